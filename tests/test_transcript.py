"""Several texts on one standard output: one after the other, each as it grows, or as records."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from data.tokenizer import make_tokenizer
from inference.generation import Delta, Generation
from inference.params import SamplingParams
from inference.transcript import Transcript

BYTE = make_tokenizer("byte")


def said(*texts: Sequence[int], n_samples: int = 1, **sampling) -> Generation:
    """A generation of these tokens, a row for each."""
    columns = (torch.tensor(column) for column in zip(*texts, strict=True))
    nothing = lambda *_, **__: None
    return Generation(
        SimpleNamespace(tokenizer=BYTE, lock=nullcontext()),
        columns,
        SamplingParams(max_new_tokens=len(texts[0]), num_samples=n_samples, **sampling),
        SimpleNamespace(begin=nothing, count=nothing, end=nothing),
        lengths=[1] * (len(texts) // n_samples),
    )


def feed(transcript: Transcript, generation: Generation) -> None:
    for delta in generation:
        transcript.add(delta)


def test_texts_are_shown_one_after_the_other_with_their_prompts(capsys):
    feed(Transcript(["one ", "two "], n_samples=2), said(b"AA", b"BB", b"CC", b"DD", n_samples=2))
    titles = [f"--- prompt {p} of 2, sample {s} of 2 ---\n" for p in (1, 2) for s in (1, 2)]
    texts = ["one AA\n", "one BB\n", "two CC\n", "two DD\n"]
    assert capsys.readouterr().out == "".join(map("".join, zip(titles, texts, strict=True)))


def test_the_front_text_is_shown_as_it_is_made_and_the_next_one_when_it_ends(capsys):
    transcript, seen = Transcript(["", ""]), [""]
    for delta in said(b"ab.~", b"wxyz", stop=(".",)):
        transcript.add(delta)
        seen.append(capsys.readouterr().out)
    assert [x for x in seen if x] == ["--- prompt 1 of 2 ---\na", "b", "\n--- prompt 2 of 2 ---\nwx", "y", "z", "\n"]


def test_a_row_that_has_ended_takes_no_more_tokens(capsys):
    feed(Transcript(["", ""], records=True), said(b"a.bc", b"wxyz", stop=(".",)))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["text"], first["tokens"], first["finish"], first["stop"]) == ("a", [*b"a."], "stop", ".")
    assert (second["text"], second["tokens"], second["finish"]) == ("wxyz", [*b"wxyz"], "length")
    assert "stop" not in second


def test_a_record_is_written_when_its_text_ends(capsys):
    transcript = Transcript(["p", "q"], records=True)
    transcript.add(Delta(row=0, text="a", token=97, logprob=-0.5))
    transcript.add(Delta(row=1, token=BYTE.eot, logprob=-1.5, finish="end"))
    record = json.loads(capsys.readouterr().out)
    expected = {"prompt": "q", "prompt_index": 1, "sample": 0, "text": "", "finish": "end"}
    assert record == expected | {"tokens": [BYTE.eot], "logprobs": [-1.5]}


def test_an_endless_text_is_not_kept():
    transcript = Transcript([""])
    transcript.add(Delta(row=0, text="a", token=97))
    row = transcript.rows[0]
    assert (row.tokens, row.text, row.waiting, row.logprobs) == ([], "", "", [])
