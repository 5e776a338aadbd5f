"""The named texts, and `open_text`, which opens any text by name or path."""

import difflib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data import pydocs, recall
from data.files import SUFFIXES, open_files, read_file
from data.hub import HubText, open_hub
from data.network import fetch
from data.text import Piece, Text
from model.errors import UserError

CACHE = Path(__file__).parent / "cache"

# Fetched directly: `datasets` needs aiohttp for https URLs but does not install it.
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

HUB_TEXTS = (
    HubText(
        name="wikitext103",
        origin="huggingface.co/datasets/Salesforce/wikitext, wikitext-103-raw-v1 (CC BY-SA 3.0)",
        builder="Salesforce/wikitext",
        config="wikitext-103-raw-v1",
        splits={"train": "train", "val": "validation"},
        articles=True,
        approx_bytes={"train": 541_000_000, "val": 1_150_000},
    ),
    HubText(
        name="tinystories",
        origin="huggingface.co/datasets/roneneldan/TinyStories (CDLA-Sharing-1.0)",
        builder="roneneldan/TinyStories",
        splits={"train": "train", "val": "validation"},
        approx_bytes={"train": 1_900_000_000, "val": 19_200_000},
    ),
    HubText(
        name="fineweb-edu",
        origin="huggingface.co/datasets/HuggingFaceFW/fineweb-edu, sample-10BT (ODC-By 1.0)",
        builder="HuggingFaceFW/fineweb-edu",
        config="sample-10BT",
        splits={"train": "train", "val": "train"},
        held_out=2000,
        streaming=True,
        approx_bytes={"train": 46_000_000_000, "val": 10_000_000},
    ),
)

NAMES = ("pydocs", "shakespeare", "recall", *(source.name for source in HUB_TEXTS))


def open_text(text: str) -> Text:
    """Open a named text, or the file or folder at a path; nothing is read until a split is called."""
    if text == "pydocs":
        return _pydocs()
    if text == "shakespeare":
        return _shakespeare()
    if text == "recall":
        return _recall()
    for source in HUB_TEXTS:
        if source.name == text:
            return open_hub(source)
    path = Path(text).expanduser()
    if path.exists():
        return open_files(path)
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"{text}: no such file or folder; give a {', '.join(SUFFIXES)} file or a folder of such files")
    near = difflib.get_close_matches(text, NAMES, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else "choose one of them"
    raise UserError(f"text {text!r} must be one of {', '.join(NAMES)}, or a file or folder; {advice}")


def _pydocs() -> Text:
    return Text(
        name="pydocs",
        origin="the reference manual and docstrings of this Python installation (PSF licence)",
        identity=pydocs.identity(),
        splits={"train": lambda: (Piece(text) for text in pydocs.documents())},
    )


def _shakespeare() -> Text:
    def pieces() -> Iterator[Piece]:
        return read_file(fetch(SHAKESPEARE_URL, CACHE / "shakespeare.txt", sha256=SHAKESPEARE_SHA256))

    return Text(
        name="shakespeare",
        origin=f"{SHAKESPEARE_URL} (public domain)",
        identity=SHAKESPEARE_SHA256,
        splits={"train": pieces},
        approx_bytes={"train": 1_115_394},
    )


def _recall() -> Text:
    def pieces(split: str) -> Iterator[Piece]:
        return map(Piece, islice(recall.documents(split), recall.DOCUMENTS[split]))

    return Text(
        name="recall",
        origin="generated, see data/recall.py",
        identity=f"1 {recall.DOCUMENTS}",  # raise the first number whenever the generated text changes
        splits={"train": lambda: pieces("train"), "val": lambda: pieces("val")},
        approx_bytes={split: n * recall.LENGTH for split, n in recall.DOCUMENTS.items()},
    )
