"""What training refuses, in one line and with nothing written: a second start, configs, texts, tokens, directories."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import command_line, run_config, run_program, sentences
from training_runs import content, losses

import train
from data.prepare import prepare
from data.tokenizer import make_tokenizer
from model.errors import UserError

pytestmark = pytest.mark.usefixtures("unmeasured")

# A second start.


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, text, program):
    arguments = command_line(tmp_path, text)
    first = program(train.main, *arguments)
    before = content(tmp_path), {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    second = program(train.main, *arguments)
    assert second.code == 0
    assert second.out.splitlines() == [
        f"{tmp_path}/run is finished at step 12: --train.max_steps extends it, --name starts a new run",
        first.out.splitlines()[-1],
    ]
    assert before == (content(tmp_path), {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")})


def test_a_finished_run_asked_for_fewer_steps_changes_nothing(trained):
    run = trained()
    before = content(run.path)
    assert trained(train={"max_steps": 5}).summary()["step"] == 12
    assert content(run.path) == before


def test_a_finished_run_can_be_extended_as_if_it_had_never_ended(trained):
    constant = {"schedule": "constant", "warmup_steps": 3}
    trained("parts", optim=constant, train={"max_steps": 8})
    parts = trained("parts", optim=constant, train={"max_steps": 12})
    whole = trained("whole", optim=constant, train={"max_steps": 12})
    assert losses(parts) == losses(whole)
    assert parts.summary()["step"] == 12
    last = "step_00000012/model.safetensors"
    assert content(parts.checkpoints)[last] == content(whole.checkpoints)[last]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": {"window": 3}}, "model.window = 5, now it is 3"),
        ({"seed": 2}, "seed = 1337, now it is 2"),
        ({"train": {"global_batch_tokens": 32}}, "train.global_batch_tokens = 96, now it is 32"),
        ({"data": {"tokenizer": "char"}}, "data.tokenizer = 'byte', now it is 'char'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_another_config_in_the_same_directory_is_refused_by_its_key(tmp_path, text, program, trained, changes, key):
    run = trained()
    before = content(run.path)
    program(train.main, *command_line(tmp_path / "runs", text, **changes)).assert_refused(
        f"{run.path} was begun with {key}", "give another --name, or remove the directory to begin again"
    )
    assert content(run.path) == before


def test_other_data_under_the_same_name_are_refused(tmp_path, program):
    text = tmp_path / "a.txt"
    text.write_text(sentences(60), encoding="utf-8")
    arguments = command_line(tmp_path / "runs", text)
    assert program(train.main, *arguments).code == 0
    text.write_text(sentences(61), encoding="utf-8")
    before = content(tmp_path / "runs")
    program(train.main, *arguments).assert_refused("run was begun on other data (hash ", "give another --name")
    assert content(tmp_path / "runs") == before


def test_the_advice_to_remove_the_directory_works(trained):
    run = trained()
    shutil.rmtree(run.path)
    assert trained(seed=2).summary()["step"] == 12


# What bad input gets.

SHORT_TEXT = {"model": {"block_size": 8192}, "train": {"global_batch_tokens": 8192}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": {"n_embd": 22}}, ["n_embd (22) must be divisible by n_head (4)"]),
        ({"model": {"n_kv_head": 3}}, ["n_head (4) must be divisible by n_kv_head (3)"]),
        ({"model": {"n_embd": 20}}, ["RoPE rotates pairs: head_dim (5) must be even"]),
        ({"model": {"window": 0}}, ["model.window (0)"]),
        ({"model": {"window": -1}}, ["model.window (-1)"]),
        ({"model": {"pattern": "swa ful"}}, ["'ful' is not a layer", "did you mean full?"]),
        ({"model": {"pattern": "5:"}}, ["pattern ('5:')", "a ratio is"]),
        ({"model": {"pattern": "0:0"}}, ["pattern ('0:0')", "a + b >= 1"]),
        ({"model": {"vocab_size": 100}}, ["model.vocab_size (100) is below the 257 of byte: leave it out"]),
        ({"data": {"tokenizer": "gpt3"}}, ["tokenizer 'gpt3'", "did you mean gpt2?"]),
        ({"data": {"text": "shakespear"}}, ["text 'shakespear'", "did you mean shakespeare?"]),
        ({"data": {"text": "no/such/file.txt"}}, ["no/such/file.txt: no such file or folder"]),
        (SHORT_TEXT, ["tokens, block_size is 8192; use --model.block_size 2048 or more text"]),
        ({"device": "gpu"}, ["device (gpu) is unknown; here there is"]),
    ],
    ids=lambda x: x[0][:30] if isinstance(x, list) else "",
)
def test_a_config_that_cannot_work_is_refused_and_nothing_is_written(tmp_path, text, program, changes, parts):
    arguments = command_line(tmp_path / "runs", text, **changes)
    program(train.main, *arguments, name="train.py").assert_refused("train.py: ", *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is cuda")
def test_cuda_where_there_is_none_ends_a_real_process_with_2(tmp_path, text):
    ended = run_program("train.py", *command_line(tmp_path / "runs", text, device="cuda"))
    ended.assert_refused("train.py: device (cuda) is not there; here there is ", "take one of them, or auto")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        (b"", ["the text is empty", "use a longer text"]),
        (b"tiny", ["the text has 4 bytes, too few to hold out a tenth for validation", "use a longer text"]),
        (b"fine so far \xff" * 9, ["a.txt: the byte at offset 12 is not UTF-8; convert the file", "iconv"]),
        ("fine".encode("utf-16") * 9, ["a.txt: the byte at offset 0 is not UTF-8", "UTF-16"]),
    ],
    ids=["empty", "short", "latin1", "utf-16"],
)
def test_a_text_that_cannot_be_read_is_refused_and_nothing_is_written(tmp_path, program, written, parts):
    (tmp_path / "a.txt").write_bytes(written)
    program(train.main, *command_line(tmp_path / "runs", tmp_path / "a.txt")).assert_refused(*parts)
    left = [file.name for file in tmp_path.rglob("*") if file.suffix != ".lock"]
    assert sorted(left) == ["a.txt", "prepared"]


@pytest.fixture
def prepared(tmp_path) -> tuple[Path, Path]:
    """A text of its own, and the folder of its tokens."""
    text = tmp_path / "a.txt"
    text.write_text(sentences(60), encoding="utf-8")
    return text, prepare(str(text), "byte", root=tmp_path / "prepared", progress=False).directory


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda folder: os.truncate(folder / "train.bin", 99), ["train.bin: has 99 bytes, but"]),
        (lambda folder: (folder / "val.bin").unlink(), ["val.bin: has 0 bytes, but"]),
        (lambda folder: os.truncate(folder / "meta.json", 30), ["meta.json: damaged"]),
        (
            lambda folder: make_tokenizer("char", lambda: iter(["other"])).save(folder / "tokenizer.json"),
            ["tokenizer.json: this is char", "but the tokens were made with byte"],
        ),
    ],
    ids=["truncated", "missing", "meta", "tokenizer"],
)
def test_damaged_tokens_are_refused_and_no_run_is_begun(tmp_path, program, prepared, spoil, parts):
    text, folder = prepared
    spoil(folder)
    program(train.main, *command_line(tmp_path / "runs", text)).assert_refused(*parts, "prepare the text again")
    assert not (tmp_path / "runs").exists()


def test_the_advice_for_damaged_tokens_works(tmp_path, program, prepared):
    text, folder = prepared
    os.truncate(folder / "train.bin", 99)
    shutil.rmtree(folder)
    assert program(train.main, *command_line(tmp_path / "runs", text)).code == 0


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path, text, program):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    program(train.main, *command_line(tmp_path, text)).assert_refused(
        "run exists and is not a run: give another --name"
    )
    assert content(tmp_path) == {"run/thesis.tex": b"mine"}


def test_runs_below_a_file_are_refused(tmp_path, text, program):
    (tmp_path / "runs").write_text("a file")
    program(train.main, *command_line(tmp_path / "runs", text)).assert_refused(str(tmp_path / "runs"))


def test_an_error_of_the_user_is_a_valueerror_that_programs_can_catch(tmp_path, text):
    with pytest.raises(UserError) as error:
        train.run(run_config(tmp_path, text, device="gpu"))
    assert isinstance(error.value, ValueError)


def test_an_interrupted_preparation_is_one_line(tmp_path, text, program, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare", interrupted)
    ended = program(train.main, *command_line(tmp_path, text), name="train.py")
    assert (ended.code, ended.err) == (130, "train.py: interrupted\n")
