"""Loss of rows of logits on a CPU: how many rows fit in its caches, and the C++ operator for CPUs with AMX.

Dimensions: N rows, V vocabulary.
"""

import torch
from torch import Tensor

from model.constants import IGNORED
from model.cpu.cpp_ops import cpp_ops

CACHED_ELEMENTS = 1 << 20  # logits to process at a time
VOCABULARY_CHUNK = 1 << 11  # rows of the head to multiply at a time


def rows_at_once(logits: Tensor) -> int:
    """Rows of (N, V) logits that fit in the caches."""
    return max(1, CACHED_ELEMENTS // logits.shape[1])


def serves(logits: Tensor, softcap: float | None) -> bool:
    """Whether loss_and_grad supports these logits."""
    return logits.is_cpu and logits.dtype == torch.bfloat16 and softcap is None and cpp_ops() is not None


@torch.library.custom_op("sash::loss_and_grad", mutates_args=("logits",))
def loss_and_grad(logits: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float) -> Tensor:
    """Loss (N,) of contiguous (N, V) logits by cpp/loss.cpp; with weights (N,), the gradient overwrites the logits."""
    n, V = logits.shape
    if n and not int(targets.max()) < V:
        raise IndexError(f"target {int(targets.max())} is not one of {V} tokens")
    losses, targets = targets.new_empty(n, dtype=torch.float32), targets.long().contiguous()
    weights = None if weights is None else weights.contiguous()
    loaded = cpp_ops()
    assert loaded is not None
    pointers = (None if x is None else x.data_ptr() for x in (losses, logits, targets, weights))
    loaded.loss_and_grad(*pointers, n, V, IGNORED, z_loss, torch.get_num_threads())
    return losses


loss_and_grad.register_fake(lambda logits, targets, *_: targets.new_empty(len(targets), dtype=torch.float32))
