"""Models of transformers with the same config, to compare with."""

from torch import nn

from model.config import ModelConfig
from model.cpu import keep_compiled_code
from scripts.convert.fit import fitting


def transformers_twin(config: ModelConfig, *, use_cache: bool = False) -> nn.Module:
    """A new transformers model with this config, to train or (use_cache) to decode. UserError if no class fits."""
    keep_compiled_code()  # before transformers imports torch's compiler, which then fixes its cache directory
    from transformers import AutoConfig, AutoModelForCausalLM

    family = fitting(config)
    hf_config = AutoConfig.for_model(family.model_type, **family.theirs(config), use_cache=use_cache)
    if getattr(hf_config, "sliding_window", 0) is None:
        hf_config.sliding_window = config.block_size  # some classes require it even without sliding layers
    return AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa")
