"""Logits equal those of transformers' models, an implementation that is not ours, over the same random weights."""

import pytest
import torch
from conftest import assert_equal, logits_in_chunks, random_tokens
from networks import VOCAB, tiny_config, tiny_model
from torch import Tensor, nn

from model.config import ModelConfig
from model.gpt import GPT

B, T, W = 3, 29, 8  # more than three windows
BASE = 500.0
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
    "attn_implementation": "eager",
}
OURS = {"n_layer": 3, "n_embd": 24, "rope_base": BASE, "norm_eps": 1e-5, "tie_embeddings": False}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the oracle: install the test group")


def copy_llama(ours: GPT, theirs: nn.Module) -> None:
    """Our weights into Llama, Mistral or Qwen3: only the names differ."""
    put = lambda module, weight: module.weight.data.copy_(weight.data)
    put(theirs.model.embed_tokens, ours.wte.weight)
    for block, layer in zip(ours.h, theirs.model.layers, strict=True):
        attention = layer.self_attn
        put(layer.input_layernorm, block.norm_1.weight)
        put(attention.q_proj, block.mixer.c_q.weight)
        put(attention.k_proj, block.mixer.c_k.weight)
        put(attention.v_proj, block.mixer.c_v.weight)
        put(attention.o_proj, block.mixer.c_proj.weight)
        if block.mixer.spec.qk_norm != "none":
            put(attention.q_norm, block.mixer.q_norm.weight)
            put(attention.k_norm, block.mixer.k_norm.weight)
        put(layer.post_attention_layernorm, block.norm_2.weight)
        put(layer.mlp.gate_proj, block.mlp.c_gate.weight)
        put(layer.mlp.up_proj, block.mlp.c_fc.weight)
        put(layer.mlp.down_proj, block.mlp.c_proj.weight)
    put(theirs.model.norm, ours.ln_f.weight)
    put(theirs.lm_head, ours.lm_head.weight)


def copy_gpt2(ours: GPT, theirs: nn.Module) -> None:
    """Our weights into GPT-2, whose Conv1D keeps matrices transposed."""

    def put(module: nn.Module, source: nn.Module, transpose: bool = False) -> None:
        module.weight.data.copy_(source.weight.data.T if transpose else source.weight.data)
        module.bias.data.copy_(source.bias.data)

    theirs.transformer.wte.weight.data.copy_(ours.wte.weight.data)
    theirs.transformer.wpe.weight.data.copy_(ours.wpe.weight.data)
    for block, layer in zip(ours.h, theirs.transformer.h, strict=True):
        put(layer.ln_1, block.norm_1)
        qkv = [block.mixer.c_q, block.mixer.c_k, block.mixer.c_v]
        layer.attn.c_attn.weight.data.copy_(torch.cat([c.weight.data for c in qkv]).T)
        layer.attn.c_attn.bias.data.copy_(torch.cat([c.bias.data for c in qkv]))
        put(layer.attn.c_proj, block.mixer.c_proj, transpose=True)
        put(layer.ln_2, block.norm_2)
        put(layer.mlp.c_fc, block.mlp.c_fc, transpose=True)
        put(layer.mlp.c_proj, block.mlp.c_proj, transpose=True)
    put(theirs.transformer.ln_f, ours.ln_f)
    theirs.lm_head.weight.data.copy_(ours.lm_head.weight.data)


def build(config: ModelConfig) -> GPT:
    return tiny_model(config, dtype=torch.float32)


def llama(transformers) -> tuple[GPT, nn.Module]:
    ours = build(tiny_config(qk_norm=False, **OURS))
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    copy_llama(ours, theirs)
    return ours, theirs


def qwen3(transformers) -> tuple[GPT, nn.Module]:
    ours = build(tiny_config(qk_norm=True, **OURS))
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA)).eval()
    copy_llama(ours, theirs)
    return ours, theirs


def mistral(transformers) -> tuple[GPT, nn.Module]:
    ours = build(tiny_config(qk_norm=False, pattern="swa", window=W, **OURS))
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=W)).eval()
    copy_llama(ours, theirs)
    return ours, theirs


def qwen3_mixed(transformers) -> tuple[GPT, nn.Module]:
    ours = build(tiny_config(qk_norm=True, pattern="2:1", window=W, **OURS))
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = transformers.Qwen3Config(**LLAMA, use_sliding_window=True, sliding_window=W, layer_types=kinds)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    copy_llama(ours, theirs)
    return ours, theirs


def gpt2(transformers) -> tuple[GPT, nn.Module]:
    numbers = {"n_layer": 3, "n_embd": 24, "n_head": 6, "vocab_size": VOCAB}
    kinds = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "qk_norm": False}
    widths = {"n_kv_head": None, "head_dim": None, "mlp_width": None, "norm_eps": 1e-5, "block_size": 64}
    ours = build(tiny_config(**numbers, **kinds, **widths, tie_embeddings=False))
    for table in (ours.wte, ours.wpe):
        table.weight.data *= 8  # or the biases decide, and greedy text repeats one token
    numbers |= {"n_positions": 64, "activation_function": "gelu", "tie_word_embeddings": False}
    config = transformers.GPT2Config(**numbers, attn_implementation="eager")
    theirs = transformers.GPT2LMHeadModel(config).eval()
    copy_gpt2(ours, theirs)
    return ours, theirs


each_oracle = pytest.mark.parametrize("pair", [llama, qwen3, mistral, qwen3_mixed, gpt2])


@torch.no_grad()
def their_logits(theirs: nn.Module, idx: Tensor) -> Tensor:
    return theirs(idx, use_cache=False).logits


@each_oracle
def test_logits_equal_an_independent_implementation(transformers, pair):
    ours, theirs = pair(transformers)
    idx = random_tokens(B, T)
    assert_equal(ours(idx).detach(), their_logits(theirs, idx), 1e-5)


@each_oracle
@pytest.mark.parametrize(
    "sizes", [[1] * T, [W - 1] * 9, [W + 1] * 9, [19] + [1] * T], ids=["ones", "W-1", "W+1", "prompt"]
)
def test_cached_logits_equal_their_forward(transformers, pair, sizes):
    ours, theirs = pair(transformers)
    idx = random_tokens(B, T)
    assert_equal(logits_in_chunks(ours, idx, sizes), their_logits(theirs, idx), 1e-5)


@each_oracle
@torch.no_grad()
def test_greedy_decoding_writes_what_their_forward_would(transformers, pair):
    ours, theirs = pair(transformers)
    idx = random_tokens(B, 3)
    cache = ours.new_cache(B, T)
    logits = ours(idx, cache=cache, last_only=True)
    for _ in range(T - 3):
        new = logits.argmax(dim=-1)  # (B, 1)
        idx = torch.cat((idx, new), dim=1)
        logits = ours(new, cache=cache)
    assert torch.equal(their_logits(theirs, idx)[:, 2:-1].argmax(dim=-1), idx[:, 3:])
    assert len(idx[:, 3:].unique()) > 3, "the text repeats one token"


def test_mistrals_window_matters_in_this_test(transformers):
    ours, theirs = mistral(transformers)
    off_by_one = GPT(ours.config.model_copy(update={"window": W + 1})).eval()
    off_by_one.load_state_dict(ours.state_dict())
    idx = random_tokens(B, T)
    difference = (off_by_one(idx) - their_logits(theirs, idx)).abs().amax(dim=(0, 2))
    assert (difference[:W] < 1e-5).all()
    assert (difference[W:] > 1e-3).all()
