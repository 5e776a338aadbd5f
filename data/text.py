"""The type of a text: an iterator of pieces for each split, and a description."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Piece(NamedTuple):
    """Part of a document, small enough for memory; a long document is split into several pieces."""

    text: str
    ends_document: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A text to train on; each call of a split yields the same pieces from the start."""

    name: str  # used in messages and folder names
    origin: str  # one line: source and licence
    identity: str  # everything that its bytes depend on, hashed to find a prepared copy
    splits: Mapping[str, Callable[[], Iterator[Piece]]]  # "train" and, where the source has one, "val"
    approx_bytes: Mapping[str, int] = field(default_factory=dict)  # per split, for progress bars only

    @property
    def own_val(self) -> bool:
        """Whether the source has its own validation split."""
        return "val" in self.splits


def encodable(text: str) -> str:
    """Replace lone surrogates, which JSON escapes can contain but UTF-8 cannot, with U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
