"""Progress of a run: the numbers that every checkpoint carries beside weights and optimizer state."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from configs.schema import TrainConfig

OVERFITTING = 0.02  # relative rise of the validation loss over its best, and fall of the training loss since then
OLD_NAMES = {"parted": "overfitting_reported"}  # in state.json of earlier versions


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    elapsed_s: float = 0.0  # of training, evaluating and waiting for checkpoints
    best_val_loss: float | None = None
    best_train_loss: float | None = None  # of the steps before that evaluation
    evaluations_since_best: int = 0
    overfitting_reported: bool = False
    loss_sum: float = 0.0  # over the good steps since the last line of metrics
    loss_count: int = 0
    auxiliary_sums: dict[str, float] = field(default_factory=dict)  # by name, over the same steps
    guard: dict[str, Any] | None = None  # state of the spike guard

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The progress in a checkpoint's state.json, also of an earlier version."""
        return cls(**{OLD_NAMES.get(key, key): value for key, value in state.items()})

    def is_over(self, train: TrainConfig) -> bool:
        """All steps are done, or `patience` evaluations in a row brought no improvement."""
        return self.step >= train.max_steps or self.evaluations_since_best >= (train.patience or math.inf)

    def note_evaluation(self, val_loss: float, train_loss: float | None) -> bool:
        """Count an evaluation; True if it is the best so far."""
        if self.best_val_loss is None or val_loss < self.best_val_loss:
            self.best_val_loss, self.best_train_loss = val_loss, train_loss
            self.evaluations_since_best = 0
            return True
        self.evaluations_since_best += 1
        return False

    def overfitting_note(self, val_loss: float, train_loss: float | None) -> str | None:
        """A message, once in a run, when validation loss has risen while training loss fell."""
        best_val, best_train = self.best_val_loss, self.best_train_loss
        if self.overfitting_reported or train_loss is None or best_val is None or best_train is None:
            return None
        rose, fell = val_loss > best_val * (1 + OVERFITTING), train_loss <= best_train * (1 - OVERFITTING)
        if not (rose and fell):
            return None
        self.overfitting_reported = True
        return (
            f"step {self.step}: validation loss rose from {best_val:.4f} to {val_loss:.4f} while training loss fell "
            f"from {best_train:.4f} to {train_loss:.4f}: the model overfits; the best checkpoint is kept, "
            f"--train.patience N ends such a run, more text or dropout prevents it"
        )
