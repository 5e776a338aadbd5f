"""Which steps are skipped, and that a skipped step changes nothing."""

import math
import random

import pytest
import torch
from conftest import random_tokens
from networks import tiny_config, tiny_model

from training.loss_spikes import LEAST_SPREAD, WARM_UP, WEIGHT, SpikeGuard
from training.optim import Optimizers, make_optimizers

CPU = torch.device("cpu")
NUMBERS = {"muon_lr": 0.02, "adamw_lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def make_guard(*, sigma: float | None = 6.0, limit: int = 5) -> SpikeGuard:
    return SpikeGuard(CPU, sigma=sigma, limit=limit)


def judge(guard: SpikeGuard, losses: list[float] | float, norm: float = 0.5, step: int = 1) -> bool:
    losses = losses if isinstance(losses, list) else [losses]
    return bool(guard.should_skip(step, torch.tensor(losses), torch.tensor(norm)))


def ordinary(guard: SpikeGuard, n: int = WARM_UP, *, level: float = 2.0, seed: int = 0) -> list[bool]:
    """n steps with losses of the level with a standard deviation of 0.1."""
    draw = random.Random(seed)
    return [judge(guard, level + draw.gauss(0, 0.1)) for _ in range(n)]


def reference(values: list[float], sigma: float) -> list[bool]:
    """The rule for one number, in plain arithmetic."""
    mean = var = 0.0
    out, seen = [], 0
    for x in values:
        bound = mean + sigma * max(math.sqrt(var), LEAST_SPREAD * mean) if seen >= WARM_UP else math.inf
        out.append(not math.isfinite(x) or x > bound)
        if math.isfinite(x):
            seen += 1
            weight, delta = max(1 / seen, WEIGHT), min(x, bound) - mean
            mean, var = mean + weight * delta, (1 - weight) * (var + weight * delta * delta)
    return out


def test_steps_are_judged_as_plain_arithmetic_would():
    draw = random.Random(1)
    values = [4 * math.exp(-i / 50) + draw.expovariate(1.5) for i in range(400)]
    values[100], values[200] = math.nan, math.inf
    guard = make_guard(sigma=2.0, limit=1000)
    found = [judge(guard, x) for x in values]
    assert found == reference(values, 2.0)
    assert 5 < sum(found) == int(guard.skipped) < 100


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sigma", [6.0, None])
def test_what_is_not_finite_is_bad_and_leaves_the_mean_alone(value, sigma):
    guard = make_guard(sigma=sigma)
    assert not any(ordinary(guard, 3))
    before = guard.mean.tolist(), guard.var.tolist()
    assert judge(guard, value)
    assert judge(guard, 2.0, norm=value)
    assert (guard.mean.tolist(), guard.var.tolist()) == before
    assert not judge(guard, 2.0)


@pytest.mark.parametrize("number", ["loss", "norm"])
def test_a_spike_of_the_loss_or_of_the_gradient_is_bad_after_the_warm_up(number):
    spike = {"losses": 4.0, "norm": 0.5} if number == "loss" else {"losses": 2.0, "norm": 1.5}
    young, old = make_guard(), make_guard()
    ordinary(young, WARM_UP - 1)
    ordinary(old, WARM_UP)
    assert not judge(young, **spike)
    assert judge(old, **spike)
    assert not judge(make_guard(sigma=None), **spike)


def test_a_low_loss_is_no_spike():
    guard = make_guard()
    ordinary(guard)
    assert not judge(guard, 0.0)


def test_one_spike_hides_no_other():
    guard = make_guard()
    ordinary(guard)
    assert [judge(guard, 1e30), judge(guard, 4.0)] == [True, True]


def test_a_lasting_change_of_level_is_taken_for_normal_in_time():
    guard = make_guard(limit=1000)
    ordinary(guard)
    found = ordinary(guard, 100, level=6.0)
    assert found[0]
    assert not any(found[60:])


def test_a_loss_that_hardly_changes_makes_no_spike_of_nothing():
    guard = make_guard()
    for _ in range(2 * WARM_UP):
        assert not judge(guard, 2.0)
    assert not judge(guard, 2.05)


def test_after_too_many_bad_steps_in_a_row_all_are():
    guard = make_guard(limit=2)
    assert [judge(guard, x, step=n) for n, x in enumerate([2.0, math.nan, math.nan, 2.0])] == [False, True, True, False]
    assert not guard.lost
    assert [judge(guard, x, step=n) for n, x in enumerate([math.nan, math.nan, math.nan, 2.0], start=4)] == [True] * 4
    assert guard.lost
    assert guard.culprit()[:2] == (4, 0)
    assert int(guard.skipped) == 6


def test_the_micro_batch_of_the_highest_loss_is_named():
    for losses, worst in (([1.0, math.nan, 3.0], 1), ([1.0, 2.0, math.inf], 2), ([1e9, 2.0, 3.0], 0)):
        guard = make_guard(limit=0)
        ordinary(guard)
        assert judge(guard, losses, step=77)
        assert guard.culprit()[:2] == (77, worst)


def test_a_guard_goes_on_where_it_was_saved():
    guard = make_guard()
    ordinary(guard)
    judge(guard, math.nan)
    other = SpikeGuard(CPU, sigma=6.0, limit=5, state=guard.state())
    assert ordinary(guard, 80, level=2.4, seed=3) == ordinary(other, 80, level=2.4, seed=3)
    assert guard.state() == other.state()


# The optimizers.


def backward(model, seed: int) -> None:
    idx = random_tokens(2, 9, seed=seed)
    model(idx, idx).backward()


def everything(model, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    names = {p: name for name, p in model.named_parameters()}
    state = {f"{names[p]}.{slot}": x for p, slots in optimizers.state.items() for slot, x in slots.items()}
    return {name: x.detach().clone() for name, x in model.named_parameters()} | {k: x.clone() for k, x in state.items()}


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_skipped_step_changes_nothing_and_one_that_is_not_is_whole(name, on_device):
    """On a CPU the flag is read. What other devices do instead is done here by hand."""

    def step(optimizers: Optimizers, *, skip: bool) -> None:
        if not on_device:
            optimizers.step(skip=torch.tensor(skip))
            return
        for optimizer in optimizers.all:
            optimizer.found_inf = torch.tensor(float(skip))
            optimizer.step()
            optimizer.zero_grad()

    model, plain = (tiny_model(tiny_config(), dtype=torch.float32) for _ in range(2))
    optimizers, others = (make_optimizers(m, optimizer=name, **NUMBERS) for m in (model, plain))
    for seed in range(4):
        backward(model, seed)
        step(optimizers, skip=False)
        backward(plain, seed)
        others.step()
        before = everything(model, optimizers)
        backward(model, seed=50 + seed)
        model.h[0].mlp.c_proj.weight.grad[3, 5] = math.nan
        step(optimizers, skip=True)
        after = everything(model, optimizers)
        assert [key for key in after if not torch.equal(after[key], before[key])] == []
        assert all(p.grad is None for p in model.parameters())
    expected = everything(plain, others)
    assert [key for key in expected if not torch.equal(expected[key], after[key])] == []


def test_muon_is_that_of_torch_bit_for_bit():
    one, other = (tiny_model(tiny_config(), dtype=torch.float32) for _ in range(2))
    ours, theirs = (make_optimizers(model, optimizer="muon", **NUMBERS) for model in (one, other))
    theirs.all[0] = torch.optim.Muon(theirs.all[0].param_groups[0]["params"], lr=0.02, weight_decay=0.1)
    assert len({tuple(p.shape) for p in theirs.all[0].param_groups[0]["params"]}) >= 3
    for seed in range(5):
        for model, optimizers in ((one, ours), (other, theirs)):
            backward(model, seed)
            optimizers.step()
    found, expected = everything(one, ours), everything(other, theirs)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
