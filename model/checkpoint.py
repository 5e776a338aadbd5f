"""Checkpoints: directories of safetensors and JSON that appear whole or not at all."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.errors import UserError
from model.optim import Optimizers

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A directory `step_00001000`, verified: every file is there with the bytes that were written."""

    path: Path
    state: dict  # state.json: step and whatever the caller kept beside it

    @property
    def step(self) -> int:
        return self.state["step"]


def save(root: Path, *, step: int, model: nn.Module, optimizers: Optimizers | None = None, state: dict) -> Path:
    """Write root/step_XXXXXXXX and return its path. It appears by rename; a crash leaves only a *.tmp directory."""
    final = root / f"step_{step:08d}"
    partial = root / f"{final.name}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(unique_tensors(model.state_dict()), partial / "model.safetensors")
        if optimizers is not None:
            save_file(_optimizer_tensors(model, optimizers) | _rng_tensors(), partial / "optimizer.safetensors")
        files = {file.name: _digest(file) for file in sorted(partial.iterdir())}
        content = {"format": FORMAT, "step": step, **state, "sha256": files}
        write_json(partial / "state.json", content | {"own_sha256": _own_digest(content)})
        for file in partial.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if match := re.search(r"^(?:.*: )?(.+) \(os error (\d+)\)$", str(error)):  # safetensors hides the number
            raise OSError(int(match[2]), match[1], str(partial)) from None
        raise
    return final


def read(path: Path) -> Checkpoint:
    """Open a checkpoint directory and verify every file. UserError that names what is wrong with it."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint: state.json cannot be read ({error})") from None
    damaged = UserError(f"{path} is no checkpoint: state.json is damaged")
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
    """Delete a checkpoint; from the first moment on it is none."""
    (path / "state.json").unlink(missing_ok=True)
    shutil.rmtree(path)


def point(root: Path, name: str, target: Path) -> None:
    """Make root/name, a one-line file, point to a checkpoint beside it."""
    write_text(root / name, target.name + "\n")


def pointed(root: Path, name: str) -> Path | None:
    """Where root/name points; None if it does not exist or points nowhere."""
    with contextlib.suppress(OSError):
        target = root / (root / name).read_text().strip()
        return target if target.is_dir() else None
    return None


def load_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Weights into the model. UserError where names or shapes differ."""
    tensors = _load(checkpoint.path / "model.safetensors")
    own = unique_tensors(model.state_dict())
    for name in sorted(own.keys() | tensors.keys()):
        there, here = (tuple(side[name].shape) if name in side else "missing" for side in (tensors, own))
        if there != here:
            raise UserError(
                f"{checkpoint.path} is of another shape: {name} is {there} in the checkpoint and {here} in the model"
            )
    model.load_state_dict(tensors, strict=False)  # tied weights are stored once


def load_training(model: nn.Module, optimizers: Optimizers, checkpoint: Checkpoint) -> None:
    """Weights, optimizer state and the state of the random generators, as they were."""
    load_model(model, checkpoint)
    tensors = _load(checkpoint.path / "optimizer.safetensors")
    names = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, slot = rest.rpartition("/")
            optimizers.load(names[name], slot, value)
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def write_json(path: Path, content: dict) -> None:
    """A whole JSON file or none."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A whole file or none: written beside, synced, renamed."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def unique_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the second name of a tied weight."""
    seen: set[int] = set()
    return {
        name: t.contiguous()
        for name, t in tensors.items()
        if t.data_ptr() not in seen and not seen.add(t.data_ptr())  # type: ignore[func-returns-value]
    }


def _optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"optimizer/{names[p]}/{slot}": value.contiguous()
        for p, state in optimizers.state.items()
        for slot, value in state.items()
    }


def _rng_tensors() -> dict[str, Tensor]:
    rng = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["rng/cuda"] = torch.cuda.get_rng_state()
    return rng


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): it is truncated or no safetensors file") from None


def _own_digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """To the disk, where the system can."""
    with contextlib.suppress(PermissionError):  # Windows cannot open directories
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
