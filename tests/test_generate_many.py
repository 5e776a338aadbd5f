"""Several texts at once, stop strings, records, windows with places, and what ends a text from outside."""

import io
import json
import signal
import sys

import pytest
import torch
from conftest import CPU, PATIENCE_S, run_program, start_program

from artifacts.run_dir import RunDir
from data.tokenizer import make_tokenizer
from inference.sampling import LogProbs

BYTE = make_tokenizer("byte")
LINES = ["To be", "or", "x" * 13]
LONG = ("--max-new-tokens", 30, "--no-stop-at-end")


def texts(out: str) -> list[str]:
    """What stands under the headings."""
    return [part.split(" ---\n", 1)[1].removesuffix("\n") for part in ("\n" + out).split("\n--- ")[1:]]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return tmp_path / "prompts.txt"


# Several prompts and samples.


@pytest.mark.parametrize(
    "arguments", [[], ["--chunk", 3], ["--cache", "full"], ["--cache", "none"], ["--num-samples", 2]]
)
@pytest.mark.parametrize("run", ["sliding", "swa", "full"])
def test_a_prompt_gives_the_same_text_alone_and_among_others(say, prompts, run, arguments):
    among = texts(say(run, "--prompts", prompts, *LONG, *arguments).out)
    first_samples = among[:: 2 if "--num-samples" in arguments else 1]
    assert first_samples == [say(run, "--prompt", line, *LONG).out.removesuffix("\n") for line in LINES]


def test_samples_have_headings_and_differ(say):
    ended = say("sliding", "--prompt", "To be", "--num-samples", 3, *LONG)
    assert [line for line in ended.out.splitlines() if line.startswith("---")] == [
        f"--- sample {n} of 3 ---" for n in (1, 2, 3)
    ]
    assert len(set(texts(ended.out))) == 3
    assert all(text.startswith("To be") for text in texts(ended.out))


def test_learned_positions_take_prompts_of_different_lengths(say, prompts):
    among = texts(say("learned", "--prompts", prompts, "--max-new-tokens", 4, "--no-stop-at-end", "--check").out)
    alone = [say("learned", "--prompt", x, "--max-new-tokens", 4, "--no-stop-at-end").out[:-1] for x in LINES]
    assert among == alone
    say("learned", "--prompts", prompts, "--max-new-tokens", 5).assert_refused("max_new_tokens may be 4")


def test_statistics_and_check_are_of_all_rows(say, prompts):
    ended = say("sliding", "--prompts", prompts, "--num-samples", 2, *LONG, "--check")
    assert ended.code == 0
    assert "prefill 20 tokens" in ended.err
    assert f"decode {6 * 29} tokens" in ended.err
    n = 2 * sum(map(len, LINES)) + 6 * 30
    assert ended.err.endswith(f"the likeliest token is the same at {n} of {n}\n")


def test_a_text_that_ends_early_leaves_the_others_going_on(say, prompts):
    alone = {line: say("full", "--prompt", line, *LONG).out[len(line) : -1] for line in LINES}
    stop = alone["or"][2:4]
    among = texts(say("full", "--prompts", prompts, "--stop", stop, *LONG).out)
    expected = [line + alone[line].split(stop)[0] for line in LINES]
    assert among == expected
    assert len(expected[1]) == 4


def test_prompts_may_come_from_standard_input(say, prompts, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompts.read_bytes())))
    assert say("full", "--prompts", "-", *LONG).out == say("full", "--prompts", prompts, *LONG).out


def test_line_ends_of_other_systems_are_line_ends(say, prompts):
    expected = say("full", "--prompts", prompts, *LONG).out
    prompts.write_bytes(b"\xef\xbb\xbf" + prompts.read_bytes().replace(b"\n", b"\r\n"))
    assert say("full", "--prompts", prompts, *LONG).out == expected


@pytest.mark.parametrize(("content", "line"), [("", 1), ("a\n\nb\n", 2), ("\na", 1), ("a\n\n", 2)])
def test_an_empty_line_of_prompts_is_refused(say, prompts, content, line):
    prompts.write_text(content)
    say("full", "--prompts", prompts).assert_refused(f"prompts.txt: line {line} is empty: each line is a prompt")


def test_standard_input_that_is_not_utf8_is_refused(say, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode("latin1"))))
    say("full", "--prompt-file", "-").assert_refused("standard input is not UTF-8 at byte 2: convert it")


# Stop strings.


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(say, speak):
    speak(b"one two\nROMEO: three")
    assert say("full", "--prompt", "x", "--stop", "\nROMEO:").out == "xone two\n"


def test_half_a_stop_string_is_held_back_until_it_is_none(say, speak):
    written = speak(b"a\nROM\nROMEO:")
    assert say("full", "--prompt", "x", "--stop", "\nROMEO:", "--stop", "never").out == "xa\nROM\n"
    assert [piece for piece in written if piece] == ["x", "a", "\nROM", "\n"]


def test_a_stop_string_that_never_comes_changes_nothing(say):
    arguments = ("full", "--prompt", "x", *LONG)
    assert say(*arguments, "--stop", "it never says this").out == say(*arguments).out


# Draws.


def test_a_repetition_penalty_and_min_p_change_the_text(say):
    arguments = ("sliding", "--prompt", "To be", "--temperature", 1.5, *LONG)
    plain = say(*arguments).out
    assert len({plain, say(*arguments, "--repetition-penalty", 1.5).out, say(*arguments, "--min-p", 0.5).out}) == 3
    likeliest = say(*arguments, "--temperature", 0).out
    assert say(*arguments, "--min-p", 1).out == likeliest
    assert say(*arguments, "--temperature", 0, "--repetition-penalty", 3).out != likeliest


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 13])
def test_chunks_do_not_change_the_text(say, chunk):
    arguments = ("sliding", "--prompt", "To be, or not", *LONG)
    assert say(*arguments, "--chunk", chunk, "--check").out == say(*arguments).out


# Records.


def test_records_have_the_text_its_tokens_and_their_log_probabilities(say, prompts, runs):
    ended = say("sliding", "--prompts", prompts, "--num-samples", 2, "--json", "--max-new-tokens", 9)
    records = [json.loads(line) for line in ended.out.splitlines()]
    assert sorted((r["prompt_index"], r["sample"]) for r in records) == [(p, s) for p in range(3) for s in range(2)]
    model, tokenizer = RunDir(runs / "sliding").load(runs / "sliding")
    model.eval()
    for record in records:
        assert record["prompt"] == LINES[record["prompt_index"]]
        assert record["finish"] == ("end" if BYTE.eot in record["tokens"] else "length")
        assert record["text"] == tokenizer.decode(token for token in record["tokens"] if token != BYTE.eot)
        ids = torch.tensor([tokenizer.encode(record["prompt"]) + record["tokens"]])
        expected = LogProbs(tokenizer.n_vocab)
        with torch.no_grad():
            logits = model(ids)[0, len(record["prompt"]) - 1 : -1]
        expected(logits, torch.tensor(record["tokens"]))
        assert record["logprobs"] == pytest.approx(expected.last.tolist(), abs=1e-4)


def test_a_record_says_which_stop_string_came(say):
    ended = say("sliding", "--prompt", "To be", "--temperature", 0, *LONG)
    text = ended.out[len("To be") : -1]
    record = json.loads(
        say("sliding", "--prompt", "To be", "--temperature", 0, *LONG, "--json", "--stop", text[3:5]).out
    )
    assert (record["text"], record["finish"], record["stop"]) == (text[:3], "stop", text[3:5])


# Windows with places in the cache.


def test_positions_in_the_cache_pass_the_check_and_change_the_text(say):
    arguments = ("full", "--prompt", "To be, or not", *LONG, "--temperature", 1.2, "--window", 3, "--n-sink", 2)
    placed = say(*arguments, "--positions", "in-cache", "--check")
    assert placed.code == 0
    assert placed.out != say(*arguments).out
    assert placed.out == say(*arguments, "--positions", "in-cache", "--cache", "none").out


def test_positions_in_the_cache_of_a_run_that_rotates_no_keys_are_refused(say):
    ended = say("learned", "--prompt", "x", "--window", 3, "--positions", "in-cache")
    ended.assert_refused("positions (in-cache) needs layers that rotate keys (RoPE): this run has none")


# What ends a text from outside.


@pytest.mark.parametrize("options", [["--max-new-tokens", 10**14], ["--max-length", 10**14, "--interactive"]])
def test_a_cache_that_no_memory_can_hold_is_refused(say, options):
    ended = say("sliding", *options)
    ended.assert_refused(f"there is not enough memory: take fewer {options[0]}", "or --window")
    assert ended.out == ""


def test_another_failure_is_not_taken_for_a_lack_of_memory(say, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("inference.session.stream", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        say("sliding")


@pytest.mark.slow
def test_an_output_that_cannot_write_a_character_writes_another(runs, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    ended = run_program("generate.py", runs / "full", "--prompt", "naïve", "--max-new-tokens", 1, *CPU)
    assert (ended.code, ended.out[:5]) == (0, "na?ve")


def test_an_interrupted_prefill_still_says_what_it_cost(say, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("inference.session.stream", interrupted)
    ended = say("full", "--prompt", "x")
    assert ended.code == 130
    assert ended.out == "x"
    assert [line.split()[0] for line in ended.err.strip().splitlines()] == ["cache", "peak", "generate.py:"]


@pytest.mark.slow
def test_control_c_ends_a_real_process_with_statistics(runs):
    process = start_program("generate.py", runs / "swa", "--max-new-tokens", 10**6, "--no-stop-at-end", *CPU)
    assert process.stdout is not None
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "decode " in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_closed_pipe_ends_a_real_process_with_one_line(runs):
    process = start_program("generate.py", runs / "swa", "--max-new-tokens", 10**6, "--no-stop-at-end", *CPU)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(20)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=PATIENCE_S) == 141
    assert err.endswith("generate.py: standard output was closed\n")
    assert "decode " in err
    assert "Traceback" not in err
    assert "Exception" not in err
