"""metrics.jsonl, one JSON object per line, and its mirror on wandb."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from artifacts.files import write_text
from configs.schema import RunConfig
from model.errors import UserError

METRICS = "metrics.jsonl"


class Metrics:
    """Appends to metrics.jsonl and, if the config says so, to wandb, which never asks for a login."""

    def __init__(self, directory: Path, config: RunConfig):
        self._file = open(directory / METRICS, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._wandb = None
        if config.log.wandb:
            import wandb

            has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
            self._wandb = wandb.init(
                project=config.log.wandb_project,
                name=config.name,
                dir=directory,
                mode=None if has_key or "WANDB_MODE" in os.environ else "offline",
                config=config.model_dump(mode="json"),
            )

    def write(self, record: dict[str, Any]) -> None:
        """Append one line, without the keys whose value is None: they were not measured."""
        record = {key: value for key, value in record.items() if value is not None}
        self._file.write(json.dumps(record) + "\n")
        if self._wandb is not None:
            self._wandb.log(record, step=record["step"])

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl. UserError for a damaged one."""
    return _parse(path, path.read_text(encoding="utf-8", errors="replace").splitlines())


def truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last line that was cut short."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        write_text(
            path, "".join(x for x, record in zip(whole, _parse(path, whole), strict=True) if record["step"] <= step)
        )


def _parse(path: Path, lines: list[str]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        with suppress(ValueError):
            if isinstance(record := json.loads(line), dict) and "step" in record:
                records.append(record)
        if len(records) < number:
            raise UserError(f"{path}: line {number} is damaged: take it out")
    return records
