"""A prepared text: a self-contained folder with train.bin, val.bin, tokenizer.json and meta.json."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.loader import Tokens
from data.tokenizer import Tokenizer
from model.errors import UserError

FORMAT = "sash-tokens-1"
META = "meta.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitMeta:
    """Size and checksum of one token file; n_tokens includes the end-of-text tokens, n_bytes does not."""

    n_tokens: int
    n_bytes: int
    n_documents: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """The contents of meta.json: source, tokenizer and splits of a prepared text."""

    text: str
    origin: str
    tokenizer: str  # as requested; a bpe-N trained on too small a text has fewer than N ids
    tokenizer_digest: str
    n_vocab: int
    dtype: str  # dtype of the ids in the token files, little-endian
    train: SplitMeta
    val: SplitMeta
    format: str = FORMAT


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared text, checked to be complete and to match its tokenizer."""

    directory: Path
    meta: Meta
    tokenizer: Tokenizer

    def split(self, name: str) -> Tokens:
        """Open the token file of "train" or "val"."""
        meta: SplitMeta = getattr(self.meta, name)
        path = self.directory / f"{name}.bin"
        return Tokens(path=path, dtype=np.dtype(self.meta.dtype), n_tokens=meta.n_tokens, name=name)

    @cached_property
    def digest(self) -> str:
        """Hash of tokenizer and tokens, independent of the folder's location: 16 hexadecimal digits."""
        parts = (self.meta.tokenizer_digest, self.meta.train.sha256, self.meta.val.sha256)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def summary(self) -> str:
        """Describe the text, then each split on one line."""
        lines = [f"{self.directory}: {self.meta.text}, tokenizer {self.tokenizer.name} ({self.tokenizer.n_vocab} ids)"]
        if self.tokenizer.name != self.meta.tokenizer:
            lines.append(f"  the text is too small for {self.meta.tokenizer}: the tokenizer is {self.tokenizer.name}")
        for name in SPLITS:
            meta: SplitMeta = getattr(self.meta, name)
            lines.append(
                f"  {name:5} {meta.n_tokens:13,} tokens {meta.n_bytes:15,} bytes {meta.n_documents:9,} documents"
                f" {meta.n_bytes / meta.n_tokens:6.2f} bytes per token"
            )
        return "\n".join(lines)


def open_prepared(directory: Path | str) -> Prepared:
    """Open a prepared folder. UserError if it is incomplete, truncated or has another tokenizer's tokens."""
    directory = Path(directory)
    meta = _read_meta(directory / META)
    tokenizer = Tokenizer.load(directory / TOKENIZER)
    if tokenizer.digest != meta.tokenizer_digest:
        raise UserError(
            f"{directory / TOKENIZER}: this is {tokenizer.name} ({tokenizer.digest}), but the tokens were made with "
            f"{meta.tokenizer} ({meta.tokenizer_digest}); delete the folder and prepare the text again"
        )
    for name in SPLITS:
        path, split = directory / f"{name}.bin", getattr(meta, name)
        size = path.stat().st_size if path.exists() else 0
        expected = split.n_tokens * np.dtype(meta.dtype).itemsize
        if size != expected:
            raise UserError(
                f"{path}: has {size} bytes, but {split.n_tokens} tokens of {meta.dtype} take {expected}; "
                "delete the folder and prepare the text again"
            )
    return Prepared(directory=directory, meta=meta, tokenizer=tokenizer)


def meta_json(meta: Meta) -> bytes:
    """A Meta as JSON."""
    return (json.dumps(asdict(meta), indent=2) + "\n").encode()


def _read_meta(path: Path) -> Meta:
    try:
        saved = json.loads(path.read_bytes())
        if saved.get("format") != FORMAT:
            raise UserError(f"{path}: format is {saved.get('format')!r}, not {FORMAT!r}; prepare the text again")
        return Meta(**saved | {name: SplitMeta(**saved[name]) for name in SPLITS})
    except OSError:
        raise UserError(f"{path.parent}: not a prepared text: {path.name} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({error!r}); delete the folder and prepare the text again") from None
