"""The subject of an evaluation: a checkpoint with its training settings, and the tokens to predict."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from artifacts.run_dir import RunDir
from configs.schema import RunConfig
from data.catalog import open_text
from data.loader import TokenArray, TokenSource
from data.prepare import prepare
from data.tokenizer import Tokenizer
from model import cost
from model.device import DType, Runtime, compile_blocks, resolve
from model.errors import UserError
from model.gpt import GPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A trained model on its device, with its config and tokenizer."""

    run: RunDir
    config: RunConfig
    step: int
    model: GPT
    tokenizer: Tokenizer
    runtime: Runtime

    def batch_rows(self, context: int) -> int:
        """Rows of one forward pass, so that it has as many tokens as one of training's evaluations."""
        return max(1, self.config.micro_rows * self.config.model.block_size // context)

    def tokens(self, text: str | None, max_tokens: int | None) -> TokenSource:
        """The run's validation split, or the first max_tokens targets (None: all) of another text."""
        if text is None:
            return _validation(self.run, self.config)
        return _head(text, self.tokenizer, max_tokens)

    @property
    def position_limit(self) -> int | None:
        """Number of learned positions; None if positions are not learned, hence unlimited."""
        return None if self.model.wpe is None else self.model.wpe.num_embeddings

    def check_context(self, context: int) -> None:
        """UserError if a context is longer than the learned positions."""
        limit = self.position_limit
        if limit is not None and context > limit:
            raise UserError(
                f"a context of {context} tokens is longer than the {limit} learned positions of this model "
                "(block_size): use a shorter one, or train with position = rope"
            )


def open_subject(path: Path, which: str, *, device: str | None, dtype: DType | None) -> Subject:
    """Open a run or one of its checkpoints, by default with training's device, dtype and compile setting."""
    run = RunDir.of(path)
    config, checkpoint = run.config(), run.chosen(path, which)
    flops = cost.train_flops(config.model, config.model.block_size) * config.global_rows * config.train.max_steps
    runtime = resolve(device or config.device, dtype or config.dtype, config.compile, flops=flops)
    model, tokenizer = run.load(checkpoint.path)
    model = model.to(runtime.device).eval()
    if runtime.compile:
        compile_blocks(model)
    return Subject(run=run, config=config, step=checkpoint.step, model=model, tokenizer=tokenizer, runtime=runtime)


def _validation(run: RunDir, config: RunConfig) -> TokenSource:
    """The run's own validation split. UserError if the text has changed since training."""
    data = config.data
    prepared = prepare(data.text, data.tokenizer, root=data.dir, progress=False)
    if prepared.digest != (trained_on := run.facts()["data"]):
        raise UserError(
            f"the text {data.text} has changed since this run was trained (hash {prepared.digest}, was {trained_on}): "
            "evaluate where it was trained, or give a text with --text"
        )
    return prepared.split("val")


def _head(text: str, tokenizer: Tokenizer, max_tokens: int | None) -> TokenSource:
    """The first max_tokens targets of a text, from its validation split if the source has one."""
    source = open_text(text)
    pieces = source.splits["val" if source.own_val else "train"]()

    def ids() -> Iterator[int]:
        for piece in pieces:
            yield from tokenizer.encode(piece.text)
            if piece.ends_document:
                yield tokenizer.eot

    found = islice(ids(), None if max_tokens is None else max_tokens + 1)
    return TokenArray(ids=np.fromiter(found, dtype=np.uint32), name=source.name)
