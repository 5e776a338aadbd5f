"""Benchmark training steps of a config against other implementations: tokens per second, MFU, peak memory."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli.options import Count, options_class
from configs.load import load
from model import cost, cpu
from model.config import ModelConfig
from model.device import Runtime, Switch, compile_blocks, matmul_rate, resolve
from model.gpt import GPT
from model.memory import measure_peak
from scripts.bench.peers import transformers_twin
from scripts.bench.timing import Measured, ratio, refuse_unfused, save, take_turns
from scripts.memory import with_known_vocabulary
from training.memory import training_tensors
from training.optim import Optimizers

Peer = Literal["transformers", "plain", "full", "sdpa"]


@options_class
class Options(Measured):
    """Time training steps on random tokens; all candidates use AdamW."""

    config: Path = Path("configs/gpt2.toml")
    """config file of the model to train"""
    batch_size: Count = 2
    """sequences in a step"""
    block_size: int | None = None
    """training context in tokens (default: as in the config)"""
    pattern: str | None = None
    """layer pattern, such as 5:1 (default: as in the config)"""
    window: int | None = None
    """window of sliding layers, in tokens: keys a query attends to, itself included (default: as in the config)"""
    peer: tuple[Peer, ...] = ()
    """implementations to compare with. transformers: Hugging Face, compiled; plain: eager float32 PyTorch with window
    masks and all logits in memory; full: Sash with full attention in every layer; sdpa: as full, with torch's fused
    attention"""
    compile: Switch = "off"
    """compile the layers of Sash"""


class Candidate:
    """A training step of one implementation, with its model and optimizer."""

    def __init__(
        self,
        config: ModelConfig,
        model: nn.Module,
        loss: Callable[[], Tensor],
        kernel: str,
        *,
        own_cpu_code: bool = True,
    ):
        self.config, self.model, self.loss, self.kernel = config, model, loss, kernel
        self._switch = nullcontext if own_cpu_code else cpu.switched_off
        self.optimizers = Optimizers([torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)])

    def __call__(self) -> None:
        with self._switch():
            self.loss().backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizers.step()

    def tensors(self) -> Iterator[Tensor]:
        return training_tensors(self.model, self.optimizers)


def train(options: Options) -> None:
    """Time a training step of Sash, and of the implementations given by --peer."""
    runtime = resolve(options.device, options.dtype, options.compile)
    given = {key: getattr(options, key) for key in ("block_size", "pattern", "window")}
    overrides: dict[str, Any] = {"model": {key: value for key, value in given.items() if value is not None}}
    if options.block_size is not None:
        overrides["train"] = {"global_batch_tokens": options.block_size}
    config = with_known_vocabulary(load(options.config, overrides)).model
    idx = torch.randint(config.vocab, (options.batch_size, config.block_size), device=runtime.device)
    makers = {"transformers": transformers, "plain": plain, "full": full, "sdpa": sdpa}
    candidates = {"sash": ours(config, runtime, idx)}
    candidates |= {name: makers[name](config, runtime, idx) for name in options.peer}
    first = {name: once[0] for name, once in take_turns(candidates, runtime, rounds=1, warm_up=0).items()}
    rates: list[float] = []  # measured in every round, as the attainable rate varies on a shared machine
    turns: dict[str, Callable] = candidates | {"products": lambda: rates.append(matmul_rate(runtime, seconds=1.0))}
    seconds = take_turns(turns, runtime, rounds=options.rounds)
    rate = statistics.median(rates[1:])
    print(f"{options.config}, {options.batch_size} x {config.block_size} tokens, {runtime.why}")
    print(f"matmul rate {rate / 1e9:.0f} GFLOP/s (measured)\n")
    print(f"{'':13} {'tokens/s':>9} {'MFU':>6} {'sash is x faster':>17} {'first step s':>13} {'peak MB':>9}  kernel")
    rows = []
    for name, candidate in candidates.items():
        flops = cost.train_flops(candidate.config, config.block_size) * options.batch_size
        with measure_peak(runtime.device, candidate.tensors()) as peak:
            candidate()
        median = statistics.median(seconds[name])
        row = {
            "name": name,
            "tokens_per_s": idx.numel() / median,
            "mfu": flops / median / rate,
            "sash_times_faster": ratio(seconds[name], seconds["sash"]),
            "first_step_s": first[name],
            "peak_bytes": peak.bytes,
            "peak_method": peak.method,
            "kernel": candidate.kernel,
        }
        rows.append(row)
        print(
            f"{name:13} {row['tokens_per_s']:9.0f} {row['mfu']:6.3f} {row['sash_times_faster']:17.2f} "
            f"{first[name]:13.1f} {(peak.bytes or 0) / 1e6:9.0f}  {candidate.kernel}"
        )
    save(options, runtime, matmul_flops_per_s=rate, rows=rows)


def ours(config: ModelConfig, runtime: Runtime, idx: Tensor) -> Candidate:
    """Sash, as in train.py."""
    model = GPT(config).to(runtime.device)
    if runtime.compile:
        compile_blocks(model)

    def loss() -> Tensor:
        with runtime.autocast():
            return model(idx, idx)

    kernel = model.kernel_names(config.block_size, runtime.dtype)
    refuse_unfused(kernel, "the network")
    return Candidate(config, model, loss, kernel)


def full(config: ModelConfig, runtime: Runtime, idx: Tensor) -> Candidate:
    return ours(config.model_copy(update={"pattern": "full"}), runtime, idx)


def sdpa(config: ModelConfig, runtime: Runtime, idx: Tensor) -> Candidate:
    return ours(config.model_copy(update={"pattern": "full", "kernel": "sdpa"}), runtime, idx)


def plain(config: ModelConfig, runtime: Runtime, idx: Tensor) -> Candidate:
    """A simple trainer: float32, eager, windows as masks, all logits in memory, only torch's own operators."""
    kernel = "masked" if "swa" in config.kinds else "sdpa"
    model = GPT(config.model_copy(update={"kernel": kernel})).to(runtime.device)
    loss = lambda: F.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
    name = model.kernel_names(config.block_size, torch.float32) + ", float32"
    return Candidate(config, model, loss, name, own_cpu_code=False)


def transformers(config: ModelConfig, runtime: Runtime, idx: Tensor) -> Candidate:
    """The same config in transformers, compiled, with its own loss."""
    model = transformers_twin(config).to(runtime.device)
    compiled = torch.compile(model)

    def loss() -> Tensor:
        with runtime.autocast():
            return compiled(input_ids=idx, labels=idx).loss

    return Candidate(config, model, loss, f"{type(model).__name__}, sdpa, compiled")
