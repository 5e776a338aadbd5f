"""The little that Sash asks of a network, with time limits, so that being offline is noticed at once."""

import hashlib
from pathlib import Path

from data.atomic import write_atomically
from model.errors import UserError

TIMEOUT_S = 5


def reachable(url: str) -> bool:
    """Say whether the server of a URL answers at all, within a few seconds."""
    import requests

    try:
        requests.head(url, timeout=TIMEOUT_S)
    except requests.RequestException:
        return False
    return True


def fetch(url: str, path: Path, *, sha256: str) -> Path:
    """Return path, downloading it first if it is missing; what arrives must have the given hash."""
    if path.exists():
        return path
    import requests

    advice = f"download it where there is a network and put it at {path}, or use pydocs, which needs none"
    try:
        answer = requests.get(url, timeout=TIMEOUT_S)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise UserError(f"{url} cannot be downloaded ({type(error).__name__}); {advice}") from None
    if hashlib.sha256(answer.content).hexdigest() != sha256:
        raise UserError(f"{url} sent {len(answer.content)} bytes that are not the expected text; {advice}")
    write_atomically(path, answer.content)
    return path
