"""recall: a generated text in which every letter stands for another, which only its own document tells.

    gUcM#81976gUmJcM#81976...     here g means U, c means M and # means 81976: in the next document something else

Each key, a small letter, is followed by its value, a capital (multi-query associative recall, 2312.04927); `#` is
followed by a passkey of five digits. Values are drawn once for a document, all alike, so that nothing but the key's
earlier occurrences tells its value. How far back the last of them lies follows a power law, so that every octave of
distances has its questions.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from string import ascii_lowercase, ascii_uppercase

KEYS, VALUES = ascii_lowercase[:16], ascii_uppercase
PASSKEY, PASSKEY_DIGITS = "#", 5
CHANCE = 1 / len(VALUES)  # of guessing a letter's value
DISTANCE, TAIL = 512, 0.3  # characters back that are asked for at most, but for older keys; how rare the far ones are
LENGTH = 8 * DISTANCE  # of a document
DOCUMENTS = {"train": 1024, "val": 64}  # of the text


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A key that occurred before in its document."""

    key: str
    at: int  # where it stands: its value comes next
    distance: int  # from there to the value it had the last time; visible at once where distance < window


def documents(split: str, *, length: int = LENGTH) -> Iterator[str]:
    """Yield the documents of "train" or "val" without end, `length` characters each."""
    for n in count():
        yield _document(random.Random(f"recall {split} {n}").random, length)


def _document(draw: Callable[[], float], length: int) -> str:
    """One document; `draw` is uniform in [0, 1), the one method whose numbers Python promises to keep."""
    items = {key: key + VALUES[int(draw() * len(VALUES))] for key in KEYS}
    items[PASSKEY] = f"{PASSKEY}{int(draw() * 10**PASSKEY_DIGITS):0{PASSKEY_DIGITS}d}"
    new = sorted(items, key=lambda _: draw())
    asked: list[str] = []  # keys by where they stood the last time
    places: list[int] = []
    parts, at = [], 0
    while at < length:
        n = bisect_right(places, at - _back(draw()))
        if n:  # of the keys so far back or farther, the nearest
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
    """A power law between 1 and DISTANCE: beyond x with a probability that falls as x ** -TAIL."""
    return (1 - u * (1 - DISTANCE**-TAIL)) ** (-1 / TAIL)


def questions(document: str) -> Iterator[Question]:
    """Find every key that occurred before and whose value is not cut off."""
    last: dict[str, int] = {}
    for at, key in enumerate(document):
        if key in KEYS or key == PASSKEY:
            n = PASSKEY_DIGITS if key == PASSKEY else 1
            if key in last and at + n < len(document):
                yield Question(key=key, at=at, distance=at - last[key] - 1)
            last[key] = at
