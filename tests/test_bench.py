"""The benchmarks: their arithmetic, their peers' shapes, and that they refuse to call a mask a window."""

import json
import os

import pytest
import torch
from networks import tiny_config
from torch import nn

from model import cost, cpu
from model.device import resolve
from model.errors import UserError
from model.gpt import GPT
from scripts.bench import __main__ as bench
from scripts.bench import attention, loss, timing, train
from scripts.bench.peers import transformers_twin

TOML = """
[model]
vocab_size = 64
block_size = 24
n_layer = 2
n_head = 2
n_embd = 16
pattern = "1:1"
window = 5
[data]
tokenizer = "byte"
[train]
global_batch_tokens = 24
"""


def test_the_exponent_of_a_power_is_found():
    lengths = [16, 64, 512]
    assert timing.exponent(lengths, [3 * n**1.25 for n in lengths]) == pytest.approx(1.25)


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_sums():
    assert timing.ratio([2, 30, 8], [1, 10, 2]) == 3


def test_a_mask_is_not_measured_as_a_window():
    with pytest.raises(UserError, match=r"^window ran as a mask \(masked\)"):
        timing.refuse_unfused("masked", "window")


def test_attention_names_the_kernel_of_every_figure(tmp_path, capsys):
    file, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    attention.attention(
        attention.Options(
            lengths=(48, 96),
            window=8,
            n_head=4,
            head_dim=8,
            dtype="float32",
            device="cpu",
            rounds=1,
            json=file,
            plot=picture,
        )
    )
    rows = json.loads(file.read_text())["rows"]
    kernels = {row["attention"]: row["kernel"] for row in rows}
    assert kernels == {
        "full": "sdpa-causal",
        "window": "tiles",
        "window gqa sinks": "tiles",
        "window as a mask": "masked",
    }
    assert [row["T"] for row in rows] == [48] * 4 + [96] * 4
    assert all(row["peak_bytes"] > 0 and row["peak_method"] == "cpu-live-tensors" for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "exponent of time in T: full" in capsys.readouterr().out


def test_training_is_measured_beside_its_peers(tmp_path, capsys, monkeypatch):
    (tmp_path / "tiny.toml").write_text(TOML)
    rates = iter([8e9, 1e9])  # of the warm-up round, and of the one that counts
    monkeypatch.setattr(train, "matmul_rate", lambda runtime, seconds: next(rates))
    file = tmp_path / "figures.json"
    peers = ("plain", "full", "sdpa")
    train.train(
        train.Options(config=tmp_path / "tiny.toml", peer=peers, dtype="float32", device="cpu", rounds=1, json=file)
    )
    record = json.loads(file.read_text())
    assert record["options"]["peer"] == list(peers)
    assert record["matmul_flops_per_s"] == 1e9
    assert "json" not in record["options"]
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["sash", *peers]
    assert rows["sash"]["kernel"] == "swa tiles, full sdpa-causal"
    assert rows["plain"]["kernel"] == "swa masked, full masked, float32"
    assert rows["full"]["kernel"] == rows["sdpa"]["kernel"] == "full sdpa-causal"
    assert all(row["first_step_s"] > 0 for row in rows.values())
    assert rows["sash"]["sash_times_faster"] == 1
    assert "MFU" in capsys.readouterr().out


def test_a_network_that_would_run_as_a_mask_is_refused(tmp_path):
    (tmp_path / "tiny.toml").write_text(TOML.replace("window = 5", 'window = 5\nkernel = "masked"'))
    with pytest.raises(UserError, match="the network ran as a mask"):
        train.train(train.Options(config=tmp_path / "tiny.toml", dtype="float32", device="cpu", rounds=1))


GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "bias": True,
    "qk_norm": False,
    "n_kv_head": None,
}
DIVIDED = {"n_embd": 48, "head_dim": None}
FAMILIES = {
    "GPT2LMHeadModel": GPT2 | {"pattern": "full"},
    "LlamaForCausalLM": {"qk_norm": False, "pattern": "full"},
    "MistralForCausalLM": {"qk_norm": False, "pattern": "swa"},
    "Qwen3ForCausalLM": {"qk_norm": True, "pattern": "2:1"},
}


@pytest.mark.parametrize(("family", "shape"), FAMILIES.items())
def test_a_peer_has_our_shape_to_the_parameter(family, shape):
    config = tiny_config(
        **DIVIDED, **{"window": 5, "norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "bias": False} | shape
    )
    twin = transformers_twin(config)
    assert type(twin).__name__ == family
    assert sum(p.numel() for p in twin.parameters()) == cost.n_params(config)


def test_what_a_peer_compiles_is_kept_where_our_own_code_is(monkeypatch, tmp_path):
    """Importing transformers imports torch's compiler, which settles on a folder below /tmp for all processors."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    transformers_twin(tiny_config(**DIVIDED, norm="rmsnorm", mlp="swiglu", position="rope", bias=False))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))


def test_a_shape_that_no_peer_has_is_refused():
    with pytest.raises(UserError, match="no class of transformers fits"):
        transformers_twin(tiny_config(**DIVIDED, mlp="relu2"))


def test_the_plain_peer_has_the_loss_of_ours():
    config = tiny_config()
    idx = torch.arange(6)[None] % config.vocab
    model = GPT(config)
    ours, plain = model(idx, idx), torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)


def test_the_plain_peer_runs_torchs_operators_alone(monkeypatch):
    own = []
    monkeypatch.setattr(
        cpu.matmul, "linear", lambda x, weight, bias: own.append(1) or nn.functional.linear(x, weight, bias)
    )
    idx, runtime = torch.arange(6)[None], resolve("cpu", "float32")
    train.plain(tiny_config(), runtime, idx)()
    assert not own
    assert cpu.is_on()
    train.ours(tiny_config(), runtime, idx)()
    assert own


def test_the_loss_is_measured_beside_the_ways_that_hold_all_logits(tmp_path):
    file = tmp_path / "figures.json"
    shape = {"batch_size": 2, "block_size": 12, "n_embd": 8, "vocab_size": 40}
    loss.loss(loss.Options(**shape, dtype="float32", device="cpu", rounds=1, json=file))
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert {"sash", "plain"} <= set(rows)
    assert rows["plain"]["peak_bytes"] > 24 * 40 * 4  # all logits


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("attention --lengths 64 0", "--lengths (0) must be at least 2"),
        ("attention --window 0", "--window (0) must be at least 1"),
        ("attention --n-head 3", "--n-head (3) must be divisible by --n-kv-head (2)"),
        ("loss --block-size 0", "--block-size (0) must be at least 1"),
        ("train --batch-size -2", "--batch-size (-2) must be at least 1"),
        ("train --rounds 0", "--rounds (0) must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_timed(program, line, said):
    program(bench.main, *line.split()).assert_refused(said)
