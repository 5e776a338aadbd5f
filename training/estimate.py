"""Memory of a training step, estimated on fake tensors: neither the device nor the memory is needed."""

import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.schema import OptimizerName
from model.attention.dispatch import workspaces
from model.config import ModelConfig
from model.gpt import GPT
from training.optim import Optimizers, make_optimizers

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "work")


def train_peak(
    config: ModelConfig,
    batch_size: int,
    dtype: torch.dtype,
    *,
    optimizer: OptimizerName,
    activation_checkpointing: bool = False,
) -> dict[str, int]:
    """Live bytes at the peak of a training step of batch_size sequences of block_size tokens, by PARTS.

    Activations live from the forward to the backward pass; logits are everything that the loss allocates, including
    the head's gradient; work is the rest. The second step is counted, since the first creates the optimizer state.
    """
    with FakeTensorMode(), _Live() as live:
        live.part = "parameters"
        model = GPT(config)
        model.activation_checkpointing = activation_checkpointing
        optimizers = make_optimizers(
            model, optimizer=optimizer, muon_lr=0.02, adamw_lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
        )
        model.h[-1].register_forward_hook(lambda *_: setattr(live, "part", "logits"))
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: live.relabel([p.grad], "gradients"))
        live.part = "activations"
        idx = torch.zeros(batch_size, config.block_size, dtype=torch.long)
        for _ in range(2):
            live.start_peak()
            _step(live, model, optimizers, idx, dtype)
    return {part: live.at_peak[part] for part in PARTS}


def rows_that_fit(
    config: ModelConfig,
    n_bytes: int,
    dtype: torch.dtype,
    *,
    optimizer: OptimizerName,
    activation_checkpointing: bool = False,
    shards: int = 1,
) -> int:
    """Largest batch of block_size sequences whose training step stays below n_bytes, at least 1.

    Extrapolates linearly from the peaks of one and two sequences; the true peak grows less, since the loss works in
    chunks. A process holds one of `shards` parts of the weights and the optimizer state.
    """
    one, two = (
        train_peak(config, n, dtype, optimizer=optimizer, activation_checkpointing=activation_checkpointing)
        for n in (1, 2)
    )
    row = sum(two.values()) - sum(one.values())
    kept = one["parameters"] + one["optimizer"]
    return max(1, (n_bytes - sum(one.values()) + row + kept - kept // shards) // row)


def _step(live: "_Live", model: GPT, optimizers: Optimizers, idx: Tensor, dtype: torch.dtype) -> None:
    live.part = "activations"
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(idx, idx)
    live.part = "work"
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizers.step()
    live.relabel((x for state in optimizers.state.values() for x in state.values()), "optimizer")


class _Live(TorchDispatchMode):
    """Counts the bytes of each storage from the operator that makes it until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "work"  # what is made now
        self._workspaces = workspaces()  # operators that use more memory than their results
        self.now: Counter[str] = Counter()
        self.start_peak()
        self._part_of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # storage -> [part]

    def start_peak(self) -> None:
        self.at_peak, self._peak = Counter(self.now), self.now.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self._workspaces:
            work_bytes, first = self._workspaces[func]
            q, k, v, *numbers = args[first:]
            self._count_work(work_bytes(q, k, v, *numbers, backward=first > 0))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self._part_of:
                label = self._part_of[storage] = [self.part]
                self.now[self.part] += storage.nbytes()
                weakref.finalize(storage, self._free, label, storage.nbytes())
        self._count_work(0)
        return out

    def _count_work(self, n: int) -> None:
        if (total := self.now.total() + n) > self._peak:
            self.at_peak, self._peak = self.now + Counter(work=n), total

    def relabel(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that were allocated under another label as `part`."""
        for x in tensors:
            storage = x.untyped_storage()
            label = self._part_of[storage]
            self.now[label[0]] -= storage.nbytes()
            self.now[part] += storage.nbytes()
            label[0] = part

    def _free(self, label: list[str], n: int) -> None:
        self.now[label[0]] -= n
