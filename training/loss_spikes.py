"""Loss-spike guard: decides on the device, without synchronizing, which optimizer steps to skip.

A step is bad if its loss or gradient norm is not finite, or far above the running mean of earlier steps. A high value
enters the running mean clipped to the bound it exceeded, so that one spike does not hide the next and a lasting change
of level becomes the new normal.
"""

from typing import Any

import torch
from torch import Tensor

WARM_UP = 64  # steps before spikes are detected at all
WEIGHT = 0.02  # of a new value in the running mean and variance
LEAST_SPREAD = 0.01  # lower bound of the standard deviation, as a fraction of the mean


class SpikeGuard:
    """Marks bad steps by their loss and gradient norm, and counts them.

    After more than `limit` bad steps in a row every later step is bad too: the weights stay as before the first.
    """

    def __init__(self, device: torch.device, *, sigma: float | None, limit: int, state: dict[str, Any] | None = None):
        self.sigma, self.limit = sigma, limit
        state = state or {"mean": [0.0, 0.0], "var": [0.0, 0.0], "seen": 0, "skipped": 0}
        make = lambda value, dtype: torch.tensor(value, dtype=dtype, device=device)
        self.mean, self.var = make(state["mean"], torch.float32), make(state["var"], torch.float32)  # of loss and norm
        self.seen, self.skipped, self.in_a_row = (make(n, torch.int64) for n in (state["seen"], state["skipped"], 0))
        self.first = make([0.0] * 4, torch.float32)  # bad step of this streak: step, worst micro-batch, loss, norm

    def should_skip(self, step: int, losses: Tensor, grad_norm: Tensor) -> Tensor:
        """A bool on the device, for step number `step` with the losses (n,) of its micro-batches."""
        x = torch.stack([losses.mean(), grad_norm])
        finite, bad = x.isfinite().all(), self.in_a_row > self.limit
        if self.sigma is not None:
            bound = self.mean + self.sigma * torch.maximum(self.var.sqrt(), LEAST_SPREAD * self.mean)
            bound = torch.where(self.seen >= WARM_UP, bound, torch.inf)
            bad, x = bad | (x > bound).any(), torch.minimum(x, bound)
        bad = bad | ~finite
        weight = finite / (self.seen + 1).clamp(max=round(1 / WEIGHT))
        delta = x.nan_to_num(posinf=0.0, neginf=0.0) - self.mean
        self.mean += weight * delta
        self.var.add_(weight * delta.square()).mul_(1 - weight)
        self.seen += finite
        worst = losses.nan_to_num(torch.inf).argmax()
        now = torch.stack([worst.new_tensor(step), worst, losses.mean(), grad_norm])
        self.first.copy_(torch.where(bad & (self.in_a_row == 0), now, self.first))
        self.skipped += bad
        self.in_a_row.add_(1).mul_(bad)
        return bad

    # The rest reads values back from the device.

    @property
    def lost(self) -> bool:
        """More than `limit` steps in a row were bad."""
        return int(self.in_a_row) > self.limit

    def culprit(self) -> tuple[int, int, str]:
        """Of the first bad step of the last streak: its number, the micro-batch with the highest loss, the reason."""
        (step, micro, loss, norm), (usual_loss, usual_norm) = self.first.tolist(), self.mean.tolist()
        usual = f" (usual: {usual_loss:.4g} and {usual_norm:.4g})" if int(self.seen) else ""
        return int(step), int(micro), f"the loss is {loss:.4g}, the norm of its gradient {norm:.4g}{usual}"

    def state(self) -> dict[str, Any]:
        """The state to save with a checkpoint, as JSON values."""
        return {key: getattr(self, key).tolist() for key in ("mean", "var", "seen", "skipped")}
