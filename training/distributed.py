"""Data-parallel training: the process group that torchrun starts, and the model under DDP or FSDP2.

A single process is `DistributedContext()`, which connects to nothing.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal, TextIO

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported before a group exists, else its functions keep the group alive
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from artifacts.sharding import is_sharded
from configs.schema import Parallel
from model.context import AuxiliaryLosses
from model.errors import UserError
from model.gpt import GPT

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two averages, in float32
COPY_UP_TO = 0.4  # fraction of a device's memory up to which each process holds a full copy rather than a shard


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """Rank, number of processes and device of this process, with the collective operations of training."""

    rank: int = 0
    size: int = 1
    device: str = "auto"  # of this process
    _meshes: list[DeviceMesh] = field(default_factory=list, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """True in rank 0, the one process that writes files and prints."""
        return self.rank == 0

    def print0(self, text: str, file: TextIO | None = None) -> None:
        """Print in the main process only."""
        if self.is_main:
            print(text, file=file)

    def barrier(self) -> None:
        """Return when every process has called it."""
        if self.size > 1:
            dist.barrier()

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes, in float64."""
        return self._reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM).tolist()

    def all_reduce_max(self, value: int = 0) -> int:
        """The largest value of all processes. Waits for the other processes, never for a device."""
        return int(self._reduce(torch.tensor(value), dist.ReduceOp.MAX))

    def all_gather_rows(self, x: Tensor) -> Tensor:
        """(n,) in each process -> (size, n), on the device, without synchronizing with it."""
        rows = x.new_zeros(self.size, len(x))
        rows[self.rank] = x
        return self._reduce(rows, dist.ReduceOp.SUM)

    def rows_of_rank(self, n_rows: int) -> range:
        """The rows of a global batch that this process computes; n_rows is a multiple of `size`."""
        share = n_rows // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def split_batches(self, batches: Iterable[tuple[Tensor, Tensor]], ignored: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every size-th (idx, targets) pair, the same number in each process.

        If the last pairs do not suffice for all processes, the others get a repeated one with all targets ignored.
        """
        batches = iter(batches)
        while group := list(islice(batches, self.size)):
            idx, targets = group[min(self.rank, len(group) - 1)]
            yield idx, targets if self.rank < len(group) else torch.full_like(targets, ignored)

    def device_mesh(self, device: torch.device) -> DeviceMesh:
        """A one-dimensional mesh of all processes, which FSDP2 shards over."""
        from torch.distributed.device_mesh import init_device_mesh

        self._meshes.append(init_device_mesh(device.type, (self.size,)))
        return self._meshes[-1]

    def shut_down(self) -> None:
        """Destroy the process group and its threads: a thread that frees a tensor at exit would abort the process.

        The threads end with the last reference to the group. Two outlive `destroy_process_group`: device meshes, which
        DTensor caches, and a reference cycle in DDP, hence the garbage collection.
        """
        dist.destroy_process_group()
        for mesh in self._meshes:
            getattr(mesh, "_pg_registry", {}).clear()  # private to torch: a version without it does no harm
        gc.collect()

    def _reduce(self, x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x, op=how)
        return x


UNDISTRIBUTED = DistributedContext()


def rank() -> int:
    """Rank of this process under torchrun; 0 without it."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


@contextmanager
def init_distributed(device: str) -> Iterator[DistributedContext]:
    """Join the process group of torchrun for the length of the block. UserError if there are too few devices."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield DistributedContext(device=device)
        return
    device = _own_device(device)
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # torchrun keeps its store over a restart, with stale addresses
        store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    distributed = DistributedContext(rank=rank, size=size, device=device)
    try:
        yield distributed
    finally:
        distributed.shut_down()


def _own_device(asked: str) -> str:
    """The device of this process: on CUDA, each process of a machine gets its own GPU."""
    n = int(os.environ["LOCAL_WORLD_SIZE"])
    if asked.startswith("cuda:") and n > 1:
        raise UserError(f"device ({asked}) is one device for {n} processes: leave it out")
    if asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return asked
    if n > torch.cuda.device_count():
        raise UserError(f"{n} processes cannot share {torch.cuda.device_count()} GPUs: start one for each")
    return f"cuda:{os.environ['LOCAL_RANK']}"


class ParallelModel:
    """The model as this process trains it: by itself, as a DDP replica with averaged gradients, or as an FSDP2 shard.

    Create the optimizers afterwards, since sharding replaces the parameters.
    """

    def __init__(self, model: GPT, distributed: DistributedContext, method: Parallel, device: torch.device):
        self.model, self.distributed = model, distributed
        self.method = "single" if distributed.size == 1 else _choose(model, device) if method == "auto" else method
        self._wrapped: nn.Module = model
        if self.method == "ddp":
            self._wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        elif self.method == "fsdp":
            _shard(model, distributed.device_mesh(device))

    @property
    def warm_up_steps(self) -> int:
        """Steps until memory use is steady: DDP allocates its buckets again in the second step."""
        return 2 if self.method == "ddp" else 1

    @property
    def n_shards(self) -> int:
        """Number of shards of the weights and the optimizer state."""
        return self.distributed.size if self.method == "fsdp" else 1

    def __call__(self, idx: Tensor, targets: Tensor, auxiliary: AuxiliaryLosses | None = None) -> Tensor:
        return self._wrapped(idx, targets, auxiliary=auxiliary)

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Context of a micro-batch's forward and backward pass: only the last of a step communicates gradients."""
        if self.method == "fsdp":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        no_sync = self._wrapped.no_sync() if self.method == "ddp" and not last else contextlib.nullcontext()  # type: ignore[operator]
        with no_sync:
            yield

    def clip(self, limit: float) -> Tensor:
        """Clip the gradients to a norm of at most `limit`; returns the norm before, on the device."""
        params = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if is_sharded(norm):
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
        return norm


def _choose(model: nn.Module, device: torch.device) -> Literal["ddp", "fsdp"]:
    """DDP while the copies leave room for activations, since it communicates least."""
    if device.type != "cuda":
        return "ddp"
    needed = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    return "ddp" if needed < COPY_UP_TO * torch.cuda.get_device_properties(device).total_memory else "fsdp"


def _shard(model: GPT, mesh: DeviceMesh) -> None:
    """One FSDP unit per layer, so that one layer at a time is gathered; embeddings, head and last norm form another."""
    from torch.distributed.fsdp import fully_shard

    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
