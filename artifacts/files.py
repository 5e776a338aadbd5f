"""Text and JSON files, written atomically and read with errors a user can act on."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.atomic import write_atomically
from model.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Replace the file in one step; after a failure the old one is still there."""
    write_atomically(path, text.encode("utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file in one step, indented for people."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path, *, keys: Iterable[str] = (), advice: str = "") -> dict[str, Any]:
    """The object in a JSON file. UserError, with the advice, if it holds anything else or lacks one of the keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"it has no {', '.join(missing)}")
        return content
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})" + (f": {advice}" if advice else "")) from None
