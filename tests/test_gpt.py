"""The whole network: identities, its start, its positions, its options."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import assert_equal, logits_in_chunks, logits_ragged, random_tokens
from networks import VOCAB, tiny_config, tiny_model
from torch import nn

from model.attention.rope import Rope, rotate
from model.config import ModelConfig
from model.context import ForwardContext
from model.errors import UserError
from model.gpt import GPT
from model.layers import RMSNorm, RMSNormPlusOne, rms_norm

B, T = 3, 13
DEPTH = {"n_layer": 5, "window": 4, "n_sink": 1}


def same_weights(config: ModelConfig, source: GPT) -> GPT:
    """A network of another config over these weights."""
    model = tiny_model(config, seed=7)
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("n_sink", [0, 3])
@pytest.mark.parametrize("window", [T, T + 1, 1000])
@pytest.mark.parametrize("pattern", ["swa", "swa full"])
def test_window_as_long_as_the_text_equals_full(pattern, window, n_sink):
    full, idx = tiny_model(tiny_config()), random_tokens(B, T)
    sliding = same_weights(tiny_config(pattern=pattern, window=window, n_sink=n_sink), full)
    assert_equal(sliding(idx), full(idx))


def test_window_shorter_than_the_text_does_not_equal_full():
    full, idx = tiny_model(tiny_config()), random_tokens(B, T)
    sliding = same_weights(tiny_config(pattern="swa", window=T - 1), full)
    assert_equal(sliding(idx)[:, :-1], full(idx)[:, :-1])
    assert not torch.allclose(sliding(idx)[:, -1], full(idx)[:, -1], atol=1e-3)


@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_gqa_equals_mha_with_repeated_kv_heads(n_kv_head):
    config, idx = tiny_config(n_kv_head=n_kv_head, pattern="swa full", window=4), random_tokens(B, T)
    gqa, mha = tiny_model(config), tiny_model(config.model_copy(update={"n_kv_head": None}), seed=7)
    state = gqa.state_dict()
    for name in [name for name in state if name.endswith(("c_k.weight", "c_v.weight"))]:
        heads = state[name].view(n_kv_head, 8, 20)
        state[name] = heads.repeat_interleave(6 // n_kv_head, dim=0).flatten(0, 1)
    mha.load_state_dict(state)
    assert_equal(mha(idx), gqa(idx))


def test_as_many_kv_heads_as_heads_is_mha():
    heads, idx = tiny_model(tiny_config(n_kv_head=None)), random_tokens(B, T)
    assert torch.equal(same_weights(tiny_config(n_kv_head=6), heads)(idx), heads(idx))


@pytest.mark.parametrize(("ratio", "words"), [("2:1", "swa*2 full"), ("5:1", "swa*5 full"), ("0:1", "full")])
def test_ratio_equals_its_expansion(ratio, words):
    one, idx = tiny_model(tiny_config(pattern=ratio, **DEPTH)), random_tokens(B, T)
    assert torch.equal(same_weights(tiny_config(pattern=words, **DEPTH), one)(idx), one(idx))


def test_sliding_reads_the_same_weights_through_a_window():
    trained, idx = tiny_model(tiny_config(pattern="swa full", window=9)), random_tokens(B, T)
    slid = same_weights(trained.config.sliding(4, 1), trained)
    expected = same_weights(tiny_config(pattern="swa", window=4, n_sink=1), trained)
    assert_equal(slid(idx), expected(idx))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("pattern", ["full", "swa full"])
def test_loss_starts_near_the_log_of_the_vocabulary(pattern, tie):
    torch.manual_seed(0)
    model = GPT(tiny_config(pattern=pattern, window=4, tie_embeddings=tie))
    loss = model(random_tokens(B, T), random_tokens(B, T, seed=9))
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.05)


def test_layers_can_start_alike_at_every_width():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=97, n_layer=8, n_embd=192, mlp_width=768, init_std=None))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 if name == "wte.weight" else p.shape[1] ** -0.5 / (4 if "c_proj" in name else 1)
            assert p.std().item() == pytest.approx(std, rel=0.1), name


def test_weights_start_small_and_smaller_where_they_add_up():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=97, n_layer=8, n_embd=192, bias=True))
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    assert all(s == pytest.approx(0.005 if "c_proj" in name else 0.02, rel=0.1) for name, s in std.items())
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_dropout_acts_in_training_alone():
    model, idx = tiny_model(tiny_config(dropout=0.4)), random_tokens(B, T)
    without = same_weights(tiny_config(), model)(idx)
    assert torch.equal(model(idx), without)
    assert not torch.allclose(model.train()(idx), without)


def test_tied_embeddings_are_one_tensor():
    tied, free = GPT(tiny_config(tie_embeddings=True)), GPT(tiny_config(tie_embeddings=False))
    assert tied.lm_head.weight is tied.wte.weight
    assert free.lm_head.weight.data_ptr() != free.wte.weight.data_ptr()


@pytest.mark.parametrize("overrides", [{}, {"mlp": "gelu", "norm": "layernorm", "bias": True, "position": "learned"}])
@pytest.mark.parametrize("sizes", [[4] * 4, [1] * 16, [9, 7]], ids=str)
def test_learned_positions_and_layernorm_decode_as_they_train(overrides, sizes):
    model, idx = tiny_model(tiny_config(pattern="swa full", window=4, **overrides)), random_tokens(B, 16)
    assert_equal(logits_in_chunks(model, idx, sizes), model(idx).detach())


def test_learned_positions_of_ragged_rows_are_their_own():
    model, idx = tiny_model(tiny_config(pattern="swa", window=4, position="learned")), random_tokens(B, 16)
    parts = logits_ragged(model, list(idx), [[5, 0, 2], [6, 7, 1]], model.new_cache(B, 16))
    for b, n in enumerate([11, 7, 3]):
        assert_equal(torch.cat(parts[b]), model(idx[b : b + 1, :n])[0].detach())


def test_pads_take_no_learned_positions():
    model, idx = tiny_model(tiny_config(pattern="swa", window=4, position="learned")), random_tokens(B, 16)
    parts = logits_ragged(model, list(idx), [[5, 0, 2], [11, 7, 1]], model.new_cache(B, 16))
    assert_equal(torch.cat(parts[0]), model(idx[:1])[0].detach())


@pytest.mark.parametrize("cached", [False, True])
def test_more_tokens_than_learned_positions_is_a_clear_error(cached):
    model = tiny_model(tiny_config(position="learned", pattern="swa", window=4))
    cache = model.new_cache(B, 40) if cached else None
    message = (
        r"^17 tokens are more than the 16 of the learned positions of this model \(block_size\); "
        r"train with position = rope to go further$"
    )
    with pytest.raises(UserError, match=message):
        model(random_tokens(B, 17), cache=cache)


def test_rope_goes_beyond_block_size():
    model, idx = tiny_model(tiny_config()), random_tokens(B, 40)
    assert_equal(logits_in_chunks(model, idx, [33] + [1] * 7), model(idx).detach())


def test_without_positions_the_order_of_the_past_does_not_matter():
    model, idx = tiny_model(tiny_config(position="none", n_layer=1)), random_tokens(B, T)
    swapped = idx[:, [3, 0, 2, 1, *range(4, T)]]
    assert_equal(model(swapped)[:, 4:], model(idx)[:, 4:])


@pytest.mark.parametrize("rotated", ["swa", "full"])
def test_positions_by_kind_of_layer_rotate_those_layers_alone(rotated):
    table = {"swa": "none", "full": "none"} | {rotated: "rope"}
    bases = {"swa": 1e4, "full": 1e4}
    config = tiny_config(pattern="swa full", window=4, position=table)
    idx, model = random_tokens(B, T), tiny_model(config)
    other = {key: 7.0 if key != rotated else base for key, base in bases.items()}
    assert torch.equal(same_weights(config.model_copy(update={"rope_base": other}), model)(idx), model(idx))
    changed = same_weights(config.model_copy(update={"rope_base": bases | {rotated: 7.0}}), model)(idx)
    assert not torch.allclose(changed, model(idx), atol=1e-3)


@pytest.mark.parametrize("kind", ["swa", "full"])
def test_rope_bases_by_kind_of_layer_are_all_used(kind):
    bases, idx = {"swa": 100.0, "full": 1e4}, random_tokens(B, T)
    model = tiny_model(tiny_config(pattern="swa full", window=4, rope_base=bases))
    changed = same_weights(tiny_config(pattern="swa full", window=4, rope_base=bases | {kind: 7.0}), model)
    assert not torch.allclose(changed(idx), model(idx), atol=1e-3)


def test_rope_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    pos = torch.tensor([[0, 5, 1000, 10**6]])
    table = Rope(base=1e4, width=8).table
    score = lambda offset: (rotate(q, *table(pos + offset)) * rotate(k, *table(pos))).sum(-1)
    for offset in (0, 3):
        assert_equal(score(offset), score(offset)[..., :1].expand(1, 1, 4), 1e-6)


def test_rope_rotates_the_pairs_of_the_definition():
    x, pos, base = torch.arange(1.0, 7.0)[None, None, None].double(), torch.tensor([[3]]), 50.0
    expected = x.clone()[0, 0, 0]
    for m in range(3):
        angle, u, w = 3 * base ** (-2 * m / 6), x[0, 0, 0, m].item(), x[0, 0, 0, m + 3].item()
        expected[m] = u * math.cos(angle) - w * math.sin(angle)
        expected[m + 3] = w * math.cos(angle) + u * math.sin(angle)
    assert_equal(rotate(x, *Rope(base=base, width=6).table(pos))[0, 0, 0], expected, 1e-6)


def test_rmsnorm_divides_by_the_root_of_the_mean_square():
    norm, x = RMSNorm(6, eps=0.01).double(), torch.linspace(-2, 3, 12).double().view(2, 6)
    nn.init.constant_(norm.weight, 0.7)
    expected = [[0.7 * v / math.sqrt(sum(u * u for u in row) / 6 + 0.01) for v in row] for row in x.tolist()]
    assert_equal(norm(x).detach(), torch.tensor(expected, dtype=torch.float64))


def test_rmsnorm_has_torchs_values_and_gradients():
    x, weight = torch.randn(2, 5, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    theirs = lambda x, weight: nn.functional.rms_norm(x, (6,), weight, 0.01)
    assert_equal(rms_norm(x, weight, 0.01), theirs(x, weight))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 0.01), (x, weight))
    upstream = torch.randn(2, 5, 6).double()
    for ours, other in zip(
        torch.autograd.grad(rms_norm(x, weight, 0.01), (x, weight), upstream),
        torch.autograd.grad(theirs(x, weight), (x, weight), upstream),
        strict=True,
    ):
        assert_equal(ours, other)


@pytest.mark.parametrize("autocast", [True, False])
def test_rmsnorm_of_bfloat16_is_computed_in_float32(autocast):
    x, norm = torch.randn(40, 6).bfloat16(), RMSNorm(6, eps=0.01).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = norm(x)
    assert y.dtype == (torch.float32 if autocast else torch.bfloat16)
    expected = nn.functional.rms_norm(x.float(), (6,), norm.weight.float(), 0.01)
    assert_equal(y.float(), expected, 1e-6 if autocast else 2**-8)  # half a place of bfloat16


def test_rmsnorm_of_one_more_equals_the_norm_of_its_weight_plus_one():
    plain, more, x = RMSNorm(6, eps=0.01).double(), RMSNormPlusOne(6, eps=0.01).double(), torch.randn(4, 6).double()
    assert_equal(more(x).detach(), plain(x).detach())  # both begin as the bare norm
    nn.init.constant_(more.weight, 0.7), nn.init.constant_(plain.weight, 1.7)
    assert_equal(more(x).detach(), plain(x).detach())


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_gates_scale_each_head_or_channel_by_a_sigmoid_of_the_layers_input(gate):
    config = tiny_config(n_layer=1, attn_gate=gate)
    mixer, step = tiny_model(config).h[0].mixer, ForwardContext(pos=torch.arange(T)[None])
    x, heads = torch.randn(B, T, 20).double(), []
    mixer.c_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    mixer(x, step)
    weight, mixer.c_gate.weight.data = mixer.c_gate.weight.data, torch.zeros_like(mixer.c_gate.weight)
    mixer(x, step)  # every gate is half open
    gates = torch.sigmoid(x @ weight.T)  # (B, T, H) or (B, T, H D)
    gated, half = (y.unflatten(-1, (6, 8)) for y in heads)
    assert_equal(gated, 2 * half * gates.view(B, T, 6, -1))


def test_query_scale_and_qk_norm_over_the_projection_are_what_they_say():
    idx = random_tokens(B, T)
    model = tiny_model(tiny_config(attn_scale=0.05))
    scaled = same_weights(tiny_config(), model)
    for block in scaled.h:
        block.mixer.q_norm.weight.data *= 0.05 * math.sqrt(8)
    assert_equal(scaled(idx), model(idx))
    mixer, x = tiny_model(tiny_config(qk_norm_over="projection")).h[0].mixer, torch.randn(B, T, 20).double()
    q = mixer.c_q(x)
    rms = (q.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert_equal(mixer.q_norm(q), q / rms * mixer.q_norm.weight)
    assert (len(mixer.q_norm.weight), len(mixer.k_norm.weight)) == (48, 16)


def test_soft_capped_logits_and_their_loss_are_of_the_same_cap():
    model, idx, targets = tiny_model(tiny_config(logit_softcap=0.8)), random_tokens(B, T), random_tokens(B, T, seed=9)
    plain = same_weights(tiny_config(), model)(idx)
    capped = 0.8 * torch.tanh(plain / 0.8)
    assert_equal(model(idx), capped)
    expected = nn.functional.cross_entropy(capped.flatten(0, 1), targets.flatten())
    assert_equal(model(idx, targets).double(), expected, 1e-6)


def test_z_loss_is_minimised_and_not_shown():
    model, idx, targets = tiny_model(tiny_config(z_loss=0.1)), random_tokens(B, T), random_tokens(B, T, seed=9)
    loss, logits = model(idx, targets), model(idx)
    plain = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_equal(loss.double(), plain, 1e-6)
    both = plain + 0.1 * logits.logsumexp(-1).square().mean()
    for got, expected in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, both)), strict=True):
        assert_equal(got, expected, 1e-6)


def test_scaled_embeddings_are_longer_by_the_root_of_their_width():
    model, idx = tiny_model(tiny_config(scale_embeddings=True, tie_embeddings=False)), random_tokens(B, T)
    longer = same_weights(tiny_config(tie_embeddings=False), model)
    longer.wte.weight.data *= math.sqrt(20)
    assert_equal(longer(idx), model(idx))


@pytest.mark.parametrize("mlp", ["swiglu", "geglu", "gelu", "gelu-tanh", "relu2"])
@pytest.mark.parametrize("norm", ["rmsnorm", "rmsnorm+1", "layernorm"])
def test_bf16_autocast_gives_finite_gradients_and_float32_loss(norm, mlp):
    config = tiny_config(pattern="swa full", window=4, norm=norm, mlp=mlp, bias=True)
    model, idx = tiny_model(config, dtype=torch.float32), random_tokens(B, T)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, random_tokens(B, T, seed=9))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(idx, random_tokens(B, T, seed=9)).item(), rel=0.05)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_bf16_autocast_decodes_with_a_cache_in_bf16():
    model, idx = tiny_model(tiny_config(pattern="swa full", window=4), dtype=torch.float32), random_tokens(B, T)
    with torch.autocast("cpu", torch.bfloat16):
        cached = logits_in_chunks(model, idx, [5, 1, 7], model.new_cache(B, T, dtype=torch.bfloat16))
    assert_equal(cached.float(), model(idx).detach(), 0.2)


def test_kernel_names_say_what_each_kind_of_layer_takes():
    names = tiny_model(tiny_config(pattern="swa full", window=4)).kernel_names(T, torch.float64).split(", ")
    assert [name.split()[0] for name in names] == ["swa", "full"]


@pytest.mark.slow
def test_importing_the_model_does_nothing():
    probe = """
import sys, torch
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
import model.gpt, model.cost, model.loss, model.config
assert torch.equal(before[0], torch.get_rng_state())
assert before[1:] == (torch.get_num_threads(), torch.get_default_dtype())
assert not torch.cuda.is_initialized()
assert not {"wandb", "transformers", "datasets", "data", "configs", "train"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
