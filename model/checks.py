"""What settings of ModelConfig need and exclude, said with the key and its value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.mixers import MIXERS

if TYPE_CHECKING:
    from model.config import ModelConfig

BY_KIND = ("position", "rope_base", "rope_fraction", "rope_scaling", "rope_factor")


def check_tables(config: ModelConfig, kinds: set[str]) -> None:
    """Tables by kind of layer have a value for each kind there is, and for nothing else."""
    for key in BY_KIND:
        table = getattr(config, key)
        if isinstance(table, dict):
            if unknown := set(table) - set(MIXERS):
                raise ValueError(f"{key}.{unknown.pop()} is no kind of layer; the kinds are {', '.join(MIXERS)}")
            if missing := kinds - set(table):
                raise ValueError(
                    f"{key} says nothing of {missing.pop()} layers, which pattern ({config.pattern!r}) has"
                )
    if isinstance(config.position, dict) and "learned" in config.position.values():
        raise ValueError("position = learned is one table for the whole model, it cannot be given by kind of layer")


def check_patterns(config: ModelConfig, kinds: set[str]) -> None:
    """What kinds of layers beside full and swa need is there."""
    if "mswa" in kinds:
        if not config.head_windows or min(config.head_windows) < 1 or config.kv_heads % len(config.head_windows):
            raise ValueError(
                f"head_windows ({list(config.head_windows)}) of mswa layers must be numbers of keys, each at least "
                f"1, as many as divide n_kv_head ({config.kv_heads})"
            )
        if config.of_kind("position", "mswa") == "alibi" or config.qk_norm_over == "projection":
            raise ValueError("mswa splits the heads: position = alibi and qk_norm_over = projection do not fit")
    if min(config.global_tokens, default=0) < 0:
        raise ValueError(f"global_tokens ({list(config.global_tokens)}) are positions: from 0 on")
    if (config.global_tokens or config.n_random) and "swa" not in kinds:
        raise ValueError(f"global_tokens and n_random need swa layers, and pattern ({config.pattern!r}) has none")
    for kind, keys in {
        "strided": ("sparse_block",),
        "fixed": ("sparse_block", "n_summary"),
        "star": ("sparse_block", "star_context"),
    }.items():
        for key in keys:
            if kind in kinds and getattr(config, key) is None:
                raise ValueError(f"pattern ({config.pattern!r}) has {kind} layers: give {key}")
    if "fixed" in kinds and (config.n_summary or 0) > (config.sparse_block or 0):
        raise ValueError(f"n_summary ({config.n_summary}) must be at most sparse_block ({config.sparse_block})")


def check_rope(config: ModelConfig, kind: str) -> None:
    """What one kind of layer says of its rotation fits together."""
    if config.of_kind("rope_base", kind) <= 0:
        raise ValueError(f"rope_base ({config.rope_base}) must be above 0")
    position, scaling = config.of_kind("position", kind), config.of_kind("rope_scaling", kind)
    factor, fraction = config.of_kind("rope_factor", kind), config.of_kind("rope_fraction", kind)
    if position != "rope":
        for key, value, unused in (
            ("rope_scaling", scaling, "none"),
            ("rope_factor", factor, 1),
            ("rope_fraction", fraction, 1),
        ):
            if value != unused:
                raise ValueError(f"{key} ({value}) needs position = rope, and {kind} layers have {position}")
        return
    if config.head_width % 2:
        raise ValueError(f"RoPE rotates pairs: head_dim ({config.head_width}) must be even")
    width = fraction * config.head_width
    if not 0 < fraction <= 1 or round(width) % 2 or abs(width - round(width)) > 1e-6:
        raise ValueError(
            f"rope_fraction ({fraction}) of head_dim ({config.head_width}) must be an even number of dimensions"
        )
    if (scaling == "none") != (factor == 1) or factor < 1:
        raise ValueError(
            f"rope_factor ({factor}) and rope_scaling ({scaling}) of {kind} layers: "
            "give both, with a factor above 1, or neither"
        )
    if scaling in ("yarn", "llama3") and (config.rope_trained is None or config.of_kind("rope_base", kind) <= 1):
        raise ValueError(
            f"rope_scaling ({scaling}) needs rope_trained ({config.rope_trained}), the context that it stretches, "
            f"and a rope_base ({config.rope_base}) above 1"
        )
