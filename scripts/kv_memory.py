"""Compute the size of the KV cache:  python -m scripts.kv_memory --n-kv-head 8 --pattern 5:1 --window 1024

Sizes are for one sequence; 1 GB is 10^9 bytes. Tests check that the formula equals what a real cache allocates.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from pydantic import AfterValidator

from cli.options import Count, options_class, parse
from cli.program import exit_with_one_line
from configs.load import build, load
from model import cost
from model.config import ModelConfig
from model.device import long_dtype
from model.errors import UserError
from scripts.figure import new_figure, save_figure

CONTEXTS = tuple(2**n for n in range(10, 21))  # 1k to 1M tokens
PRESETS = Path("configs/presets")
PRESET_CONTEXTS = (1_024, 8_192, 32_768, 131_072, 1_048_576)
EXAMPLE = {"n_layer": 32, "n_embd": 4096, "n_head": 32, "n_kv_head": 8, "pattern": "5:1", "window": 1024}
SHAPE = (*EXAMPLE, "head_dim", "n_sink")  # options that override the config


@options_class
class Options:
    """Size of the KV cache by context length, compared with the same model without GQA or without windows."""

    config: tyro.conf.Positional[Path | None] = None
    """config file of the model (default: a 7B model with 8 KV heads, pattern 5:1 and windows of 1024 tokens)"""
    n_layer: int | None = None
    """number of layers (default: as in the config)"""
    n_embd: int | None = None
    """width of the residual stream (default: as in the config)"""
    n_head: int | None = None
    """number of query heads (default: as in the config)"""
    n_kv_head: int | None = None
    """number of KV heads (default: as in the config)"""
    head_dim: int | None = None
    """width of an attention head (default: as in the config)"""
    pattern: str | None = None
    """layer pattern, such as 5:1 or "swa*5 full" (default: as in the config)"""
    window: int | None = None
    """window of sliding layers, in tokens: keys a query attends to, itself included (default: as in the config)"""
    n_sink: int | None = None
    """attention sinks: first tokens that sliding layers keep in their cache (default: as in the config)"""

    context: Count | None = None
    """context length for the line above the table, in tokens (default: 32768, or block_size with learned positions)"""
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32", "bf16", "fp16", "fp32", "int8"], AfterValidator(long_dtype)
    ] = "bfloat16"
    """dtype of keys and values; int8 adds a two-byte scale per token, KV head, and key or value"""
    presets: bool = False
    """print one row for each config in configs/presets instead of one model"""
    json: bool = False
    """print JSON instead of tables"""
    plot: Path | None = None
    """file for a plot of cache size against context length (PNG)"""


def shape(options: Options) -> ModelConfig:
    """The model described by the options. UserError if it is invalid."""
    given = {key: value for key in SHAPE if (value := getattr(options, key)) is not None}
    if options.config is not None:
        return load(options.config, {"model": given}).model
    return build(ModelConfig, EXAMPLE | given)


def variants(base: ModelConfig) -> dict[str, ModelConfig]:
    """Name -> config: with and without GQA, with and without windows; equal ones are merged."""
    # positions are irrelevant here: the cache does not depend on them
    plain = {"pattern": "full", "window_everywhere": None, "position": "none", "rope_base": 1.0}
    full = [base.model_copy(update=plain | {"n_kv_head": n}) for n in (base.n_head, base.kv_heads)]
    own = [base.model_copy(update={"n_kv_head": base.n_head}), base]
    return {name(config): config for config in (*full, *own)}


def name(config: ModelConfig) -> str:
    """The common name of the attention: "GQA+SWA"."""
    if unusual := set(config.kinds) - {"full", "swa"}:
        return f"{'MHA' if config.kv_heads == config.n_head else 'GQA'}+{'+'.join(sorted(unusual))}"
    heads = {config.n_head: "MHA", 1: "MQA"}.get(config.kv_heads, "GQA")
    return heads + ("+SWA" if any(getattr(spec, "window", None) is not None for spec in config.layers) else "")


def limit(config: ModelConfig) -> float:
    """The longest possible context: block_size with learned positions, otherwise unlimited."""
    return config.block_size if config.position == "learned" else math.inf


def bytes_at(config: ModelConfig, contexts: Iterable[int], dtype: torch.dtype) -> dict[int, int]:
    return {n: cost.cache_bytes(config, n, dtype=dtype) for n in contexts}


def unit(table: dict[str, dict[int, int]]) -> tuple[str, float]:
    """Unit for the sizes of a table, chosen so that the smallest has significant digits."""
    smallest = min(n for row in table.values() for n in row.values())
    return ("GB", 1e9) if smallest >= 1e8 else ("MB", 1e6)


def kinds_of(config: ModelConfig) -> dict[str, int]:
    """Number of layers of each kind: {"sliding": 27, "full": 5}."""
    return Counter({"swa": "sliding"}.get(spec.kind, spec.kind) for spec in config.layers)


def describe(base: ModelConfig, dtype: str) -> str:
    """One-line description of a model: "27 sliding + 5 full layers, ..."."""
    layers = " + ".join(f"{n} {kind}" for kind, n in kinds_of(base).items())
    return f"{layers} layers, {base.kv_heads} KV heads for {base.n_head} heads of {base.head_width}, {dtype}"


def rows_of(table: dict[str, dict[int, int]]) -> str:
    """Table with one line per context length and one column per variant."""
    symbol, size = unit(table)
    lines = [f"{'tokens':>9}" + "".join(f"{f'{label}, {symbol}':>15}" for label in table)]
    for n in next(iter(table.values())):
        lines.append(f"{n:9,}" + "".join(f"{row[n] / size:15,.3f}" for row in table.values()))
    return "\n".join(lines)


def rows_of_presets(table: dict[str, dict[int, int]]) -> str:
    """Table with one line per preset; a dash where learned positions end before the context does."""
    width = max(map(len, [*table, head := "GB of 10^9 bytes"]))
    lines = [f"{head:{width}}" + "".join(f"{n:12,}" for n in PRESET_CONTEXTS)]
    for preset, row in table.items():
        cells = (f"{row[n] / 1e9:.3f}" if n in row else "-" for n in PRESET_CONTEXTS)
        lines.append(f"{preset:{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def draw(table: dict[str, dict[int, int]], dtype: str, path: Path) -> None:
    """Plot cache size against context length on log axes."""
    figure, (axes,) = new_figure("context length (tokens)", [f"KV cache (GB, {dtype})"])
    for label, row in table.items():
        axes.loglog(list(row), [n / 1e9 for n in row.values()], "o-", ms=3, label=label)
    ticks = [n for n in (2**10, 2**13, 2**15, 2**17, 2**20) if n in row]
    axes.set_xticks(ticks, [f"{n >> 10}k" if n < 2**20 else "1M" for n in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    save_figure(figure, path)


def presets(options: Options) -> str:
    """The output of --presets."""
    for key in ("config", *SHAPE, "context", "plot"):
        if (value := getattr(options, key)) is not None:
            raise UserError(f"--presets shows all presets unchanged: leave out {key} ({value})")
    files = sorted(PRESETS.glob("*.toml"))
    if not files:
        raise UserError(f"--presets: there are no configs in {PRESETS}; run it in the root of the repository")
    dtype, table = getattr(torch, options.dtype), {}
    for file in files:
        model = load(file).model
        table[file.stem] = bytes_at(model, (n for n in PRESET_CONTEXTS if n <= limit(model)), dtype)
    return json.dumps({"dtype": options.dtype, "bytes": table}, indent=2) if options.json else rows_of_presets(table)


def one_shape(options: Options) -> str:
    """The output for one model and its variants."""
    base, dtype = shape(options), getattr(torch, options.dtype)
    context = options.context or int(min(32_768, limit(base)))
    if context > limit(base):
        raise UserError(
            f"--context ({context}) must be at most {limit(base)}, the number of learned positions (block_size)"
        )
    contexts = sorted(n for n in {*CONTEXTS, context} if n <= limit(base))
    table = {label: bytes_at(config, contexts, dtype) for label, config in variants(base).items()}
    if options.plot:
        draw(table, options.dtype, options.plot)
    if options.json:
        kinds = kinds_of(base)
        return json.dumps({"layers": kinds, "dtype": options.dtype, "context": context, "bytes": table}, indent=2)
    symbol, size = unit(table)
    at = ", ".join(f"{label} {row[context] / size:,.2f} {symbol}" for label, row in table.items())
    return f"{describe(base, options.dtype)}\nat {context:,} tokens: {at}\n\n{rows_of(table)}"


def main() -> None:
    options = parse(Options, prog="python -m scripts.kv_memory", description=__doc__)
    print(presets(options) if options.presets else one_shape(options))


if __name__ == "__main__":
    exit_with_one_line(main)
