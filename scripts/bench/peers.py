"""The same shapes in transformers, to be measured beside ours."""

from torch import nn

from model.config import ModelConfig
from model.cpu import keep_compiled_code
from scripts.convert.fit import fitting


def transformers_twin(config: ModelConfig, *, use_cache: bool = False) -> nn.Module:
    """A new model of transformers with this shape, to train or, with a cache, to decode. UserError if it has none."""
    keep_compiled_code()  # before transformers imports torch's compiler, which would settle on a place of its own
    from transformers import AutoConfig, AutoModelForCausalLM

    family = fitting(config)
    theirs = AutoConfig.for_model(family.model_type, **family.theirs(config), use_cache=use_cache)
    if getattr(theirs, "sliding_window", 0) is None:
        theirs.sliding_window = config.block_size  # some ask for it where no layer slides too
    return AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa")
