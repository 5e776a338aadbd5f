"""Which optimizer steps to skip, decided on the device: nothing is read back.

A step is bad if its loss or the norm of its gradient is not finite, or lies far above the running mean of the steps
before it. What is remembered of a high value is at most the bound it went over, so that one spike hides no other and
a lasting change of level is taken for normal in time.
"""

from typing import Any

import torch
from torch import Tensor

WARM_UP = 64  # steps before a spike can be told from the ordinary
WEIGHT = 0.02  # of a new value in the running mean and variance
LEAST_SPREAD = 0.01  # of the mean: the standard deviation counts as at least this


class StepGuard:
    """Judges each step by its loss and the norm of its gradient, and counts.

    When more than `limit` in a row were bad, all that follow are: the weights stay as they were before the first.
    """

    def __init__(self, device: torch.device, *, sigma: float | None, limit: int, state: dict[str, Any] | None = None):
        self.sigma, self.limit = sigma, limit
        state = state or {"mean": [0.0, 0.0], "var": [0.0, 0.0], "seen": 0, "skipped": 0}
        make = lambda value, dtype: torch.tensor(value, dtype=dtype, device=device)
        self.mean, self.var = make(state["mean"], torch.float32), make(state["var"], torch.float32)  # of loss and norm
        self.seen, self.skipped, self.in_a_row = (make(n, torch.int64) for n in (state["seen"], state["skipped"], 0))
        self.first = make([0.0] * 4, torch.float32)  # of the bad ones in a row: step, worst micro-batch, loss, norm

    def judge(self, step: int, losses: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether step number `step`, with these losses of its micro-batches (n,), is bad: a bool on the device."""
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

    # What reads from the device.

    @property
    def lost(self) -> bool:
        """More steps in a row were bad than may be."""
        return int(self.in_a_row) > self.limit

    def culprit(self) -> tuple[int, int, str]:
        """The first of the last bad steps in a row: its number, its micro-batch of the highest loss, what was wrong."""
        (step, micro, loss, norm), (usual_loss, usual_norm) = self.first.tolist(), self.mean.tolist()
        usual = f" (usual: {usual_loss:.4g} and {usual_norm:.4g})" if int(self.seen) else ""
        return int(step), int(micro), f"the loss is {loss:.4g}, the norm of its gradient {norm:.4g}{usual}"

    def state(self) -> dict[str, Any]:
        """What goes on with the run, for JSON."""
        return {key: getattr(self, key).tolist() for key in ("mean", "var", "seen", "skipped")}
