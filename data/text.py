"""What a text is to Sash: an iterator of pieces for each split, and the words that describe it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Piece(NamedTuple):
    """A stretch of text that fits in memory; a long document comes in several."""

    text: str
    ends_document: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A text to train on; calling a split again starts it again, with the same pieces."""

    name: str  # what people call it; part of folder names
    origin: str  # one line: where it comes from, and its licence
    identity: str  # all that its bytes depend on
    splits: Mapping[str, Callable[[], Iterator[Piece]]]  # "train" and, where the source has one, "val"
    approx_bytes: Mapping[str, int] = field(default_factory=dict)  # per split, for progress bars only

    @property
    def own_val(self) -> bool:
        """Say whether the source brings its own validation split."""
        return "val" in self.splits


def encodable(text: str) -> str:
    """Replace lone surrogates, which JSON escapes can write and UTF-8 cannot, by the replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
