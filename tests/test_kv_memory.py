"""The arithmetic of the KV cache comes out as published, and for what cannot be there is a line."""

import json

import pytest
import torch
from networks import tiny_model

from configs.load import load
from model.config import ModelConfig
from scripts import kv_memory

TINY = {"n_layer": 7, "n_embd": 24, "n_head": 6, "n_kv_head": 2, "pattern": "2:1", "window": 5, "n_sink": 1}


@pytest.fixture
def ask(program):
    return lambda *arguments: program(kv_memory.main, *arguments, name="kv_memory.py")


def test_the_published_figures_come_out_to_the_digit(ask):
    ended = ask("--n-layer", 32, "--n-embd", 4096, "--n-head", 32, "--n-kv-head", 8, "--pattern", "5:1")
    first, second, *_ = ended.out.splitlines()
    assert first == "27 sliding + 5 full layers, 8 KV heads for 32 heads of 128, bfloat16"
    assert second == "at 32,768 tokens: MHA 17.18 GB, GQA 4.29 GB, MHA+SWA 3.14 GB, GQA+SWA 0.78 GB"
    assert ask().out == ended.out  # this shape is the example that needs no arguments


def test_json_has_the_bytes_themselves(ask):
    found = json.loads(ask("--json").out)
    assert found["layers"] == {"sliding": 27, "full": 5}
    bytes_at = {variant: row["32768"] for variant, row in found["bytes"].items()}
    of_a_layer = 2 * 2 * 128  # keys and values of one KV head and token
    swa = 5 * 32_768 + 27 * 1024
    assert bytes_at == {
        "MHA": 32 * 32_768 * 32 * of_a_layer,
        "GQA": 32 * 32_768 * 8 * of_a_layer,
        "MHA+SWA": swa * 32 * of_a_layer,
        "GQA+SWA": swa * 8 * of_a_layer,
    }
    assert list(found["bytes"]["MHA"]) == [str(2**n) for n in range(10, 21)]


@pytest.mark.parametrize("n", [3, 6, 40])
def test_every_variant_is_what_its_cache_allocates(n):
    for name, config in kv_memory.variants(ModelConfig(**TINY)).items():
        model = tiny_model(config.model_copy(update={"vocab_size": 11}), dtype=torch.float32)
        for dtype in (torch.float16, torch.int8):
            assert model.new_cache(1, n, dtype=dtype).nbytes == kv_memory.bytes_at(config, [n], dtype)[n], name


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (TINY, ["MHA", "GQA", "MHA+SWA", "GQA+SWA"]),
        (TINY | {"n_kv_head": 1}, ["MHA", "MQA", "MHA+SWA", "MQA+SWA"]),
        (TINY | {"n_kv_head": None}, ["MHA", "MHA+SWA"]),
        (TINY | {"pattern": "full"}, ["MHA", "GQA"]),
        (
            TINY | {"pattern": "swa", "position": {"swa": "rope"}, "rope_base": {"swa": 100.0}},
            ["MHA", "GQA", "MHA+SWA", "GQA+SWA"],
        ),
    ],
)
def test_variants_are_those_that_differ(shape, names):
    assert list(kv_memory.variants(ModelConfig(**shape))) == names


def test_a_config_gives_the_shape_and_the_line_overrides_it(ask, tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text("[model]\n" + "\n".join(f"{key} = {value!r}" for key, value in TINY.items()))
    ended = ask(file, "--n-layer", 4, "--context", 100, "--dtype", "float32", "--head-dim", 8)
    assert ended.out.startswith("3 sliding + 1 full layers, 2 KV heads for 6 heads of 8, float32\nat 100 tokens: ")
    assert f"GQA+SWA {(3 * 6 + 100) * 2 * 2 * 8 * 4 / 1e6:.2f} MB" in ended.out
    assert [line.split()[0] for line in ended.out.splitlines()[4:6]] == ["100", "1,024"]


def test_learned_positions_end_the_table(ask):
    ended = ask("configs/gpt2.toml")
    assert "at 1,024 tokens: MHA 37.75 MB" in ended.out
    assert ended.out.splitlines()[-1].split() == ["1,024", "37.749"]


def test_presets_have_a_row_each(ask, tmp_path, monkeypatch):
    (tmp_path / "llama3-8b.toml").write_text("[model]\nn_layer = 32\nn_head = 32\nn_kv_head = 8\nn_embd = 4096\n")
    (tmp_path / "old.toml").write_text('[model]\nposition = "learned"\nblock_size = 2048\n')
    monkeypatch.setattr(kv_memory, "PRESETS", tmp_path)
    head, *rows = ask("--presets").out.splitlines()
    assert head.split()[4:] == ["1,024", "8,192", "32,768", "131,072", "1,048,576"]
    assert rows[0].split() == ["llama3-8b", "0.134", "1.074", "4.295", "17.180", "137.439"]
    assert rows[1].split() == ["old", "0.009", "-", "-", "-", "-"]
    found = json.loads(ask("--presets", "--json", "--dtype", "float32").out)
    assert found["bytes"]["old"] == {"1024": 6 * 1024 * 2 * 384 * 4}


def test_every_preset_of_the_repository_has_a_cache():
    for file in sorted(kv_memory.PRESETS.glob("*.toml")):
        assert kv_memory.bytes_at(load(file).model, [1024], torch.bfloat16)[1024] > 0


def test_the_plot_is_a_picture_with_a_line_for_each_variant(ask, tmp_path, monkeypatch):
    lines = []
    new_figure = kv_memory.new_figure

    def spy(*arguments):
        figure, axes = new_figure(*arguments)
        lines.append(axes[0])
        return figure, axes

    monkeypatch.setattr(kv_memory, "new_figure", spy)
    assert ask("--plot", tmp_path / "kv.png").code == 0
    assert (tmp_path / "kv.png").read_bytes().startswith(b"\x89PNG")
    assert [line.get_label() for line in lines[0].get_lines()] == ["MHA", "GQA", "MHA+SWA", "GQA+SWA"]
    assert lines[0].get_lines()[3].get_ydata()[5] == pytest.approx(0.784, abs=5e-4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--n-kv-head", 5], "n_head (32) must be divisible by n_kv_head (5)"),
        (["--n-embd", 100], "n_embd (100) must be divisible by n_head (32)"),
        (["--pattern", "5:x"], "pattern ('5:x'): a ratio is \"a:b\""),
        (["--pattern", "0:0"], "pattern ('0:0'): a ratio is \"a:b\""),
        (["--context", 0], "--context (0) must be at least 1"),
        (["--context", -5], "--context (-5) must be at least 1"),
        (["--n-layer", 0], "n_layer (0): input should be greater than or equal to 1"),
        (["--window", 0], "window (0): input should be greater than or equal to 1"),
        (["configs/gpt3.toml"], "configs/gpt3.toml does not exist; did you mean configs/gpt2.toml?"),
        (
            ["configs/gpt2.toml", "--context", 1025],
            "--context (1025) must be at most 1024, the number of learned positions",
        ),
        (["configs/gpt2.toml", "--pattern", "5:1"], "has swa layers: give window"),
    ],
)
def test_a_shape_that_cannot_be_gets_a_line(ask, wrong, said):
    ask(*wrong).assert_refused(said)


@pytest.mark.parametrize("other", [["configs/demo.toml"], ["--n-layer", 3], ["--context", 7], ["--plot", "kv.png"]])
def test_presets_stand_as_they_are(ask, other):
    ask("--presets", *other).assert_refused("--presets shows all presets unchanged: leave out", str(other[-1]))


def test_no_presets_are_said(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(kv_memory, "PRESETS", tmp_path)
    ask("--presets").assert_refused("--presets: there are no configs in")
