"""Patterns: "swa*5 full", "5:1" and "(kda*3 mla)*6 kda*2 mla" as the words of the layers, and back."""

import difflib
import re
from collections.abc import Iterable
from itertools import groupby

RATIO = re.compile(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*")
TOKEN = re.compile(r"\s*(?:(?P<word>\w+)|(?P<open>\()|(?P<close>\))|\*\s*(?P<times>[1-9]\d{0,3})(?!\w))")
MOST_WORDS = 10_000


def expand_pattern(pattern: str, known: Iterable[str]) -> tuple[str, ...]:
    """One period of a pattern as words: "swa*2 full" and "2:1" are both ("swa", "swa", "full").

    A word or a group in parentheses may be repeated with *n. ValueError for anything else, or a word that is not known.
    """
    known = list(known)
    if ":" in pattern:
        match = RATIO.fullmatch(pattern)
        if not match or (n_swa := int(match[1])) + (n_full := int(match[2])) < 1:
            raise ValueError(
                f'pattern ({pattern!r}): a ratio is "a:b", a swa layers to b full ones, a + b >= 1, as "5:1"'
            )
        return ("swa",) * n_swa + ("full",) * n_full
    groups: list[list[tuple[str, ...]]] = [[]]  # open groups, each a list of words and groups that are complete
    at = 0
    while pattern[at:].strip():
        match = TOKEN.match(pattern, at)
        if match is None:
            raise _unknown(pattern, at, known)
        if word := match["word"]:
            if word not in known:
                raise _unknown(pattern, match.start("word"), known)
            groups[-1].append((word,))
        elif match["open"]:
            groups.append([])
        elif match["close"]:
            if len(groups) == 1:
                raise ValueError(f"pattern ({pattern!r}): a ) without a ( before it")
            group = groups.pop()
            groups[-1].append(tuple(word for part in group for word in part))
        elif not groups[-1]:
            raise ValueError(
                f'pattern ({pattern!r}): *{match["times"]} repeats nothing; write it behind a layer, "swa*5"'
            )
        else:
            if len(groups[-1][-1]) * int(match["times"]) > MOST_WORDS:
                raise ValueError(f"pattern ({pattern!r}) has more than {MOST_WORDS} layers in one period")
            groups[-1][-1] *= int(match["times"])
        at = match.end()
    if len(groups) > 1:
        raise ValueError(f"pattern ({pattern!r}): a ( without a ) behind it")
    words = tuple(word for part in groups[0] for word in part)
    if not words:
        raise ValueError(f'pattern ({pattern!r}) is empty; layers are {", ".join(known)}, as "swa*5 full" or "5:1"')
    return words


def _unknown(pattern: str, at: int, known: list[str]) -> ValueError:
    """The error for what stands at this place, with the nearest word that is known."""
    start = pattern.rfind(" ", 0, at + 1 if pattern[at] == " " else at) + 1
    item = pattern[start:].split()[0]
    near = difflib.get_close_matches(re.split(r"\W", item.lstrip("("))[0], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ValueError(
        f'pattern ({pattern!r}): {item!r} is not a layer; layers are {", ".join(known)}, as "swa*5 full"{hint}'
    )


def describe_layers(kinds: Iterable[str]) -> str:
    """The kinds of all layers, short: "swa*5 full"."""
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    return " ".join(kind if n == 1 else f"{kind}*{n}" for kind, n in runs)
