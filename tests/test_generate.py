"""Generating: the text alone on standard output, whole characters, the same with any cache."""

import io
import os
import signal
import sys

import pytest
import torch
from conftest import CPU, run_program, save_run
from networks import SMALL, make_sampler, tiny_config, tiny_model

import generate
from artifacts.run_dir import RunDir
from data.tokenizer import make_tokenizer
from inference.loading import load
from inference.params import ModelParams
from inference.sampling import Sampler, stream
from model import cost
from model.cache import KVCache
from training.optim import Optimizers

BYTE = make_tokenizer("byte")


# The text.


def test_standard_output_has_the_prompt_and_the_text_alone(say, runs):
    ended = say("full", "--prompt", "To be", "--max-new-tokens", 30, "--no-stop-at-end")
    model, tokenizer = RunDir(runs / "full").load(runs / "full")
    prompt = torch.tensor([tokenizer.encode("To be")])
    tokens = stream(model.eval(), None, prompt, make_sampler(temperature=0.8, n_vocab=257))
    expected = tokenizer.decode([int(next(tokens)) for _ in range(30)])
    assert ended.code == 0
    assert ended.out == f"To be{expected}\n"


def test_statistics_go_to_standard_error(say, runs):
    ended = say("sliding", "--prompt", "To be", "--max-new-tokens", 30, "--no-stop-at-end")
    prefill, decode, cache, memory = ended.err.strip().splitlines()
    assert prefill.startswith("prefill 5 tokens at ")
    assert decode.startswith("decode 29 tokens at ")
    assert decode.endswith(" GB/s of weights and cache")
    config = RunDir(runs / "sliding").config().model
    sliding, full = (spec.cache_bytes(35, torch.float32) for spec in config.layers)
    assert sliding + full == cost.cache_bytes(config, 35, dtype=torch.float32)
    assert cache == f"cache {sliding + full:,} bytes: swa {sliding:,}, full {full:,}"
    assert memory.startswith("peak memory ")
    assert "(process)" in memory


def test_without_a_prompt_a_new_document_begins(say, runs):
    ended = say("full", "--max-new-tokens", 12, "--no-stop-at-end")
    model, tokenizer = RunDir(runs / "full").load(runs / "full")
    tokens = stream(model.eval(), None, torch.tensor([[tokenizer.eot]]), make_sampler(temperature=0.8, n_vocab=257))
    assert ended.out == tokenizer.decode([int(next(tokens)) for _ in range(12)]) + "\n"


def test_the_same_seed_says_the_same_and_another_seed_another(say):
    texts = [say("full", "--prompt", "x", "--seed", seed).out for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("cache", ["full", "none"])
def test_the_cache_does_not_change_the_text(say, cache):
    rolling = say("sliding", "--prompt", "To be, or not", "--max-new-tokens", 60)
    other = say("sliding", "--prompt", "To be, or not", "--max-new-tokens", 60, "--cache", cache)
    assert other.out == rolling.out
    assert other.err != rolling.err


def test_temperature_zero_takes_the_likeliest(say, runs):
    ended = say("full", "--prompt", "To be", "--temperature", 0, "--max-new-tokens", 9, "--no-stop-at-end")
    model, tokenizer = RunDir(runs / "full").load(runs / "full")
    idx = torch.tensor([tokenizer.encode("To be")])
    with torch.no_grad():
        for _ in range(9):
            idx = torch.cat((idx, model.eval()(idx)[:, -1:].argmax(dim=-1)), dim=1)
    assert ended.out == tokenizer.decode(idx[0].tolist()) + "\n"


@pytest.mark.parametrize("top", [["--top-k", "1"], ["--top-p", "1e-9"]], ids=lambda x: x[0])
def test_top_k_and_top_p_narrow_the_choice(say, top):
    arguments = ("--prompt", "x", "--temperature", 5, "--max-new-tokens", 20)
    likeliest = say("full", *arguments[:2], "--temperature", 0, "--max-new-tokens", 20)
    assert say("full", *arguments, *top).out == likeliest.out != say("full", *arguments).out


def test_a_document_that_ends_ends_the_text(say, speak):
    speak(b"The end.", then=BYTE.eot)
    assert say("full", "--prompt", "x ").out == "x The end.\n"


def test_a_text_may_go_on_behind_the_end_of_its_document(say, speak):
    speak(b"The end.", then=BYTE.eot)
    assert (
        say("full", "--prompt", "x ", "--no-stop-at-end", "--max-new-tokens", 12).out == "x The end.<|endoftext|>~~~\n"
    )


# Whole characters.


def test_no_character_is_written_in_halves(say, speak):
    spoken = "naïve 猫 😀, é̀!"
    written = speak(spoken.encode())
    ended = say("full", "--prompt", "“", "--max-new-tokens", len(spoken.encode()))
    assert ended.out == f"“{spoken}\n"
    assert "\ufffd" not in "".join(written)
    assert {"ï", "猫", "😀"} <= set(written)


def test_a_character_that_is_never_finished_becomes_a_replacement(say, speak):
    speak("a😀".encode()[:-1])
    assert say("full", "--prompt", "x", "--max-new-tokens", 4).out == "xa\ufffd\n"


def test_bytes_that_are_no_text_become_replacements_and_the_text_goes_on(say, speak):
    speak(b"a\xffb\xc3c")
    assert say("full", "--prompt", "x", "--max-new-tokens", 5).out == "xa\ufffdb\ufffdc\n"


def test_text_appears_as_it_is_made(say, speak):
    written = speak(b"one by one")
    say("full", "--prompt", "x", "--max-new-tokens", 10)
    assert [piece for piece in written if len(piece) == 1][: 1 + 10] == ["x", *"one by one"]


# Prompts.


def test_a_prompt_may_come_from_a_file(say, tmp_path):
    (tmp_path / "prompt.txt").write_text("Grüße 猫", encoding="utf-8")
    ended = say("full", "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 5)
    assert ended.out == say("full", "--prompt", "Grüße 猫", "--max-new-tokens", 5).out
    assert ended.out.startswith("Grüße 猫")


def test_a_prompt_may_come_from_standard_input(say, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße 猫".encode())))
    assert say("full", "--prompt-file", "-", "--max-new-tokens", 5).out.startswith("Grüße 猫")


def test_a_real_process_reads_standard_input_and_writes_the_text_alone(say, runs, tmp_path):
    (tmp_path / "prompt.txt").write_text("Grüße 猫", encoding="utf-8")
    with open(tmp_path / "prompt.txt") as prompt:
        ended = run_program(
            "generate.py", runs / "full", "--prompt-file", "-", "--max-new-tokens", 5, *CPU, stdin=prompt
        )
    assert ended.code == 0, ended
    assert ended.out == say("full", "--prompt", "Grüße 猫", "--max-new-tokens", 5).out


# Windows and lengths.


def test_a_window_equals_a_network_whose_every_layer_slides(say):
    arguments = ("--prompt", "To be, or not to be", "--max-new-tokens", 60, "--temperature", 1.2)
    windowed = say("full", *arguments, "--window", 3, "--n-sink", 1)
    assert windowed.out == say("swa", *arguments).out != say("full", *arguments).out
    slots = 3 + 1
    assert f"cache {2 * 2 * slots * 2 * 8 * 4:,} bytes" in windowed.err  # layers, k and v, slots, heads, width, float32


def test_a_window_keeps_the_weights_and_changes_the_layers(runs):
    model = load(runs / "full", ModelParams(window=3, n_sink=1, device="cpu", dtype="float32")).model
    other = tiny_model(tiny_config(vocab_size=257, pattern="swa", window=3, n_sink=1), dtype=torch.float32)
    idx = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(idx), other(idx))
    assert [spec.window for spec in model.config.layers] == [3, 3]


def test_a_text_may_be_longer_than_the_training_context(say):
    ended = say("sliding", "--prompt", "x", "--max-new-tokens", 5 * SMALL["block_size"], "--no-stop-at-end", "--check")
    assert ended.code == 0
    assert "decode 79 tokens" in ended.err


def test_learned_positions_end_at_the_training_context(say):
    fits = say("learned", "--prompt", "x" * 6, "--max-new-tokens", 11, "--no-stop-at-end")
    assert fits.code == 0
    beyond = say("learned", "--prompt", "x" * 6, "--max-new-tokens", 12, "--no-stop-at-end")
    beyond.assert_refused("generate.py: ", "more than the 16 learned positions", "max_new_tokens may be 11")
    assert beyond.out == ""


@pytest.mark.parametrize("cache", ["rolling", "none"])
def test_a_prompt_longer_than_the_learned_positions_is_refused(say, cache):
    ended = say("learned", "--prompt", "x" * 17, "--cache", cache)
    ended.assert_refused("17 tokens of prompt", "more than the 16 learned positions", "shorten the prompt")
    assert ended.out == ""


# --check.


@pytest.mark.parametrize("cache", ["rolling", "full"])
@pytest.mark.parametrize("run", ["full", "sliding", "swa"])
def test_check_passes_and_says_the_difference(say, run, cache):
    ended = say(run, "--prompt", "To be, or not", *LONG, "--check", "--cache", cache)
    assert ended.code == 0
    assert "check: logits differ by at most " in ended.err
    verdict = ended.err.splitlines()[-1]
    assert ", within the " in verdict
    n = 13 + 25
    assert verdict.endswith(f" of float32; the likeliest token is the same at {n} of {n}")


def test_check_of_a_windowed_network_passes(say):
    assert say("full", "--prompt", "To be, or not", "--window", 3, "--n-sink", 2, "--check").code == 0


LONG = ("--max-new-tokens", 25, "--no-stop-at-end")
BROKEN = {
    "values": lambda k, v, pos: (k, v * 1.01, pos),
    "keys": lambda k, v, pos: (k * 1.01, v, pos),
    "positions": lambda k, v, pos: (k, v, (pos - 1).clamp(min=0)),
    "order": lambda k, v, pos: (k.flip(2), v, pos),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_check_finds_a_cache_that_is_broken(say, monkeypatch, broken):
    update = KVCache.update
    monkeypatch.setattr(KVCache, "update", lambda self, k, v, step: BROKEN[broken](*update(self, k, v, step)))
    ended = say("sliding", "--prompt", "To be, or not", *LONG, "--check")
    assert ended.code == 1
    assert "BEYOND" in ended.err.splitlines()[-1]


# Which weights.


def test_the_best_checkpoint_speaks_unless_another_is_asked_for(program, tmp_path):
    save_run(tmp_path / "run")
    last = save_run(tmp_path / "last", seed=1)
    RunDir(tmp_path / "run").save(last, Optimizers([torch.optim.SGD(last.parameters())]), {"step": 9}, best=False)
    texts = {
        name: program(generate.main, tmp_path / path, "--prompt", "x", *options, *CPU).out
        for name, path, options in (
            ("best", "run", []),
            ("latest", "run", ["--checkpoint", "latest"]),
            ("first", "run/checkpoints/step_00000003", []),
            ("ninth", "run/checkpoints/step_00000009", []),
        )
    }
    assert texts["best"] == texts["first"] != texts["latest"] == texts["ninth"]


def test_a_run_that_was_moved_still_speaks(program, tmp_path):
    save_run(tmp_path / "run")
    before = program(generate.main, tmp_path / "run", "--prompt", "x", *CPU).out
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert program(generate.main, tmp_path / "elsewhere", "--prompt", "x", *CPU).out == before


def test_ids_that_pad_the_vocabulary_are_never_said(program, tmp_path, monkeypatch):
    model = save_run(tmp_path / "run", vocab_size=320, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[257:] *= 40
    RunDir(tmp_path / "run").save(model, Optimizers([torch.optim.SGD(model.parameters())]), {"step": 9}, best=True)
    drawn: list[int] = []
    following = Sampler.next
    monkeypatch.setattr(Sampler, "next", lambda *a: (t := following(*a), drawn.append(int(t)))[0])
    assert program(generate.main, tmp_path / "run", "--prompt", "x", "--temperature", 3, *CPU).code == 0
    assert len(drawn) > 20
    assert max(drawn) <= 256


# Stopping.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_text_with_the_token_in_the_making_and_says_what_it_cost(say, monkeypatch, number, code):
    def interrupted(*_, **__):
        for n in range(99):
            if n == 4:
                os.kill(os.getpid(), number)
            yield torch.tensor([ord("a") + n])

    monkeypatch.setattr("inference.session.stream", interrupted)
    ended = say("full", "--prompt", "x")
    assert ended.code == code
    assert ended.out == "xabcde\n"
    assert "decode" in ended.err
