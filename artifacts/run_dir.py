"""What a run leaves behind: config.json, metrics.jsonl, summary.json, tokenizer.json, checkpoints/."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from torch import nn

from artifacts import checkpoint
from artifacts.background import Background
from artifacts.checkpoint import Checkpoint
from artifacts.safetensors_io import CheckpointKind
from configs.load import build
from configs.schema import RunConfig
from data.tokenizer import Tokenizer
from model.device import Runtime
from model.errors import UserError
from model.gpt import GPT
from training.distributed import ALONE, World
from training.optim import Optimizers

MAY_CHANGE = (  # on resume: none of them is part of the experiment
    *("name", "out_dir", "data.dir", "device", "dtype", "compile", "log", "model.kernel"),
    *("train.max_steps", "train.patience", "train.micro_batch", "train.recompute"),
    *("train.parallel", "train.checkpoint", "train.keep_checkpoints"),
)
LOCK = ".lock"


class RunDir:
    """A directory of one run. Opening it writes nothing; `begin` does."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"

    def exists(self) -> bool:
        return (self.path / "config.json").is_file()

    @classmethod
    def of(cls, path: Path) -> "RunDir":
        """The run that `path`, its directory or one of its checkpoints, belongs to. UserError if it is neither."""
        run = cls(path.parent.parent if path.parent.name == "checkpoints" else path)
        if not run.exists():
            raise UserError(f"{path} is no run: it has no config.json")
        return run

    def load(self, path: Path, which: str = "best") -> tuple[GPT, Tokenizer]:
        """The network in float32 and its tokenizer: of the checkpoint that `path` is, or else of `which`."""
        model = GPT(self.config().model)
        checkpoint.load_model(model, self.chosen(path, which))
        return model, Tokenizer.load(self.path / "tokenizer.json")

    def chosen(self, path: Path, which: str = "best") -> Checkpoint:
        """The checkpoint that `path` is, or else `which`, verified."""
        return self.checkpoint(which) if path == self.path else checkpoint.read(path)

    def config(self) -> RunConfig:
        """The resolved config the run was made with."""
        return build(RunConfig, self.facts()["config"], source=lambda _: f"{self.path}/config.json: ")

    def facts(self) -> dict[str, Any]:
        """config.json whole: the config, and the versions, device, commit and data it ran with."""
        file = self.path / "config.json"
        if not self.exists():
            raise UserError(f"{self.path} is no run directory: it has no config.json")
        facts = checkpoint.read_json(file)
        if not isinstance(facts.get("config"), dict) or "data" not in facts:
            raise UserError(f"{file} is damaged: it does not say config and data")
        return facts

    def summary(self) -> dict[str, Any] | None:
        """What the finished run came to; None while it is unfinished."""
        file, advice = self.path / "summary.json", "remove it and repeat the training command"
        return checkpoint.read_json(file, advice=advice) if file.is_file() else None

    def check_same(self, config: RunConfig, data_hash: str) -> None:
        """UserError that names the first key in which `config` is another experiment than the one begun here.

        A key that was not known yet when the run was begun has its default.
        """
        for key, was, now in _differences(self.config().model_dump(mode="json"), config.model_dump(mode="json")):
            if not any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE):
                raise UserError(
                    f"{self.path} was begun with {key} = {was!r}, now it is {now!r}: give another --name, "
                    f"or remove the directory to begin again"
                )
        if (old_hash := self.facts()["data"]) != data_hash:
            raise UserError(
                f"{self.path} was begun on other data (hash {old_hash}, now {data_hash}): "
                f"give another --name, or remove the directory to begin again"
            )

    @contextmanager
    def alone(self, world: World = ALONE) -> Iterator[None]:
        """Nobody but these processes trains this run as long as the block lasts. UserError, in all, if others do."""
        lock, taken = FileLock(self.path / LOCK, timeout=0), False
        new = [path for path in (self.path, *self.path.parents) if not path.exists()]
        if world.is_first:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                taken = True
        if world.largest(taken):
            raise UserError(f"{self.path} is trained by another process now: wait, or give another --name")
        try:
            yield
        finally:
            if world.is_first:
                self._leave(lock, new)

    def _leave(self, lock: BaseFileLock, new: list[Path]) -> None:
        """Release the lock; and of a run that was not begun, leave nothing."""
        begun = self.exists()
        with suppress(OSError):  # Windows keeps what is open
            if not begun:
                (self.path / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for path in [] if begun else new:
                path.rmdir()

    def begin(self, config: RunConfig, facts: dict[str, Any]) -> None:
        """Write config.json; from here on the directory is a run."""
        own = {"checkpoints", "config.json.tmp", LOCK}  # what a start that was cut short leaves
        if self.path.exists() and not self.exists() and not own.issuperset(x.name for x in self.path.iterdir()):
            raise UserError(f"{self.path} exists and is no run: give another --name")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.path / "summary.json").unlink(missing_ok=True)
        checkpoint.write_json(self.path / "config.json", {"config": config.model_dump(mode="json"), **facts})

    def save(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        progress: dict[str, Any],
        *,
        best: bool,
        keep: int = 2,
        kind: CheckpointKind = "whole",
        world: World = ALONE,
        background: Background | None = None,
    ) -> None:
        """A checkpoint that `latest`, and if it is the best so far `best`, points to; of others the newest stay.

        `keep` are kept, beside the best. Called by all. What is whole is copied and written in the background, if there
        is one; shards are written at once. UserError, before anything is written, where there is no room.
        """
        if kind == "sharded":
            background = None
        if background is not None:
            background.wait()  # one copy in memory at a time
        content = checkpoint.content(model, optimizers, kind=kind, world=world, copy=background is not None)

        def write() -> None:
            saved = checkpoint.write(self.checkpoints, content, step=progress["step"], state={"progress": progress})
            if world.is_first:
                self._point_and_prune(saved, best=best, keep=keep)

        if kind == "sharded" or world.is_first:
            checkpoint.check_room(self.checkpoints, content.nbytes)
            write() if background is None else background.start(write)

    def _point_and_prune(self, saved: Path, *, best: bool, keep: int) -> None:
        if best:  # first: whoever goes on from the latest takes for granted that the best is there
            checkpoint.point(self.checkpoints, "best", saved)
        checkpoint.point(self.checkpoints, "latest", saved)
        steps = checkpoint.list_steps(self.checkpoints)
        kept = {checkpoint.pointed(self.checkpoints, "best"), *steps[-keep:]}
        for path in steps:
            if path not in kept:
                checkpoint.remove(path)

    def to_go_on_from(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole, and what is wrong with newer ones is said; None before the first.

        UserError if there were some and none is whole.
        """
        try:
            return self.latest()
        except UserError as error:
            for path in reversed(checkpoint.list_steps(self.checkpoints)):
                with suppress(UserError):
                    older = checkpoint.read(path)
                    say(f"note: {error}; {path}, which is whole, is taken instead")
                    return older
            advice = f"no other checkpoint is whole: remove {self.path} to begin again, or give another --name"
            raise UserError(f"{error}; {advice}") from None

    def cut_checkpoints(self, taken: Checkpoint) -> None:
        """Go back to the checkpoint taken: those after it, damaged or not, would be counted among the newest."""
        checkpoint.point(self.checkpoints, "latest", taken.path)
        steps = checkpoint.list_steps(self.checkpoints)
        for path in steps[steps.index(taken.path) + 1 :]:
            checkpoint.remove(path)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, verified; None before the first. UserError if it was there and is gone."""
        return self.checkpoint("latest") if (self.checkpoints / "latest").exists() else None

    def checkpoint(self, which: str = "best") -> Checkpoint:
        """The best or the latest checkpoint, verified. UserError if there is none."""
        path = checkpoint.pointed(self.checkpoints, which)
        if path is not None:
            return checkpoint.read(path)
        if (pointer := self.checkpoints / which).exists():
            raise UserError(
                f"{pointer} points to {pointer.read_text(errors='replace').strip()!r}, which is gone: write the name "
                f"of another checkpoint into it, or remove {self.path} to begin again"
            )
        latest = which == "best" and (self.checkpoints / "latest").exists()
        what = "it was not evaluated before it stopped; take --checkpoint latest" if latest else "train it first"
        raise UserError(f"{self.path} has no {which} checkpoint yet: {what}")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json: the run is finished."""
        checkpoint.write_json(self.path / "summary.json", summary)

    def cut_metrics(self, step: int) -> None:
        """Drop the lines that came after `step`, and a last one that was never finished."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)
            kept = [line for line, record in zip(whole, self._records(whole), strict=True) if record["step"] <= step]
            checkpoint.write_text(path, "".join(kept))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl. UserError for one that is damaged."""
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
        return self._records(text.splitlines())

    def _records(self, lines: list[str]) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            with suppress(ValueError):
                if isinstance(record := json.loads(line), dict) and "step" in record:
                    records.append(record)
            if len(records) < number:
                raise UserError(f"{self.path}/metrics.jsonl: line {number} is damaged: take it out")
        return records


class Metrics:
    """Appends to metrics.jsonl, and mirrors to wandb when asked; wandb never asks for a login."""

    def __init__(self, run: RunDir, config: RunConfig):
        self._file = open(run.path / "metrics.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._wandb = None
        if config.log.wandb:
            import wandb

            has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
            self._wandb = wandb.init(
                project=config.log.wandb_project,
                name=config.name,
                dir=run.path,
                mode=None if has_key or "WANDB_MODE" in os.environ else "offline",
                config=config.model_dump(mode="json"),
            )

    def write(self, record: dict[str, Any]) -> None:
        """One line; keys whose value is None were not measured and are left out."""
        record = {key: value for key, value in record.items() if value is not None}
        self._file.write(json.dumps(record) + "\n")
        if self._wandb is not None:
            self._wandb.log(record, step=record["step"])

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def environment(runtime: Runtime) -> dict[str, Any]:
    """What a run ran with: versions, device, git commit."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "tiktoken")}},
        "runtime": runtime.why,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The checked-out commit, with "+changes" where files differ; None outside a repository."""
    root = Path(__file__).resolve().parent
    try:
        git = lambda *args: subprocess.run(("git", *args), cwd=root, capture_output=True, text=True, check=True).stdout
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(was.keys() | now.keys()):
        a, b = was.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found
