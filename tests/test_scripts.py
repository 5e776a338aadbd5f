"""The scripts: what generating costs, one table of runs, and the demo, each in a tiny form."""

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE_S, RUN, run_config, save_run, start_program

import generate
import train
from artifacts.run_dir import RunDir
from configs.load import from_command_line
from model import cost
from model.errors import UserError
from scripts import demo, measure
from scripts.report import __main__ as report
from scripts.report.collect import collect


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text) -> Path:
    """Two finished runs of two windows."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "matmul_rate", lambda runtime: 1e12)
        for name, window in (("wide", 9), ("narrow", 3)):
            train.run(run_config(root, text, name, model={"window": window}))
    return root


# measure


def options(run: Path, **changes) -> measure.Options:
    return measure.Options(**({"run": run, "new_tokens": 5, "rounds": 3, "device": "cpu"} | changes))


def test_measuring_writes_what_generating_costs(runs):
    figures = measure.measure(options(runs / "wide"))
    assert json.loads((runs / "wide" / "measured.json").read_text()) == figures
    model = RunDir(runs / "wide").config().model
    assert figures["cache_length"] == 16 + 5
    assert figures["cache_bytes"] == cost.cache_bytes(model, 21, dtype=getattr(torch, figures["dtype"]))
    assert figures["decode_tokens_per_s"] > 0
    assert figures["prefill_tokens_per_s"] > 0
    weights = cost.n_params(model) * getattr(torch, figures["dtype"]).itemsize
    assert figures["peak_memory_generate_bytes"] > weights + figures["cache_bytes"]
    assert figures["peak_memory_method"] == "cpu-live-tensors"


def test_the_peak_of_generating_is_the_same_twice(runs):
    one, other = (measure.measure(options(runs / "narrow"))["peak_memory_generate_bytes"] for _ in "ab")
    assert one == other


def test_a_narrow_window_has_the_smaller_cache(runs):
    wide, narrow = (measure.measure(options(runs / name))["cache_bytes"] for name in ("wide", "narrow"))
    assert narrow < wide


def test_measuring_learned_positions_stays_within_them(tmp_path):
    save_run(tmp_path / "run", position="learned")
    figures = measure.measure(options(tmp_path / "run"))
    assert figures["decode_tokens_per_s"] > 0


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--new-tokens", "0"], ["--new-tokens", "-3"]], ids=" ".join)
def test_measuring_nothing_is_refused(program, runs, wrong):
    program(measure.main, runs / "wide", *wrong, "--device", "cpu").assert_refused(wrong[0], f"({wrong[1]})")


def test_measuring_what_is_no_run_is_refused(program, tmp_path):
    program(measure.main, tmp_path / "nowhere").assert_refused("nowhere is not a run: it has no config.json")


# report


def test_a_report_is_a_table_a_page_and_plots(program, runs, tmp_path):
    ended = program(report.main, runs / "wide", runs / "narrow", "--out", tmp_path / "report")
    assert ended.code == 0
    table = ended.out.splitlines()
    assert [row.split("|")[1].strip() for row in table[:1] + table[2:4]] == ["variant", "wide", "narrow"]
    assert len({len(row) for row in table[:4]}) == 1
    files = {file.name for file in (tmp_path / "report").iterdir()}
    assert files >= {"report.md", "report.html", "results.csv", "timings.csv", "loss.png", "cache.png"}


def test_a_row_says_what_the_run_came_to(runs):
    run = RunDir(runs / "wide")
    summary, config = run.summary(), run.config()
    (row,) = collect([runs / "wide"]).results.to_dict("records")
    shared = (summary.keys() & row.keys()) - {"variant"}
    assert shared >= {"val_perplexity", "val_bits_per_byte", "peak_memory_train_bytes", "stream_hash"}
    assert {key: row[key] for key in shared} == {key: summary[key] for key in shared}
    assert (row["variant"], row["layers"], row["kernel"]) == ("wide", "swa full", summary["kernel"])
    assert row["n_params"] == cost.n_params(config.model)
    assert row["kv_cache_bytes_32768"] == cost.cache_bytes(config.model, 32_768)


def test_runs_evaluated_on_different_streams_share_no_table(runs, tmp_path, text, unmeasured):
    other = train.run(run_config(tmp_path, text, "other", train={"eval_tokens": 50})).path
    with pytest.raises(UserError) as error:
        collect([runs / "wide", other])
    assert str(error.value) == "these runs have 2 different evaluation streams: their losses are not comparable"


def test_the_folder_of_runs_may_hold_the_report_itself(runs, tmp_path, program):
    for name in ("wide", "narrow"):
        (tmp_path / name).symlink_to(runs / name, target_is_directory=True)
    for _ in range(2):  # as `python -m scripts.report runs/demo/* --out runs/demo`, twice
        ended = program(report.main, *sorted(tmp_path.iterdir()), "--out", tmp_path)
        assert ended.code == 0, ended.err


# demo


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path, text, program, capsys, unmeasured_speed) -> list[tuple[str, ...]]:
    """The demo with a tiny config and its programs called in this process; the commands it gave."""
    lines = [f"[model]\nblock_size = 16\nn_layer = {RUN['model']['n_layer']}\nn_head = 4\nn_embd = 24"]
    lines.append(f'[data]\ntokenizer = "byte"\ntext = "{text}"\ndir = "{text.parent / "prepared"}"')
    lines.append(
        "[train]\nmax_steps = 6\nglobal_batch_tokens = 96\neval_every = 3\nlog_every = 1\ncheckpoint_every = 3"
    )
    config = tmp_path / "tiny.toml"
    config.write_text("\n".join(lines) + "\n[log]\nprogress = false\n")
    given: list[tuple[str, ...]] = []
    mains = {"train.py": train.main, "scripts.measure": measure.main, "generate.py": generate.main}

    def call(*arguments: str, quiet: bool = False) -> None:
        given.append(arguments)
        name, *rest = arguments[1:] if arguments[0] == "-m" else arguments
        short = {"scripts.measure": ["--new-tokens", "3", "--rounds", "1"]}.get(name, [])
        ended = program(mains[name], *rest, *short)
        if ended.code:
            raise SystemExit(ended.code)
        if not quiet:
            print(ended.out)

    monkeypatch.setattr(demo, "CONFIG", str(config))
    monkeypatch.setattr(demo, "_python", call)
    return given


def test_the_demo_trains_measures_and_compares_three_kinds_of_attention(tiny_demo, tmp_path, capsys):
    demo.demo(demo.Options(out=tmp_path / "demo"))
    names = ["mha", "gqa", "gqa-swa"]
    assert {*names, "report.html", "results.csv", "loss.png"} <= {file.name for file in (tmp_path / "demo").iterdir()}
    table = capsys.readouterr().out.split("\n\n")[-2]
    rows = [row for row in table.splitlines() if row.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == names
    assert "not measured" not in table
    assert [arguments[0] for arguments in tiny_demo] == ["train.py"] * 3 + ["-m"] * 3 + ["generate.py"] * 3


@pytest.mark.usefixtures("unmeasured_memory")
def test_the_variants_of_the_demo_see_the_same_data_and_differ_in_attention_alone(tiny_demo, tmp_path):
    demo.demo(demo.Options(out=tmp_path / "demo", steps=2))
    configs = [RunDir(tmp_path / "demo" / name).config() for name in demo.VARIANTS]
    assert len({config.model_dump_json(exclude={"model", "name"}) for config in configs}) == 1
    attention = {"n_kv_head", "pattern", "window"}
    assert len({config.model.model_dump_json(exclude=attention) for config in configs}) == 1
    assert [config.train.max_steps for config in configs] == [2, 2, 2]
    streams = {RunDir(tmp_path / "demo" / name).summary()["stream_hash"] for name in demo.VARIANTS}
    assert len(streams) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured_memory")
def test_an_interrupted_demo_goes_on(tiny_demo, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(demo, "report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            demo.demo(demo.Options(out=tmp_path / "demo"))
    weights = {file: file.stat().st_mtime_ns for file in (tmp_path / "demo").rglob("*.safetensors")}
    demo.demo(demo.Options(out=tmp_path / "demo"))
    assert {file: file.stat().st_mtime_ns for file in weights} == weights


def test_a_variant_that_fails_ends_the_demo_with_its_code(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "CONFIG", str(tmp_path / "missing.toml"))
    with pytest.raises(SystemExit) as end:
        demo.demo(demo.Options(out=tmp_path / "demo"))
    assert end.value.code == 2


@pytest.mark.slow
def test_a_stopped_demo_stops_what_it_runs_and_waits_until_that_has_saved(tmp_path):
    saved = tmp_path / "saved"
    save = f"signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), open({str(saved)!r}, 'w'), exit(143)))"
    program = f"import signal, time; {save}; open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(60)"
    demo_of = f"from scripts import demo; demo._python('-c', {program!r})"
    started = start_program("-c", demo_of)
    while not (tmp_path / "ready").exists() and started.poll() is None:
        time.sleep(0.01)
    started.terminate()
    assert (started.wait(PATIENCE_S), saved.exists()) == (143, True), started.communicate()[1]


def test_the_real_variants_can_be_built():
    for arguments in demo.VARIANTS.values():
        config = from_command_line([demo.CONFIG, *arguments], prog="train.py", description="")
        assert len(config.model.layers) == config.model.n_layer
