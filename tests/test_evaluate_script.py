"""What an evaluation keeps and prints, and what it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PNG, run_program, save_run
from evaluated import LINE, figures

from artifacts.run_dir import RunDir
from data.tokenizer import make_tokenizer
from scripts import evaluate as script
from scripts.probes import subject
from scripts.probes.results import FILE, Found, column, keep


def test_evaluations_are_added_to_what_is_there(run_copy):
    first, second = figures(run_copy), figures(run_copy, attention_to_first=1)
    kept = json.loads((run_copy / FILE).read_text())
    assert kept == {"evaluated_step": RunDir(run_copy).checkpoint().step, **first, **second}


def test_figures_of_another_checkpoint_are_dropped_and_that_is_said(tmp_path, capsys):
    keep(tmp_path, 5, [Found(figures={"a": 1.0}, text="")], plot=False)
    keep(tmp_path, 5, [Found(figures={"b": 2.0}, text="")], plot=False)
    assert json.loads((tmp_path / FILE).read_text()) == {"evaluated_step": 5, "a": 1.0, "b": 2.0}
    assert capsys.readouterr().err == ""
    keep(tmp_path, 7, [Found(figures={"b": 3.0}, text="")], plot=False)
    assert json.loads((tmp_path / FILE).read_text()) == {"evaluated_step": 7, "b": 3.0}
    assert "had results of step 5; replacing them with step 7" in capsys.readouterr().err


def test_evaluations_that_end_together_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: keep(tmp_path, 1, [Found(figures={f"{n}": n}, text="")], plot=False), range(24)))
    assert len(json.loads((tmp_path / FILE).read_text())) == 25


def test_a_column_says_what_it_was_measured_under():
    assert column("loss") == "loss"
    assert column("loss", context=None) == "loss"
    assert column("recall", "below W", context=5, k=0) == "recall[below W,context=5,k=0]"


def test_plots_lie_beside_what_they_show(run_copy):
    figures(run_copy, by_position=True, stream=True, window=5, n_sink=(0, 1), length=60, plot=True)
    for name in ("loss_by_position", "loss_in_stream"):
        assert (run_copy / f"{name}.png").read_bytes().startswith(PNG)
        assert json.loads((run_copy / f"{name}.json").read_text())
    assert not list(run_copy.glob("*.tmp"))


def test_json_on_standard_output_has_every_digit(program, run_copy):
    ended = program(script.main, run_copy, "--json")
    found = json.loads(ended.out)
    assert found["figures"] == {
        k: v for k, v in json.loads((run_copy / FILE).read_text()).items() if k != "evaluated_step"
    }
    assert found["step"] == RunDir(run_copy).checkpoint().step


def test_the_table_has_the_four_digits_that_training_prints(program, run_copy):
    ended = program(script.main, run_copy)
    found = json.loads((run_copy / FILE).read_text())
    printed = {line.rpartition("  ")[0].strip(): line.split()[-1] for line in ended.out.splitlines() if "  " in line}
    assert printed["bits per byte"] == f"{found['bits_per_byte']:.4f}"
    assert printed["perplexity"] == f"{found['perplexity']:.4f}"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--context", 0], "--context (0) must be at least 1"),
        (["--tokens", -1], "--tokens (-1) must be at least 1"),
        (["--attention-to-first", 0], "--attention-to-first (0) must be at least 1"),
        (["--attention-to-first", 16], "--attention-to-first (16) must be less than the context length (16)"),
        (["--attention-to-first", 1, "--context", 9999], "less than one context of 9999"),
        (["--extrapolate", 16], "--extrapolate (16) must be more than the training context (16)"),
        (["--extrapolate", 64, "--stride", 4], "--extrapolate chooses the contexts itself: leave out --context and"),
        (["--stride", 17], "--stride (17) must be at most the context length (16)"),
        (["--window", 4], "--window (4) requires --stream"),
        (["--length", 4], "--length (4) requires --stream"),
        (["--stream", "--n-sink", 1], "--n-sink (1) requires --window"),
        (["--stream", "--window", 4, "--n-sink", 2, 2], "--n-sink (2 2) must be numbers without repetition"),
        (["--stream", "--window", 4, "--n-sink", -1], "--n-sink (-1) must be at least 0"),
        (["--stream", "--length", 99999], "--length (99999) must be at most "),
        (["--recall", "--context", 2, "--tokens", 60], "--recall: a context of 2 tokens is too short for any question"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["--device", "abacus"], "device (abacus) is unknown"),
    ],
)
def test_what_cannot_be_gets_a_line(program, run_copy, wrong, said):
    program(script.main, run_copy, *wrong).assert_refused(said)
    assert not (run_copy / FILE).exists()


def test_the_line_begins_with_the_name_of_the_program(tmp_path):
    ended = run_program("-m", "scripts.evaluate", tmp_path / "nowhere")
    assert (ended.code, ended.err) == (2, f"evaluate.py: {tmp_path / 'nowhere'} is not a run: it has no config.json\n")


def test_learned_positions_cannot_be_left(program, tmp_path):
    save_run(tmp_path / "run", position="learned")
    (tmp_path / "long.txt").write_text(LINE * 9, encoding="utf-8")
    text = ("--text", tmp_path / "long.txt", "--device", "cpu")
    for wrong in (["--context", 17], ["--stream", "--window", 4], ["--recall", "--context", 20]):
        program(script.main, tmp_path / "run", *wrong, *text).assert_refused("the 16 learned positions")


def test_a_tokenizer_that_joins_letters_cannot_be_asked(program, run_copy, monkeypatch):
    joining = make_tokenizer("bpe-300", lambda: iter(["hBhBhBaUaU" * 50]))
    opened = subject.open_subject(run_copy, "best", device="cpu", dtype=None)
    fields = {name: getattr(opened, name) for name in opened.__slots__} | {"tokenizer": joining}
    monkeypatch.setattr(script, "open_subject", lambda *_, **__: subject.Subject(**fields))
    program(script.main, run_copy, "--recall").assert_refused(
        "needs one token per character", "train with the tokenizer char"
    )


def test_a_text_that_changed_since_training_is_no_validation_stream(program, random_run, tmp_path, text):
    path = random_run / "config.json"
    content = json.loads(path.read_text())
    content["config"]["data"] |= {"text": str(text), "tokenizer": "byte", "dir": str(text.parent / "prepared")}
    path.write_text(json.dumps(content))
    program(script.main, random_run).assert_refused("has changed since this run was trained", "give a text with --text")


def test_a_damaged_file_of_evaluations_is_not_overwritten(program, run_copy):
    (run_copy / FILE).write_text("[1]")
    program(script.main, run_copy).assert_refused(f"{run_copy / FILE} is damaged (it holds a list): remove it")
    assert (run_copy / FILE).read_text() == "[1]"
