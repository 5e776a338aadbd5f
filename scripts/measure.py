"""Measure speed and memory of generating text from a run:  python -m scripts.measure runs/demo/gqa

Batch size 1, a prompt of block_size tokens (fewer with learned positions). Writes measured.json into the run directory.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from pydantic import Field

from artifacts.files import write_json
from artifacts.run_dir import RunDir
from cli.options import Count, options_class, parse
from cli.program import exit_with_one_line
from inference.sampling import Sampler, SamplingParams, prefill, stream
from model.device import resolve
from model.memory import measure_peak

FILE = "measured.json"


@options_class
class Options:
    """Measure prefill and decode after a prompt of block_size tokens; write measured.json into the run's directory."""

    run: tyro.conf.Positional[Path]
    """directory of a run"""
    new_tokens: Annotated[int, Field(ge=2)] = 128
    """tokens to decode in each round"""
    rounds: Count = 3
    """timed rounds; the median is reported"""
    device: str = "auto"
    """device to run on: auto, cpu, cuda or mps"""


def measure(options: Options) -> dict[str, Any]:
    """Measure tokens per second of prefill and decode at batch size 1, cache size and peak memory in bytes."""
    runtime = resolve(options.device)
    run = RunDir.of(options.run)
    model, tokenizer = run.load(run.path)
    model = model.to(runtime.device, runtime.dtype).eval()
    T = model.config.block_size
    if model.wpe is not None:
        T = max(1, T - options.new_tokens)  # learned positions end at block_size
    prompt = torch.full((1, T), tokenizer.eot, device=runtime.device)
    cache = model.new_cache(1, T + options.new_tokens)
    sampler = Sampler(SamplingParams(temperature=1), n_vocab=tokenizer.n_vocab)

    def decode() -> float:
        cache.reset()
        tokens = stream(model, cache, prompt, sampler)
        next(tokens)
        start = time.perf_counter()
        for _ in range(options.new_tokens - 1):
            next(tokens)
        runtime.synchronize()
        return (options.new_tokens - 1) / (time.perf_counter() - start)

    def fill() -> float:
        cache.reset()
        start = time.perf_counter()
        prefill(model, cache, prompt)
        runtime.synchronize()
        return T / (time.perf_counter() - start)

    decode(), fill()  # warm up
    figures = {
        "decode_tokens_per_s": statistics.median(decode() for _ in range(options.rounds)),
        "prefill_tokens_per_s": statistics.median(fill() for _ in range(options.rounds)),
        "cache_bytes": cache.nbytes,
        "cache_length": T + options.new_tokens,
        "dtype": str(runtime.dtype).removeprefix("torch."),
    }
    held = [*model.parameters(), *(x for layer in cache.layers for x in layer.tensors())]
    with measure_peak(runtime.device, held) as peak:
        decode()
    figures["peak_memory_generate_bytes"], figures["peak_memory_method"] = peak.bytes, peak.method
    write_json(run.path / FILE, figures)
    return figures


def main() -> None:
    for key, value in measure(parse(Options, prog="python -m scripts.measure", description=__doc__)).items():
        print(f"{key}: {value:,.1f}" if isinstance(value, float) else f"{key}: {value}")


if __name__ == "__main__":
    exit_with_one_line(main)
