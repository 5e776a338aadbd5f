"""A prepared text: a folder with train.bin, val.bin, tokenizer.json and meta.json that can be copied anywhere."""

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
    """What one token file holds; the end-of-text tokens count as tokens and not as bytes."""

    n_tokens: int
    n_bytes: int
    n_documents: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """What made a prepared text and what it must hold."""

    text: str
    origin: str
    tokenizer: str  # as asked for
    tokenizer_digest: str
    n_vocab: int
    dtype: str  # of the ids in the token files, little-endian
    train: SplitMeta
    val: SplitMeta
    format: str = FORMAT


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared text that is complete and fits its tokenizer."""

    directory: Path
    meta: Meta
    tokenizer: Tokenizer

    def split(self, name: str) -> Tokens:
        """Open the tokens of "train" or "val"."""
        meta: SplitMeta = getattr(self.meta, name)
        path = self.directory / f"{name}.bin"
        return Tokens(path=path, dtype=np.dtype(self.meta.dtype), n_tokens=meta.n_tokens, name=name)

    @cached_property
    def digest(self) -> str:
        """Identify tokenizer and tokens, wherever the folder lies, in 16 hexadecimal digits."""
        parts = (self.meta.tokenizer_digest, self.meta.train.sha256, self.meta.val.sha256)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def summary(self) -> str:
        """Describe the splits in a line each."""
        lines = [f"{self.directory}: {self.meta.text}, tokenizer {self.tokenizer.name} ({self.tokenizer.n_vocab} ids)"]
        if self.tokenizer.name != self.meta.tokenizer:
            lines.append(f"  the text is too small to learn {self.meta.tokenizer} from; it gave {self.tokenizer.name}")
        for name in SPLITS:
            meta: SplitMeta = getattr(self.meta, name)
            lines.append(
                f"  {name:5} {meta.n_tokens:13,} tokens {meta.n_bytes:15,} bytes {meta.n_documents:9,} documents"
                f" {meta.n_bytes / meta.n_tokens:6.2f} bytes per token"
            )
        return "\n".join(lines)


def open_prepared(directory: Path | str) -> Prepared:
    """Open a prepared folder; one that is incomplete, cut short or of another tokenizer is a UserError."""
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
                f"{path}: has {size} bytes where {split.n_tokens} tokens of {meta.dtype} take {expected}; "
                "delete the folder and prepare the text again"
            )
    return Prepared(directory=directory, meta=meta, tokenizer=tokenizer)


def meta_json(meta: Meta) -> bytes:
    """Write a Meta as JSON."""
    return (json.dumps(asdict(meta), indent=2) + "\n").encode()


def _read_meta(path: Path) -> Meta:
    try:
        saved = json.loads(path.read_bytes())
        if saved.get("format") != FORMAT:
            raise UserError(f"{path}: format is {saved.get('format')!r}, not {FORMAT!r}; prepare the text again")
        return Meta(**saved | {name: SplitMeta(**saved[name]) for name in SPLITS})
    except OSError:
        raise UserError(f"{path.parent}: not a prepared text, it has no {path.name}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({error!r}); delete the folder and prepare the text again") from None
