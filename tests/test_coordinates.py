"""What the outputs of networks of several widths do in their first steps."""

import pytest
from conftest import PNG, command_line, run_config

from data.prepare import prepare
from model.errors import UserError
from scripts import coordinates
from scripts.bench.timing import exponent

WIDTHS = (32, 64, 128)


def exponents(tmp_path, text, **changes) -> dict[str, float]:
    """By part: p of change ~ width ** p, after two steps of a tiny run."""
    config = run_config(tmp_path, text, **changes)
    prepared = prepare(config.data.text, config.data.tokenizer, root=config.data.dir, progress=False)
    found = [coordinates.changes(coordinates.of_width(config, width, 257), prepared, steps=2) for width in WIDTHS]
    return {part: exponent(WIDTHS, [row[part] for row in found]) for part in coordinates.PARTS}


def test_muon_moves_layers_alike_at_every_width_where_they_begin_so(tmp_path, text):
    alike = exponents(tmp_path, text, model={"n_embd": 32, "init_std": None})
    growing = exponents(tmp_path, text, model={"n_embd": 32})  # as GPT-2 begins
    for part in ("mixers", "MLPs"):
        assert abs(alike[part]) < 0.2
        assert growing[part] > 0.6


def test_adamw_moves_layers_more_the_wider_they_are_unless_its_rate_falls(tmp_path, text):
    model = {"n_embd": 32, "init_std": None}
    adamw = {"optimizer": "adamw", "adamw_lr": 3e-3}
    constant, falling = (
        exponents(tmp_path, text, model=model, optim=adamw | more) for more in ({}, {"base_width": 32})
    )
    for part in ("mixers", "MLPs"):
        assert constant[part] > 0.2 > 0 > falling[part]


def test_heads_stay_as_wide_and_in_groups_as_large(tmp_path, text):
    config = run_config(tmp_path, text, model={"n_embd": 32, "mlp_width": 40})  # 4 heads of 8, 2 KV heads
    model = coordinates.of_width(config, 48, 300).model
    assert (model.n_embd, model.n_head, model.kv_heads, model.head_width, model.mlp_width) == (48, 6, 3, 8, 60)
    assert model.vocab_size == 300
    assert coordinates.of_width(config, 32, 257).model == config.model.model_copy(update={"vocab_size": 257})


@pytest.mark.parametrize("width", [8, 20, 24])
def test_widths_that_heads_do_not_fill_are_refused(tmp_path, text, width):
    config = run_config(tmp_path, text, model={"n_embd": 32})
    with pytest.raises(UserError) as error:
        coordinates.of_width(config, width, 257)
    assert str(error.value).startswith(f"--widths ({width}) must be multiples of 16: head_dim is 8, with ")


def test_the_program_prints_a_table_and_draws(tmp_path, text, program):
    picture = tmp_path / "widths.png"
    line = command_line(tmp_path, text, model={"n_embd": 32})
    ended = program(coordinates.main, *line, "--widths", 16, 32, "--steps", 2, "--to", picture)
    assert ended.code == 0
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in ended.out.splitlines() if row.startswith("|")]
    assert rows[0] == ["RMS change of", "16", "32", "exponent"]
    assert [row[0] for row in rows[2:]] == list(coordinates.PARTS)
    for row in rows[2:]:
        assert float(row[3]) == pytest.approx(exponent((16, 32), [float(x) for x in row[1:3]]), abs=0.03)
    assert picture.read_bytes().startswith(PNG)


def test_one_width_is_refused(tmp_path, text, program):
    program(coordinates.main, *command_line(tmp_path, text), "--widths", 24).assert_refused(
        "--widths (24) must be at least two different numbers"
    )


@pytest.mark.parametrize("wrong", [("--widths", 0), ("--steps", 0)])
def test_numbers_out_of_range_are_refused(tmp_path, text, program, wrong):
    ended = program(coordinates.main, *command_line(tmp_path, text), *wrong)
    ended.assert_refused("must be at least 1")
