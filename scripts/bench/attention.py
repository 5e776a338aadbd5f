"""Benchmark sliding-window against full causal attention: time and memory of forward + backward, by context length."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field

from cli.options import Count, Natural, options_class
from model.attention.dispatch import Call, attend, kernel_name, prepare
from model.attention.spec import AttentionSpec
from model.context import ForwardContext
from model.device import Runtime, resolve
from model.errors import UserError
from model.memory import measure_peak
from scripts.bench.timing import Measured, exponent, ratio, refuse_unfused, save, take_turns
from scripts.figure import new_figure, save_figure


@options_class
class Options(Measured):
    """Compare sliding-window attention with full attention, which is torch's fused causal kernel."""

    lengths: tuple[Annotated[int, Field(ge=2)], ...] = (2048, 4096, 8192, 16384, 32768)
    """context lengths in tokens"""
    window: Count = 256
    """window in tokens: keys a query attends to, itself included"""
    batch_size: Count = 1
    """sequences in a batch"""
    n_head: Count = 8
    """number of query heads"""
    head_dim: Count = 64
    """width of an attention head"""
    n_kv_head: Count = 2
    """number of KV heads in the table's row `window gqa sinks`"""
    n_sink: Natural = 4
    """number of attention sinks in the table's row `window gqa sinks`"""
    mask_up_to: int = 4096
    """up to this context length in tokens, also time the window as a mask in torch's fused attention; 0: never"""
    plot: Path | None = None
    """file for a plot of time and memory against context length"""


def attention(options: Options) -> None:
    """Time sliding-window against full causal attention, forward and backward."""
    if options.n_head % options.n_kv_head:
        raise UserError(f"--n-head ({options.n_head}) must be divisible by --n-kv-head ({options.n_kv_head})")
    runtime = resolve(options.device, options.dtype)
    rows = [row for T in options.lengths for row in measure(options, T, runtime)]
    print(f"B{options.batch_size} H{options.n_head} D{options.head_dim} W{options.window}, {runtime.why}")
    print(f"{'T':>7} {'attention':18} {'kernel':22} {'ms':>9} {'x faster':>9} {'peak MiB':>9}")
    for row in rows:
        print(
            f"{row['T']:7} {row['attention']:18} {row['kernel']:22} {row['seconds'] * 1e3:9.1f} "
            f"{row['times_faster_than_full']:9.2f} {row['peak_bytes'] / 2**20:9.1f}"
        )
    names = dict.fromkeys(row["attention"] for row in rows)
    curves = {name: [row for row in rows if row["attention"] == name] for name in names}
    exponents = {name: exponent([x["T"] for x in rows], [x["seconds"] for x in rows]) for name, rows in curves.items()}
    print("exponent of time in T: " + ", ".join(f"{name} {p:.2f}" for name, p in exponents.items()))
    save(options, runtime, rows=rows, exponents=exponents)
    if options.plot:
        plot(curves, options.plot)


def measure(options: Options, T: int, runtime: Runtime) -> list[dict[str, Any]]:
    """One row for each kind of attention at one length."""
    numbers: dict[str, Any] = {
        "n_embd": options.n_head * options.head_dim,
        "n_head": options.n_head,
        "head_dim": options.head_dim,
    }
    numbers |= {"window": options.window}
    specs = {
        "window": AttentionSpec(**numbers, n_kv_head=options.n_head),
        "window gqa sinks": AttentionSpec(**numbers, n_kv_head=options.n_kv_head, n_sink=options.n_sink),
    }
    candidates = {"full": full(options, T, runtime)}
    kernels = {"full": "sdpa-causal"}
    for name, spec in specs.items():
        candidates[name] = windowed(options, T, runtime, spec, contiguous=True)
        kernels[name] = kernel_name(spec, Call(T, runtime.device, runtime.dtype))
        refuse_unfused(kernels[name], name)
    if options.mask_up_to >= T:
        candidates["window as a mask"] = windowed(options, T, runtime, specs["window"], contiguous=False)
        kernels["window as a mask"] = "masked"
    seconds = take_turns(candidates, runtime, rounds=options.rounds)
    rows = []
    for name, run in candidates.items():
        with measure_peak(runtime.device) as peak:
            run()
        rows.append(
            {
                "T": T,
                "attention": name,
                "kernel": kernels[name],
                "seconds": statistics.median(seconds[name]),
                "times_faster_than_full": ratio(seconds["full"], seconds[name]),
                "peak_bytes": peak.bytes,
                "peak_method": peak.method,
            }
        )
    return rows


def full(options: Options, T: int, runtime: Runtime) -> Callable[[], None]:
    """Forward + backward of torch's causal attention."""
    q, k, v, grad = _tensors(options, T, runtime, options.n_head)

    def run() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad)

    return run


def windowed(
    options: Options, T: int, runtime: Runtime, spec: AttentionSpec, *, contiguous: bool
) -> Callable[[], None]:
    """Forward + backward with the kernel that training uses, or with a mask if not contiguous."""
    q, k, v, grad = _tensors(options, T, runtime, spec.n_kv_head)
    ctx = ForwardContext(pos=torch.arange(T, device=runtime.device)[None], contiguous=contiguous)
    prepare(spec, ctx, runtime.device, runtime.dtype)

    def run() -> None:
        y = attend(q, k, v, ctx.pos, spec, ctx)
        torch.autograd.grad(y, (q, k, v), grad)

    return run


def _tensors(options: Options, T: int, runtime: Runtime, n_kv_head: int) -> list[torch.Tensor]:
    """q, k, v and the output gradient, (B, heads, T, D), in the memory layout that a projection produces."""
    heads = (options.n_head, n_kv_head, n_kv_head, options.n_head)
    shapes = [(options.batch_size, T, n, options.head_dim) for n in heads]
    tensors = [torch.randn(s, device=runtime.device, dtype=runtime.dtype).transpose(1, 2) for s in shapes]
    return [x.requires_grad_(i < 3) for i, x in enumerate(tensors)]


def plot(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot time and memory against context length on log axes."""
    labels = ["forward + backward (ms)", "peak memory above the inputs (MiB)"]
    figure, (time_axes, memory_axes) = new_figure("context length (tokens)", labels)
    for name, rows in curves.items():
        lengths = [row["T"] for row in rows]
        time_axes.loglog(lengths, [row["seconds"] * 1e3 for row in rows], "o-", ms=3, label=name)
        memory_axes.loglog(lengths, [row["peak_bytes"] / 2**20 for row in rows], "o-", ms=3, label=name)
    lengths = [row["T"] for row in max(curves.values(), key=len)]
    for axes in (time_axes, memory_axes):
        axes.set_xticks(lengths, [f"{T / 1024:g}k" if T >= 1024 else str(T) for T in lengths])
        axes.minorticks_off()
    time_axes.legend(frameon=False)
    save_figure(figure, path)
    print(path)
