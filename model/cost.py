"""What a network costs, by arithmetic: parameters, FLOPs, cache bytes. Tested equal to what is allocated."""

import torch

from model.config import ModelConfig
from model.errors import UserError
from model.layers import GATED


def n_params(config: ModelConfig) -> int:
    """Parameters of the whole network; tied embeddings count once. UserError where some of them are left out."""
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

    A multiply-add is two; the backward pass is twice the forward; recomputation is not counted. UserError where some of
    the work is left out.
    """
    _check_whole(config, "FLOPs")
    mixers = sum(spec.forward_flops(T) for spec in config.layers)
    mlp_weights = _mlp_params(config) - _mlp_biases(config)
    return 3 * (mixers + 2 * T * (config.n_layer * mlp_weights + config.vocab * config.n_embd))


def cache_bytes(
    config: ModelConfig, max_length: int, *, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Keys, values and states of all layers: what GPT.new_cache allocates, to the byte."""
    return batch_size * sum(spec.cache_bytes(max_length, dtype.itemsize) for spec in config.layers)


def read_bytes(config: ModelConfig, start: int, stop: int, dtype: torch.dtype, *, rolling: bool = True) -> int:
    """Keys and values of all layers that one sequence reads to decode its tokens start to stop - 1."""
    return sum(spec.read_bytes(start, stop, dtype.itemsize, rolling=rolling) for spec in config.layers)


def _check_whole(config: ModelConfig, what: str) -> None:
    if config.without is not None:
        raise UserError(
            f"{what} are not stated for a design without {config.without} (model.without); "
            "--model.without none counts what is there"
        )


def _mlp_params(config: ModelConfig) -> int:
    matrices = 3 if config.mlp in GATED else 2
    return matrices * config.n_embd * config.mlp_hidden + _mlp_biases(config)


def _mlp_biases(config: ModelConfig) -> int:
    return config.bias * ((2 if config.mlp in GATED else 1) * config.mlp_hidden + config.n_embd)
