"""Positions against the published constructions and transformers' tables."""

import pytest
import torch
from conftest import assert_equal

from model.attention.rope import Rope, alibi_slopes, rotate

CPU = torch.device("cpu")


def frequencies(**numbers) -> torch.Tensor:
    return Rope(**({"base": 10_000.0, "width": 64} | numbers)).frequencies()


def their_frequencies(kind: str, **numbers) -> tuple[torch.Tensor, float]:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle: install the test group")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, "rope_theta": 10_000.0} | numbers
    config = transformers.LlamaConfig(head_dim=64, max_position_embeddings=131_072, rope_parameters=parameters)
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("base", "factor", "trained"), [(150_000.0, 32.0, 4096), (500_000.0, 8.0, 8192), (1e4, 2.0, 8)]
)
def test_yarn_equals_the_table_of_transformers(base, factor, trained, whole):
    ours = Rope(base=base, width=64, scaling="yarn", factor=factor, trained_length=trained, whole_ramp=whole)
    numbers = {"rope_theta": base, "factor": factor, "original_max_position_embeddings": trained, "truncate": whole}
    theirs, temperature = their_frequencies("yarn", **numbers)
    assert_equal(ours.frequencies().float(), theirs, 1e-6)
    assert ours.temperature == pytest.approx(temperature)


@pytest.mark.parametrize(
    ("base", "factor", "trained"), [(500_000.0, 8.0, 8192), (500_000.0, 32.0, 8192), (1e4, 2.0, 64)]
)
def test_llama3_equals_the_table_of_transformers(base, factor, trained):
    ours = Rope(base=base, width=64, scaling="llama3", factor=factor, trained_length=trained)
    numbers = {"rope_theta": base, "factor": factor, "original_max_position_embeddings": trained}
    theirs, temperature = their_frequencies("llama3", **numbers, low_freq_factor=1.0, high_freq_factor=4.0)
    assert_equal(ours.frequencies().float(), theirs, 1e-6)
    assert ours.temperature == temperature == 1.0
    assert 2 < (ours.frequencies() == frequencies(base=base)).sum() < 32  # some stay, some do not


def test_yarn_has_the_ramp_and_temperature_of_gpt_oss():
    rope = Rope(base=150_000.0, width=64, scaling="yarn", factor=32.0, trained_length=4096)
    assert (*rope.ramp, rope.temperature) == pytest.approx((8.093, 17.398, 1.3466), abs=1e-3)


def test_yarn_keeps_fast_rotations_and_divides_slow_ones():
    rope = Rope(base=150_000.0, width=64, scaling="yarn", factor=32.0, trained_length=4096)
    ratio = frequencies(base=150_000.0) / rope.frequencies()
    assert_equal(ratio[:9], torch.ones(9).double())
    assert_equal(ratio[18:], torch.full((14,), 32.0).double())
    assert (ratio[9:18].diff() > 0).all()


def test_yarn_multiplies_queries_and_keys_by_its_temperature():
    rope = Rope(base=150_000.0, width=64, scaling="yarn", factor=32.0, trained_length=4096)
    cos, sin = rope.table(torch.tensor([[0, 7, 9000]]))
    assert_equal((cos**2 + sin**2).double(), torch.full((1, 1, 3, 32), rope.temperature**2).double(), 1e-6)


def test_linear_scaling_equals_transformers_and_divided_positions():
    theirs, temperature = their_frequencies("linear", factor=8.0)
    ours = Rope(base=1e4, width=64, scaling="linear", factor=8.0)
    assert (ours.temperature, temperature) == (1.0, 1.0)
    assert_equal(ours.frequencies().float(), theirs, 1e-6)
    plain = Rope(base=1e4, width=64)
    for stretched, divided in zip(ours.table(torch.tensor([[80]])), plain.table(torch.tensor([[10]])), strict=True):
        assert_equal(stretched, divided, 1e-6)


def test_partial_rotation_leaves_the_other_dimensions_alone():
    torch.manual_seed(0)
    x, pos = torch.randn(2, 3, 5, 16, dtype=torch.float64), torch.arange(5)[None]
    cos, sin = Rope(base=1e4, width=6).table(pos)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert_equal(turned[..., :6], rotate(x[..., :6], cos, sin))


def test_at_position_zero_nothing_turns():
    x = torch.randn(2, 3, 1, 16)
    assert torch.equal(rotate(x, *Rope(base=1e4, width=16).table(torch.tensor([[0]]))), x)


@pytest.mark.parametrize(
    ("n_head", "slopes"),
    [
        (8, [2.0**-n for n in range(1, 9)]),
        (12, [*(2.0**-n for n in range(1, 9)), 0.7071, 0.3536, 0.1768, 0.0884]),
        (6, [2.0**-n for n in (2, 4, 6, 8, 1, 3)]),
        (1, [2.0**-8]),
    ],
)
def test_alibi_slopes_are_the_published_ones(n_head, slopes):
    assert alibi_slopes(n_head, CPU, torch.float64).tolist() == pytest.approx(slopes, abs=5e-5)
