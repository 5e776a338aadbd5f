"""A text that a user and a model write by turns, of which every token is read once."""

import io
import os
import signal
import sys
from itertools import islice

import pytest
import torch
from conftest import CPU, run_program, save_run
from networks import make_sampler

import generate
from artifacts.run_dir import RunDir
from data.tokenizer import make_tokenizer
from inference.generation import Generation
from inference.sampling import stream
from model.gpt import GPT

TEN = ("--max-new-tokens", 10, "--no-stop-at-end")


@pytest.fixture
def converse(say, monkeypatch):
    """Give a run these lines, one after the other."""

    def call(run, *lines: str, options=TEN):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return say(run, "--interactive", *options)

    return call


def test_an_empty_line_goes_on_as_if_it_had_never_stopped(say, converse):
    whole = say("sliding", "--prompt", "To be", "--max-new-tokens", 30, "--no-stop-at-end")
    ended = converse("sliding", "To be", "", "")
    assert ended.code == 0
    assert "To be" + ended.out.replace("\n", "") == whole.out.replace("\n", "")


@pytest.mark.parametrize("run", ["full", "sliding", "swa", "learned"])
@pytest.mark.parametrize("penalty", [1, 1.5])
def test_a_turn_is_what_follows_the_whole_text_so_far(converse, runs, monkeypatch, run, penalty):
    next_delta = Generation.__next__
    four = ("--max-new-tokens", 4, "--no-stop-at-end", "--repetition-penalty", penalty, "--temperature", 0)
    shown = []
    monkeypatch.setattr(Generation, "__next__", lambda self: (d := next_delta(self), shown.append(d.token))[0])
    converse(run, "To", "be", options=four)
    network, tokenizer = RunDir(runs / run).load(runs / run)
    sampler = make_sampler(temperature=0, repetition_penalty=penalty, n_vocab=257)
    text = []
    for line in ("To", "be"):
        text += tokenizer.encode(line)
        tokens = stream(network.eval(), None, torch.tensor([text]), sampler)
        text += [int(token) for token in islice(tokens, 4)]
    assert [token for token in shown if token is not None] == text[2:6] + text[8:]


def test_every_token_is_read_once(converse, monkeypatch):
    read = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, idx, *a, **k: (read.append(idx[0]), forward(self, idx, *a, **k))[1]
    )
    ended = converse("sliding", "To be", "or", "not")
    assert len(torch.cat(read)) == 5 + 2 + 3 + 3 * 10 - 1  # the last one made is never read
    assert "prefill 12 tokens" in ended.err  # the two that were made and not read among them
    assert "decode 27 tokens" in ended.err


def test_a_prompt_stands_before_the_first_line(say, converse):
    whole = say("sliding", "--prompt", "To be", *TEN).out
    assert "To be" + converse("sliding", " be", options=(*TEN, "--prompt", "To")).out == whole


def test_an_empty_first_line_begins_a_document(say, converse):
    assert converse("sliding", "").out == say("sliding", *TEN).out


def test_full_layers_that_are_full_say_so_and_name_the_option(converse):
    ended = converse("sliding", "x" * 8, "y" * 5, "", options=(*TEN, "--max-length", 20))
    assert ended.code == 0
    full = "full layers have room for 20 tokens (max_length)"
    assert ended.err.splitlines()[0] == f"{full}: 17 are used, 6 more do not fit"
    assert ended.err.splitlines()[1] == f"{full}, and they are used: begin again"
    assert "decode 11 tokens" in ended.err  # 9 of the first turn and 2 of the last, beside the first of each


def test_learned_positions_that_are_used_say_so(converse):
    ended = converse("learned", "x" * 8, "")
    assert "the learned positions end at 16 (block_size), and they are used: begin again" in ended.err


def test_sliding_layers_are_never_full(converse):
    ended = converse("swa", *["x" * 9] * 9, options=(*TEN, "--max-length", 20))
    assert "room" not in ended.err
    assert "decode 81 tokens" in ended.err


def test_a_character_that_the_tokenizer_cannot_write_costs_a_line_and_not_the_text(program, monkeypatch, tmp_path):
    save_run(tmp_path / "run", vocab_size=31)
    make_tokenizer("char", lambda: iter(["abc"])).save(tmp_path / "run" / "tokenizer.json")
    monkeypatch.setattr(sys, "stdin", io.StringIO("abd\nabc\n"))
    ended = program(generate.main, tmp_path / "run", "--interactive", "--max-new-tokens", 3, *CPU)
    assert ended.code == 0
    assert ended.err.splitlines()[0].startswith("the character 'd'")
    assert "prefill 3 tokens" in ended.err


@pytest.mark.parametrize(("number", "code", "turns"), [(signal.SIGINT, 0, 2), (signal.SIGTERM, 143, 1)])
def test_control_c_ends_the_turn_and_a_termination_the_conversation(converse, monkeypatch, number, code, turns):
    begun = []

    def interrupted(*_, **__):
        begun.append(1)
        for n in range(99):
            if n == 4 and len(begun) == 1:
                os.kill(os.getpid(), number)
            yield torch.tensor([ord("a") + n])

    monkeypatch.setattr("inference.session.stream", interrupted)
    ended = converse("full", "x", "y")
    assert ended.code == code
    assert ended.out == "".join(["abcde\n", "abcdefghij\n"][:turns])
    assert "decode" in ended.err


def test_control_c_at_the_mark_ends_with_statistics(say, monkeypatch):
    def no_line(mark: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", no_line)
    ended = say("full", "--interactive")
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "generate.py: interrupted"
    assert "peak memory" in ended.err


@pytest.mark.slow
def test_lines_that_are_not_utf8_are_refused(runs, tmp_path):
    (tmp_path / "lines").write_bytes("Grüße\n".encode("latin1"))
    with open(tmp_path / "lines") as lines:
        ended = run_program("generate.py", runs / "full", "--interactive", *CPU, stdin=lines)
    ended.assert_refused("generate.py: standard input is not UTF-8")
