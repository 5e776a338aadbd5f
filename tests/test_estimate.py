"""The estimate of a training step's memory against what a CPU measures."""

from itertools import product

import pytest
import torch
from networks import tiny_config

from model.gpt import GPT
from model.memory import measure_peak
from scripts import memory
from training.estimate import train_peak
from training.memory import training_tensors
from training.optim import make_optimizers

SHAPES = {
    "activations rule": {"n_embd": 96, "block_size": 192, "n_layer": 3, "pattern": "2:1", "window": 20, "n_sink": 2},
    "shaped scores": {
        "n_embd": 60,
        "block_size": 192,
        "n_layer": 3,
        "pattern": "2:1",
        "window": 20,
        "position": "alibi",
        "attn_softcap": 9.0,
        "sink_logit": True,
        "attn_gate": "channel",
        "norm_place": "sandwich",
        "mlp": "geglu",
    },
    "heads as AMX takes them": {
        "n_embd": 128,
        "n_head": 4,
        "n_kv_head": 2,
        "block_size": 192,
        "n_layer": 3,
        "pattern": "2:1",
        "window": 70,
        "n_sink": 2,
    },
    "logits rule": {"vocab_size": 7001, "block_size": 160},
    "weights rule": {"n_embd": 300, "mlp_width": 900, "block_size": 8, "n_layer": 3},
}


def in_all_ways() -> list:
    """Every shape with every optimizer, dtype and checkpointing; of each shape two that share no value are quick."""
    cases = []
    for i, shape in enumerate(SHAPES):
        for ways in product(["muon", "adamw"], [torch.float32, torch.bfloat16], [False, True]):
            optimizer, dtype, activation_checkpointing = ways
            is_first = (optimizer == "muon") == (dtype == torch.float32 if i % 2 else dtype == torch.bfloat16)
            is_quick = is_first and (optimizer == "muon") == activation_checkpointing
            marks = [] if is_quick else [pytest.mark.slow]
            cases.append(pytest.param(SHAPES[shape], *ways, marks=marks, id=f"{shape}-{'-'.join(map(str, ways))}"))
    return cases


@pytest.mark.parametrize(("shape", "optimizer", "dtype", "activation_checkpointing"), in_all_ways())
def test_estimate_is_within_a_tenth_of_what_is_measured(shape, optimizer, dtype, activation_checkpointing):
    config, B = tiny_config(**shape), 5
    estimated = sum(
        train_peak(config, B, dtype, optimizer=optimizer, activation_checkpointing=activation_checkpointing).values()
    )
    torch.manual_seed(0)
    model = GPT(config)
    model.activation_checkpointing = activation_checkpointing
    numbers = {"muon_lr": 0.02, "adamw_lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = make_optimizers(model, optimizer=optimizer, **numbers)
    idx = torch.zeros(B, config.block_size, dtype=torch.long)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(idx, idx)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()

    step()
    with measure_peak(torch.device("cpu"), training_tensors(model, optimizers)) as measured:
        step()
    assert estimated == pytest.approx(measured.bytes, rel=0.1)


def test_parts_are_told_apart():
    config = tiny_config(**SHAPES["activations rule"])
    parts = train_peak(config, 5, torch.float32, optimizer="adamw")
    weights = sum(p.nbytes for p in GPT(config).parameters())
    assert parts["parameters"] == weights
    assert parts["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert parts["activations"] > 5 * parts["logits"]


def test_recomputation_keeps_the_gradients_and_little_else():
    torch.manual_seed(0)
    model = GPT(tiny_config(pattern="swa full", window=3)).double()
    idx = torch.randint(31, (2, 9))
    plain = torch.autograd.grad(model(idx, idx), model.parameters())
    model.activation_checkpointing = True
    for again, once in zip(torch.autograd.grad(model(idx, idx), model.parameters()), plain, strict=True):
        torch.testing.assert_close(again, once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ("bpe-0", "tokenizer bpe-0: the size must be at least 257"),
        ("gpt3", "did you mean gpt2?"),
        ("char", "depends on"),
    ],
)
def test_a_tokenizer_whose_size_cannot_be_told_is_refused(program, tokenizer, said):
    program(memory.main, "configs/demo.toml", "--data.tokenizer", tokenizer).assert_refused(said)
