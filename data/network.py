"""Network access with timeouts, so that being offline is noticed immediately."""

import hashlib
from pathlib import Path

from data.atomic import write_atomically
from model.errors import UserError

TIMEOUT_S = 5


def reachable(url: str) -> bool:
    """Whether the server of a URL answers within TIMEOUT_S seconds."""
    import requests

    try:
        requests.head(url, timeout=TIMEOUT_S)
    except requests.RequestException:
        return False
    return True


def fetch(url: str, path: Path, *, sha256: str) -> Path:
    """Return path, downloading the file first if it is missing and checking its hash."""
    if path.exists():
        return path
    import requests

    advice = f"download it on a machine with a network and copy it to {path}, or use pydocs, which needs no network"
    try:
        answer = requests.get(url, timeout=TIMEOUT_S)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise UserError(f"{url} cannot be downloaded ({type(error).__name__}); {advice}") from None
    if hashlib.sha256(answer.content).hexdigest() != sha256:
        raise UserError(f"{url} sent {len(answer.content)} bytes that are not the expected text; {advice}")
    write_atomically(path, answer.content)
    return path
