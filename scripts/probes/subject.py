"""What is evaluated: a checkpoint as it was trained, and the stream of tokens that it has to predict."""

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
    """A trained network on its device, and what it was trained with."""

    run: RunDir
    config: RunConfig
    step: int
    model: GPT
    tokenizer: Tokenizer
    runtime: Runtime

    def batch_rows(self, context: int) -> int:
        """Rows of one forward pass: as many tokens as training evaluates at a time."""
        return max(1, self.config.micro_rows * self.config.model.block_size // context)

    def tokens(self, text: str | None, max_tokens: int | None) -> TokenSource:
        """The run's validation split, or the first max_tokens targets (none: all) of another text."""
        if text is None:
            return _validation(self.run, self.config)
        return _head(text, self.tokenizer, max_tokens)

    @property
    def position_limit(self) -> int | None:
        """Where learned positions end; none: they are not learned, and do not."""
        return None if self.model.wpe is None else self.model.wpe.num_embeddings

    def check_context(self, context: int) -> None:
        """UserError where positions end before such a context does."""
        limit = self.position_limit
        if limit is not None and context > limit:
            raise UserError(
                f"a context of {context} tokens is more than the {limit} of the learned "
                "positions of this model (block_size): take a shorter one, or train with position = rope"
            )


def open_subject(path: Path, which: str, *, device: str | None, dtype: DType | None) -> Subject:
    """A run or a checkpoint of it, on the device, in the dtype and compiled as in training unless asked otherwise."""
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
    """The validation split that the run was trained beside. UserError if the text is another one by now."""
    data = config.data
    prepared = prepare(data.text, data.tokenizer, root=data.dir, progress=False)
    if prepared.digest != (trained_on := run.facts()["data"]):
        raise UserError(
            f"the text {data.text} is not the one of this run any more (hash {prepared.digest}, then {trained_on}): "
            "evaluate where it was trained, or give another text with --text"
        )
    return prepared.split("val")


def _head(text: str, tokenizer: Tokenizer, max_tokens: int | None) -> TokenSource:
    """A text's first max_tokens targets by this tokenizer: of its validation split where the source has one."""
    source = open_text(text)
    pieces = source.splits["val" if source.own_val else "train"]()

    def ids() -> Iterator[int]:
        for piece in pieces:
            yield from tokenizer.encode(piece.text)
            if piece.ends_document:
                yield tokenizer.eot

    found = islice(ids(), None if max_tokens is None else max_tokens + 1)
    return TokenArray(ids=np.fromiter(found, dtype=np.uint32), name=source.name)
