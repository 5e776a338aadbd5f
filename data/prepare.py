"""Turn a text into token files: once, resumable, and never half-written under the final name.

All work happens in a `.partial` folder. A batch of tokens is appended and synced before state.json says so, thus a
restart cuts the file back to what state.json says and goes on from there; the folder gets its final name at the end.
Every document is followed by the end-of-text token.
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

BATCH_BYTES = 8 << 20  # text tokenized between two records of progress
VAL_FRACTION = 0.1
_VERSION = "1"  # raise it when the same text would give other tokens
_STATE = "state.json"


def prepare(text: str, tokenizer: str, *, root: Path = Path("data/prepared"), progress: bool = True) -> Prepared:
    """Open the prepared form of a text, making it if it is missing; text may also be a prepared folder."""
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
    """Name the folder after text and tokenizer, with a hash of all that the tokens depend on."""
    saved = _saved(tokenizer)
    identity, name = (saved.digest, saved.name) if saved else (tokenizer, tokenizer)
    key = hashlib.sha256("\n".join([_VERSION, source.name, source.identity, identity]).encode()).hexdigest()[:8]
    readable = [re.sub(r"[^\w.-]+", "-", part)[:60] for part in (source.name, name)]
    return "-".join([*readable, key])


def _saved(tokenizer: str) -> Tokenizer | None:
    """The tokenizer that is given by its path."""
    file = saved_file(tokenizer)
    return None if file is None else Tokenizer.load(file)


def _open_folder(folder: Path, tokenizer: str) -> Prepared:
    prepared, saved = open_prepared(folder), _saved(tokenizer)
    same = saved.digest == prepared.tokenizer.digest if saved else False
    if not same and tokenizer not in (prepared.meta.tokenizer, prepared.tokenizer.name):
        raise UserError(
            f"{folder}: prepared with tokenizer {prepared.meta.tokenizer}, not {tokenizer}; ask for that one"
        )
    return prepared


@dataclass(slots=True)
class _Done:
    """How far a split has come."""

    pieces: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    n_documents: int = 0


@dataclass(slots=True)
class _State:
    """What a restart needs to know."""

    total_bytes: int | None = None  # of the text, counted where the last tenth is the validation split
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
    """Write all files of a prepared text, going on from where the state says."""
    splits = _splits(source, state, partial, progress)
    if (partial / TOKENIZER).exists():
        tokenizer = Tokenizer.load(partial / TOKENIZER)
    else:
        learn_from = SPLITS if tokenizer_name == "char" else ("train",)  # char must be able to write all of it
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
    """Append the pieces that are not done yet to the token file, recording progress after each batch."""
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
    """Gather pieces into batches of about BATCH_BYTES."""
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
    """Give the source's own splits, or its last tenth for validation, which takes one pass to measure."""
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
            size = f"has {total} bytes, too few to keep a tenth for validation" if total else "is empty"
            raise UserError(f"{source.name}: the text {size} ({source.origin}); give a longer one")
        state.total_bytes = total
        state.save(partial)
    cut = state.total_bytes - int(state.total_bytes * VAL_FRACTION)
    return {"train": lambda: until(train(), cut), "val": lambda: beyond(train(), cut)}


def until(pieces: Iterator[Piece], cut: int) -> Iterator[Piece]:
    """Yield the first `cut` bytes, up to the next whole character; the cut ends a document."""
    left = cut
    for piece in pieces:
        content = piece.text.encode()
        if len(content) >= left:
            yield Piece(content[: _character_end(content, left)].decode())
            return
        yield piece
        left -= len(content)


def beyond(pieces: Iterator[Piece], cut: int) -> Iterator[Piece]:
    """Yield what `until` leaves."""
    left = cut
    for piece in pieces:
        content = piece.text.encode()
        if left <= 0:
            yield piece
        elif rest := content[_character_end(content, left) :]:
            yield Piece(rest.decode(), piece.ends_document)
        left -= len(content)


def _character_end(content: bytes, at: int) -> int:
    """Move a cut forward over the bytes that continue a UTF-8 character."""
    while at < len(content) and content[at] & 0xC0 == 0x80:
        at += 1
    return at


def _read_all(source: Text, splits: Splits, names: Iterable[str], progress: bool) -> Iterator[str]:
    total = sum(source.approx_bytes.get(name, 0) for name in names)
    with _bar("learning the vocabulary", total or None, progress) as bar:
        for piece in itertools.chain.from_iterable(splits[name]() for name in names):
            bar.update(len(piece.text.encode()))
            yield piece.text


def _size(source: Text, state: _State, name: str) -> int | None:
    if state.total_bytes is None:
        return source.approx_bytes.get(name)
    val = int(state.total_bytes * VAL_FRACTION)
    return val if name == "val" else state.total_bytes - val


def _bar(what: str, total: int | None, progress: bool) -> tqdm:
    disable = None if progress else True  # None: where there is a terminal
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=disable, leave=False)


def _split_meta(path: Path, done: _Done) -> SplitMeta:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return SplitMeta(n_tokens=done.n_tokens, n_bytes=done.n_bytes, n_documents=done.n_documents, sha256=sha256)


@contextmanager
def _only_one(directory: Path, progress: bool) -> Iterator[None]:
    """Hold the lock for a folder, waiting while another process holds it; it is freed even by a kill."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{directory}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            tqdm.write(f"{directory}: another process is preparing it; waiting")
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
            f"{directory}: the disk is full; make room and run the same command, it goes on where it stopped"
        ) from None
