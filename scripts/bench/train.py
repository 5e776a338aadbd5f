"""Training steps of a config against the same shape trained otherwise: tokens per second, MFU, peak memory."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli.program import at_least
from configs.load import load
from model import cost
from model.config import ModelConfig
from model.cpu.matmul import Linear
from model.device import Runtime, Switch, compile_blocks, matmul_rate, resolve
from model.gpt import GPT
from model.memory import measure_peak
from scripts.bench.peers import transformers_twin
from scripts.bench.timing import Measured, ratio, refuse_unfused, save, take_turns
from scripts.memory import with_known_vocabulary
from training.memory import training_tensors
from training.optim import Optimizers

Peer = Literal["transformers", "plain", "full", "sdpa"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Measured):
    """What to train, and beside whom. The text is random, the optimizer AdamW for all."""

    config: Path = Path("configs/gpt2.toml")
    """Whose shape."""
    batch_size: int = 2
    """Sequences of one step."""
    block_size: int | None = None
    """Instead of the config's."""
    pattern: str | None = None
    """Instead of the config's."""
    window: int | None = None
    """Instead of the config's."""
    peer: tuple[Peer, ...] = ()
    """transformers: the same shape there, compiled; plain: as simple trainers do on a CPU, float32, eager, the whole
    logits, windows as masks; full: our own with every layer full; sdpa: the same with torch's fused attention."""
    compile: Switch = "off"
    """Whether our layers are compiled."""


class Candidate:
    """A training step: what it computes, and all that it holds."""

    def __init__(self, config: ModelConfig, model: nn.Module, loss: Callable[[], Tensor], kernel: str):
        self.config, self.model, self.loss, self.kernel = config, model, loss, kernel
        self.optimizers = Optimizers([torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)])

    def __call__(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step()

    def tensors(self) -> Iterator[Tensor]:
        return training_tensors(self.model, self.optimizers)


def train(options: Options) -> None:
    """Time training steps."""
    at_least(options, batch_size=1, rounds=1)
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
    rates: list[float] = []  # in turns too: on a shared machine the limit moves
    turns: dict[str, Callable] = candidates | {"products": lambda: rates.append(matmul_rate(runtime, seconds=1.0))}
    seconds = take_turns(turns, runtime, rounds=options.rounds)
    rate = statistics.median(rates[1:])
    print(f"{options.config}, {options.batch_size} x {config.block_size} tokens, {runtime.why}")
    print(f"matrix products at {rate / 1e9:.0f} GFLOP/s\n")
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
    """As train.py does it."""
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
    """As simple trainers do it: float32, eager, windows as masks, the whole logits, nn.Linear."""
    model = GPT(config.model_copy(update={"kernel": "masked" if "swa" in config.kinds else "sdpa"})).to(runtime.device)
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    loss = lambda: F.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
    return Candidate(config, model, loss, model.kernel_names(config.block_size, torch.float32) + ", float32")


def transformers(config: ModelConfig, runtime: Runtime, idx: Tensor) -> Candidate:
    """The same shape in transformers, compiled, with its own loss."""
    model = transformers_twin(config).to(runtime.device)
    compiled = torch.compile(model)

    def loss() -> Tensor:
        with runtime.autocast():
            return compiled(input_ids=idx, labels=idx).loss

    return Candidate(config, model, loss, f"{type(model).__name__}, sdpa, compiled")
