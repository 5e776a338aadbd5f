"""The same shapes in transformers, to be measured beside ours."""

from typing import Any

from torch import nn

from model.config import ModelConfig
from model.errors import UserError


def transformers_twin(config: ModelConfig) -> nn.Module:
    """A new model of transformers with this shape: GPT-2, Llama, Qwen3, or Mistral where every layer slides."""
    import transformers

    if config.position == "learned" and config.norm == "layernorm" and config.mlp == "gelu" and config.bias:
        if config.kv_heads != config.n_head or "swa" in config.kinds:
            raise UserError("transformers has GPT-2 with full multi-head attention only: take away n_kv_head and swa")
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab,
                n_positions=config.block_size,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_inner=config.mlp_hidden,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=0.0,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
    if config.position != "rope" or config.norm != "rmsnorm" or config.mlp != "swiglu" or config.bias:
        raise UserError(
            "transformers has no model with this mixture of position, norm, mlp and bias: take those of GPT-2 or Llama"
        )
    kinds = {"swa": "sliding_attention", "full": "full_attention"}
    numbers: dict[str, Any] = {
        "vocab_size": config.vocab,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if config.qk_norm:
        sliding = {"use_sliding_window": True, "sliding_window": config.window} if "swa" in config.kinds else {}
        layers = {"layer_types": [kinds[kind] for kind in config.kinds]}
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**numbers, **sliding, **layers))
    if "swa" in config.kinds and "full" in config.kinds:
        raise UserError("without qk_norm transformers has layers all full (Llama) or all sliding (Mistral), not both")
    if "swa" in config.kinds:
        return transformers.MistralForCausalLM(transformers.MistralConfig(**numbers, sliding_window=config.window))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**numbers))
