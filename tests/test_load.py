"""From a file and a command line to a config: merged, validated once, and refused in one line."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, run_program
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.load import build, from_command_line, load
from configs.schema import RunConfig
from model.errors import UserError
from model.mixers import MIXERS
from model.section import Section

WORDS = ", ".join(MIXERS)

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def refusal(file: Path | None, overrides: dict | None = None) -> str:
    """The message of the UserError, which is one line."""
    with pytest.raises(UserError) as error:
        load(file, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def line(*arguments: str) -> RunConfig:
    return from_command_line(list(arguments), prog="train.py", description="")


def leaves(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested dictionaries as {"section.key": value}."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


DEFAULTS = leaves(RunConfig().model_dump())
SECTIONS = sorted({key.split(".")[0] for key in DEFAULTS if "." in key})


# A file and a command line are one thing.


def test_without_a_file_there_are_the_defaults():
    assert load(None) == RunConfig() == line()


def test_a_file_changes_what_it_says_and_names_the_run(tmp_path):
    config = load(write(tmp_path / "mine.toml", "seed = 7\n[model]\nn_layer = 3\n"))
    assert config == load(None, {"name": "mine", "seed": 7, "model": {"n_layer": 3}})


def test_overrides_replace_keys_and_leave_their_neighbours(tmp_path):
    file = write(tmp_path / "a.toml", 'name = "b"\n[model]\nn_layer = 3\nn_sink = 2\n[train]\nmax_steps = 5\n')
    config = line(str(file), "--model.n_layer", "4", "--name", "c")
    assert (config.name, config.model.n_layer, config.model.n_sink, config.train.max_steps) == ("c", 4, 2, 5)


def test_a_section_that_is_a_value_in_the_file_is_refused_from_the_command_line_too(tmp_path):
    file = write(tmp_path / "a.toml", "model = [1]\n")
    with pytest.raises(UserError, match=re.escape(f"{file}: model ([1]): input should be a valid dictionary")):
        line(str(file))


def test_overrides_reach_into_tables_by_kind(tmp_path):
    file = write(tmp_path / "a.toml", "[model]\nrope_base = {full = 1e6, swa = 1e4}\n")
    assert line(str(file), "--model.rope_base", "full", "5e5").model.rope_base == {"full": 5e5, "swa": 1e4}


@pytest.mark.parametrize(
    ("broken", "mend"),
    [
        ("n_layer = 'six'", {"n_layer": 6}),
        ("n_head = 6\nn_kv_head = 4", {"n_kv_head": 3}),
        ("n_head = 6\nn_kv_head = 4", {"n_kv_head": "none"}),
        ("pattern = '5:1'", {"window": 3}),
        ("pattern = 'sva'", {"pattern": "full"}),
        ("window = 0", {"window": 1}),
        ("n_embd = 100", {"head_dim": 16}),
    ],
)
def test_an_override_mends_a_broken_file(tmp_path, broken, mend):
    file = write(tmp_path / "a.toml", f"[model]\n{broken}\n")
    refusal(file)
    assert load(file, {"model": mend}).name == "a"


def test_options_may_be_spelled_with_hyphens_or_underscores():
    assert line("--model.n-kv-head", "2", "--out-dir", "x") == line("--model.n_kv_head", "2", "--out_dir", "x")


def test_switches_pairs_and_tables_have_a_spelling_on_the_line():
    config = line("--model.no-tie-embeddings", "--log.wandb", "--optim.betas", "0.8", "0.9", "--model.position", "none")
    assert not config.model.tie_embeddings
    assert config.log.wandb
    assert config.optim.betas == (0.8, 0.9)
    assert config.model.position == "none"


@pytest.mark.parametrize("key", ["model.n_kv_head", "train.eval_tokens", "train.micro_batch", "model.mlp_width"])
def test_none_is_none_in_a_file_and_on_the_line(tmp_path, key):
    section, _, name = key.partition(".")
    number = write(tmp_path / "number.toml", f"[{section}]\n{name} = 2\n")
    none = write(tmp_path / "none.toml", f'[{section}]\n{name} = "none"\n')
    for config in (load(none), line(str(number), f"--{key}", "none")):
        assert leaves(config.model_dump())[key] is None
    assert leaves(line(str(none), f"--{key}", "2").model_dump())[key] == 2


def test_none_is_a_word_where_none_is_no_value(tmp_path):
    assert load(write(tmp_path / "a.toml", '[model]\nposition = "none"\n')).model.position == "none"


def test_a_config_survives_json():
    config = line("--model.rope_base", "full", "1e6", "--out_dir", "elsewhere", "--model.n_kv_head", "2")
    assert build(RunConfig, json.loads(json.dumps(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize("section", [None, *SECTIONS])
def test_a_config_cannot_be_changed(section):
    record = getattr(RunConfig(), section) if section else RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(record, next(iter(type(record).model_fields)), 1)


@given(rows=st.integers(1, 600), block_size=st.sampled_from([1, 16, 100, 512, 1024, 40_000]))
@example(rows=59, block_size=512)
def test_chosen_micro_batches_divide_the_batch_and_are_small(rows, block_size):
    train = {"global_batch_tokens": rows * block_size}
    config = load(None, {"model": {"block_size": block_size}, "train": train})
    assert config.global_rows == rows
    assert rows % config.micro_rows == 0
    assert config.micro_rows == 1 or config.micro_rows * block_size <= 16_384


# What is wrong is said with its place, its name, its value and the nearest name.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[model]\nn_kv_heads = 2", "model.n_kv_heads is unknown; did you mean n_kv_head?"),
        ("[model]\nn-head = 2", "model.n-head is unknown; did you mean n_head?"),
        ('[model]\n"n head" = 2', "model.n head is unknown; did you mean n_head?"),
        ("[modle]\nn_head = 2", "modle is unknown; did you mean model?"),
        ("max_steps = 2", "max_steps is unknown; known are name, out_dir, seed, device, dtype, compile, model, data"),
        ("1 = 2", "1 is unknown; known are name, out_dir, seed"),
        ("[train]\nzzz = 2", "train.zzz is unknown; known are max_steps, global_batch_tokens"),
        ("[model]\nlayers = 3\n[train]\nsteps = 1", "model.layers is unknown; did you mean n_layer? (and 1 more)"),
        ('[model]\nn_layer = "six"', "model.n_layer ('six'): input should be a valid integer"),
        ("[model]\nn_layer = 2.5", "model.n_layer (2.5): input should be a valid integer"),
        ("[model]\nn_layer = 0", "model.n_layer (0): input should be greater than or equal to 1"),
        ('[model]\nn_layer = "none"', "model.n_layer ('none')"),
        ("[model]\nwindow = 0", "model.window (0): input should be greater than or equal to 1"),
        ("[model]\nwindow = -3", "model.window (-3): input should be greater than or equal to 1"),
        ('[model]\nqk_norm = "perhaps"', "model.qk_norm ('perhaps'): input should be a valid boolean"),
        (
            '[model]\nposition = "ropee"',
            "model.position ('ropee'): input should be 'rope', 'learned', 'alibi' or 'none'",
        ),
        ('[model]\nrope_base = "x"', "model.rope_base ('x'): input should be a valid number"),
        ('[optim]\nschedule = "cosin"', "optim.schedule ('cosin'): input should be 'cosine', 'trapezoid' or 'const"),
        ("[optim]\nweight_decay = nan", "optim.weight_decay (nan): input should be a finite number"),
        ("[optim]\nbetas = [0.9, 1.0]", "optim: betas ((0.9, 1.0)) must each be at least 0 and below 1"),
        ("[optim]\nbetas = [0.9]", "optim.betas ([0.9]): "),
        ("[model]\nn_embd = {a = 1}", "model.n_embd ({'a': 1}) is a section here, and should be a value"),
        ("model = 3", "model (3)"),
        ('data = "pydocs"', "data ('pydocs')"),
        ("[[model]]\nn_layer = 2", "model ([{'n_layer': 2}])"),
        ("seed = -1", "seed (-1): input should be greater than or equal to 0"),
        ("seed = 100000000000000000000000000", "seed (100000000000000000000000000)"),
        ("device = 3", "device (3): input should be a valid string"),
        (
            'dtype = "float8"',
            "dtype ('float8'): input should be 'auto', 'float32', 'bfloat16', 'float16', 'fp32', 'bf16'",
        ),
        (
            'dtype = "fp16"',
            "dtype (float16) is not for training: gradients below its smallest number vanish without loss",
        ),
        ('name = "two words"', "name ('two words')"),
        ('name = "/absolute"', "name ('/absolute')"),
    ],
)
def test_one_wrong_key_of_a_file_is_said_with_its_place_and_value(tmp_path, content, message):
    file = write(tmp_path / "a.toml", content)
    assert refusal(file).startswith(f"{file}: {message}")


def test_a_switch_is_no_number(tmp_path):
    file = write(tmp_path / "a.toml", "[model]\nn_layer = true")
    assert refusal(file).startswith(f"{file}: model")
    assert "n_layer (True)" in refusal(file)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"n_embd": 20, "n_head": 3}, "n_embd (20) must be divisible by n_head (3), or head_dim be given"),
        ({"n_head": 6, "n_kv_head": 4}, "n_head (6) must be divisible by n_kv_head (4)"),
        ({"n_embd": 18, "n_head": 2}, "RoPE rotates pairs: head_dim (9) must be even"),
        ({"head_dim": 7}, "RoPE rotates pairs: head_dim (7) must be even"),
        ({"pattern": "swa"}, "pattern ('swa') has swa layers: give window, the number of keys a query sees"),
        (
            {"pattern": "swa ful", "window": 2},
            f"'ful' is not a layer; layers are {WORDS}, as \"swa*5 full\"; did you me",
        ),
        ({"pattern": "5:"}, "pattern ('5:'): a ratio is \"a:b\""),
        ({"pattern": "0:0"}, "pattern ('0:0'): a ratio is \"a:b\""),
        ({"pattern": ""}, "pattern ('') is empty"),
        ({"position": {"swa": "rope"}}, "position has no value for full layers, which pattern ('full') has"),
        (
            {"rope_base": {"sliding": 1.0}},
            f"rope_base.sliding is not a kind of layer; the kinds are {WORDS}",
        ),
        ({"rope_base": -1.0}, "rope_base (-1.0) must be above 0"),
    ],
)
def test_keys_that_contradict_each_other_are_said_with_their_values(model, message):
    assert f"model: {message}" in refusal(None, {"model": model}) or message in refusal(None, {"model": model})


def test_a_batch_that_is_no_whole_number_of_rows_is_said_with_its_values():
    message = "train.global_batch_tokens (1000) must be a multiple of model.block_size (256)"
    assert refusal(None, {"train": {"global_batch_tokens": 1000}}) == message


def test_a_micro_batch_that_does_not_divide_the_rows_is_said_with_its_values():
    message = "train.micro_batch (7) must divide the 32 rows of a step (global_batch_tokens / block_size)"
    assert refusal(None, {"train": {"micro_batch": 7}}) == message


def test_an_error_of_the_line_does_not_blame_the_file(tmp_path):
    file = write(tmp_path / "a.toml", "[model]\nn_layer = 2\n")
    assert refusal(file, {"model": {"window": 0}}).startswith("model.window (0)")
    assert refusal(write(file, "[model]\nwindow = 0\n"), {"model": {"n_layer": 2}}).startswith(f"{file}: model.window")


def test_a_file_that_does_not_exist_is_said_with_the_nearest_one(tmp_path):
    write(tmp_path / "shakespeare.toml", "")
    file = tmp_path / "shakespear.toml"
    assert refusal(file) == f"{file} does not exist; did you mean {tmp_path / 'shakespeare.toml'}?"
    assert refusal(tmp_path / "q.toml").startswith(f"{tmp_path / 'q.toml'} does not exist")


@pytest.mark.parametrize("content", [b"[model\n", b"n_layer: 3", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_file_that_is_no_toml_is_said(tmp_path, content):
    file = tmp_path / "a.toml"
    file.write_bytes(content)
    assert refusal(file).startswith(f"{file} cannot be read as TOML: ")


def test_a_folder_is_no_config(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path} cannot be read as TOML: ")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=2)


@given(key=st.sampled_from([*sorted(DEFAULTS), *SECTIONS]), value=VALUES)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line_that_names_it(key, value):
    section, _, name = key.partition(".")
    message = name or section
    try:
        load(None, {section: {name: value}} if name else {section: value})
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert (name or section) in message


@given(key=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12), section=st.sampled_from(SECTIONS))
@example(key="", section="model")
@example(key="n-head", section="model")
def test_any_unknown_key_is_refused_by_its_name(key, section):
    if key not in {name.rpartition(".")[2] for name in [*DEFAULTS, *SECTIONS]}:
        assert refusal(None, {section: {key: 1}}).startswith(f"{section}.{key} is unknown; ")
        assert refusal(None, {key: 1}).startswith(f"{key} is unknown; ")


# The command line.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.n_kv_heads", "2"], ["--model.n_kv_heads", "--model.n-kv-head"]),
        (["--modle.window", "2"], ["--modle.window", "--model.window"]),
        (["--window", "2"], ["--window", "--model.window"]),
        (["--model.n_lay", "2"], ["--model.n_lay", "--model.n-layer"]),
        (["--model.n_kv_head", "2.5"], ["--model.n-kv-head", "2.5"]),
        (["--train.max_steps", "many"], ["--train.max-steps", "many"]),
        (["--dtype", "float8"], ["--dtype", "float8", "bfloat16"]),
        (["--model.n_layer"], ["--model.n-layer"]),
        (["a.toml", "b.toml"], ["b.toml"]),
    ],
    ids=lambda x: x[0] if x[0].startswith("-") else "",
)
def test_a_line_that_cannot_be_read_shows_what_and_the_nearest_option(capsys, arguments, parts):
    with pytest.raises(SystemExit) as end:
        line(*arguments)
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert [part for part in parts if part not in shown] == []


def test_help_names_every_field_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        line("--help")
    assert end.value.code == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]+|-{3,}", " ", capsys.readouterr().out).split())
    options = dict(re.findall(r"--([\w.-]+)(?:, --[\w.-]+)? (.*?)(?= --|$)", shown))
    for key, value in DEFAULTS.items():
        assert f"(default: {'none' if value is None else value})" in options[key.replace("_", "-")]


def test_a_typo_ends_a_real_process_with_2(tmp_path):
    file = write(tmp_path / "a.toml", "[model]\nn_kv_heads = 2\n")
    in_file = run_program("train.py", file, "--out_dir", tmp_path / "runs")
    in_file.assert_refused(f"train.py: {file}: model.n_kv_heads is unknown; did you mean n_kv_head?")
    assert sorted(tmp_path.iterdir()) == [file]


# The configs that come along.


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_loads(file):
    assert load(file).name == file.stem


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_lists_only_what_differs(file):
    said, meant = leaves(tomllib.loads(file.read_text())), leaves(load(file).model_dump())
    assert {key: value for key, value in said.items() if meant.get(key) == DEFAULTS.get(key)} == {}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_says_what_it_is_for_and_is_short(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 40


def test_gpt2_has_the_124_m_shape():
    from model import cost

    model = load(ROOT / "configs/gpt2.toml").model
    padding = (model.vocab_size - 50_257) * model.n_embd
    assert cost.n_params(model) - padding == 124_439_808


def test_sections_have_a_description_for_every_field():
    def fields(schema: type[Section]):
        for name, field in schema.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from fields(field.annotation)
            else:
                yield f"{schema.__name__}.{name}", field.description

    assert [name for name, description in fields(RunConfig) if not description] == []


@pytest.mark.parametrize("name", ["..", "../mine", "a/../b", ".hidden", "a//b", "", "-x"])
def test_a_name_that_leads_out_of_the_directory_of_runs_is_refused(name):
    with pytest.raises(UserError, match=r"^name \('"):
        load(None, {"name": name})
    assert load(None, {"name": "a/b.c-1_d+2"}).path == RunConfig().out_dir / "a/b.c-1_d+2"


def test_an_empty_text_is_refused():
    with pytest.raises(UserError, match=r"^data\.text \(''\): "):
        load(None, {"data": {"text": ""}})
