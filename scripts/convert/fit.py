"""Find the class of transformers that fits a config: one whose config.json converts back to an equal config."""

from model.attention.spec import AttentionSpec
from model.config import ModelConfig
from model.errors import UserError
from scripts.convert.families import ALL, Family, GPT2Family, attention_of
from scripts.convert.rope import Values


def fitting(config: ModelConfig) -> Family | GPT2Family:
    """The class that fits a config. UserError with the settings that the nearest class cannot express."""
    if config.omits is not None:
        raise UserError(f"model.omits ({config.omits}) must be none for transformers: the design is incomplete")
    if unknown := [spec.kind for spec in config.layers if not isinstance(spec, AttentionSpec)]:
        raise UserError(f"pattern ({config.pattern!r}): no supported class of transformers has {unknown[0]} layers")
    if config.n_embd % config.n_head:
        raise UserError(f"n_embd ({config.n_embd}) must be a multiple of n_head ({config.n_head}) for transformers")
    lost = {family.name: _lost(config, family) for family in ALL}
    nearest = min(ALL, key=lambda family: len(lost[family.name]))
    if differences := lost[nearest.name]:
        shown = ", ".join(f"{key} ({getattr(config, key)})" for key in differences)
        raise UserError(f"no class of transformers fits; the nearest is {nearest.name}, which does not support {shown}")
    return nearest


def _lost(config: ModelConfig, family: Family | GPT2Family) -> list[str]:
    """Names of the settings that change when a config is converted to a class and back."""
    before = _traits(config)
    try:
        after = _traits(ModelConfig(**family.ours(family.theirs(config))))
    except (UserError, ValueError):
        return list(before)  # not convertible at all
    return [key for key in before if before[key] != after[key]]


def _traits(config: ModelConfig) -> Values:
    """Everything that determines the function of a model, by the name of its setting."""
    whole = ("n_layer", "n_head", "n_embd", "norm", "norm_place", "norm_eps", "mlp", "bias", "tie_embeddings")
    plain = ("loops", "scale_embeddings", "logit_softcap", "vocab_size", "block_size")
    numbers = {"n_kv_head": config.kv_heads, "head_dim": config.head_width, "mlp_width": config.mlp_hidden}
    layers = [_layer_traits(config, attention_of(config, i)) for i in range(config.n_layer)]
    by_layer = {key: [layer[key] for layer in layers] for key in layers[0]}
    return {key: getattr(config, key) for key in (*whole, *plain)} | numbers | by_layer


def _layer_traits(config: ModelConfig, spec: AttentionSpec) -> Values:
    rope = spec.rope
    from_trained = rope is not None and rope.scaling in ("yarn", "llama3")
    return {
        "position": "rope" if rope else "alibi" if spec.alibi else config.position == "learned",
        "rope_base": rope and rope.base,
        "rope_fraction": rope and rope.width,
        "rope_scaling": rope and rope.scaling,
        "rope_factor": rope and rope.factor,
        "rope_trained": rope and from_trained and rope.trained_length,
        "rope_whole_ramp": rope and rope.scaling == "yarn" and rope.whole_ramp,
        "pattern": spec.kind,
        "window": spec.window,
        "global_tokens": spec.sparse and spec.sparse.tokens,
        "n_random": spec.sparse and spec.sparse.n_random,
        "n_sink": spec.n_sink,
        "attn_scale": round(spec.scale or spec.head_dim**-0.5, 12),
        "attn_softcap": spec.softcap,
        "sink_logit": spec.sink_logit,
        "attn_gate": spec.gate,
        "qk_norm": spec.qk_norm != "none",
        "qk_norm_over": spec.qk_norm,
        "attn_bias": spec.bias,
    }
