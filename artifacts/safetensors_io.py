"""Safetensors files, and folders of shards written by several processes; any number of processes reads both."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from artifacts.processes import Processes
from artifacts.sharding import like, whole
from model.errors import UserError


def gather(tensors: dict[str, Tensor], processes: Processes, *, copy: bool) -> dict[str, Tensor]:
    """The full tensors in CPU memory, in the main process; every process must call it, the others get none."""
    gathered = {}
    for key, x in tensors.items():
        full = whole(x).detach()
        if processes.is_main:
            gathered[key] = full.to("cpu", copy=copy and full.is_cpu).contiguous()
    return gathered


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file. OSError if the disk is full."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if match := re.search(r"^(?:.*: )?(.+) \(os error (\d+)\)$", str(error)):  # safetensors hides errno
            raise OSError(int(match[2]), match[1], str(path.parent)) from None
        raise


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write a folder to which each process adds its shards. OSError if the disk is full."""
    import torch.distributed.checkpoint as dcp

    try:
        with _without_group_warning():
            dcp.save({key: x.detach() for key, x in tensors.items()}, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):
                raise cause from None
        raise


def shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor saved under this name."""
    if (folder / name).is_dir():
        from torch.distributed.checkpoint import FileSystemReader

        entries = FileSystemReader(folder / name).read_metadata().state_dict_metadata
        return {key: tuple(entry.size) for key, entry in entries.items()}  # type: ignore[union-attr]
    path = folder / f"{name}.safetensors"
    with _readable(path), safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def read(folder: Path, name: str, owner: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Every tensor saved under this name, on the device of its owner, a parameter, and sharded like it."""
    if not (folder / name).is_dir():
        path = folder / f"{name}.safetensors"
        with _readable(path):
            return {key: like(value, owner(key)) for key, value in load_file(path).items()}
    import torch.distributed.checkpoint as dcp

    tensors = {
        key: torch.empty_like(p) if (p := owner(key)).shape == shape else torch.empty(shape, device=p.device)
        for key, shape in shapes(folder, name).items()
    }
    with _without_group_warning():
        dcp.load(tensors, checkpoint_id=folder / name)
    return tensors


@contextmanager
def _without_group_warning() -> Iterator[None]:
    """Silence the warning that no process group exists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): it is truncated or no safetensors file") from None
