"""A running generation: turns sampled tokens into text deltas, step by step and row by row."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from inference.detokenizer import Finish, StreamingDetokenizer
from inference.loading import LoadedModel
from inference.params import SamplingParams
from inference.sampling import LogProbs
from inference.statistics import GenerationStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The output of one step for one text."""

    row: int  # prompt * num_samples + sample
    text: str = ""  # safe to show: whole characters, and nothing that may still become a stop string
    token: int | None = None  # None if the text ends without another token, as with `length`
    logprob: float | None = None  # of the token under the model itself, before temperature and filters
    finish: Finish | None = None  # why the text ends with this delta
    stop: str | None = None  # the stop string that ended it; never part of the text


class Generation:
    """An iterator over the deltas of all rows; each step is computed lazily, when the previous deltas are consumed.

    A row has one delta per token; its last delta, which may have no token, sets `finish`. The generation is over when
    every row has finished or when it is closed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        stream: Generator[Tensor, None, None],
        sampling: SamplingParams,
        statistics: GenerationStatistics,
        *,
        lengths: Sequence[int],
        past: int = 0,
        room: int | None = None,
        logprobs: LogProbs | None = None,
    ):
        """`stream` yields (rows,) sampled tokens after prompts of these lengths, which follow `past` cached tokens.

        `room` is the number of tokens that still fit, if something other than max_new_tokens limits it; `logprobs` is
        the watcher of the stream, if log-probabilities are requested.
        """
        self._loaded, self._stream, self._sampling = loaded, stream, sampling
        self._lengths, self._past, self._room, self._logprobs = lengths, past, room, logprobs
        self._cancelled = False
        self._deltas = self._run()
        self.statistics = statistics
        self.n_rows = len(lengths) * sampling.num_samples
        self.n_steps = 0  # tokens sampled for each row so far
        self.last_token: int | None = None  # the newest token of the first row
        self.state: Literal["new", "running", "over"] = "new"

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def cancel(self) -> None:
        """End every text after the token being computed, with finish reason `interrupted`. From any thread."""
        self._cancelled = True

    def close(self) -> None:
        """Stop at once and give up the rest; the deltas yielded so far stay valid."""
        self._deltas.close()
        self.state = "over"

    @property
    def out_of_room(self) -> bool:
        """Whether the generation used all of `room` and stopped before max_new_tokens."""
        return self._room is not None and self.n_steps == self._room < self._sampling.max_new_tokens

    def _run(self) -> Generator[Delta, None, None]:
        self.state = "running"
        loaded, sampling = self._loaded, self._sampling
        rows = [
            StreamingDetokenizer(loaded.tokenizer, stop=sampling.stop, stop_at_end=sampling.stop_at_end)
            for _ in range(self.n_rows)
        ]
        live = list(range(self.n_rows))
        most = min(sampling.max_new_tokens, sampling.max_new_tokens if self._room is None else self._room)
        self.statistics.begin(self._lengths, past=self._past)
        try:
            with closing(self._stream) as stream:
                while live and not self._cancelled and self.n_steps < most:
                    with loaded.lock:
                        tokens, logprobs = self._read(next(stream))
                    self.statistics.count(len(live))
                    self.n_steps, self.last_token = self.n_steps + 1, tokens[0]
                    for row in live:
                        text = rows[row].add(tokens[row])
                        yield _delta(row, rows[row], text, tokens[row], None if logprobs is None else logprobs[row])
                    live = [row for row in live if rows[row].finish is None]
            for row in live:
                text = rows[row].end("interrupted" if self._cancelled else "length")
                yield _delta(row, rows[row], text)
        finally:
            self.state = "over"
            self.statistics.end()

    def _read(self, tokens: Tensor) -> tuple[list[int], list[float] | None]:
        """One step's tokens, and their log-probabilities on request, in one copy from the device."""
        if self._logprobs is None:
            return tokens.tolist(), None
        ids, logprobs = torch.stack((tokens.float(), self._logprobs.last)).tolist()
        return [int(i) for i in ids], logprobs


def _delta(
    row: int, spelled: StreamingDetokenizer, text: str, token: int | None = None, logprob: float | None = None
) -> Delta:
    return Delta(row=row, text=text, token=token, logprob=logprob, finish=spelled.finish, stop=spelled.stop_string)
