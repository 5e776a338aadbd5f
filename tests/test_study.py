"""A study's file: what it may say, the cells it comes to, and the studies that ship."""

from pathlib import Path

import pytest
from conftest import ROOT, RUN
from studies import cells_of

from model import cost
from model.config import ModelConfig
from scripts.ablate import __main__ as lab
from scripts.ablate.plan import train_and_evaluation_flops
from scripts.ablate.study import cells, load_study
from scripts.memory import with_known_vocabulary

SHIPPED = sorted((ROOT / "configs" / "ablations").glob("*.toml"))


# What a file may say.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "wid"}, "baseline (wid) is not a variant; did you mean wide?"),
        ({"baseline": "mha"}, "baseline (mha) is not a variant; it must be one of wide, narrow"),
        ({"baseline": None}, "baseline"),
        ({"variants": {}}, "the study has no variants: add [variants.NAME] tables or a [grid]"),
        ({"seeds": []}, "seeds ([]) must be a list of different numbers, at least one"),
        ({"seeds": [1, 2, 1]}, "seeds ([1, 2, 1]) must be a list of different numbers, at least one"),
        ({"seeds": ["a"]}, "seeds"),
        ({"varaints": {}}, "varaints is unknown; did you mean variants?"),
        ({"grid": {"model": {"window": 3}}}, "grid.model.window (3) must be a list of the values to try"),
        ({"grid": {"model": {"window": []}}}, "grid.model.window ([]) must be a list"),
        ({"overrides": {"seed": 3}}, "seed is set by the study for each cell"),
        ({"variants": {"wide": {"name": "x"}}}, "name is set by the study for each cell"),
        ({"measure": [[]]}, "measure has an empty command"),
        ({"base": "configs/dmo.toml"}, "configs/dmo.toml does not exist; did you mean configs/demo.toml?"),
        (
            {"variants": {"wide": {"model": {"windw": 3}}}},
            "variant 'wide': model.windw is unknown; did you mean window?",
        ),
        (
            {"variants": {"wide": {"model": {"n_kv_head": 3}}}},
            "variant 'wide': model: n_head (4) must be divisible by n_kv_head (3)",
        ),
        (
            {"variants": {"wide": {"model": {"window": 9}}, "same": {"model": {"window": 9}}}},
            "variants 'wide' and 'same' are the same experiment: remove one",
        ),
        ({"measure": [["scripts.mesure"]]}, "measure: there is no module scripts.mesure"),
    ],
    ids=str,
)
def test_a_wrong_study_is_refused_in_one_line(write_study, program, changes, words):
    file = write_study(**changes)
    ended = program(lab.main, file, "--out", file.with_suffix(""))
    ended.assert_refused(f"{file}: ", words)
    assert not file.with_suffix("").exists()


def test_a_run_in_place_of_a_study_is_refused_by_what_it_lacks(tmp_path, program):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nmax_steps = 3\n")
    program(lab.main, file).assert_refused(f"{file}: baseline is missing: write it")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--jobs", "0"], "--jobs (0) must be at least 1"),
        *((["--shard", x], f"--shard ({x}) must be i/n with i from 1 to n") for x in ("0/2", "3/2", "1", "a/b")),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(write_study, program, options, words):
    program(lab.main, write_study(), *options).assert_refused(words)


def test_a_study_that_is_not_there_is_refused_with_the_nearest_name(write_study, program):
    file = write_study()
    program(lab.main, file.with_name("smal.toml")).assert_refused(f"smal.toml does not exist; did you mean {file}?")


def test_a_grid_is_all_combinations_beside_the_named_variants(write_study):
    grid = {"model": {"window": [3, 5], "pattern": ["swa", "1:1"]}, "optim": {"muon_lr": [0.01]}}
    file = write_study(grid=grid, variants={"wide": {"model": {"window": 9}}})
    first = cells_of(file)[:5]
    assert [cell.variant for cell in first] == [
        "wide",
        *("window=3 pattern=swa", "window=3 pattern=1:1", "window=5 pattern=swa", "window=5 pattern=1:1"),
    ]
    models = [cell.config.model for cell in first]
    assert [(m.window, m.pattern) for m in models] == [(9, "swa full"), (3, "swa"), (3, "1:1"), (5, "swa"), (5, "1:1")]
    assert [cell.config.optim.muon_lr for cell in first] == [0.02, 0.01, 0.01, 0.01, 0.01]


def test_variants_differ_from_the_base_in_their_overrides_alone(write_study):
    wide, narrow = (cell.config for cell in cells_of(write_study())[:2])
    assert wide.model.n_embd == RUN["model"]["n_embd"]
    assert narrow.model_copy(update={"name": wide.name, "model": wide.model}) == wide
    assert narrow.model.model_copy(update={"window": 9}) == wide.model


def test_one_seed_comes_after_the_other_so_that_pairs_are_whole(write_study):
    assert [(cell.seed, cell.variant) for cell in cells_of(write_study())] == [
        (1, "wide"),
        (1, "narrow"),
        (2, "wide"),
        (2, "narrow"),
    ]


def test_a_cell_is_named_by_its_content_wherever_it_stands(write_study):
    file, other = write_study(), write_study("other", seeds=[2, 1], question="", train={"log_every": 1})
    one, two = ({c.config.name for c in cells_of(f)} for f in (file, other))
    assert one == two
    assert len(one) == 4
    assert not one & {c.config.name for c in cells_of(write_study("longer", train={"max_steps": 13}))}


def test_shards_are_all_cells_each_once(write_study):
    every = cells_of(write_study(seeds=[1, 2, 3, 4]))
    shards = [lab.of_shard(every, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(map(len, shards)) == [2, 3, 3]
    assert sorted(str(cell) for shard in shards for cell in shard) == sorted(map(str, every))


def test_a_dry_run_shows_the_cells_and_leaves_nothing(write_study, program, monkeypatch):
    monkeypatch.setattr("scripts.ablate.plan.matmul_rate", lambda runtime: 1e12)
    file = write_study()
    ended = program(lab.main, file, "--dry-run", "--shard", "1/2", "--out", file.with_suffix(""))
    assert ended.code == 0, ended.err
    rows = [[x.strip() for x in line.split("|")[2:6]] for line in ended.out.splitlines() if line.startswith("|")]
    assert rows[2:] == [["wide", "1", "12 steps", "0.02 M"], ["wide", "2", "12 steps", "0.02 M"]]
    assert "an estimate from FLOPs, at 25% MFU (assumed) of the 1,000 GFLOP/s measured" in ended.out
    assert not file.with_suffix("").exists()


def test_a_tokenizer_that_is_none_is_no_plan(write_study, program, monkeypatch):
    monkeypatch.setattr("scripts.ablate.plan.matmul_rate", lambda runtime: 1e12)
    file = write_study(overrides={"data": {"tokenizer": "bqe-300"}}, variants={"wide": {}})
    program(lab.main, file, "--dry-run").assert_refused("tokenizer 'bqe-300' must be one of")


def test_the_estimate_counts_training_and_evaluation(write_study):
    config = with_known_vocabulary(cells_of(write_study(train={"eval_tokens": 480}))[0].config)
    per_row = cost.train_flops(config.model, 16)
    assert train_and_evaluation_flops(config) == pytest.approx(per_row * (12 * 6 + 3 * 30 / 3))


# Studies that ship.


def test_six_studies_of_attention_ship_each_with_a_larger_sibling_and_three_of_training():
    names = {file.stem for file in SHIPPED}
    studies = ("window", "ratio", "heads", "sinks", "recall", "extrapolation")
    assert names == {name + kind for name in studies for kind in ("", "-gpu")} | {"rates", "recipe", "widths"}


def shipped(name: str) -> dict[str, ModelConfig]:
    """The models of a study's variants, a vocabulary given."""
    file = ROOT / "configs" / "ablations" / f"{name}.toml"
    first = {cell.variant: cell.config.model for cell in reversed(cells(load_study(file), file, Path("out")))}
    return {variant: model.model_copy(update={"vocab_size": 2048}) for variant, model in reversed(first.items())}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_study_says_what_it_asks_and_has_three_seeds(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(file)
    assert study.question.endswith("?")
    assert study.seeds == (1, 2, 3)
    assert study.measure[0] == ("scripts.measure",)
    assert len(cells(study, file, Path("out"))) == 3 * len(study.all_variants())


@pytest.mark.parametrize("kind", ["", "-gpu"])
def test_windows_go_from_a_32nd_of_the_context_to_all_of_it(monkeypatch, kind):
    monkeypatch.chdir(ROOT)
    full, *models = shipped(f"window{kind}").values()
    assert [model.window for model in models] == [full.block_size // 2**n for n in (5, 4, 3, 2, 1, 0)]
    assert {model.kinds[:6] for model in models} == {("swa",) * 5 + ("full",)}
    assert set(full.kinds) == {"full"}


@pytest.mark.parametrize("kind", ["", "-gpu"])
def test_ratios_fall_from_full_to_all_sliding_at_one_window(monkeypatch, kind):
    monkeypatch.chdir(ROOT)
    models = shipped(f"ratio{kind}")
    assert list(models) == ["full", "1:1", "3:1", "5:1", "7:1", "all sliding"]
    n_full = [model.kinds.count("full") for model in models.values()]
    assert n_full == sorted(n_full, reverse=True)
    assert n_full[0] == models["full"].n_layer > n_full[1] > n_full[2] > n_full[4] > n_full[5] == 0
    assert len({model.window for model in models.values()}) == 1


@pytest.mark.parametrize("kind", ["", "-gpu"])
def test_heads_are_compared_at_equal_shape_and_at_equal_parameters(monkeypatch, kind):
    monkeypatch.chdir(ROOT)
    models = shipped(f"heads{kind}")
    n = {variant: cost.n_params(model) for variant, model in models.items()}
    assert n["MHA"] == n["MHA, SWA"] > n["GQA"] == n["GQA, SWA"] > n["MQA"] == n["MQA, SWA"]
    equal = [variant for variant in models if variant.endswith("=")]
    assert len(equal) == 4
    assert all(n[variant] == pytest.approx(n["MHA"], rel=1e-3) for variant in equal)
