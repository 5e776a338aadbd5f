"""What a run leaves behind: config.json, metrics.jsonl, summary.json, tokenizer.json, checkpoints/."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from configs.load import build
from configs.schema import RunConfig
from data.tokenizer import Tokenizer
from model import checkpoint
from model.checkpoint import Checkpoint
from model.device import Runtime
from model.errors import UserError
from model.gpt import GPT
from model.optim import Optimizers

MAY_CHANGE = (  # on resume: none of them is part of the experiment
    *("name", "out_dir", "data.dir", "device", "dtype", "compile", "log", "model.kernel"),
    *("train.max_steps", "train.micro_batch", "train.recompute"),
)
KEEP = 2  # newest checkpoints, beside the best


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
        return build(RunConfig, self._read("config.json")["config"], source=lambda _: f"{self.path}/config.json: ")

    def facts(self) -> dict[str, Any]:
        """config.json whole: the config, and the versions, device, commit and data it ran with."""
        return self._read("config.json")

    def summary(self) -> dict[str, Any] | None:
        """What the finished run came to; None while it is unfinished."""
        return self._read("summary.json") if (self.path / "summary.json").is_file() else None

    def check_same(self, config: RunConfig, data_hash: str) -> None:
        """UserError that names the first key in which `config` is another experiment than the one begun here."""
        old = self._read("config.json")
        for key, was, now in _differences(old["config"], config.model_dump(mode="json")):
            if not any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE):
                raise UserError(
                    f"{self.path} was begun with {key} = {was!r}, now it is {now!r}: give another --name, "
                    f"or remove the directory to begin again"
                )
        if old["data"] != data_hash:
            raise UserError(
                f"{self.path} was begun on other data (hash {old['data']}, now {data_hash}): "
                f"give another --name, or remove the directory to begin again"
            )

    def begin(self, config: RunConfig, facts: dict[str, Any]) -> None:
        """Write config.json; from here on the directory is a run."""
        own = {"checkpoints", "config.json.tmp"}  # what a start that was cut short leaves
        if self.path.exists() and not self.exists() and not own.issuperset(x.name for x in self.path.iterdir()):
            raise UserError(f"{self.path} exists and is no run: give another --name")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.path / "summary.json").unlink(missing_ok=True)
        checkpoint.write_json(self.path / "config.json", {"config": config.model_dump(mode="json"), **facts})

    def save(self, model: nn.Module, optimizers: Optimizers, progress: dict[str, Any], *, best: bool) -> None:
        """A checkpoint that `latest`, and if it is the best so far `best`, points to; old ones go."""
        saved = checkpoint.save(
            self.checkpoints, step=progress["step"], model=model, optimizers=optimizers, state={"progress": progress}
        )
        checkpoint.point(self.checkpoints, "latest", saved)
        if best:
            checkpoint.point(self.checkpoints, "best", saved)
        steps = checkpoint.list_steps(self.checkpoints)
        keep = {checkpoint.pointed(self.checkpoints, "best"), *steps[-KEEP:]}
        for path in steps:
            if path not in keep:
                checkpoint.remove(path)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, verified; None before the first."""
        return self.checkpoint("latest") if checkpoint.pointed(self.checkpoints, "latest") else None

    def checkpoint(self, which: str = "best") -> Checkpoint:
        """The best or the latest checkpoint, verified. UserError if there is none."""
        path = checkpoint.pointed(self.checkpoints, which)
        if path is None:
            raise UserError(f"{self.path} has no {which} checkpoint yet: train it first")
        return checkpoint.read(path)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json: the run is finished."""
        checkpoint.write_json(self.path / "summary.json", summary)

    def cut_metrics(self, step: int) -> None:
        """Drop the lines that came after `step`, and a last one that was never finished."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
            checkpoint.write_text(path, kept)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text())
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}")
            return content
        except FileNotFoundError:
            raise UserError(f"{self.path} is no run directory: it has no {name}") from None
        except ValueError as error:
            raise UserError(f"{self.path / name} is damaged: {error}") from None


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
