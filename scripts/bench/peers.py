"""The same shapes in transformers, to be measured beside ours."""

from torch import nn

from model.config import ModelConfig
from scripts.convert.fit import fitting


def transformers_twin(config: ModelConfig) -> nn.Module:
    """A new model of transformers with this shape. UserError where it has none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = fitting(config)
    theirs = AutoConfig.for_model(family.model_type, **family.theirs(config), use_cache=False)
    return AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa")
