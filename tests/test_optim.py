"""The learning rate over time, and of each parameter."""

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from networks import tiny_config, tiny_model

from configs.schema import OptimConfig
from training import muon
from training.optim import lr_factor, make_optimizers

SCHEDULES = ("cosine", "trapezoid", "constant")


def factors(
    schedule: str, *, max_steps: int = 100, warmup_steps: int = 9, decay_fraction: float = 0.4, final_lr: float = 0.1
) -> list[float]:
    """Of every step of a run."""
    return [
        lr_factor(
            step,
            max_steps=max_steps,
            warmup_steps=warmup_steps,
            schedule=schedule,
            decay_fraction=decay_fraction,
            final_lr=final_lr,
        )
        for step in range(max_steps + 1)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_begins_above_zero(schedule):
    assert factors(schedule)[:9] == pytest.approx([n / 10 for n in range(1, 10)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_is_whole(schedule):
    assert factors(schedule, warmup_steps=0)[0] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_ends_at_the_peak(schedule):
    assert factors(schedule)[9] == 1


@pytest.mark.parametrize("final_lr", [0.0, 0.1, 1.0])
def test_cosine_falls_by_half_a_period_to_the_final_fraction(final_lr):
    after = factors("cosine", final_lr=final_lr)[9:]
    expected = [final_lr + (1 - final_lr) * (1 + math.cos(math.pi * n / 91)) / 2 for n in range(92)]
    assert after == pytest.approx(expected)


@pytest.mark.parametrize("final_lr", [0.0, 0.1, 1.0])
def test_trapezoid_is_flat_and_then_falls_in_a_line(final_lr):
    found = factors("trapezoid", final_lr=final_lr)
    assert found[9:61] == [1] * 52
    assert found[60:] == pytest.approx([1 - (1 - final_lr) * n / 40 for n in range(41)])


def test_a_trapezoid_that_decays_from_the_start_begins_after_warm_up():
    found = factors("trapezoid", decay_fraction=1.0)
    assert found[9:] == pytest.approx([1 - 0.9 * n / 91 for n in range(92)])


def test_constant_stays():
    assert factors("constant")[9:] == [1] * 92


@given(
    schedule=st.sampled_from(SCHEDULES),
    max_steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 70),
    decay_fraction=st.floats(0, 1, exclude_min=True),
    final_lr=st.floats(0, 1),
)
@example(schedule="cosine", max_steps=1, warmup_steps=0, decay_fraction=1e-9, final_lr=0.0)
@example(schedule="trapezoid", max_steps=5, warmup_steps=5, decay_fraction=1.0, final_lr=0.0)
def test_it_rises_once_falls_once_and_stays_between_its_ends(
    schedule, max_steps, warmup_steps, decay_fraction, final_lr
):
    assume(schedule != "constant")
    found = factors(
        schedule, max_steps=max_steps, warmup_steps=warmup_steps, decay_fraction=decay_fraction, final_lr=final_lr
    )
    rising, falling = found[: warmup_steps + 1], found[warmup_steps:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 < x <= 1 for x in found[:max_steps])
    assert all(x >= final_lr - 1e-12 for x in falling)


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
def test_beyond_the_end_it_stays_at_the_final_fraction(schedule):
    beyond = lr_factor(1000, max_steps=100, warmup_steps=9, schedule=schedule, decay_fraction=0.4, final_lr=0.1)
    assert beyond == pytest.approx(0.1)


def rates(**changes) -> dict[str, float]:
    """Of every parameter, by name."""
    numbers = {"optimizer": "adamw", "muon_lr": 0.02, "adamw_lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    model = tiny_model(tiny_config())  # n_embd 20
    groups = [group for o in make_optimizers(model, **(numbers | changes)).all for group in o.param_groups]
    of = {p: group["lr"] for group in groups for p in group["params"]}
    return {name: of[p] for name, p in model.named_parameters()}


def test_a_base_width_changes_the_rate_of_the_layers_matrices_alone():
    plain, scaled = rates(), rates(base_width=5)
    assert set(plain.values()) == {3e-3}
    for name, rate in scaled.items():
        in_a_layer = name.startswith("h.") and "norm" not in name
        assert rate == pytest.approx(3e-3 * 5 / 20 if in_a_layer else 3e-3), name
    assert {name for name, rate in scaled.items() if rate == 3e-3} >= {"wte.weight", "ln_f.weight"}


def test_the_base_width_itself_changes_nothing():
    assert rates(base_width=20) == rates()


def test_muon_has_the_layers_matrices_and_adamw_the_rest():
    for name, rate in rates(optimizer="muon").items():
        assert rate == (0.02 if name.startswith("h.") and "norm" not in name else 3e-3), name


def test_a_base_width_beside_muon_is_refused():
    with pytest.raises(ValueError, match=r"base_width \(64\) is for optimizer adamw"):
        OptimConfig(base_width=64)


@pytest.mark.parametrize("together", [1, 2, 3, 9])
def test_matrices_that_muon_takes_together_move_as_torchs(monkeypatch, together):
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", together * 24)
    start = [torch.randn(6, 4), torch.randn(4, 6), torch.randn(6, 4), torch.randn(6, 4)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = muon.Muon(ours, lr=0.1, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, x in zip(ours, theirs, start, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, x)
