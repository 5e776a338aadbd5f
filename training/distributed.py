"""Several processes that train one model: started by torchrun, connected here, and each with a copy or a shard.

One process by itself is `World()`, which connects to nothing.
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
import torch.distributed.nn.functional  # now: imported in a group, its functions hold that for good
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from model.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from model.gpt import GPT

Parallel = Literal["auto", "ddp", "fsdp"]

BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two averages, in float32
COPY_UP_TO = 0.4  # of a device's memory: what each process holds a copy of, rather than a shard


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes that train together, and which of them this is."""

    rank: int = 0
    size: int = 1
    device: str = "auto"  # of this process
    _meshes: list[DeviceMesh] = field(default_factory=list, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Print, once for all processes."""
        if self.is_first:
            print(text, file=file)

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Over all processes, in float64."""
        return self._reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM).tolist()

    def part_of(self, n: int) -> range:
        """Which of n rows, a multiple of `size`, are this process's."""
        share = n // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def largest(self, value: int = 0) -> int:
        """Of all processes. It never waits for a device, only for the other processes to have come here."""
        return int(self._reduce(torch.tensor(value), dist.ReduceOp.MAX))

    def rows(self, x: Tensor) -> Tensor:
        """(n,) of each process -> (size, n), on the device, with nothing read back."""
        rows = x.new_zeros(self.size, len(x))
        rows[self.rank] = x
        return self._reduce(rows, dist.ReduceOp.SUM)

    def share(self, batches: Iterable[tuple[Tensor, Tensor]], ignored: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every size-th of the (idx, targets); all get as many, the last ones perhaps with targets to be ignored."""
        batches = iter(batches)
        while together := list(islice(batches, self.size)):
            idx, targets = together[min(self.rank, len(together) - 1)]
            yield idx, targets if self.rank < len(together) else torch.full_like(targets, ignored)

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All processes in a row, as what is sharded knows them."""
        from torch.distributed.device_mesh import init_device_mesh

        self._meshes.append(init_device_mesh(device.type, (self.size,)))
        return self._meshes[-1]

    def leave(self) -> None:
        """End the connection with its threads: one that frees a tensor while Python ends would abort the process.

        They end with the last that holds the group: meshes, which the caches of DTensor keep, and DDP, in a circle.
        """
        dist.destroy_process_group()
        for mesh in self._meshes:
            getattr(mesh, "_pg_registry", {}).clear()  # torch's own: where it is not, the run is finished all the same
        gc.collect()

    def _reduce(self, x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x, op=how)
        return x


ALONE = World()


def rank() -> int:
    """Which of the processes that torchrun started this is; 0 without it."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


@contextmanager
def together(device: str) -> Iterator[World]:
    """The processes that torchrun started, connected as long as the block lasts. UserError if they lack devices."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield World(device=device)
        return
    device = _own_device(device)
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # torchrun keeps its store over a restart, with addresses of the dead
        store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    world = World(rank=rank, size=size, device=device)
    try:
        yield world
    finally:
        world.leave()


def _own_device(asked: str) -> str:
    """On CUDA each of a machine's processes has a device to itself."""
    n = int(os.environ["LOCAL_WORLD_SIZE"])
    if asked.startswith("cuda:") and n > 1:
        raise UserError(f"device ({asked}) is one device for {n} processes: leave it out")
    if asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return asked
    if n > torch.cuda.device_count():
        raise UserError(f"{n} processes cannot share {torch.cuda.device_count()} GPUs: start one for each")
    return f"cuda:{os.environ['LOCAL_RANK']}"


class Replica:
    """A model as this process trains it: alone, a copy whose gradients are averaged (DDP), or a shard (FSDP2).

    Make the optimizers after it, since sharding replaces the parameters.
    """

    def __init__(self, model: GPT, world: World, method: Parallel, device: torch.device):
        self.model, self.world = model, world
        self.method = "alone" if world.size == 1 else _choose(model, device) if method == "auto" else method
        self._whole: nn.Module = model
        if self.method == "ddp":
            self._whole = DistributedDataParallel(model, gradient_as_bucket_view=True)
        elif self.method == "fsdp":
            _shard(model, world.mesh(device))

    @property
    def warm_up_steps(self) -> int:
        """Steps until memory is arranged for good: DDP does so once more in its second."""
        return 2 if self.method == "ddp" else 1

    @property
    def n_shards(self) -> int:
        """Into how many parts weights and optimizer state are split."""
        return self.world.size if self.method == "fsdp" else 1

    def __call__(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self._whole(idx, targets)

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch: gradients are exchanged in a step's last alone."""
        if self.method == "fsdp":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        wait = self._whole.no_sync() if self.method == "ddp" and not last else contextlib.nullcontext()  # type: ignore[operator]
        with wait:
            yield

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients to a norm of at most `limit`; what it was, on the device."""
        params = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if is_sharded(norm):
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
        return norm


def is_sharded(x: Tensor) -> bool:
    """Whether this process holds only a part of it."""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """All of a tensor, which every process must ask for."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def like(value: Tensor, p: Tensor) -> Tensor:
    """All of a tensor -> where p is, and as p is sharded; what has another shape than p is not."""
    if not is_sharded(p) or value.shape != p.shape:
        return value.to(p.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _choose(model: nn.Module, device: torch.device) -> Literal["ddp", "fsdp"]:
    """Copies where they leave room for the rest, since they exchange least."""
    if device.type != "cuda":
        return "ddp"
    needed = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    return "ddp" if needed < COPY_UP_TO * torch.cuda.get_device_properties(device).total_memory else "fsdp"


def _shard(model: GPT, mesh: DeviceMesh) -> None:
    """Each layer by itself, so that one at a time is whole; embeddings, head and last norm together."""
    from torch.distributed.fsdp import fully_shard

    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
