"""Muon: the update of a matrix is its orthogonalised momentum (2502.16982).

Dimensions: a matrix has N rows and C columns; sharded over W processes, each process holds n of its rows.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from artifacts.sharding import is_sharded, local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration
ITERATIONS = 5
LEAST_NORM = 1e-7
BATCH_ELEMENTS = 1 << 22  # matrices of one shape are orthogonalised in batches of so many elements: small copies


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon that can also skip a step, batches matrices of one shape, and works on FSDP2 shards.

    Of sharded matrices each process gathers a different one, orthogonalises it and scatters the rows back, so that no
    work is done twice.
    """

    found_inf: Tensor | None = None  # 1 on the device skips the update: the gradient scaler's flag, as AdamW takes it

    def __init__(self, params: Iterable[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(tuple(p.shape), []).append(p)
            for params in alike.values():
                p = params[0]
                n = p.device_mesh.size() if is_sharded(p) else max(1, BATCH_ELEMENTS // p.numel())  # type: ignore[attr-defined]
                for start in range(0, len(params), n):
                    self._update(params[start : start + n], **{k: group[k] for k in self.defaults})

    def _update(self, params: list[Tensor], *, lr: float, weight_decay: float, momentum: float) -> None:
        """Update matrices of one shape; if they are sharded, at most one per process."""
        momenta = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            assert p.grad is not None
            buffer, grad = local(state["momentum_buffer"]), local(p.grad)
            new = buffer.lerp(grad, 1 - momentum)
            momenta.append(grad.lerp(new, momentum).bfloat16())  # Nesterov's
            self._write(buffer, new)
        N, C = params[0].shape
        updates = _orthogonal_rows(momenta, params[0]) if is_sharded(params[0]) else orthogonal(torch.stack(momenta))
        for p, update in zip(map(local, params), updates, strict=True):
            new = p * (1 - lr * weight_decay)
            self._write(p, new.add_(update, alpha=-lr * math.sqrt(max(1, N / C))))

    def _write(self, old: Tensor, new: Tensor) -> None:
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))


def orthogonal(x: Tensor) -> Tensor:
    """(n, N, C) in bfloat16 -> matrices with the same singular vectors and all singular values near 1."""
    a, b, c = COEFFICIENTS
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def _orthogonal_rows(rows: list[Tensor], p: Tensor) -> list[Tensor]:
    """Our (n, C) rows of each of up to W matrices shaped like p -> our rows of the orthogonalised matrices."""
    group = p.device_mesh.get_group()  # type: ignore[attr-defined]
    W, rank, (N, C) = dist.get_world_size(group), dist.get_rank(group), p.shape
    most = -(-N // W)
    ours = rank < len(rows)
    of_each = [max(0, min(most, N - k * most)) if ours else 0 for k in range(W)]  # rows of our matrix: as torch.chunk
    to_each = [len(rows[0]) if k < len(rows) else 0 for k in range(W)]
    sent = torch.cat(rows)  # (number of matrices * n, C)
    whole = sent.new_empty(sum(of_each), C)
    dist.all_to_all_single(whole, sent, of_each, to_each, group)
    back = torch.empty_like(sent)
    dist.all_to_all_single(back, orthogonal(whole[None])[0].contiguous() if ours else whole, to_each, of_each, group)
    return list(back.view(len(rows), -1, C))
