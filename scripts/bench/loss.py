"""Cross-entropy over a large vocabulary, forward and backward, against ways that hold all logits: time and memory."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from cli.program import at_least
from model.device import resolve
from model.loss import cross_entropy
from model.memory import measure_peak
from scripts.bench.timing import Measured, ratio, save, take_turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Measured):
    """Hidden states of a batch to the mean loss and the gradients of hidden states and head, which is in float32."""

    batch_size: int = 8
    """Sequences."""
    block_size: int = 1024
    """Tokens of each."""
    n_embd: int = 768
    """Width of the hidden states."""
    vocab_size: int = 50_304
    """Rows of the head."""


def loss(options: Options) -> None:
    """Time the loss without the logits against plain cross-entropy and torch's linear_cross_entropy."""
    at_least(options, batch_size=1, block_size=1, n_embd=1, vocab_size=1, rounds=1)
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
    print("peak memory is above that of hidden states and head; their gradients are in it")
    save(options, runtime, rows=rows)
