"""Costs of a network by arithmetic: parameters, FLOPs, cache bytes. Tests hold them to what is allocated."""

import torch

from model.config import ModelConfig
from model.errors import UserError
from model.gpt import GPT
from model.layers import GATED
from model.memory import total_bytes


def n_params(config: ModelConfig) -> int:
    """Parameters of the whole network; tied embeddings count once. UserError where the config omits components."""
    _check_whole(config, "parameters")
    C = config.n_embd
    norm = C * (2 if config.norm == "layernorm" and config.bias else 1)
    embeddings = config.vocab * C * (1 if config.tie_embeddings else 2)
    positions = config.block_size * C if config.position == "learned" else 0
    mixers = sum(spec.n_params for spec in config.layers)
    norms = 1 + config.n_layer * (4 if config.norm_place == "sandwich" else 2)
    return embeddings + positions + mixers + config.n_layer * _mlp_params(config) + norms * norm


def train_flops(config: ModelConfig, T: int) -> int:
    """Forward and backward of one sequence of T tokens, windows counted: what MFU divides by.

    A multiply-add is two; the backward pass is twice the forward; recomputation is not counted. UserError where the
    config omits components.
    """
    _check_whole(config, "FLOPs")
    mixers = sum(spec.forward_flops(T) for spec in config.applied_layers)
    mlp_weights = len(config.applied_layers) * (_mlp_params(config) - _mlp_biases(config))
    return 3 * (mixers + 2 * T * (mlp_weights + config.vocab * config.n_embd))


def cache_bytes(
    config: ModelConfig, max_length: int, *, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Keys, values and states of all layers: what GPT.new_cache allocates, to the byte."""
    return batch_size * sum(spec.cache_bytes(max_length, dtype) for spec in config.applied_layers)


def read_bytes(config: ModelConfig, start: int, stop: int, dtype: torch.dtype, *, rolling: bool = True) -> int:
    """Keys and values of all layers that one sequence reads to decode its tokens start to stop - 1."""
    return sum(spec.read_bytes(start, stop, dtype, rolling=rolling) for spec in config.applied_layers)


def step_bytes(model: GPT) -> int:
    """Bytes of weights that one decoding step reads, whatever the batch: all but embeddings, read a row each."""
    looked_up = [] if model.config.tie_embeddings else [model.wte.weight]
    looked_up += [] if model.wpe is None else [model.wpe.weight]
    return total_bytes([*model.parameters(), *model.buffers()]) - total_bytes(looked_up)


def _check_whole(config: ModelConfig, what: str) -> None:
    if config.omits is not None:
        raise UserError(
            f"{what} are not reported for a design that omits {config.omits} (model.omits); "
            "--model.omits none counts the components that are there"
        )


def _mlp_params(config: ModelConfig) -> int:
    matrices = 3 if config.mlp in GATED else 2
    return matrices * config.n_embd * config.mlp_hidden + _mlp_biases(config)


def _mlp_biases(config: ModelConfig) -> int:
    return config.bias * ((2 if config.mlp in GATED else 1) * config.mlp_hidden + config.n_embd)
