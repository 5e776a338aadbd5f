"""Tokenize a text into token files: done once, resumable, and never half-written under the final name.

All work happens in a `.partial` folder, which is renamed at the end. A batch of tokens is appended and synced before
state.json records it, so a restart truncates the file to the recorded length and continues from there. Every document
is followed by the end-of-text token.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.atomic import write_atomically
from data.catalog import open_text
from data.prepared import META, SPLITS, TOKENIZER, Meta, Prepared, SplitMeta, meta_json, open_prepared
from data.text import Piece, Text
from data.tokenizer import Tokenizer, check_name, make_tokenizer, saved_file
from model.errors import UserError

__all__ = ["Meta", "Prepared", "SplitMeta", "open_prepared", "prepare"]

BATCH_BYTES = 8 << 20  # bytes of text tokenized between two saves of state.json
VAL_FRACTION = 0.1
_VERSION = "1"  # raise it when a change here would give other tokens for the same text
_STATE = "state.json"


def prepare(text: str, tokenizer: str, *, root: Path = Path("data/prepared"), progress: bool = True) -> Prepared:
    """Open a prepared text, preparing it first if necessary; `text` may also be the path of a prepared folder."""
    if (Path(text) / META).is_file():
        return _open_folder(Path(text), tokenizer)
    check_name(tokenizer)
    source = open_text(text)
    directory = root / folder_name(source, tokenizer)
    if not directory.exists():
        with _full_disk_explained(directory):
            root.mkdir(parents=True, exist_ok=True)
            with _only_one(directory, progress):
                if not directory.exists():
                    _make(source, tokenizer, directory, progress)
        if progress:
            tqdm.write(open_prepared(directory).summary())
    return open_prepared(directory)


def folder_name(source: Text, tokenizer: str) -> str:
    """The folder's name: text, tokenizer, and a hash of everything that the tokens depend on."""
    saved = _saved(tokenizer)
    identity, name = (saved.digest, saved.name) if saved else (tokenizer, tokenizer)
    key = hashlib.sha256("\n".join([_VERSION, source.name, source.identity, identity]).encode()).hexdigest()[:8]
    readable = [re.sub(r"[^\w.-]+", "-", part)[:60] for part in (source.name, name)]
    return "-".join([*readable, key])


def _saved(tokenizer: str) -> Tokenizer | None:
    """The saved tokenizer, if `tokenizer` is a path; otherwise None."""
    file = saved_file(tokenizer)
    return None if file is None else Tokenizer.load(file)


def _open_folder(folder: Path, tokenizer: str) -> Prepared:
    prepared, saved = open_prepared(folder), _saved(tokenizer)
    same = saved.digest == prepared.tokenizer.digest if saved else False
    if not same and tokenizer not in (prepared.meta.tokenizer, prepared.tokenizer.name):
        raise UserError(
            f"{folder}: prepared with tokenizer {prepared.meta.tokenizer}, not {tokenizer}; "
            f"set data.tokenizer to {prepared.meta.tokenizer}"
        )
    return prepared


@dataclass(slots=True)
class _Done:
    """Progress of a split."""

    pieces: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    n_documents: int = 0


@dataclass(slots=True)
class _State:
    """Progress of the preparation, saved so that it can be resumed."""

    total_bytes: int | None = None  # size of the text; measured only if its last tenth is the validation split
    splits: dict[str, _Done] = field(default_factory=lambda: {name: _Done() for name in SPLITS})

    def save(self, folder: Path) -> None:
        write_atomically(folder / _STATE, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, folder: Path) -> "_State":
        saved = json.loads((folder / _STATE).read_bytes())
        return cls(saved["total_bytes"], {name: _Done(**saved["splits"][name]) for name in SPLITS})


def _make(source: Text, tokenizer_name: str, directory: Path, progress: bool) -> None:
    partial = directory.with_name(f"{directory.name}.partial")
    partial.mkdir(exist_ok=True)
    state = _State.load(partial) if (partial / _STATE).exists() else _State()
    try:
        _fill(partial, state, source, tokenizer_name, progress)
    except UserError:
        if not state.splits["train"].pieces:
            shutil.rmtree(partial)
        raise
    os.rename(partial, directory)


def _fill(partial: Path, state: _State, source: Text, tokenizer_name: str, progress: bool) -> None:
    """Write all files of a prepared text, resuming from the saved state."""
    splits = _splits(source, state, partial, progress)
    if (partial / TOKENIZER).exists():
        tokenizer = Tokenizer.load(partial / TOKENIZER)
    else:
        learn_from = SPLITS if tokenizer_name == "char" else ("train",)  # char must cover both splits
        tokenizer = make_tokenizer(tokenizer_name, lambda: _read_all(source, splits, learn_from, progress))
        tokenizer.save(partial / TOKENIZER)
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    for name in SPLITS:
        with _bar(f"tokenizing {name}", _size(source, state, name), progress) as bar:
            _tokenize(splits[name](), partial / f"{name}.bin", tokenizer, dtype, state, state.splits[name], bar)
    meta = Meta(
        text=source.name,
        origin=source.origin,
        tokenizer=tokenizer.name if saved_file(tokenizer_name) else tokenizer_name,
        tokenizer_digest=tokenizer.digest,
        n_vocab=tokenizer.n_vocab,
        dtype=dtype.str,
        train=_split_meta(partial / "train.bin", state.splits["train"]),
        val=_split_meta(partial / "val.bin", state.splits["val"]),
    )
    write_atomically(partial / META, meta_json(meta))
    (partial / _STATE).unlink()


def _tokenize(
    pieces: Iterator[Piece], path: Path, tokenizer: Tokenizer, dtype: np.dtype, state: _State, done: _Done, bar: tqdm
) -> None:
    """Append the remaining pieces to the token file, saving progress after each batch."""
    bar.update(done.n_bytes)
    with open(path, "ab") as file:
        file.truncate(done.n_tokens * dtype.itemsize)
        for batch in _batches(itertools.islice(pieces, done.pieces, None)):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                if piece.ends_document:
                    ids.append(tokenizer.eot)
                file.write(np.array(ids, dtype=dtype).tobytes())
                done.pieces += 1
                done.n_tokens += len(ids)
                done.n_bytes += len(piece.text.encode())
                done.n_documents += piece.ends_document
                bar.update(len(piece.text.encode()))
            file.flush()
            os.fsync(file.fileno())
            state.save(path.parent)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into batches of about BATCH_BYTES."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


Splits = dict[str, Callable[[], Iterator[Piece]]]


def _splits(source: Text, state: _State, partial: Path, progress: bool) -> Splits:
    """The source's own splits; without a validation split, hold out the last tenth, which takes a pass to measure."""
    train = source.splits["train"]
    if source.own_val:
        return dict(source.splits)
    if state.total_bytes is None:
        with _bar("measuring", source.approx_bytes.get("train"), progress) as bar:
            total = 0
            for piece in train():
                total += len(piece.text.encode())
                bar.update(len(piece.text.encode()))
        if int(total * VAL_FRACTION) == 0:
            size = f"has {total} bytes, too few to hold out a tenth for validation" if total else "is empty"
            raise UserError(f"{source.name}: the text {size} ({source.origin}); use a longer text")
        state.total_bytes = total
        state.save(partial)
    cut = state.total_bytes - int(state.total_bytes * VAL_FRACTION)
    return {"train": lambda: until(train(), cut), "val": lambda: beyond(train(), cut)}


def until(pieces: Iterator[Piece], cut: int) -> Iterator[Piece]:
    """Yield the first `cut` bytes, rounded up to a whole character; the cut ends a document."""
    left = cut
    for piece in pieces:
        content = piece.text.encode()
        if len(content) >= left:
            yield Piece(content[: _character_end(content, left)].decode())
            return
        yield piece
        left -= len(content)


def beyond(pieces: Iterator[Piece], cut: int) -> Iterator[Piece]:
    """Yield everything after the part that `until` yields."""
    left = cut
    for piece in pieces:
        content = piece.text.encode()
        if left <= 0:
            yield piece
        elif rest := content[_character_end(content, left) :]:
            yield Piece(rest.decode(), piece.ends_document)
        left -= len(content)


def _character_end(content: bytes, at: int) -> int:
    """Move a cut forward to the end of the UTF-8 character that it splits."""
    while at < len(content) and content[at] & 0xC0 == 0x80:
        at += 1
    return at


def _read_all(source: Text, splits: Splits, names: Iterable[str], progress: bool) -> Iterator[str]:
    total = sum(source.approx_bytes.get(name, 0) for name in names)
    with _bar("training the tokenizer", total or None, progress) as bar:
        for piece in itertools.chain.from_iterable(splits[name]() for name in names):
            bar.update(len(piece.text.encode()))
            yield piece.text


def _size(source: Text, state: _State, name: str) -> int | None:
    if state.total_bytes is None:
        return source.approx_bytes.get(name)
    val = int(state.total_bytes * VAL_FRACTION)
    return val if name == "val" else state.total_bytes - val


def _bar(label: str, total: int | None, progress: bool) -> tqdm:
    disable = None if progress else True  # None: show it only on a terminal
    return tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=disable, leave=False)


def _split_meta(path: Path, done: _Done) -> SplitMeta:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return SplitMeta(n_tokens=done.n_tokens, n_bytes=done.n_bytes, n_documents=done.n_documents, sha256=sha256)


@contextmanager
def _only_one(directory: Path, progress: bool) -> Iterator[None]:
    """Hold the lock of a folder, waiting while another process holds it; it is released even if killed."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{directory}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            tqdm.write(f"{directory}: waiting for another process that is preparing this text")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _full_disk_explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{directory}: the disk is full; free some space and run the same command again, it resumes"
        ) from None
