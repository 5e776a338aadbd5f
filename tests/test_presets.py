"""Presets: published designs at their size, and siblings that train here."""

from pathlib import Path

import pytest
from conftest import ROOT, run_config

import generate
import train
from configs.load import load
from model.config import ModelConfig
from model.cost import cache_bytes, n_params, train_flops
from model.errors import UserError
from scripts import memory
from scripts.convert import __main__ as convert

PRESETS = ROOT / "configs" / "presets"
FAMILIES = sorted(path.stem for path in PRESETS.glob("*.toml") if not path.stem.endswith("-tiny"))
LENGTHS = (1024, 8192, 32_768, 131_072)
GEMMA_1B = {"n_layer": 26, "n_head": 4, "n_kv_head": 1, "window": 512}
GEMMA_27B = {"n_layer": 62, "n_head": 32, "n_kv_head": 16, "head_dim": 128}
BUDGETS = {  # GB of bfloat16 keys and values of one sequence, by its length
    ("gpt2",): (0.038, 0.302, 1.208, 4.832),
    ("llama3",): (0.134, 1.074, 4.295, 17.180),
    ("mistral-7b-v0.1",): (0.134, 0.537, 0.537, 0.537),
    ("mistral-small-3.1",): (0.168, 1.342, 5.369, 21.475),
    ("gemma2",): (0.352, 2.114, 6.342, 23.253),
    ("gemma3", *GEMMA_1B.items()): (0.016, 0.045, 0.146, 0.548),
    ("gemma3",): (0.143, 0.289, 0.793, 2.806),
    ("gemma3", *GEMMA_27B.items()): (0.520, 1.107, 3.121, 11.174),
    ("gpt-oss",): (0.028, 0.204, 0.808, 3.224),
    ("gpt-oss", ("n_layer", 36)): (0.042, 0.307, 1.213, 4.837),
    ("qwen3",): (0.151, 1.208, 4.832, 19.327),
    ("olmo3",): (0.537, 2.684, 5.906, 18.790),
    ("olmo3", ("n_layer", 64), ("n_head", 40), ("n_kv_head", 8), ("n_embd", 5120)): (0.268, 1.342, 2.953, 9.395),
}


def preset(name: str, **changes) -> ModelConfig:
    return load(PRESETS / f"{name}.toml", {"model": changes}).model


def test_every_preset_has_a_tiny_sibling():
    assert len(FAMILIES) == 9
    assert {path.stem for path in PRESETS.glob("*-tiny.toml")} == {f"{name}-tiny" for name in FAMILIES}


@pytest.mark.parametrize(("design", "gigabytes"), BUDGETS.items(), ids=str)
def test_cache_budgets_are_the_published_ones(design, gigabytes):
    name, *changes = design
    config = preset(name, **dict(changes))
    assert tuple(round(cache_bytes(config, n) / 1e9, 3) for n in LENGTHS) == gigabytes


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("gpt2", 124_439_808),
        ("llama3", 8_030_261_248),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("qwen3", 8_190_735_360),
        ("gemma2", 9_241_705_984),
        ("olmo3", 7_298_011_136),
    ],
)
def test_parameters_are_those_of_the_released_weights(name, n):
    assert n_params(preset(name)) == n


@pytest.mark.parametrize("count", [n_params, lambda config: train_flops(config, 1024)])
def test_without_its_experts_gpt_oss_states_no_parameters_and_no_flops(count):
    with pytest.raises(UserError, match="not reported for a design that omits its 32 experts per layer"):
        count(preset("gpt-oss"))
    assert count(preset("gpt-oss", omits="none")) > 10**9


def test_memory_of_gpt_oss_is_that_of_its_cache_alone(program):
    ended = program(memory.main, PRESETS / "gpt-oss.toml")
    assert ended.code == 0
    assert "omits its 32 experts per layer, of which each token takes 4: parameters and training are not" in ended.out
    assert "131,072            3,224.4 MB" in ended.out
    assert "parameters  " not in ended.out


KEPT = (
    *("pattern", "position", "rope_base", "rope_scaling", "rope_factor", "rope_fraction", "rope_whole_ramp"),
    *("qk_norm", "qk_norm_over", "attn_softcap", "sink_logit", "attn_gate", "attn_bias", "logit_softcap", "norm"),
    *("norm_place", "norm_eps", "mlp", "bias", "tie_embeddings", "scale_embeddings", "n_sink"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_sibling_keeps_the_design(name):
    full, tiny = preset(name), preset(f"{name}-tiny", vocab_size=2048)
    assert {key: getattr(tiny, key) for key in KEPT} == {key: getattr(full, key) for key in KEPT}
    assert tiny.n_head // tiny.kv_heads == full.n_head // full.kv_heads
    assert set(tiny.kinds) == set(full.kinds)
    assert tiny.window is None or tiny.window < tiny.block_size
    assert n_params(tiny) < 4e6


SOME = [name if name in ("gemma2", "gpt2") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", SOME)
def test_tiny_sibling_trains_resumes_and_generates_past_its_window(name, tmp_path: Path, text, program):
    config = load(PRESETS / f"{name}-tiny.toml")
    model = config.model.model_dump() | {"block_size": 128, "n_layer": min(6, config.model.n_layer)}
    for key in ("rope_trained", "window"):
        model[key] = model[key] and max(1, model[key] // 8)
    numbers = {"global_batch_tokens": 256, "checkpoint_every": 2, "eval_every": 9, "eval_tokens": 512}
    runs = [
        train.run(run_config(tmp_path, text, name, model=model, train=numbers | {"max_steps": steps}))
        for steps in (2, 4)
    ]
    assert [run.step for run in runs] == [2, 4]
    assert runs[1].summary["val_loss"] < 5.5  # from the logarithm of 257 and above
    ended = program(generate.main, runs[1].path, "--prompt", "The cat sees", "--max-new-tokens", 40, "--check")
    assert (ended.code, "within" in ended.err) == (0, True), ended.err
    exported = program(convert.main, "export", runs[1].path, "--to", tmp_path / "exported")
    assert exported.code == (2 if name == "gpt-oss" else 0), exported.err
    assert not model["window"] or 3 * model["window"] < 12 + 40
