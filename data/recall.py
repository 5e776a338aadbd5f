"""recall: a synthetic text of key-value pairs, different in every document, that tests recall by distance.

    gUcM#81976gUmJcM#81976...     here g maps to U, c to M and # to 81976; the next document has other values

Each key, a lower-case letter, is followed by its value, an upper-case letter (multi-query associative recall,
2312.04927); `#` is followed by a passkey of five digits. Values are drawn uniformly, once per document, so a value can
only be predicted from an earlier occurrence of its key. The distance back to the last occurrence follows a power law,
so that every octave of distances has questions.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from string import ascii_lowercase, ascii_uppercase

KEYS, VALUES = ascii_lowercase[:16], ascii_uppercase
PASSKEY, PASSKEY_DIGITS = "#", 5
CHANCE = 1 / len(VALUES)  # accuracy of guessing a letter's value
DISTANCE, TAIL = 512, 0.3  # of the power law of distances: its largest, in characters, and its exponent
LENGTH = 8 * DISTANCE  # characters of a document
DOCUMENTS = {"train": 1024, "val": 64}  # documents of each split


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A key that occurred earlier in its document."""

    key: str
    at: int  # index of the key in the document; its value comes next
    distance: int  # from the key back to its previous value; within one window if distance < window


def documents(split: str, *, length: int = LENGTH) -> Iterator[str]:
    """Yield an endless stream of documents of "train" or "val", `length` characters each."""
    for n in count():
        yield _document(random.Random(f"recall {split} {n}").random, length)


def _document(draw: Callable[[], float], length: int) -> str:
    """Generate a document; `draw` is random.random, the one method whose sequence Python guarantees across versions."""
    items = {key: key + VALUES[int(draw() * len(VALUES))] for key in KEYS}
    items[PASSKEY] = f"{PASSKEY}{int(draw() * 10**PASSKEY_DIGITS):0{PASSKEY_DIGITS}d}"
    new = sorted(items, key=lambda _: draw())
    asked: list[str] = []  # keys in order of their last occurrence
    places: list[int] = []
    parts, at = [], 0
    while at < length:
        n = bisect_right(places, at - _back(draw()))
        if n:  # the nearest key that is at least as far back as drawn
            key = asked.pop(n - 1)
            del places[n - 1]
        elif new:
            key = new.pop()
        else:
            continue
        asked.append(key)
        places.append(at)
        parts.append(items[key])
        at += len(items[key])
    return "".join(parts)[:length]


def _back(u: float) -> float:
    """Map a uniform u to a power law on [1, DISTANCE]: the probability of exceeding x falls as x ** -TAIL."""
    return (1 - u * (1 - DISTANCE**-TAIL)) ** (-1 / TAIL)


def questions(document: str) -> Iterator[Question]:
    """Yield every key that occurred earlier and whose value is not cut off by the end."""
    last: dict[str, int] = {}
    for at, key in enumerate(document):
        if key in KEYS or key == PASSKEY:
            n = PASSKEY_DIGITS if key == PASSKEY else 1
            if key in last and at + n < len(document):
                yield Question(key=key, at=at, distance=at - last[key] - 1)
            last[key] = at
