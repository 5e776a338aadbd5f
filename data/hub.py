"""Texts loaded with Hugging Face `datasets`: parquet or plain text, never a dataset script."""

import errno
import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from data.network import reachable
from data.text import Piece, Text
from model.errors import UserError

_TITLE = re.compile(r" = [^=].* = ")  # the heading of a wikitext article; section headings start with " = = "


@dataclass(frozen=True, kw_only=True, slots=True)
class HubText:
    """The arguments with which `datasets` loads a text."""

    name: str
    origin: str
    builder: str  # a repository on the hub, or "parquet" or "text" for local files
    config: str | None = None
    data_files: Mapping[str, str] | None = None  # for "parquet" and "text": split -> path
    splits: Mapping[str, str]  # "train" or "val" -> the name of the split in the source
    held_out: int = 0  # number of documents at the start of the training split that serve as validation split
    streaming: bool = False  # read over the network without storing a local copy
    articles: bool = False  # rows are lines: join them into articles at the headings
    approx_bytes: Mapping[str, int]


def open_hub(source: HubText) -> Text:
    """Describe the text; nothing is loaded yet."""
    splits = {name: lambda name=name: (Piece(text) for text in documents(source, name)) for name in source.splits}
    return Text(
        name=source.name,
        origin=source.origin,
        identity=repr(source),
        splits=splits,
        approx_bytes=source.approx_bytes,
    )


def documents(source: HubText, split: str) -> Iterator[str]:
    """Yield the documents of "train" or "val"."""
    texts = _rows(source, source.splits[split])
    if source.articles:
        texts = _articles(texts)
    if source.held_out:
        texts = itertools.islice(texts, *((source.held_out,) if split == "val" else (source.held_out, None)))
    yield from (text for text in texts if text)


def _rows(source: HubText, split: str) -> Iterator[str]:
    """Yield the `text` column; any network failure becomes a one-line error with advice."""
    import datasets

    on_hub = "/" in source.builder
    try:
        with _offline_when_unreachable(on_hub):
            dataset = datasets.load_dataset(
                source.builder, source.config, data_files=source.data_files, split=split, streaming=source.streaming
            )
        columns = dataset.column_names
        if columns and "text" not in columns:
            raise UserError(f"{source.name}: no column 'text', it has columns {', '.join(map(repr, columns))}")
        for row in dataset.select_columns(["text"]):
            yield row["text"]
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if not on_hub or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            raise
        why = str(error).partition("\n")[0]
        cached = "it is always read over the network" if source.streaming else "it is not in the cache of `datasets`"
        raise UserError(
            f"{source.name}: {why}, and {cached}; run the same command on a machine with a network "
            "(the prepared folder can be copied), or use pydocs, which needs no network"
        ) from None


@contextmanager
def _offline_when_unreachable(on_hub: bool) -> Iterator[None]:
    """Make `datasets` use its cache immediately if the hub is unreachable; by default it retries for half a minute."""
    import datasets
    from huggingface_hub import constants

    if not on_hub or constants.HF_HUB_OFFLINE or reachable(constants.ENDPOINT):
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before, False


def _articles(lines: Iterator[str]) -> Iterator[str]:
    """Join lines into articles; an article begins with a line ` = Title = ` after an empty line."""
    article: list[str] = []
    for line in lines:
        line = line.rstrip("\n")
        if _TITLE.fullmatch(line) and not (article and article[-1].strip()):
            yield _joined(article)
            article = []
        article.append(line)
    yield _joined(article)


def _joined(article: list[str]) -> str:
    text = "\n".join(article).strip("\n")
    return f"{text}\n" if text.strip() else ""
