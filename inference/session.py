"""The generation API: batches of prompts, and conversations. Nothing here prints.

    loaded = load(Path("runs/shakespeare"))
    for delta in complete(loaded, [loaded.encode("To be")], SamplingParams(max_new_tokens=50)):
        print(delta.text, end="")

    session = Session(loaded, SamplingParams(), CacheParams())
    for line in ("To be", ", or not"):
        answer = "".join(delta.text for delta in session.turn(line))

Weights are loaded once and never modified, so any number of batches and sessions can share them, also across threads.
"""

from collections.abc import Sequence

import torch

from inference.generation import Generation
from inference.loading import LoadedModel
from inference.params import CacheParams, SamplingParams
from inference.sampling import LogProbs, Sampler, pad_right, stream
from inference.statistics import GenerationStatistics
from model.cache import Cache
from model.errors import UserError


def complete(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | None = None,
    cache_params: CacheParams | None = None,
    *,
    logprobs: bool = False,
) -> Generation:
    """Generate all samples of all prompts in one batch: row p * num_samples + s is sample s of prompt p.

    UserError if the texts may become longer than the learned positions of the model.
    """
    sampling, cache_params = sampling or SamplingParams(), cache_params or CacheParams()
    idx, lengths = pad_right(prompts, loaded.runtime.device)
    P, n_new, limit = idx.shape[1], sampling.max_new_tokens, loaded.position_limit
    if limit is not None and P + n_new - 1 > limit:  # the last token is never read
        advice = f"max_new_tokens may be {limit + 1 - P}" if limit >= P else "shorten the prompt"
        raise UserError(
            f"{P} tokens of prompt and {n_new} new ones are more than the {limit} learned positions of this model "
            f"(block_size): {advice}, or train with position = rope"
        )
    cache = loaded.new_cache(len(prompts), P + n_new, cache_params)
    watch = LogProbs(loaded.tokenizer.n_vocab) if logprobs else None
    return Generation(  # only the stream holds the cache: with several samples it makes copies and frees the original
        loaded,
        stream(
            loaded.model,
            cache,
            idx,
            Sampler(sampling, n_vocab=loaded.tokenizer.n_vocab),
            lengths=lengths,
            n_samples=sampling.num_samples,
            chunk=cache_params.chunk,
            watch=watch,
        ),
        sampling,
        _statistics(loaded, cache, cache_params, n_samples=sampling.num_samples),
        lengths=[len(prompt) for prompt in prompts],
        logprobs=watch,
    )


class Session:
    """A conversation: one text that user and model extend in turns. Keeps the cache, so no token is recomputed."""

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: SamplingParams | None = None,
        cache_params: CacheParams | None = None,
        *,
        prompt: Sequence[int] = (),
    ):
        """`prompt` precedes the first turn. The parameters apply to all turns; num_samples must be 1."""
        self._loaded, self._params = loaded, cache_params or CacheParams()
        self._sampling = sampling or SamplingParams()
        cache = loaded.new_cache(1, self._params.max_length, self._params)
        if cache is None:
            raise UserError("cache (none) keeps nothing from turn to turn: take rolling or full")
        if self._sampling.num_samples != 1:
            raise UserError(f"num_samples ({self._sampling.num_samples}) must be 1 in a conversation")
        self._cache = cache
        self._sampler = Sampler(self._sampling, n_vocab=loaded.tokenizer.n_vocab)
        self._seen = self._sampler.new_seen(1, loaded.model.config.vocab, loaded.runtime.device)
        self._unread = list(prompt)  # tokens of the text that are not in the cache yet
        self._last: Generation | None = None
        self.statistics = _statistics(loaded, cache, self._params)
        self.limit, self.limited_by = self._limit()

    def _limit(self) -> tuple[int | None, str]:
        """The most tokens that the text may have (None if all layers slide), and the reason, for messages."""
        room, positions = self._cache.max_length, self._loaded.position_limit
        if positions is not None and (room is None or positions < room):
            return positions, f"the learned positions end at {positions} (block_size)"
        return room, f"full layers have room for {self._params.max_length} tokens (max_length)"

    def turn(self, text: str, *, logprobs: bool = False) -> Generation:
        """Append text, which may be empty, and generate the continuation.

        UserError, without changing the session, if the tokenizer cannot encode the text or it does not fit. The
        previous turn must be over: iterated to its end, cancelled and iterated to its end, or closed.
        """
        unread = self._unread_now()
        ids = [*unread, *self._loaded.tokenizer.encode(text)] or [self._loaded.tokenizer.eot]
        past = self._cache.length
        room = None if self.limit is None else self.limit + 1 - past - len(ids)  # the last token is never read
        if room is not None and room < 1:
            raise UserError(f"{self.limited_by}: {past} are used, {len(ids)} more do not fit")
        watch = LogProbs(self._loaded.tokenizer.n_vocab) if logprobs else None
        idx = torch.tensor([ids], device=self._loaded.runtime.device)
        tokens = stream(
            *(self._loaded.model, self._cache, idx, self._sampler),
            chunk=self._params.chunk,
            seen=self._seen,
            watch=watch,
        )
        self._unread = unread
        self._last = Generation(
            *(self._loaded, tokens, self._sampling, self.statistics),
            lengths=[len(ids)],
            past=past,
            room=room,
            logprobs=watch,
        )
        return self._last

    def _unread_now(self) -> list[int]:
        """Tokens of the text that are not in the cache yet: the last one of the previous turn."""
        last = self._last
        if last is None or last.state == "new":  # a turn that was never started added nothing
            return self._unread
        if last.state == "running":
            raise UserError("the turn before is not over: read it to its end, or close it")
        if last.last_token is None:
            raise UserError("the turn before failed while its text was read: begin a new session")
        return [last.last_token]


def _statistics(
    loaded: LoadedModel, cache: Cache | None, params: CacheParams, *, n_samples: int = 1
) -> GenerationStatistics:
    return GenerationStatistics(
        loaded.model, cache, loaded.runtime, n_samples=n_samples, rolling=params.cache == "rolling"
    )
