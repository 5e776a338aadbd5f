"""Text as it is made: whole characters, nothing from a stop string on, however the tokens cut it."""

import json

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

from inference.detokenizer import Speller
from data.tokenizer import Tokenizer, make_tokenizer
from inference.transcript import Transcript

BYTE = make_tokenizer("byte")
LETTERS = "ab猫\n"


def pieces_tokenizer(pieces: list[str]) -> Tokenizer:
    """Token i is the text pieces[i]: a text may be cut in any way."""
    ranks = {piece.encode(): i for i, piece in enumerate(dict.fromkeys(pieces))}
    special = {"<|endoftext|>": len(ranks)}
    return Tokenizer(tiktoken.Encoding("pieces", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special))


def spelled(tokenizer: Tokenizer, tokens: list[int], *, stop: list[str], why="length") -> tuple[list[str], Speller]:
    speller, shown = Speller(tokenizer, stop=stop), []
    for token in tokens:
        shown.append(speller.add(token))
        if speller.ended:
            return shown, speller
    shown.append(speller.finish(why))
    return shown, speller


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
    shown, speller = spelled(tokenizer, tokens, stop=stop)
    assert ("".join(shown), speller.stop_string) == before_stop("".join(pieces), stop)
    assert speller.ended == ("length" if speller.stop_string is None else "stop")


@given(text=st.text(LETTERS, max_size=20), stop=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3))
def test_what_can_become_a_stop_string_is_held_back_and_nothing_else(text, stop):
    tokenizer = pieces_tokenizer(list(LETTERS))
    speller, shown = Speller(tokenizer, stop=stop), ""
    for n, character in enumerate(text, 1):
        shown += speller.add(tokenizer._ranks[character.encode()])
        if speller.ended:
            return
        held = text[len(shown) : n]
        assert shown + held == text[:n]
        assert not held or any(s.startswith(held) for s in stop)
        longer = [text[i:n] for i in range(len(shown))]
        assert not any(s.startswith(more) for s in stop for more in longer if len(more) < len(s))


def test_a_stop_string_that_never_comes_changes_nothing():
    shown, speller = spelled(BYTE, [*b"never, never, nev"], stop=["never more"])
    assert "".join(shown) == "never, never, nev"
    assert speller.ended == "length"


@pytest.mark.parametrize("why", ["length", "interrupted"])
def test_half_a_character_at_the_end_becomes_a_replacement(why):
    shown, speller = spelled(BYTE, [*"a😀".encode()[:-1]], stop=[], why=why)
    assert shown == ["a", "", "", "", "\ufffd"]
    assert speller.ended == why


def test_the_models_own_end_shows_what_was_held_back():
    shown, speller = spelled(BYTE, [*b"ab", BYTE.eot, *b"c"], stop=["abc"])
    assert (shown, speller.ended, speller.stop_string) == (["", "", "ab"], "end", None)


def test_an_end_that_is_held_back_may_still_be_a_stop_string():
    shown, speller = spelled(BYTE, [*b"a", 0xF0], stop=["a\ufffd"])
    assert ("".join(shown), speller.ended) == ("", "stop")


# Several texts.


def feed(transcript: Transcript, *texts: bytes) -> None:
    for column in zip(*texts, strict=True):
        if transcript.live:
            transcript.add(list(column))
    transcript.finish("length")


def test_texts_are_shown_one_after_the_other_with_their_prompts(capsys):
    feed(Transcript(BYTE, ["one ", "two "], n_samples=2), b"AA", b"BB", b"CC", b"DD")
    titles = [f"--- prompt {p} of 2, sample {s} of 2 ---\n" for p in (1, 2) for s in (1, 2)]
    texts = ["one AA\n", "one BB\n", "two CC\n", "two DD\n"]
    assert capsys.readouterr().out == "".join(map("".join, zip(titles, texts, strict=True)))


def test_the_front_text_is_shown_as_it_is_made_and_the_next_one_when_it_ends(capsys):
    transcript = Transcript(BYTE, ["", ""], stop=["."])
    seen = []
    for column in zip(b"ab.~", b"wxyz", strict=True):
        transcript.add(list(column))
        seen.append(capsys.readouterr().out)
    assert seen == ["--- prompt 1 of 2 ---\na", "b", "\n--- prompt 2 of 2 ---\nwxy", "z"]


def test_a_row_that_has_ended_takes_no_more_tokens(capsys):
    transcript = Transcript(BYTE, ["", ""], stop=["."], records=True)
    feed(transcript, b"a.bc", b"wxyz")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["text"], first["tokens"], first["finish"], first["stop"]) == ("a", [*b"a."], "stop", ".")
    assert (second["text"], second["tokens"], second["finish"]) == ("wxyz", [*b"wxyz"], "length")
    assert "stop" not in second


def test_a_record_is_written_when_its_text_ends(capsys):
    transcript = Transcript(BYTE, ["p", "q"], records=True)
    transcript.add([97, BYTE.eot], [-0.5, -1.5])
    record = json.loads(capsys.readouterr().out)
    expected = {"prompt": "q", "prompt_index": 1, "sample": 0, "text": "", "finish": "end"}
    assert record == expected | {"tokens": [BYTE.eot], "logprobs": [-1.5]}
    assert transcript.live == [0]


def test_an_endless_text_is_not_kept():
    transcript = Transcript(BYTE, [""])
    transcript.add([97])
    row = transcript.rows[0]
    assert (row.tokens, row.text, row.waiting, row.logprobs) == ([], "", "", [])
