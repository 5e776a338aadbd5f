"""The optimizers and the learning rate schedule."""

import math

import torch
from torch import Tensor

from artifacts.sharding import like
from configs.schema import OptimizerName, Schedule
from model.gpt import GPT
from training.muon import Muon


class Optimizers:
    """All optimizers of one network behind one interface."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.all = optimizers
        self._peak = [[group["lr"] for group in o.param_groups] for o in optimizers]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Parameter -> name -> tensor."""
        return {p: state for o in self.all for p, state in o.state.items()}

    def load(self, p: Tensor, name: str, value: Tensor) -> None:
        """Restore one tensor of optimizer state, given in full; it is sharded like its parameter."""
        owner = next(o for o in self.all if any(p is q for group in o.param_groups for q in group["params"]))
        owner.state[p][name] = like(value, p)

    def set_lr(self, factor: float) -> None:
        """Set every learning rate to `factor` times its peak."""
        for optimizer, peaks in zip(self.all, self._peak, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    @property
    def lr(self) -> float:
        """Current learning rate of the first optimizer."""
        return self.all[0].param_groups[0]["lr"]

    def step(self, *, skip: Tensor | None = None) -> None:
        """Update the weights and drop the gradients; no update if `skip`, a bool on their device, is true.

        On a CPU the flag is read. Elsewhere it is passed on as `found_inf`, the flag that optimizers take from a
        gradient scaler, so that nothing is read back.
        """
        on_cpu = skip is not None and skip.device.type == "cpu"
        for optimizer in self.all:
            if not on_cpu:
                optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
            if not (on_cpu and skip):
                optimizer.step()
            optimizer.zero_grad()


def make_optimizers(
    model: GPT,
    *,
    optimizer: OptimizerName,
    muon_lr: float,
    adamw_lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    base_width: int | None = None,
) -> Optimizers:
    """Muon (2502.16982) for the matrices inside the layers and AdamW (1711.05101) for the rest, or AdamW for all.

    Weight decay applies to matrices, but not to embeddings if Muon is used, and never to norms, biases and matrices
    that a mixer keeps from Muon. With `base_width`, AdamW's rate for matrices inside the layers is
    adamw_lr * base_width / n_embd (2203.03466).
    """
    apart = {p for mixer in model.mixers for p in mixer.adamw_parameters()}  # of AdamW in any case, without decay
    inside = {p for block in model.h for p in block.parameters() if p.dim() == 2} - apart
    params = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "muon":
        matrices = [p for p in params if p in inside]
        others = [p for p in params if p not in inside]
        return Optimizers(
            [
                Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
                torch.optim.AdamW(others, lr=adamw_lr, betas=betas, weight_decay=0.0, fused=True),
            ]
        )
    width_factor = base_width / model.config.n_embd if base_width else 1.0
    groups = [
        {"params": [p for p in params if p not in inside | apart and p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p in inside], "weight_decay": weight_decay, "lr": adamw_lr * width_factor},
        {"params": [p for p in params if p.dim() < 2 or p in apart], "weight_decay": 0.0},
    ]
    return Optimizers([torch.optim.AdamW(groups, lr=adamw_lr, betas=betas, fused=True)])


def lr_factor(
    step: int, *, max_steps: int, warmup_steps: int, schedule: Schedule, decay_fraction: float, final_lr: float
) -> float:
    """Learning rate of step number `step` (from 0) as a fraction of its peak.

    Linear warm-up, followed by a cosine down to `final_lr`; by a trapezoid (2405.18392), which stays flat and decays
    linearly to `final_lr` over the last `decay_fraction` of all steps; or by a constant rate.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    start = warmup_steps if schedule == "cosine" else max(warmup_steps, round(max_steps * (1 - decay_fraction)))
    done = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
    return final_lr + (1 - final_lr) * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)
