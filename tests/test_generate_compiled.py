"""Generating with compiled layers, and with weights and a cache in 8 bits."""

import shutil

import pytest
import torch
from networks import tiny_config, tiny_model

from inference import compiled_decode as decode
from inference import sampling
from model.device import no_compiling, resolve

LONG = ("--max-new-tokens", 25, "--no-stop-at-end")


def test_compiled_layers_say_the_same_and_their_warm_up_is_said_apart(say, monkeypatch):
    plain = say("sliding", "--prompt", "To be", *LONG)
    called = []
    monkeypatch.setattr(decode, "compiled", lambda function: called.append(function) or function)
    monkeypatch.setattr(sampling, "compiled", decode.compiled)
    ended = say("sliding", "--prompt", "To be", *LONG, "--compile", "on", "--check")
    assert ended.out == plain.out
    assert (ended.code, "warm-up " in ended.err, "warm-up " in plain.err) == (0, True, False)
    assert "decode 22 tokens" in ended.err  # 25, less the first and those that warm up
    assert called


def test_a_few_tokens_are_not_worth_compiling_for_and_many_are():
    model, runtime = tiny_model(tiny_config(), dtype=torch.float32), resolve("cpu", "float32")
    worth = [decode.should_compile("auto", model, runtime, n) for n in (30, 10**6)]
    assert worth == [False, no_compiling(runtime.device) is None]


def test_compiling_without_a_compiler_is_refused(say, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    say("sliding", "--compile", "on").assert_refused("--compile (on)", "no C++ compiler here", "take off, or auto")


def test_int8_says_nearly_the_same_in_fewer_bytes(say):
    plain = say("sliding", "--prompt", "To be", *LONG, "--temperature", 0)
    eight = say("sliding", "--prompt", "To be", *LONG, "--temperature", 0, "--weights", "int8", "--cache-dtype", "int8")
    assert eight.code == 0
    cache = [int(x.err.split("cache ")[1].split(" bytes")[0].replace(",", "")) for x in (plain, eight)]
    assert cache[1] / cache[0] == (8 + 2) / 32
    assert say("sliding", "--prompt", "To be", *LONG, "--weights", "int8", "--check").code == 0


@pytest.mark.parametrize(("other", "said"), [("--check", "leave out"), ("--cache none", "needs a cache")])
def test_an_int8_cache_is_refused_where_it_says_nothing(say, other, said):
    say("sliding", "--cache-dtype", "int8", *other.split()).assert_refused("--cache-dtype int8", said)
