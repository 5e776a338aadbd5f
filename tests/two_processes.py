"""What tests/test_parallel.py starts with torchrun: runs one after the other, then what only shows from inside.

Usage: two_processes.py JOBS.json, which lists the values of runs; the findings come back in JOBS.found.json.
"""

import json
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from artifacts.sharding import like, whole
from configs.load import load
from model.config import ModelConfig
from model.context import AuxiliaryLosses
from model.gpt import GPT
from model.memory import PeakMemory
from model.mixers import MIXERS
from model.mixers.linear import LinearAttention
from training import distributed as parallel
from training import trainer
from training.distributed import DistributedContext, ParallelModel
from training.optim import make_optimizers

SHAPE = {"vocab_size": 31, "block_size": 16, "n_layer": 3, "n_head": 3, "n_kv_head": 1, "head_dim": 6, "n_embd": 20}
NUMBERS = {"muon_lr": 0.02, "adamw_lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def deviation_of_sharded_steps(distributed: DistributedContext, optimizer: str) -> float:
    """The largest difference of any weight after 3 steps with equal gradients, sharded and not."""
    weights = []
    for sharded in (False, True):
        torch.manual_seed(3)
        model = GPT(ModelConfig(**SHAPE, mlp_width=29))
        gradients = [[torch.randn(p.shape) for p in model.parameters()] for _ in range(3)]
        if sharded:
            ParallelModel(model, distributed, "fsdp", torch.device("cpu"))
        optimizers = make_optimizers(model, optimizer=optimizer, **NUMBERS)
        for values in gradients:
            for p, value in zip(model.parameters(), values, strict=True):
                p.grad = like(value, p)
            optimizers.step()
        weights.append([whole(p.detach()) for p in model.parameters()])
    return max((a - b).abs().max().item() for a, b in zip(*weights, strict=True))


def exchanges(distributed: DistributedContext, method: str) -> list[int]:
    """Gradient exchanges of 1 and of 4 micro-batches in one step."""
    counts = []
    for n in (1, 4):
        model = GPT(ModelConfig(**SHAPE))
        parallel_model = ParallelModel(model, distributed, method, torch.device("cpu"))
        idx = torch.zeros(2, 16, dtype=torch.long)
        with torch.profiler.profile() as profiler:
            for micro in range(n):
                with parallel_model.backward(last=micro == n - 1):
                    parallel_model(idx, idx).backward()
        names = [event.name for event in profiler.events()]
        counts.append(sum("reduce_scatter" in name or "all_reduce" in name or "allreduce" in name for name in names))
    return counts


class Sized(LinearAttention):
    """Linear attention with an auxiliary loss and a tensor that its first layer passes on."""

    @classmethod
    def spec_from(cls, config, place):
        return replace(super().spec_from(config, place), kind=f"sized{place.index}")

    def forward(self, x, ctx, cache=None):
        y = super().forward(x, ctx, cache)
        if self.spec.kind == "sized0":
            ctx.passed["first"] = y
        ctx.add_loss("size", 500.0 * y.square().mean())
        return y + ctx.passed["first"]


def deviation_with_auxiliary_losses(distributed: DistributedContext, method: str) -> list[float]:
    """Of the auxiliary loss, and the largest of any gradient, from those of all rows in one process."""
    MIXERS["sized"] = Sized
    idx = torch.randint(31, (4, 17), generator=torch.Generator().manual_seed(5))
    found: list[tuple[float, list[torch.Tensor]]] = []
    for together in (False, True):
        torch.manual_seed(3)
        model, aux = GPT(ModelConfig(**SHAPE, pattern="sized")), AuxiliaryLosses()
        model.activation_checkpointing = together
        rows = idx[distributed.rank :: distributed.size] if together else idx
        run = ParallelModel(model, distributed, method, torch.device("cpu")) if together else model
        run(rows[:, :-1], rows[:, 1:], auxiliary=aux).backward()
        value = distributed.all_reduce_sum([aux.values["size"].item()])[0] / distributed.size
        found.append((value, [whole(p.grad) for p in model.parameters() if p.grad is not None]))
    (one, gradients), (two, theirs) = found
    return [abs(one - two), max((a - b).abs().max().item() for a, b in zip(gradients, theirs, strict=True)), one]


def gloo_threads() -> int:
    """Threads of this process that free tensors."""
    n = 0
    for name in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended since it was listed
            n += "gloo" in name.read_text()
    return n


def gloo_threads_that_stay() -> int:
    """The system lists a thread for a moment after it has ended."""
    end = time.monotonic() + 10
    while (n := gloo_threads()) and time.monotonic() < end:
        time.sleep(0.01)
    return n


def main() -> None:
    jobs = Path(sys.argv[1])
    torch.set_num_threads(1)
    train.matmul_rate = lambda runtime: 1e12
    trainer.measure_peak = lambda device, held=(): nullcontext(PeakMemory(method="not measured"))
    with parallel.init_distributed("cpu") as distributed:
        for values in json.loads(jobs.read_text()):
            train.run_in(distributed, load(None, values))
        found = {
            "deviation": {name: deviation_of_sharded_steps(distributed, name) for name in ("muon", "adamw")},
            "exchanges": {method: exchanges(distributed, method) for method in ("ddp", "fsdp")},
            "auxiliary": {method: deviation_with_auxiliary_losses(distributed, method) for method in ("ddp", "fsdp")},
            "backend": dist.get_backend(),
        }
        found["gloo_threads_in_it"] = gloo_threads()
    found["gloo_threads_after_it"] = gloo_threads_that_stay()
    if parallel.rank() == 0:
        jobs.with_suffix(".found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
