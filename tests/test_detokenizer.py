"""Text as it is made: whole characters, nothing from a stop string on, however the tokens cut it."""

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

from data.tokenizer import Tokenizer, make_tokenizer
from inference.detokenizer import StreamingDetokenizer

BYTE = make_tokenizer("byte")
LETTERS = "ab猫\n"


def pieces_tokenizer(pieces: list[str]) -> Tokenizer:
    """Token i is the text pieces[i]: a text may be cut in any way."""
    ranks = {piece.encode(): i for i, piece in enumerate(dict.fromkeys(pieces))}
    special = {"<|endoftext|>": len(ranks)}
    return Tokenizer(tiktoken.Encoding("pieces", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special))


def spelled(
    tokenizer: Tokenizer, tokens: list[int], *, stop: list[str], why="length"
) -> tuple[list[str], StreamingDetokenizer]:
    detokenizer, shown = StreamingDetokenizer(tokenizer, stop=stop), []
    for token in tokens:
        shown.append(detokenizer.add(token))
        if detokenizer.finish:
            return shown, detokenizer
    shown.append(detokenizer.end(why))
    return shown, detokenizer


def before_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Character by character: where the first stop string is complete."""
    for n in range(1, len(text) + 1):
        found = [s for s in stop if text[:n].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: n - len(longest)], longest
    return text, None


@given(
    pieces=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=9),
    stop=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
)
@example(pieces=["a", "ab"], stop=["aab"])
@example(pieces=["ab", "aba", "b猫"], stop=["abab猫"])
@example(pieces=["abc" * 2], stop=["bca", "c"])
def test_what_is_shown_ends_before_the_stop_string_that_is_complete_first(pieces, stop):
    tokenizer = pieces_tokenizer(pieces or ["a"])
    tokens = [tokenizer._ranks[piece.encode()] for piece in pieces]
    shown, detokenizer = spelled(tokenizer, tokens, stop=stop)
    assert ("".join(shown), detokenizer.stop_string) == before_stop("".join(pieces), stop)
    assert detokenizer.finish == ("length" if detokenizer.stop_string is None else "stop")


@given(text=st.text(LETTERS, max_size=20), stop=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3))
def test_what_can_become_a_stop_string_is_held_back_and_nothing_else(text, stop):
    tokenizer = pieces_tokenizer(list(LETTERS))
    detokenizer, shown = StreamingDetokenizer(tokenizer, stop=stop), ""
    for n, character in enumerate(text, 1):
        shown += detokenizer.add(tokenizer._ranks[character.encode()])
        if detokenizer.finish:
            return
        held = text[len(shown) : n]
        assert shown + held == text[:n]
        assert not held or any(s.startswith(held) for s in stop)
        longer = [text[i:n] for i in range(len(shown))]
        assert not any(s.startswith(more) for s in stop for more in longer if len(more) < len(s))


def test_a_stop_string_that_never_comes_changes_nothing():
    shown, detokenizer = spelled(BYTE, [*b"never, never, nev"], stop=["never more"])
    assert "".join(shown) == "never, never, nev"
    assert detokenizer.finish == "length"


@pytest.mark.parametrize("why", ["length", "interrupted"])
def test_half_a_character_at_the_end_becomes_a_replacement(why):
    shown, detokenizer = spelled(BYTE, [*"a😀".encode()[:-1]], stop=[], why=why)
    assert shown == ["a", "", "", "", "\ufffd"]
    assert detokenizer.finish == why


def test_the_models_own_end_shows_what_was_held_back():
    shown, detokenizer = spelled(BYTE, [*b"ab", BYTE.eot, *b"c"], stop=["abc"])
    assert (shown, detokenizer.finish, detokenizer.stop_string) == (["", "", "ab"], "end", None)


def test_an_end_that_is_held_back_may_still_be_a_stop_string():
    shown, detokenizer = spelled(BYTE, [*b"a", 0xF0], stop=["a\ufffd"])
    assert ("".join(shown), detokenizer.finish) == ("", "stop")
