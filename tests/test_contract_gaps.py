"""The mixer contract is wide enough: each part of it is shown by a throw-away mixer that needs it."""

from dataclasses import replace

import pytest
import torch
from attending import attend, kernel_name
from conftest import assert_contract, assert_equal, logits_in_chunks, needs_amx, random_tokens, save_run
from networks import tiny_config, tiny_model
from test_attend import assert_same_with_gradients, attend_by_loops
from torch import nn

from inference.loading import load
from inference.params import ModelParams
from model.attention.dispatch import KERNELS
from model.attention.spec import AttentionSpec
from model.config import ModelConfig
from model.context import AuxiliaryLosses, ForwardContext
from model.cost import cache_bytes, n_params, train_flops
from model.errors import UserError
from model.gpt import GPT
from model.mixers import MIXERS
from model.mixers.attention import Attention
from model.mixers.base import Mixer
from model.mixers.linear import LinearAttention, LinearSpec
from model.mixers.multi_window import MultiWindowAttention
from training.estimate import train_peak
from training.muon import Muon
from training.optim import make_optimizers

B, T, D = 3, 13, 8


@pytest.fixture
def word(monkeypatch: pytest.MonkeyPatch):
    """Put a mixer into the table as the word `toy`."""
    return lambda mixer: monkeypatch.setitem(MIXERS, "toy", mixer)


# Values narrower or wider than keys.


def wide(v_head_dim: int) -> type[Attention]:
    class Wide(Attention):
        """Softmax attention whose values have a width of their own."""

        @classmethod
        def spec_from(cls, config, place):
            return replace(super().spec_from(config, place), kind="toy", v_head_dim=v_head_dim, window=config.window)

    return Wide


@pytest.mark.parametrize("v_head_dim", [3, 8, 20])
@pytest.mark.parametrize("mods", [{}, {"softcap": 1.5, "alibi": True, "sink_logit": True}], ids=["plain", "mods"])
@pytest.mark.parametrize(("kernel", "window"), [("sdpa", None), ("tiles", None), ("tiles", 4), ("masked", 4)])
def test_every_kernel_takes_values_of_another_width(kernel, window, mods, v_head_dim):
    if kernel == "sdpa" and mods:
        pytest.skip("sdpa has no score modifications")
    numbers = {"n_embd": 20, "n_head": 6, "n_kv_head": 2, "head_dim": D, "v_head_dim": v_head_dim}
    spec = AttentionSpec(**numbers, window=window, n_sink=2 if window and not mods else 0, kernel=kernel, **mods)
    torch.manual_seed(0)
    widths = ((6, D), (2, D), (2, v_head_dim))
    qkv = [torch.randn(2, n, T, width, dtype=torch.float64, requires_grad=True) for n, width in widths]
    sink = torch.linspace(-1, 2, 6).double().requires_grad_() if spec.sink_logit else None
    pos = torch.arange(T)[None]
    assert kernel in kernel_name(spec, T, pos.device, torch.float64)
    assert_same_with_gradients(
        lambda: attend(*qkv, pos, pos, spec, contiguous=True, sink_logit=sink),
        lambda: attend_by_loops(*qkv, pos, pos, spec, sink),
        qkv if sink is None else [*qkv, sink],
    )


@needs_amx
@pytest.mark.parametrize("v_head_dim", [32, 96])
def test_amx_takes_values_of_another_width(v_head_dim):
    numbers = {"n_embd": 20, "n_head": 4, "n_kv_head": 2, "head_dim": 64, "v_head_dim": v_head_dim, "window": 40}
    torch.manual_seed(0)
    widths = ((4, 64), (2, 64), (2, v_head_dim))
    qkv = [torch.randn(2, n, 90, width, requires_grad=True) for n, width in widths]
    half = [x.detach().bfloat16().requires_grad_() for x in qkv]
    pos, results = torch.arange(90)[None], []
    for inputs, kernel in ((half, "amx"), (qkv, "masked")):
        y = attend(*inputs, pos, pos, AttentionSpec(**numbers, kernel=kernel), contiguous=True)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        assert (actual.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("v_head_dim", [3, 20])
@pytest.mark.parametrize(
    "design",
    [
        {"window": 4, "n_sink": 1},
        {"window": 4, "n_sink": 1, "rope_in_cache": True, "rope_base": 100.0},
        {"window": None, "attn_softcap": 1.5, "sink_logit": True},
        {"window": 5, "attn_gate": "channel", "bias": True},
    ],
    ids=str,
)
def test_values_of_another_width_are_cached_and_counted(word, design, v_head_dim):
    word(wide(v_head_dim))
    config = tiny_config(pattern="toy full", **design)
    assert_contract(config, random_tokens(B, 2 * T), [5, 1, 1, 9], t=7, spare=3)
    assert n_params(config) == sum(p.numel() for p in GPT(config).parameters())
    cache = tiny_model(config).new_cache(B, 40, dtype=torch.int8)
    assert cache.nbytes == cache_bytes(config, 40, batch_size=B, dtype=torch.int8)


@pytest.mark.parametrize("v_head_dim", [3, 20])
def test_values_of_another_width_decode_compiled_and_in_int8(word, traced, v_head_dim):
    word(wide(v_head_dim))
    traced({"pattern": "toy full", "window": 4, "n_sink": 1})
    model = tiny_model(tiny_config(pattern="toy full", window=4, n_sink=1), dtype=torch.float32)
    idx, steps = random_tokens(B, T), [3, *[1] * 10]
    exact, rounded = (
        logits_in_chunks(model, idx, steps, model.new_cache(B, T, dtype=dtype)) for dtype in (None, torch.int8)
    )
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()


def test_an_estimate_of_memory_knows_the_width_of_values(word):
    word(wide(64))
    peaks = [
        sum(train_peak(tiny_config(pattern=pattern, window=5), 4, torch.float32, optimizer="adamw").values())
        for pattern in ("toy", "swa")
    ]
    assert peaks[0] > peaks[1]


def test_every_kernel_has_its_place_in_the_table():
    assert list(KERNELS) == ["one-query", "amx", "flex", "tiles", "sdpa", "masked"]


# Tensors of early layers in later ones, the place of a layer, auxiliary losses.


class Residual(LinearAttention):
    """Linear attention whose later layers add what the first one read, as RWKV-7 does with values."""

    @classmethod
    def spec_from(cls, config, place):
        spec = super().spec_from(config, place)
        return replace(spec, kind=f"toy{place.index}of{place.n_layer}")

    def forward(self, x, ctx, cache=None):
        y = super().forward(x, ctx, cache)
        if self.spec.kind.startswith("toy0"):
            ctx.passed["first"] = y
        if self.training:
            ctx.add_loss("size", 0.3 * y.square().mean())
        return y + ctx.passed["first"]


def test_tensors_pass_between_layers_in_every_way_of_running(word, traced):
    word(Residual)
    config = tiny_config(pattern="toy", n_layer=3)
    assert [spec.kind for spec in config.layers] == ["toy0of3", "toy1of3", "toy2of3"]
    assert_contract(config, random_tokens(B, 2 * T), [4, 1, 1, 9], t=7)
    traced({"pattern": "toy", "n_layer": 3})


def gradients(model: GPT, idx, *, aux: AuxiliaryLosses | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(idx[:, :-1], idx[:, 1:], auxiliary=aux)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loops", [1, 2])
def test_auxiliary_losses_are_in_the_gradients_once_and_reported_apart(word, loops):
    word(Residual)
    model, idx = tiny_model(tiny_config(pattern="toy", n_layer=3, loops=loops)), random_tokens(B, T + 1)
    plain_loss, plain = gradients(model.eval(), idx)
    model.train()
    found = AuxiliaryLosses()
    loss, both = gradients(model, idx, aux=found)
    assert loss == plain_loss
    sizes: list[torch.Tensor] = []
    model.zero_grad()
    Residual.forward, kept = lambda self, x, ctx, cache=None: read(self, x, ctx, sizes), Residual.forward
    try:
        model(idx[:, :-1])
        expected = 0.3 * torch.stack([y.square().mean() for y in sizes]).sum()
    finally:
        Residual.forward = kept
    assert found.values["size"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert not found.values["size"].requires_grad
    expected.backward()
    for name, p in model.named_parameters():
        assert_equal(both[name], plain[name] + (0 if p.grad is None else p.grad), 1e-9)


def read(mixer: Residual, x, ctx: ForwardContext, sizes: list) -> torch.Tensor:
    """The mixer without its loss; its own part of the output goes to `sizes`, not the sum."""
    y = LinearAttention.forward(mixer, x, ctx)
    if mixer.spec.kind.startswith("toy0"):
        ctx.passed["first"] = y
    sizes.append(y)
    return y + ctx.passed["first"]


@pytest.mark.parametrize("loops", [1, 2])
def test_activation_checkpointing_changes_no_gradient(word, loops):
    word(Residual)
    model, idx = tiny_model(tiny_config(pattern="toy full", n_layer=3, loops=loops)).train(), random_tokens(B, T + 1)
    plain_aux, aux = AuxiliaryLosses(), AuxiliaryLosses()
    loss, plain = gradients(model, idx, aux=plain_aux)
    model.activation_checkpointing = True
    again, recomputed = gradients(model, idx, aux=aux)
    assert again == loss
    assert aux.values["size"] == plain_aux.values["size"] > 0
    for name in plain:
        assert_equal(recomputed[name], plain[name], 1e-12)


def test_a_mixer_without_a_part_of_the_contract_is_an_error_when_it_is_built():
    class Stateless(LinearAttention):
        new_cache = Mixer.new_cache  # abstract again

    with pytest.raises(TypeError, match="new_cache"):
        Stateless(tiny_config(pattern="linear").layers[0])


# Optimizer groups.


def test_muon_does_not_take_what_a_mixer_keeps_from_it(word):
    class Gated(LinearAttention):
        def adamw_parameters(self):
            return [self.c_q.weight]

    word(Gated)
    model = GPT(tiny_config(pattern="toy full"))
    numbers = {"muon_lr": 0.02, "adamw_lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    kept = model.h[0].mixer.c_q.weight
    muon, adamw = make_optimizers(model, optimizer="muon", **numbers).all
    taken = lambda optimizer: {p for group in optimizer.param_groups for p in group["params"]}
    assert isinstance(muon, Muon)
    assert kept in taken(adamw) - taken(muon)
    assert model.h[1].mixer.c_q.weight in taken(muon)
    (alone,) = make_optimizers(model, optimizer="adamw", **numbers).all
    assert [group["weight_decay"] for group in alone.param_groups if kept in set(group["params"])] == [0.0]
    assert sum(len(group["params"]) for group in alone.param_groups) == len(list(model.parameters()))


# Looped depth.


@pytest.mark.parametrize("pattern", ["swa full", "linear", "full mswa"])
def test_a_loop_equals_the_stack_unrolled_with_tied_weights(pattern):
    design = {"pattern": pattern, "window": 4, "n_sink": 1, "head_windows": (2, 5)}
    looped = tiny_model(tiny_config(**design, loops=3))
    unrolled = GPT(tiny_config(**design, n_layer=6)).double()
    unrolled.h = nn.ModuleList(list(looped.h) * 3)
    for name in ("wte", "ln_f", "lm_head"):
        setattr(unrolled, name, getattr(looped, name))
    idx = random_tokens(B, T)
    assert_equal(looped(idx), unrolled(idx))
    assert_contract(looped.config, random_tokens(B, 2 * T), [5, 1, 1, 9], t=7)


def test_loops_cost_work_and_cache_but_no_parameters():
    once, thrice = (tiny_config(pattern="swa full", window=4, loops=loops) for loops in (1, 3))
    assert n_params(once) == n_params(thrice)
    assert cache_bytes(thrice, 30) == 3 * cache_bytes(once, 30)
    head = 3 * 2 * T * once.vocab * once.n_embd
    assert train_flops(thrice, T) - head == 3 * (train_flops(once, T) - head)
    assert thrice.describe() == "swa full, 3 loops"


def test_a_loop_decodes_compiled(traced):
    traced({"pattern": "swa full", "window": 4, "loops": 2})


# A mixer that looks ahead, patterns in groups, tables by kind of layer.


class AheadSpec(LinearSpec):
    """Of a mixer that would look ahead."""

    @property
    def causal(self):
        return False


class Ahead(LinearAttention):
    @classmethod
    def spec_from(cls, config, place):
        return AheadSpec(kind="toy", n_embd=config.n_embd, n_head=config.n_head, head_dim=config.head_width)


def test_a_mixer_that_is_not_causal_is_marked(word):
    word(Ahead)
    config = tiny_config(pattern="toy full")
    assert config.describe() == "toy(not causal) full"
    assert "toy layers are not causal" in "\n".join(config.notes())


def test_a_mixer_that_is_not_causal_cannot_generate(word, tmp_path):
    word(Ahead)
    save_run(tmp_path / "run", pattern="toy full")
    with pytest.raises(UserError, match=r"toy layers are not causal: .*run cannot generate text"):
        load(tmp_path / "run", ModelParams(device="cpu", compile="off"))


def test_patterns_may_group():
    assert tiny_config(pattern="(linear*2 full)*2 swa", window=3, n_layer=9).kinds == (
        *("linear", "linear", "full") * 2,
        "swa",
        "linear",
        "linear",
    )
    with pytest.raises(ValueError, match=r"a \( without a \) behind it"):
        tiny_config(pattern="(full swa")


def test_a_table_by_kind_asks_only_for_kinds_that_read_it():
    config = tiny_config(pattern="linear full", rope_base={"full": 1e6})
    assert config.layers[1].rope.base == 1e6
    assert MultiWindowAttention.per_kind == Attention.per_kind != LinearAttention.per_kind
    with pytest.raises(ValueError, match="rope_base has no value for full layers"):
        ModelConfig(n_layer=2, pattern="linear full", rope_base={"swa": 1e6})
