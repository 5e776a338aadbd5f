"""Convert RoPE settings between config.json and ModelConfig."""

from typing import Any

from model.attention.rope import Rope
from model.errors import UserError

Values = dict[str, Any]
LLAMA3: Values = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # the values of all Llama 3 models


def need(values: Values, key: str) -> Any:
    """A required value. UserError if it is missing."""
    if values.get(key) is None:
        raise UserError(f"config.json: {key} is missing")
    return values[key]


def their_rope(rope: Rope | None) -> Values:
    """A Rope as rope_parameters; None becomes the default that their classes always have."""
    if rope is None:
        return {"rope_type": "default", "rope_theta": 10_000.0}
    values: Values = {"rope_type": "default" if rope.scaling == "none" else rope.scaling, "rope_theta": rope.base}
    if rope.scaling != "none":
        values["factor"] = rope.factor
    if rope.scaling == "yarn":
        values |= {
            "original_max_position_embeddings": rope.trained_length,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": rope.whole_ramp,
        }
    if rope.scaling == "llama3":
        values |= LLAMA3 | {"original_max_position_embeddings": rope.trained_length}
    return values


def our_rope(values: Values) -> Values:
    """rope_parameters as settings of ModelConfig. UserError for values that Sash does not support."""
    kind = values.get("rope_type", values.get("type", "default"))
    ours: Values = {"rope_base": float(values["rope_theta"])}
    usual: Values = {"partial_rotary_factor": 1.0}
    match kind:
        case "default":
            ours |= {"rope_scaling": "none", "rope_factor": 1.0}
        case "linear":
            ours |= {"rope_scaling": "linear", "rope_factor": float(need(values, "factor"))}
        case "yarn":
            factor, trained = float(need(values, "factor")), need(values, "original_max_position_embeddings")
            ours |= {"rope_scaling": "yarn", "rope_factor": factor, "rope_trained": trained}
            ours |= {"rope_whole_ramp": values.get("truncate", True)}
            temperature = Rope(base=2.0, width=2, scaling="yarn", factor=factor).temperature
            usual |= {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": temperature, "mscale": None}
        case "llama3":
            factor, trained = float(need(values, "factor")), need(values, "original_max_position_embeddings")
            ours |= {"rope_scaling": "llama3", "rope_factor": factor, "rope_trained": trained}
            usual |= LLAMA3
        case _:
            raise UserError(f"rope_type ({kind}) is not supported: it must be one of default, linear, yarn, llama3")
    for key, value in usual.items():
        given = values.get(key)
        if given is not None and (value is None or abs(given - value) > 1e-6):
            needed = "absent" if value is None else value
            raise UserError(f"{key} ({given}) in rope_parameters is not supported: it must be {needed}")
    return ours
