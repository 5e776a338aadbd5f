"""What generating refuses, in one line: options, prompts, devices and runs that cannot be."""

import os

import pytest
import torch
from conftest import CPU, save_run

import generate
from data.tokenizer import make_tokenizer

BYTE = make_tokenizer("byte")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prompt", ""], ["the prompt is empty: give at least a character, or leave --prompt out"]),
        (["--prompt", "x", "--prompt-file", "-"], ["--prompt and --prompt-file were both given: take one"]),
        (["--prompt-file", "no/such/file"], ["no/such/file"]),
        (["--prompt-file", "."], ["(.)"]),
        (["--prompt", "x", "--prompts", "-"], ["--prompt and --prompts were both given: take one"]),
        (["--prompts", "no/such/file"], ["no/such/file"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens (0) must be at least 1"]),
        (["--num-samples", "0"], ["--num-samples (0) must be at least 1"]),
        (["--temperature", "-1"], ["--temperature (-1.0) must be at least 0"]),
        (["--temperature", "nan"], ["--temperature (nan) must be a finite number"]),
        (["--temperature", "inf"], ["--temperature (inf) must be a finite number"]),
        (["--top-k", "0"], ["--top-k (0) must be at least 1"]),
        (["--top-p", "0"], ["--top-p (0.0) must be above 0"]),
        (["--top-p", "1.5"], ["--top-p (1.5) must be at most 1"]),
        (["--min-p", "0"], ["--min-p (0.0) must be above 0"]),
        (["--min-p", "1.01"], ["--min-p (1.01) must be at most 1"]),
        (["--repetition-penalty", "0"], ["--repetition-penalty (0.0) must be above 0"]),
        (["--repetition-penalty", "nan"], ["--repetition-penalty (nan) must be a finite number"]),
        (["--stop", "a", "--stop", ""], ["--stop ('') must not be empty"]),
        (["--chunk", "0"], ["--chunk (0) must be at least 1"]),
        (["--max-length", "1"], ["--max-length (1) must be at least 2"]),
        (["--window", "0"], ["--window (0) must be at least 1"]),
        (["--window", "3", "--n-sink", "-1"], ["--n-sink (-1) must be at least 0"]),
        (["--window", str(10**30)], [f"--window ({10**30}) must be at most 1000000000000000"]),
        (["--chunk", str(10**30)], [f"--chunk ({10**30}) must be at most 1000000000000000"]),
        (["--max-new-tokens", str(10**30)], [f"--max-new-tokens ({10**30}) must be at most 1000000000000000"]),
        (["--n-sink", "2"], ["--n-sink (2) has an effect only with a window"]),
        (["--positions", "in-cache"], ["--positions (in-cache) has an effect only with a window"]),
        (["--interactive", "--cache", "none"], ["--interactive keeps a cache from line to line: take --cache rolling"]),
        (["--interactive", "--prompts", "x"], ["--interactive continues one text, line by line: leave out --prompts"]),
        (["--interactive", "--num-samples", "2"], ["--interactive continues one text", "leave out --num-samples"]),
        (["--interactive", "--json"], ["--interactive continues one text", "leave out --json"]),
        (["--interactive", "--check"], ["--interactive continues one text", "leave out --check"]),
        (["--interactive", "--prompt-file", "-"], ["--interactive reads your lines from standard input"]),
        (["--check", "--cache", "none"], ["--check compares a cache with none: take --cache rolling or full"]),
    ],
    ids=lambda x: " ".join(x)[:30] if x[0].startswith("--") else "",
)
def test_an_option_out_of_its_range_is_refused(say, arguments, parts):
    ended = say("full", *arguments)
    ended.assert_refused("generate.py: ", *parts)
    assert ended.out == ""


@pytest.mark.parametrize(
    "device",
    ["gpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="here there is cuda"))],
)
def test_a_device_that_is_not_there_is_refused(program, runs, device):
    program(generate.main, runs / "full", "--device", device).assert_refused(f"device ({device}) is ", "here there is ")


def test_a_prompt_that_is_not_utf8_is_refused_with_the_byte_and_the_way_out(say, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin1"))
    ended = say("full", "--prompt-file", tmp_path / "latin1.txt")
    ended.assert_refused(f"{tmp_path / 'latin1.txt'} is not UTF-8 at byte 2: convert it, as with iconv")


def test_an_empty_prompt_file_is_an_empty_prompt(say, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    say("full", "--prompt-file", tmp_path / "empty.txt").assert_refused("the prompt is empty")


def test_a_character_that_the_tokenizer_cannot_write_is_refused(program, tmp_path):
    save_run(tmp_path / "run", vocab_size=31)
    make_tokenizer("char", lambda: iter(["abc"])).save(tmp_path / "run" / "tokenizer.json")
    ended = program(generate.main, tmp_path / "run", "--prompt", "abcd", *CPU)
    ended.assert_refused("the character 'd' (byte 0x64) never occurred in the text")


@pytest.mark.parametrize("path", ["nowhere", "full/config.json", "full/checkpoints"])
def test_a_path_that_is_no_run_is_refused(say, path):
    say(path).assert_refused(f"{path} is not a run: it has no config.json")


@pytest.mark.parametrize("path", ["full/checkpoints/best", "full/checkpoints/step_00000099"])
def test_a_path_that_is_no_checkpoint_is_refused(say, path):
    say(path).assert_refused(f"{path} is not a checkpoint: state.json cannot be read")


def test_a_run_without_a_checkpoint_is_refused(program, tmp_path):
    save_run(tmp_path / "run")
    for name in ("best", "latest"):
        (tmp_path / "run" / "checkpoints" / name).unlink(missing_ok=True)
    ended = program(generate.main, tmp_path / "run")
    ended.assert_refused(f"{tmp_path / 'run'} has no best checkpoint yet: train it first")


SPOILED = {
    "truncated": (
        lambda run, step: os.truncate(step / "model.safetensors", 999),
        "model.safetensors is missing or dam",
    ),
    "missing": (lambda run, step: (step / "model.safetensors").unlink(), "model.safetensors is missing or damaged"),
    "state": (
        lambda run, step: (step / "state.json").write_text("{"),
        "is not a checkpoint: state.json cannot be read",
    ),
    "tokenizer": (lambda run, step: (run / "tokenizer.json").write_text("{"), "tokenizer.json: damaged"),
    "no tokenizer": (lambda run, step: (run / "tokenizer.json").unlink(), "the tokenizer cannot be read"),
    "config": (lambda run, step: (run / "config.json").write_text("{"), "config.json is damaged"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_damaged_run_is_refused(program, tmp_path, spoiled):
    save_run(tmp_path / "run")
    spoil, message = SPOILED[spoiled]
    spoil(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000003")
    ended = program(generate.main, tmp_path / "run", *CPU, name="generate.py")
    ended.assert_refused("generate.py: ", message)
    assert ended.out == ""


def test_a_checkpoint_of_another_shape_is_refused(program, tmp_path):
    save_run(tmp_path / "run")
    save_run(tmp_path / "other", n_embd=22)
    config = tmp_path / "other" / "config.json"
    config.replace(tmp_path / "run" / "config.json")
    ended = program(generate.main, tmp_path / "run", *CPU)
    ended.assert_refused("is of another shape: ", "in the checkpoint and ", "in the model")
