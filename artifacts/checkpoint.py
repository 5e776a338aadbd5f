"""Checkpoints: directories of safetensors and JSON, written atomically and verified when read."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from torch import Tensor, nn

from artifacts import safetensors_io as tensors
from artifacts.files import write_json, write_text
from artifacts.processes import SINGLE_PROCESS, Processes
from configs.schema import CheckpointKind
from model.errors import UserError

FORMAT = 1


class OptimizerState(Protocol):
    """Tensors that belong to parameters. Satisfied by `training.optim.Optimizers`."""

    @property
    def state(self) -> Mapping[Tensor, Mapping[str, Tensor]]:
        """Parameter -> name -> tensor."""
        ...

    def load(self, p: Tensor, name: str, value: Tensor) -> None:
        """Restore one of them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified directory `step_00001000`: every file is there with the bytes that were written."""

    path: Path
    state: dict  # state.json: the step and what the caller saved with it

    @property
    def step(self) -> int:
        return self.state["step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Tensors to save, by file: gathered in the main process or, in sharded checkpoints, as each process holds them."""

    tensors: dict[str, dict[str, Tensor]]
    kind: CheckpointKind
    processes: Processes

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for tensors in self.tensors.values() for x in tensors.values())


def content(
    model: nn.Module,
    optimizers: OptimizerState | None = None,
    *,
    kind: CheckpointKind = "whole",
    processes: Processes = SINGLE_PROCESS,
    copy: bool = False,
) -> Content:
    """Weights and optimizer state, in memory of their own with `copy`. Every process must call it."""
    named = {"model": unique_tensors(model)}
    if optimizers is not None:
        named["optimizer"] = _optimizer_tensors(model, optimizers)
    if kind == "whole":
        named = {name: tensors.gather(of_file, processes, copy=copy) for name, of_file in named.items()}
    return Content(tensors=named, kind=kind, processes=processes)


def write(root: Path, content: Content, *, step: int, state: dict) -> Path:
    """Write root/step_XXXXXXXX and return its path. It appears by rename; a crash leaves only a *.tmp directory.

    A sharded checkpoint is written by all processes at once, to a file system that they share; a whole one by the main
    process alone.
    """
    final = root / f"step_{step:08d}"
    partial = root / f"{final.name}.tmp"
    processes = content.processes if content.kind == "sharded" else SINGLE_PROCESS
    if processes.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.barrier()
    try:
        for name, of_file in content.tensors.items():
            if content.kind == "sharded":
                tensors.write_shards(partial / name, of_file)
            else:
                tensors.write(partial / f"{name}.safetensors", of_file)
        if processes.is_main:
            files = {str(file.relative_to(partial)): _digest(file) for file in _files(partial)}
            described = {"format": FORMAT, "step": step, **state, "sha256": files}
            write_json(partial / "state.json", described | {"own_sha256": _own_digest(described)})
            for path in sorted(partial.rglob("*")):
                _sync(path)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(root)
    except (OSError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    processes.barrier()
    return final


def read(path: Path) -> Checkpoint:
    """Open a checkpoint directory and verify every file. UserError names the file that is missing or damaged."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint: state.json cannot be read ({error})") from None
    damaged = UserError(f"{path} is not a checkpoint: state.json is damaged")
    if not isinstance(state, dict):
        raise damaged
    if state.get("format") != FORMAT:
        raise UserError(f"{path} has checkpoint format {state.get('format')}, this version reads {FORMAT}")
    if state.pop("own_sha256", None) != _own_digest(state):
        raise damaged
    for name, digest in state["sha256"].items():
        if not (path / name).is_file() or _digest(path / name) != digest:
            raise UserError(f"{path / name} is missing or damaged: its bytes are not those that were written")
    return Checkpoint(path=path, state=state)


def list_steps(root: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    return sorted(path for path in root.glob("step_*") if path.is_dir() and not path.name.endswith(".tmp"))


def remove(path: Path) -> None:
    """Delete a checkpoint; without its state.json, which goes first, it is no longer one."""
    (path / "state.json").unlink(missing_ok=True)
    shutil.rmtree(path)


def point(root: Path, name: str, target: Path) -> None:
    """Write root/name, a one-line file with the name of a checkpoint beside it."""
    write_text(root / name, target.name + "\n")


def pointed(root: Path, name: str) -> Path | None:
    """The checkpoint that root/name points to; None if either does not exist."""
    with contextlib.suppress(OSError, ValueError):
        target = root / (root / name).read_text(encoding="utf-8").strip()
        return target if target.is_dir() else None
    return None


def load_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the weights. UserError where names or shapes differ."""
    own = unique_tensors(model)
    shapes = tensors.shapes(checkpoint.path, "model")
    for name in sorted(own.keys() | shapes.keys()):
        there, here = shapes.get(name, "missing"), tuple(own[name].shape) if name in own else "missing"
        if there != here:
            raise UserError(
                f"{checkpoint.path} is of another shape: {name} is {there} in the checkpoint and {here} in the model"
            )
    for name, value in tensors.read(checkpoint.path, "model", own.__getitem__).items():
        own[name].copy_(value)


def load_training(model: nn.Module, optimizers: OptimizerState, checkpoint: Checkpoint) -> None:
    """Load weights and optimizer state."""
    load_model(model, checkpoint)
    own = dict(model.named_parameters())
    owner = lambda key: own[key.removeprefix("optimizer/").rpartition("/")[0]]
    for key, value in tensors.read(checkpoint.path, "optimizer", owner).items():
        optimizers.load(owner(key), key.rpartition("/")[2], value)


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model by name, tied weights once."""
    again = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return {name: x for name, x in model.state_dict().items() if name not in again}


def _optimizer_tensors(model: nn.Module, optimizers: OptimizerState) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"optimizer/{names[p]}/{slot}": value for p, state in optimizers.state.items() for slot, value in state.items()
    }


def check_room(root: Path, n_bytes: int) -> None:
    """UserError if the disk has no room for a checkpoint of so many bytes."""
    free = shutil.disk_usage(root if root.exists() else root.parent).free
    if free < n_bytes:
        raise UserError(
            f"No space left on device: {root} has {free / 1e6:,.1f} MB free and a checkpoint takes "
            f"{n_bytes / 1e6:,.1f}: make room, and the same command goes on"
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _own_digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk, where the system can."""
    with contextlib.suppress(PermissionError):  # Windows cannot open directories
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
