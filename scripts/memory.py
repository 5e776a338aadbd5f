"""Estimate the memory of a training step:  python -m scripts.memory configs/gpt2.toml --batch-size 8

Nothing is allocated and no data is read: the step runs on fake tensors, with CPU kernels. On CUDA, kernels need
different amounts of workspace, and the allocator reserves more memory than the live tensors occupy.
"""

import re

from cli.options import Count, as_arguments, options_class, validated
from cli.program import exit_with_one_line
from configs.load import with_options
from configs.schema import RunConfig
from data.tokenizer import check_name, make_tokenizer, saved_file
from model import cost
from model.config import ModelConfig
from model.device import resolve
from model.errors import UserError
from training.estimate import train_peak

VOCABULARIES = {"byte": 257, "gpt2": 50_257, "cl100k_base": 100_277, "o200k_base": 200_019}
LENGTHS = (1_024, 8_192, 32_768, 131_072)


@options_class
class Options:
    """Options in addition to the keys of the config."""

    batch_size: Count | None = None
    """sequences in one forward pass (default: micro_batch of the config)"""


def with_known_vocabulary(config: RunConfig) -> RunConfig:
    """The config with vocab_size filled in from the tokenizer's name. UserError if the name does not determine it."""
    if config.model.vocab_size is not None:
        return config
    check_name(name := config.data.tokenizer)
    learned = re.fullmatch(r"bpe-(\d+)", name)
    size = int(learned[1]) if learned else VOCABULARIES.get(name)
    size = make_tokenizer(name).n_vocab if saved_file(name) else size
    if size is None:
        raise UserError(f"the vocabulary size of the tokenizer {name} depends on the text: give --model.vocab_size")
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def main() -> None:
    config, given = with_options(None, "python -m scripts.memory", __doc__ or "", as_arguments(Options))
    options, config = validated(Options, given), with_known_vocabulary(config)
    batch_size = options.batch_size or config.micro_rows
    model, dtype = config.model, resolve("cpu", config.dtype).dtype
    if model.omits is not None:
        print(f"{model.describe()}, omits {model.omits}: parameters and training are not reported\n")
        print_cache(model)
        return
    parts = train_peak(
        model,
        batch_size,
        dtype,
        optimizer=config.optim.optimizer,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    shape = f"{batch_size} x {model.block_size} tokens, {str(dtype).removeprefix('torch.')}"
    print(f"{model.describe()}, {cost.n_params(model) / 1e6:.1f} M parameters, {shape}\n")
    print("peak memory of a training step (live tensors)")
    for part, n in parts.items():
        print(f"  {part:12}{n / 1e6:14,.1f} MB")
    print(f"  {'peak':12}{sum(parts.values()) / 1e6:14,.1f} MB\n")
    tokens, flops = config.train.max_steps * config.train.global_batch_tokens, cost.train_flops(model, model.block_size)
    print(f"the whole run: {tokens:,} tokens, {flops / model.block_size * tokens:.2e} FLOPs\n")
    print_cache(model)


def print_cache(model: ModelConfig) -> None:
    """Print the size of the KV cache by context length."""
    print("KV cache of one sequence by context length in tokens, bfloat16")
    for n in LENGTHS:
        print(f"  {n:<12,}{cost.cache_bytes(model, n) / 1e6:14,.1f} MB")


if __name__ == "__main__":
    exit_with_one_line(main)
