"""Bytes of the KV cache, by arithmetic:  python -m scripts.kv_memory --n-kv-head 8 --pattern 5:1 --window 1024

The sums are those that tests hold equal to what a real cache allocates. GB are 10^9 bytes, of one sequence.
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
SHAPE = (*EXAMPLE, "head_dim", "n_sink")  # what options say of it


CacheDType = Annotated[
    Literal["bfloat16", "float16", "float32", "int8", "bf16", "fp16", "fp32"], AfterValidator(long_dtype)
]


@options_class
class Options:
    """Compare the KV cache of one model shape, by context length, with the same shape without GQA or windows."""

    config: tyro.conf.Positional[Path | None] = None
    """config whose model shape is used; without one, a 7 B model with 8 KV heads and 5:1 windows of 1024"""
    n_layer: int | None = None
    """layers, instead of the config's"""
    n_embd: int | None = None
    """width of the residual stream, instead of the config's"""
    n_head: int | None = None
    """query heads, instead of the config's"""
    n_kv_head: int | None = None
    """KV heads, instead of the config's"""
    head_dim: int | None = None
    """width of a head, instead of the config's"""
    pattern: str | None = None
    """kinds of layers, such as 5:1 or "swa*5 full", instead of the config's"""
    window: int | None = None
    """keys visible to a query of a sliding layer, instead of the config's"""
    n_sink: int | None = None
    """first tokens that sliding layers keep, instead of the config's"""

    context: Count | None = None
    """context length, in tokens, of the summary line (default: 32768, or the end of learned positions)"""
    dtype: CacheDType = "bfloat16"
    """dtype of keys and values; int8 adds a two-byte scale to each key and value of each head"""
    presets: bool = False
    """print one row for each config in configs/presets instead"""
    json: bool = False
    """print JSON instead of tables"""
    plot: Path | None = None
    """draw cache bytes against context length into this PNG"""


def shape(options: Options) -> ModelConfig:
    """The network that is asked about. UserError for one that cannot be."""
    given = {key: value for key in SHAPE if (value := getattr(options, key)) is not None}
    if options.config is not None:
        return load(options.config, {"model": given}).model
    return build(ModelConfig, EXAMPLE | given)


def variants(base: ModelConfig) -> dict[str, ModelConfig]:
    """By name: all KV heads and the base's, without windows and with the base's, as far as these differ."""
    plain = {"pattern": "full", "window_everywhere": None, "position": "none", "rope_base": 1.0}  # as no cache asks
    full = [base.model_copy(update=plain | {"n_kv_head": n}) for n in (base.n_head, base.kv_heads)]
    own = [base.model_copy(update={"n_kv_head": base.n_head}), base]
    return {name(config): config for config in (*full, *own)}


def name(config: ModelConfig) -> str:
    """What people call it: "GQA+SWA"."""
    if unusual := set(config.kinds) - {"full", "swa"}:
        return f"{'MHA' if config.kv_heads == config.n_head else 'GQA'}+{'+'.join(sorted(unusual))}"
    heads = {config.n_head: "MHA", 1: "MQA"}.get(config.kv_heads, "GQA")
    return heads + ("+SWA" if any(getattr(spec, "window", None) is not None for spec in config.layers) else "")


def limit(config: ModelConfig) -> float:
    """The longest context that a network can have: learned positions end at block_size."""
    return config.block_size if config.position == "learned" else math.inf


def bytes_at(config: ModelConfig, contexts: Iterable[int], dtype: torch.dtype) -> dict[int, int]:
    return {n: cost.cache_bytes(config, n, dtype=dtype) for n in contexts}


def unit(table: dict[str, dict[int, int]]) -> tuple[str, float]:
    """What the figures of a table are said in, so that the smallest still have digits."""
    smallest = min(n for row in table.values() for n in row.values())
    return ("GB", 1e9) if smallest >= 1e8 else ("MB", 1e6)


def kinds_of(config: ModelConfig) -> dict[str, int]:
    """How many layers of each kind: {"sliding": 27, "full": 5}."""
    return Counter({"swa": "sliding"}.get(spec.kind, spec.kind) for spec in config.layers)


def describe(base: ModelConfig, dtype: str) -> str:
    """The shape in a line: "27 sliding + 5 full layers, ..."."""
    layers = " + ".join(f"{n} {kind}" for kind, n in kinds_of(base).items())
    return f"{layers} layers, {base.kv_heads} KV heads for {base.n_head} heads of {base.head_width}, {dtype}"


def rows_of(table: dict[str, dict[int, int]]) -> str:
    """A line for each context, a column for each variant."""
    symbol, size = unit(table)
    lines = [f"{'tokens':>9}" + "".join(f"{f'{label}, {symbol}':>15}" for label in table)]
    for n in next(iter(table.values())):
        lines.append(f"{n:9,}" + "".join(f"{row[n] / size:15,.3f}" for row in table.values()))
    return "\n".join(lines)


def rows_of_presets(table: dict[str, dict[int, int]]) -> str:
    """A line for each preset; a dash beyond the positions that it has learned."""
    width = max(map(len, [*table, head := "GB of 10^9 bytes"]))
    lines = [f"{head:{width}}" + "".join(f"{n:12,}" for n in PRESET_CONTEXTS)]
    for preset, row in table.items():
        cells = (f"{row[n] / 1e9:.3f}" if n in row else "-" for n in PRESET_CONTEXTS)
        lines.append(f"{preset:{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def draw(table: dict[str, dict[int, int]], dtype: str, path: Path) -> None:
    """Bytes against context, on log axes."""
    figure, (axes,) = new_figure("context in tokens", [f"KV cache in GB ({dtype})"])
    for label, row in table.items():
        axes.loglog(list(row), [n / 1e9 for n in row.values()], "o-", ms=3, label=label)
    ticks = [n for n in (2**10, 2**13, 2**15, 2**17, 2**20) if n in row]
    axes.set_xticks(ticks, [f"{n >> 10}k" if n < 2**20 else "1M" for n in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    save_figure(figure, path)


def presets(options: Options) -> str:
    """What to print about every preset."""
    for key in ("config", *SHAPE, "context", "plot"):
        if (value := getattr(options, key)) is not None:
            raise UserError(f"--presets has every preset as it is: leave {key} ({value}) out")
    files = sorted(PRESETS.glob("*.toml"))
    if not files:
        raise UserError(f"--presets: there is no config in {PRESETS}")
    dtype, table = getattr(torch, options.dtype), {}
    for file in files:
        model = load(file).model
        table[file.stem] = bytes_at(model, (n for n in PRESET_CONTEXTS if n <= limit(model)), dtype)
    return json.dumps({"dtype": options.dtype, "bytes": table}, indent=2) if options.json else rows_of_presets(table)


def one_shape(options: Options) -> str:
    """What to print about one shape and its variants."""
    base, dtype = shape(options), getattr(torch, options.dtype)
    context = options.context or int(min(32_768, limit(base)))
    if context > limit(base):
        raise UserError(
            f"--context ({context}) is more than the {limit(base)} learned positions (block_size): take less"
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
