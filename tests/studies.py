"""Studies of tiny runs: what writes their files, and what runs their cells without processes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RUN

from scripts.ablate import __main__ as lab
from scripts.ablate import cell as process
from scripts.ablate import runner
from scripts.ablate.study import cells, load_study

MEASURE = ["scripts.measure", "--new-tokens", "3", "--rounds", "1", "--device", "cpu"]


def toml(values: dict) -> str:
    """Nested dictionaries as a line of TOML each: JSON's values are TOML's, but for tables."""
    return "".join(f"{key} = {inline(value)}\n" for key, value in values.items())


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {inline(x)}" for key, x in value.items()) + " }"
    return json.dumps(value)


@pytest.fixture
def write_study(tmp_path, text) -> Callable[..., Path]:
    """Write a study of tiny runs, wide and narrow with seeds 1 and 2; changes replace what it says."""

    def write(name: str = "small", **changes) -> Path:
        run = {key: RUN[key] for key in ("device", "dtype", "compile", "model")}
        run["data"] = RUN["data"] | {"text": str(text), "dir": str(text.parent / "prepared")}
        run["train"] = RUN["train"] | changes.pop("train", {})
        content = {
            "question": "Is it small?",
            "baseline": "wide",
            "seeds": [1, 2],
            "overrides": run,
            "variants": {"wide": {"model": {"window": 9}}, "narrow": {"model": {"window": 3}}},
            "measure": [],
        } | changes
        file = tmp_path / f"{name}.toml"
        file.write_text(toml({key: x for key, x in content.items() if x is not None}), encoding="utf-8")
        return file

    return write


class InThisProcess:
    """A cell's process that is none: does its job as soon as it is told."""

    jobs: list[str]  # of all, as "variant's directory: job"

    def __init__(self, words, environment):
        self.stdin, self.words, self.returncode = self, words.name, None

    def write(self, line: bytes) -> None:
        self.job = json.loads(line)

    def flush(self) -> None:
        name = Path(self.job["run"]).name.rsplit("-", 1)[0]
        self.jobs.append(f"{name} {self.job.get('command', ['training'])[0]}")
        try:
            process.do(self.job)
        except SystemExit as end:
            self.returncode = end.code if isinstance(end.code, int) else 1
            Path(self.words).write_text(f"{end.code}\n")
        except Exception as error:
            Path(self.words).write_text(f"Traceback\n{error!r}\n")
            self.returncode = 1
        else:
            self.returncode = 0

    def close(self) -> None: ...

    def poll(self) -> int | None:
        return self.returncode


@pytest.fixture
def in_this_process(monkeypatch, unmeasured_speed) -> list[str]:
    """Cells without processes of their own, and reports without plots; the jobs that were begun."""
    jobs: list[str] = []
    monkeypatch.setattr(InThisProcess, "jobs", jobs, raising=False)
    monkeypatch.setattr(runner, "cell_process", InThisProcess)
    monkeypatch.setattr(runner, "POLL_S", 0.001)
    monkeypatch.setattr("scripts.report.write.draw", lambda collected, out: {})
    monkeypatch.setattr(sys, "argv", sys.argv)  # which measuring changes
    return jobs


def ablate(file: Path, **options) -> int:
    return lab.ablate(lab.Options(study=file, out=file.with_suffix(""), **options))


def results(file: Path) -> bytes:
    return (file.with_suffix("") / "results.csv").read_bytes()


def cells_of(file: Path):
    return cells(load_study(file), file, file.with_suffix(""))
