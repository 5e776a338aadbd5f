"""Linear attention against its recurrence, a token at a time; tests/test_mixers.py holds it to the contract."""

import pytest
import torch
from conftest import assert_equal, run_config
from networks import tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import generate
import train
from model.context import ForwardContext
from model.mixers.linear import CHUNK, LinearAttention, LinearSpec, chunked

B, H, D, E = 2, 3, 4, 5


def features(T: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, D), (B, H, T, D), (B, H, T, E), (B, H, D, E))
    return [torch.rand(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def recurrent(q, k, v, state) -> tuple[torch.Tensor, torch.Tensor]:
    out = []
    for t in range(q.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, :, None] * state).sum(dim=2))
    return torch.stack(out, dim=2), state


@pytest.mark.parametrize("T", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 9])
def test_chunks_equal_the_recurrence_with_gradients(T):
    inputs = features(T)
    results = []
    for form in (chunked, recurrent):
        out, state = form(*inputs)
        weight = torch.linspace(-1, 2, out.numel()).view_as(out)
        results.append((out, state, *torch.autograd.grad((out * weight).sum() + state.sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        assert_equal(ours, expected)


def test_output_is_a_weighted_mean_of_values():
    mixer = tiny_model(tiny_config(pattern="linear", n_layer=1)).h[0].mixer
    x = torch.randn(B, 9, 20, dtype=torch.float64)
    values = mixer.c_v(x).view(B, 9, 6, 8)
    heads = []
    mixer.c_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0].view(B, 9, 6, 8)))
    mixer(x, ForwardContext(pos=torch.arange(9)[None]))
    assert_equal(heads[0][:, 0], values[:, 0], 1e-5)  # the first token sees itself
    low, high = values.cummin(dim=1).values, values.cummax(dim=1).values
    assert ((heads[0] >= low - 1e-4) & (heads[0] <= high + 1e-4)).all()


@pytest.mark.parametrize("T", [1, 13, CHUNK + 1])
def test_flops_are_those_that_pytorch_counts(T):
    spec = LinearSpec(n_embd=20, n_head=6, head_dim=8)
    mixer, x = LinearAttention(spec), torch.randn(B, T, 20)
    with FlopCounterMode(display=False) as counter:
        mixer(x, ForwardContext(pos=torch.arange(T)[None]))
    assert counter.get_total_flops() == B * spec.forward_flops(T)


def test_state_is_float32_though_the_cache_is_bfloat16_and_does_not_grow():
    model = tiny_model(tiny_config(pattern="linear"), dtype=torch.float32)
    short, long = (model.new_cache(B, n, dtype=torch.bfloat16) for n in (1, 10_000))
    assert short.nbytes == long.nbytes == 2 * B * 6 * 8 * 9 * 4
    assert long.max_length is None


@pytest.mark.usefixtures("unmeasured")
def test_stack_with_one_full_layer_in_four_trains_resumes_and_generates(tmp_path, text, program):
    stack = {"pattern": "linear*3 full", "n_layer": 4, "window": None}
    runs = [train.run(run_config(tmp_path, text, model=stack, train={"max_steps": steps})) for steps in (5, 30)]
    assert runs[1].summary["layers"] == "linear*3 full"
    assert runs[1].summary["val_loss"] < runs[0].summary["val_loss"] < 5.55
    ended = program(generate.main, runs[1].path, "--prompt", "The cat sees", "--max-new-tokens", 60, "--check")
    assert (ended.code, "within" in ended.err) == (0, True), ended.err
