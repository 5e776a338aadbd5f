"""The identity of an experiment: what a run's config means, independent of how later versions spell it.

Studies name their finished cells after a hash of it, so it must not change for existing configs. It therefore has the
keys of commit dc8fb6e under the names they had there, and of keys added since then only those that are not at their
default.
"""

import hashlib
import json
from typing import Any

from model.section import Section

NOT_IDENTITY: dict[str, Any] = {  # where a run is kept and how it is shown
    "name": True,
    "out_dir": True,
    "log": True,
    "data": {"dir"},
    "train": {"keep_checkpoints"},
}

KNOWN: dict[str, frozenset[str]] = {  # keys of each section at commit dc8fb6e: never change this table
    "": frozenset(["seed", "device", "dtype", "compile", "model", "data", "optim", "train", "init_from"]),
    "model": frozenset(
        [
            "vocab_size",
            "block_size",
            "n_layer",
            "n_head",
            "n_kv_head",
            "n_embd",
            "head_dim",
            "pattern",
            "window",
            "head_windows",
            "window_everywhere",
            "n_sink",
            "global_tokens",
            "n_random",
            "sparse_block",
            "n_summary",
            "star_context",
            "position",
            "rope_base",
            "rope_fraction",
            "rope_scaling",
            "rope_factor",
            "rope_in_cache",
            "rope_trained",
            "rope_whole_ramp",
            "qk_norm",
            "qk_norm_over",
            "attn_scale",
            "attn_softcap",
            "sink_logit",
            "attn_gate",
            "attn_bias",
            "logit_softcap",
            "norm",
            "norm_place",
            "norm_eps",
            "mlp",
            "mlp_width",
            "bias",
            "tie_embeddings",
            "scale_embeddings",
            "init_std",
            "kernel",
            "dropout",
            "z_loss",
            "without",
        ]
    ),
    "data": frozenset(["text", "tokenizer"]),
    "optim": frozenset(
        [
            "optimizer",
            "muon_lr",
            "adamw_lr",
            "base_width",
            "schedule",
            "warmup_steps",
            "decay_fraction",
            "final_lr",
            "betas",
            "weight_decay",
            "grad_clip",
        ]
    ),
    "train": frozenset(
        [
            "max_steps",
            "global_batch_tokens",
            "micro_batch",
            "parallel",
            "checkpoint",
            "recompute",
            "eval_every",
            "eval_tokens",
            "log_every",
            "checkpoint_every",
            "patience",
            "spike_sigma",
            "max_skipped",
        ]
    ),
}


def settings(config: Section) -> dict[str, Any]:
    """All settings in which two experiments may differ, under their current names, as JSON values."""
    return config.model_dump(mode="json", exclude=NOT_IDENTITY)


def experiment(config: Section) -> dict[str, Any]:
    """The identity of a run's config, as JSON values."""
    return _identity(config, settings(config), "")


def experiment_digest(config: Section) -> str:
    """8 hexadecimal digits that name the experiment."""
    return hashlib.sha256(json.dumps(experiment(config), sort_keys=True).encode()).hexdigest()[:8]


def _identity(section: Section, values: dict[str, Any], path: str) -> dict[str, Any]:
    known, fields = KNOWN.get(path, frozenset()), type(section).model_fields
    former = {new: old for old, new in type(section).renamed.items()}
    identity: dict[str, Any] = {}
    for key, value in values.items():
        own, name = getattr(section, key), former.get(key, key)
        if isinstance(own, Section):
            value = _identity(own, value, f"{path}.{key}".lstrip("."))
            at_default = value == {}
        else:
            at_default = own == fields[key].get_default(call_default_factory=True) if key in fields else False
        name = name if name in known else key
        if name in known or not at_default:
            identity[name] = value
    return identity
