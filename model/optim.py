"""The optimizer and its learning rate over time."""

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["cosine", "trapezoid", "constant"]


def make_adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (1711.05101), fused; matrices decay, norms and biases do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def lr_factor(
    step: int, *, max_steps: int, warmup_steps: int, schedule: Schedule, decay_fraction: float, final: float
) -> float:
    """What step number `step` (from 0) multiplies the learning rate by.

    Linear warm-up; then a cosine to `final` at the end; or a trapezoid (2405.18392), flat and in the last
    `decay_fraction` of the steps linear to `final`; or constant.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    start = warmup_steps if schedule == "cosine" else max(warmup_steps, round(max_steps * (1 - decay_fraction)))
    done = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
    return final + (1 - final) * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)
