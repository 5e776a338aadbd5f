"""Benchmark decoding: tokens per second and KV cache size by context length, for kinds of attention and for peers."""

import math
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from cli.options import Count, options_class
from inference.compiled_decode import should_compile, use_compiled_decode
from inference.quantize import quantize
from inference.sampling import Sampler, SamplingParams, stream
from model import cost
from model.config import ModelConfig
from model.cost import step_bytes
from model.device import Runtime, Switch, memory_rate, resolve
from model.gpt import GPT
from model.memory import measure_peak
from scripts.bench.decode_peers import Concatenated, Transformers
from scripts.bench.timing import Measured, save
from scripts.figure import new_figure, save_figure

Variant = Literal["mha", "gqa", "swa", "gqa+swa", "sliding"]
Peer = Literal["transformers", "transformers-static", "concat"]
Kept = Literal["as-dtype", "int8"]


WARM_UP = 3  # tokens decoded before timing, during which layers compile


@options_class
class Options(Measured):
    """Greedy decoding with random weights: by default the size of the smallest GPT-2, with Gemma 3's kind of layers."""

    lengths: tuple[Annotated[int, Field(ge=WARM_UP)], ...] = (1024, 4096, 32_768)
    """tokens in the cache when timing starts; the cache is filled with random keys instead of by a prefill, which
    does not change the speed of decoding"""
    new_tokens: Annotated[int, Field(ge=WARM_UP)] = 64
    """tokens to decode from each of these lengths"""
    variants: tuple[Variant, ...] = ("mha", "gqa", "swa", "gqa+swa", "sliding")
    """kinds of attention. mha: full attention; gqa: fewer KV heads; swa: five sliding layers per full layer; gqa+swa:
    both; sliding: all layers sliding"""
    peer: tuple[Peer, ...] = ()
    """implementations to compare with. transformers: Hugging Face with its dynamic cache; transformers-static: with its
    static cache, compiled; concat: Sash with a cache grown by torch.cat at each token"""
    weights: tuple[Kept, ...] = ("as-dtype",)
    """dtype of weights: as-dtype, int8 (8-bit weight matrices), or both for comparison"""
    cache_dtype: tuple[Kept, ...] = ("as-dtype",)
    """dtype of the KV cache: as-dtype, int8 (8-bit keys and values), or both for comparison"""
    run: Path | None = None
    """directory of a trained run, to measure how 8-bit weights and caches change its perplexity"""
    tokens: Count = 8192
    """with --run: tokens of its validation split to measure the perplexity on"""
    batch_size: Count = 1
    """sequences in a batch"""
    window: Count = 512
    """window of sliding layers, in tokens: keys a query attends to, itself included"""
    n_layer: Count = 12
    """number of layers"""
    n_embd: Count = 768
    """width of the residual stream"""
    n_head: Count = 24
    """number of query heads"""
    n_kv_head: Count = 8
    """number of KV heads in the variants with GQA"""
    vocab_size: Count = 50_257
    """vocabulary size; embeddings are tied to the head"""
    compile: Switch = "on"
    """compile the layers of Sash; compile time is reported separately as warm-up"""
    plot: Path | None = None
    """file for a plot of speed and cache size against context length"""

    def config(self, variant: Variant) -> ModelConfig:
        """The config of a variant."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            block_size=max(self.lengths) + self.new_tokens,
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head if "gqa" in variant else None,
            pattern={"swa": "5:1", "gqa+swa": "5:1", "sliding": "swa"}.get(variant, "full"),
            window=self.window if "s" in variant else None,
            norm="rmsnorm+1",
            norm_place="sandwich",
            mlp="geglu",
            scale_embeddings=True,
            qk_norm=True,
            tie_embeddings=True,
        )


class Ours:
    """Decoding with Sash, starting from a cache filled with random keys."""

    def __init__(self, options: Options, config: ModelConfig, runtime: Runtime, length: int, weights: Kept, kept: Kept):
        torch.manual_seed(0)
        self.model = GPT(config).to(runtime.device, runtime.dtype).eval()
        if weights == "int8":
            quantize(self.model)
        use_compiled_decode(self.model, should_compile(options.compile, self.model, runtime, options.new_tokens))
        self.length = length
        dtype = torch.int8 if kept == "int8" else None
        self.cache = self.model.new_cache(options.batch_size, length + options.new_tokens, dtype=dtype)
        for x in (x for layer in self.cache.layers for x in layer.tensors()):
            x.copy_(torch.randint(-127, 128, x.shape) if x.dtype == torch.int8 else torch.randn(x.shape))
        self.last = torch.zeros(options.batch_size, 1, dtype=torch.long, device=runtime.device)

    def prepare(self) -> None:
        """Reset the cache to the length at which timing starts."""
        self.cache.pos.fill_(self.length - 1)
        self.cache.length = self.length - 1

    def __call__(self, n: int) -> list[Tensor]:
        return list(islice(stream(self.model, self.cache, self.last, Sampler(SamplingParams(temperature=0))), n))

    @property
    def cache_bytes(self) -> int:
        return self.cache.nbytes

    def held(self) -> list[Tensor]:
        return [x for layer in self.cache.layers for x in layer.tensors()]


def decode(options: Options) -> None:
    """Time decoding at several context lengths."""
    runtime = resolve(options.device, options.dtype, options.compile)
    rate = memory_rate(runtime)
    print(f"batch {options.batch_size}, window {options.window}, {options.new_tokens} new tokens, {runtime.why}")
    print(f"memory bandwidth {rate / 1e9:.1f} GB/s (measured); caches are filled with random keys\n")
    print(
        f"{'length':>7} {'attention':9} {'':27} {'tokens/s':>9} {'GB/s':>6} {'of rate':>7} {'sash is x faster':>17} "
        f"{'cache MB':>9} {'peak MB':>8} {'warm-up s':>9}"
    )
    rows = []
    for length in options.lengths:
        for variant in options.variants:
            rows += measure(options, variant, length, runtime, rate)
    changes = perplexities(options) if options.run else []
    if not changes:
        print("\nchange of perplexity in 8 bits: not measured; give a trained run with --run")
    save(options, runtime, memory_bytes_per_s=rate, rows=rows, perplexity=changes)
    if options.plot:
        plot(rows, options.plot)


def measure(options: Options, variant: Variant, length: int, runtime: Runtime, rate: float) -> list[dict[str, Any]]:
    """One row per candidate; candidates are timed in turn within each round."""
    config = options.config(variant)
    candidates: dict[str, Any] = {}
    for weights in options.weights:
        for kept in options.cache_dtype:
            marks = [f"int8 {name}" for name, x in (("weights", weights), ("cache", kept)) if x == "int8"]
            name = ", ".join(["sash", *marks])
            candidates[name] = Ours(options, config, runtime, length, weights, kept)
    sizes = (options.batch_size, options.new_tokens)
    makers = {
        "transformers": lambda: Transformers(*sizes, config, runtime, length, static=False),
        "transformers-static": lambda: Transformers(*sizes, config, runtime, length, static=True),
        "concat": lambda: Concatenated(*sizes, config, runtime, length),
    }
    candidates |= {name: makers[name]() for name in options.peer}
    warm_up: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for turn in range(1 + options.rounds):
            for name, candidate in candidates.items():
                candidate.prepare()
                start = time.perf_counter()
                candidate(options.new_tokens if turn else WARM_UP)
                runtime.synchronize()
                elapsed = time.perf_counter() - start
                if turn == 0:
                    warm_up[name] = elapsed
                else:
                    seconds[name].append(elapsed / (options.new_tokens * options.batch_size))
    rows = []
    for name, candidate in candidates.items():
        per_token = statistics.median(seconds[name])
        row: dict[str, Any] = {
            "length": length,
            "attention": variant,
            "name": name,
            "tokens_per_s": 1 / per_token,
            "sash_times_faster": statistics.median(
                a / b for a, b in zip(seconds[name], seconds[next(iter(candidates))], strict=True)
            ),
            "warm_up_s": warm_up[name],
            "cache_bytes": candidate.cache_bytes,
        }
        if isinstance(candidate, Ours):
            stored = candidate.held()[0].dtype
            predicted = cost.cache_bytes(
                config, length + options.new_tokens, batch_size=options.batch_size, dtype=stored
            )
            assert candidate.cache_bytes == predicted, f"{candidate.cache_bytes} bytes of cache, predicted {predicted}"
            kv = cost.read_bytes(config, length, length + options.new_tokens, stored) / options.new_tokens
            row["read_bytes_per_token"] = kv + step_bytes(candidate.model) / options.batch_size
            row["bytes_per_s"] = row["read_bytes_per_token"] / per_token
            row["share_of_memory_rate"] = row["bytes_per_s"] / rate
        candidate.prepare()
        with torch.inference_mode(), measure_peak(runtime.device, candidate.held()) as peak:
            candidate(WARM_UP)
        row["peak_bytes_above_weights"], row["peak_method"] = peak.bytes, peak.method
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    read = f"{row['bytes_per_s'] / 1e9:6.1f} {row['share_of_memory_rate']:7.2f}" if "bytes_per_s" in row else f"{'':14}"
    peak = math.nan if row["peak_bytes_above_weights"] is None else row["peak_bytes_above_weights"] / 1e6
    return (
        f"{row['length']:7} {row['attention']:9} {row['name']:27} {row['tokens_per_s']:9.1f} {read} "
        f"{row['sash_times_faster']:17.2f} {row['cache_bytes'] / 1e6:9.1f} {peak:8.1f} {row['warm_up_s']:9.1f}"
    )


def perplexities(options: Options) -> list[dict[str, Any]]:
    """Streaming perplexity of a trained run: unquantized, with 8-bit weights, with an 8-bit cache, and with both."""
    from inference.streaming import streamed_losses
    from scripts.probes.subject import open_subject

    assert options.run is not None
    found: list[dict[str, Any]] = []
    for weights, kept in ((None, None), ("weights", None), (None, "cache"), ("weights", "cache")):
        subject = open_subject(options.run, "best", device=options.device, dtype=options.dtype)
        source = subject.tokens(None, None)
        n = min(options.tokens, source.n_tokens - 1)
        ids = torch.from_numpy(source.read(0, n + 1).astype("int64")).to(subject.runtime.device)
        model = subject.model.to(subject.runtime.dtype)
        if weights:
            quantize(model)
        losses = streamed_losses(model, ids, subject.runtime, cache_dtype=torch.int8 if kept else None)
        name = " and ".join(x for x in (weights, kept) if x)
        perplexity = math.exp(losses.double().mean().item())
        found.append({"int8": name or "nothing", "perplexity": perplexity, "n_tokens": n, "run": options.run.name})
    print(f"\nstreaming perplexity of {options.run} on {found[0]['n_tokens']} validation tokens")
    for row in found:
        change = row["perplexity"] / found[0]["perplexity"] - 1
        print(f"  int8: {row['int8']:18} {row['perplexity']:9.4f} ({change:+.3%})")
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot speed and cache size against context length on log axes."""
    figure, (speed, memory) = new_figure("context length (tokens)", ["tokens per second", "KV cache (MB)"])
    for key in dict.fromkeys((row["attention"], row["name"]) for row in rows):
        curve = [row for row in rows if (row["attention"], row["name"]) == key]
        lengths, ours = [row["length"] for row in curve], key[1].startswith("sash")
        style = {"ms": 3, "marker": "o", "ls": "-" if ours else ":", "label": f"{key[0]}, {key[1]}"}
        speed.semilogx(lengths, [row["tokens_per_s"] for row in curve], **style)
        memory.loglog(lengths, [row["cache_bytes"] / 1e6 for row in curve], **style)
    lengths = sorted({row["length"] for row in rows})
    for axes in (speed, memory):
        axes.set_xticks(lengths, [f"{n / 1024:g}k" if n >= 1024 else str(n) for n in lengths])
        axes.minorticks_off()
    speed.set_ylim(bottom=0)
    speed.legend(frameon=False, fontsize="small")
    save_figure(figure, path)
    print(path)
