"""Benchmark the chunked cross-entropy against losses that materialise all logits: time and memory, with backward."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from cli.options import Count, options_class
from model.device import resolve
from model.loss import cross_entropy
from model.memory import measure_peak
from scripts.bench.timing import Measured, ratio, save, take_turns


@options_class
class Options(Measured):
    """Time the loss of a batch of hidden states, with the gradients of the hidden states and of a float32 head."""

    batch_size: Count = 8
    """sequences in a batch"""
    block_size: Count = 1024
    """tokens in each sequence"""
    n_embd: Count = 768
    """width of the hidden states"""
    vocab_size: Count = 50_304
    """vocabulary size, the number of rows of the head"""


def loss(options: Options) -> None:
    """Time Sash's chunked cross-entropy against F.cross_entropy and F.linear_cross_entropy."""
    runtime = resolve(options.device, options.dtype)
    n, C, V = options.batch_size * options.block_size, options.n_embd, options.vocab_size
    x = torch.randn(n, C, device=runtime.device, requires_grad=True)
    head = (torch.randn(V, C, device=runtime.device) * 0.02).requires_grad_()
    targets = torch.randint(V, (n,), device=runtime.device)

    def candidate(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            with runtime.autocast():
                torch.autograd.grad(forward(), (x, head))

        return run

    candidates = {
        "sash": candidate(lambda: cross_entropy(x, head, targets)),
        "plain": candidate(lambda: F.cross_entropy(F.linear(x, head).float(), targets)),
    }
    if torch_fused := getattr(F, "linear_cross_entropy", None):
        candidates["torch linear_cross_entropy"] = candidate(
            lambda: torch_fused(x.to(runtime.dtype), head.to(runtime.dtype), targets)
        )
    seconds = take_turns(candidates, runtime, rounds=options.rounds)
    print(f"{n} tokens x {C}, vocabulary {V}, {runtime.why}")
    print(f"{'':28} {'ms':>8} {'sash is x faster':>17} {'peak MB':>9} {'x the memory of sash':>21}")
    rows: list[dict[str, Any]] = []
    for name, run in candidates.items():
        with measure_peak(runtime.device) as peak:
            run()
        row: dict[str, Any] = {
            "name": name,
            "seconds": statistics.median(seconds[name]),
            "sash_times_faster": ratio(seconds[name], seconds["sash"]),
            "peak_bytes": peak.bytes,
            "peak_method": peak.method,
        }
        rows.append(row)
        memory = "not measured"
        if peak.bytes is not None:
            memory = f"{peak.bytes / 1e6:9.0f} {peak.bytes / int(rows[0]['peak_bytes']):21.2f}"
        print(f"{name:28} {row['seconds'] * 1e3:8.0f} {row['sash_times_faster']:17.2f} {memory}")
    print("peak memory does not include hidden states and head, but includes their gradients")
    save(options, runtime, rows=rows)
