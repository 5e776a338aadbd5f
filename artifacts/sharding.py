"""Tensors that may be sharded over processes (DTensor): the local part, the full tensor, and back."""

from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """True if this process holds only a part of the tensor."""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """The full tensor. A collective operation: every process must call it."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def like(value: Tensor, p: Tensor) -> Tensor:
    """A full tensor, moved to the device of p and sharded like p if it has the shape of p."""
    if not is_sharded(p) or value.shape != p.shape:
        return value.to(p.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]
