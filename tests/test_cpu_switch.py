"""One switch turns all of the CPU's own code off, and what it computes stays the same."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_equal, random_tokens
from networks import tiny_config, tiny_model

from model import cpu
from model.cpu import loss_rows, matmul, switch
from training.optim import make_optimizers

NUMBERS = {"muon_lr": 0.02, "adamw_lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.fixture
def no_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of our own code is called raises."""
    broken = SimpleNamespace(apply=None)
    for module, names in (
        (matmul, ("linear", "matmul_nt", "grad_input", "grad_weight")),
        (loss_rows, ("rows_at_once", "serves")),
        (cpu.amx, ("serves",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(cpu, "RMSNormFunction", broken)


def train_a_step(dtype: torch.dtype) -> list[torch.Tensor]:
    model = tiny_model(tiny_config(pattern="swa full", window=5), dtype=torch.float32).train()
    idx = random_tokens(3, 14)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    make_optimizers(model, optimizer="adamw", **NUMBERS).step()
    return [loss.detach(), *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("no_own_code")
def test_switched_off_a_training_step_runs_none_of_it(dtype):
    with pytest.raises(TypeError):
        train_a_step(dtype)
    with cpu.switched_off():
        assert all(x.isfinite().all() for x in train_a_step(dtype))


def test_a_training_step_is_the_same_without_it():
    own = train_a_step(torch.float32)
    with cpu.switched_off():
        plain = train_a_step(torch.float32)
    for a, b in zip(own, plain, strict=True):
        assert_equal(a, b, 1e-5)


def test_it_comes_back_on_when_the_block_ends_however_it_ends():
    def fail() -> None:
        with cpu.switched_off():
            assert not cpu.is_on()
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert cpu.is_on()


@pytest.mark.parametrize(("value", "on"), [("off", False), ("OFF", False), ("0", False), ("on", True)])
def test_the_environment_decides_for_a_whole_process(monkeypatch, value, on):
    monkeypatch.setenv("SASH_CPU", value)
    try:
        assert importlib.reload(switch).is_on() == on
    finally:
        monkeypatch.delenv("SASH_CPU")
        importlib.reload(switch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_function_is_torchs_operator(dtype):
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(shape, dtype=dtype) for shape in ((5, 4), (3, 4), (5, 3)))
    out = torch.empty(5, 3, dtype=dtype)
    for block in (cpu.switched_off, lambda: torch.no_grad()):
        with block():
            cpu.matmul_nt(x, weight, out)
            assert_equal(out, x @ weight.T, 1e-6)
            assert_equal(cpu.grad_input(grad, weight), grad @ weight, 1e-6)
            assert_equal(cpu.grad_weight(grad, x), grad.T @ x, 1e-6)
            assert_equal(cpu.linear(x, weight, None), x @ weight.T, 1e-6)
            rms = (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
            assert_equal(cpu.rms_norm(x, torch.ones(4, dtype=dtype), 1e-6), x / rms, 1e-6)
