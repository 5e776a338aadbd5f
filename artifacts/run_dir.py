"""The directory of a run: config.json, metrics.jsonl, summary.json, tokenizer.json, checkpoints/."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from torch import nn

from artifacts import checkpoint
from artifacts.background import Background
from artifacts.checkpoint import Checkpoint, OptimizerState
from artifacts.files import read_json, write_json
from artifacts.metrics import METRICS, read_lines, truncate
from artifacts.processes import SINGLE_PROCESS, Processes
from configs.load import build
from configs.schema import CheckpointKind, RunConfig
from data.tokenizer import Tokenizer
from model.errors import UserError
from model.gpt import GPT

MAY_CHANGE = (  # keys that a resumed run may change: they are not part of the experiment
    *("name", "out_dir", "data.dir", "device", "dtype", "compile", "log", "model.kernel"),
    *("train.max_steps", "train.patience", "train.micro_batch", "train.activation_checkpointing"),
    *("train.parallel", "train.checkpoint", "train.keep_checkpoints"),
)
LOCK = ".lock"


class RunDir:
    """The directory of one run. Creating the object writes nothing; `begin` does."""

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
            raise UserError(f"{path} is not a run: it has no config.json")
        return run

    def load(self, path: Path, which: str = "best") -> tuple[GPT, Tokenizer]:
        """The network in float32 and its tokenizer, from the checkpoint `path`; of the run's own path, from `which`."""
        model = GPT(self.config().model)
        checkpoint.load_model(model, self.chosen(path, which))
        return model, Tokenizer.load(self.path / "tokenizer.json")

    def chosen(self, path: Path, which: str = "best") -> Checkpoint:
        """The checkpoint `path`, verified; of the run's own path, the one called `which`."""
        return self.checkpoint(which) if path == self.path else checkpoint.read(path)

    def config(self) -> RunConfig:
        """The resolved config the run was made with."""
        return build(RunConfig, self.facts()["config"], source=lambda _: f"{self.path}/config.json: ")

    def facts(self) -> dict[str, Any]:
        """All of config.json: the config, and the versions, device, commit and data hash of the run."""
        file = self.path / "config.json"
        if not self.exists():
            raise UserError(f"{self.path} is not a run directory: it has no config.json")
        facts = read_json(file)
        if not isinstance(facts.get("config"), dict) or "data" not in facts:
            raise UserError(f"{file} is damaged: it does not say config and data")
        return facts

    def summary(self) -> dict[str, Any] | None:
        """Results of the finished run; None while it is unfinished."""
        file, advice = self.path / "summary.json", "remove it and repeat the training command"
        return read_json(file, advice=advice) if file.is_file() else None

    def check_same(self, config: RunConfig, data_hash: str) -> None:
        """UserError naming the first key that makes `config` another experiment than the one begun here.

        Keys that did not exist when the run was begun have their defaults.
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
    def locked(self, processes: Processes = SINGLE_PROCESS) -> Iterator[None]:
        """Keep all other processes from training this run. UserError, in every process, if it is locked already."""
        lock, taken = FileLock(self.path / LOCK, timeout=0), False
        new = [path for path in (self.path, *self.path.parents) if not path.exists()]
        if processes.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                taken = True
        if processes.all_reduce_max(taken):
            raise UserError(f"{self.path} is trained by another process now: wait, or give another --name")
        try:
            yield
        finally:
            if processes.is_main:
                self._leave(lock, new)

    def _leave(self, lock: BaseFileLock, new: list[Path]) -> None:
        """Release the lock; remove what was created for a run that never began."""
        begun = self.exists()
        with suppress(OSError):  # Windows keeps open files
            if not begun:
                (self.path / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for path in [] if begun else new:
                path.rmdir()

    def begin(self, config: RunConfig, facts: dict[str, Any]) -> None:
        """Write config.json, which makes the directory a run."""
        if self.path.exists() and not self.exists() and any(map(_is_foreign, self.path.iterdir())):
            raise UserError(f"{self.path} exists and is not a run: give another --name")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.path / "summary.json").unlink(missing_ok=True)
        write_json(self.path / "config.json", {"config": config.model_dump(mode="json"), **facts})

    def save(
        self,
        model: nn.Module,
        optimizers: OptimizerState,
        progress: dict[str, Any],
        *,
        best: bool,
        keep: int = 2,
        kind: CheckpointKind = "whole",
        processes: Processes = SINGLE_PROCESS,
        background: Background | None = None,
    ) -> None:
        """Save a checkpoint, point `latest` and perhaps `best` to it, and remove all but the best and the newest.

        `keep` is the number of newest checkpoints that stay. Every process must call it. A whole checkpoint is copied
        and written in the background, if one is given; shards are written at once. UserError if the disk lacks room,
        before anything is written.
        """
        if kind == "sharded":
            background = None
        if background is not None:
            background.wait()  # one copy in memory at a time
        content = checkpoint.content(model, optimizers, kind=kind, processes=processes, copy=background is not None)

        def write() -> None:
            saved = checkpoint.write(self.checkpoints, content, step=progress["step"], state={"progress": progress})
            if processes.is_main:
                self._point_and_prune(saved, best=best, keep=keep)

        if kind == "sharded" or processes.is_main:
            checkpoint.check_room(self.checkpoints, content.nbytes)
            write() if background is None else background.start(write)

    def _point_and_prune(self, saved: Path, *, best: bool, keep: int) -> None:
        if best:  # first: a run that resumes from the latest expects the best to be there
            checkpoint.point(self.checkpoints, "best", saved)
        checkpoint.point(self.checkpoints, "latest", saved)
        steps = checkpoint.list_steps(self.checkpoints)
        kept = {checkpoint.pointed(self.checkpoints, "best"), *steps[-keep:]}
        for path in steps:
            if path not in kept:
                checkpoint.remove(path)

    def resume_from(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest intact checkpoint, None before the first; `warn` is told of damaged newer ones.

        UserError if all of them are damaged.
        """
        try:
            return self.latest()
        except UserError as error:
            for path in reversed(checkpoint.list_steps(self.checkpoints)):
                with suppress(UserError):
                    older = checkpoint.read(path)
                    warn(f"note: {error}; {path}, which is whole, is taken instead")
                    return older
            advice = f"no other checkpoint is whole: remove {self.path} to begin again, or give another --name"
            raise UserError(f"{error}; {advice}") from None

    def discard_checkpoints_after(self, taken: Checkpoint) -> None:
        """Remove later checkpoints, damaged or not: they would count among the newest that are kept."""
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
        """Write summary.json, which marks the run as finished."""
        write_json(self.path / "summary.json", summary)

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after `step`, and a last line that was cut short."""
        truncate(self.path / METRICS, step)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl. UserError for a damaged one."""
        return read_lines(self.path / METRICS)


def _differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(was.keys() | now.keys()):
        a, b = was.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def _is_foreign(path: Path) -> bool:
    """True unless an interrupted start left this file."""
    unfinished = path.name.startswith("config.json.") and path.name.endswith(".tmp")
    return path.name not in ("checkpoints", LOCK) and not unfinished
