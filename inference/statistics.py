"""Statistics of a generation: speed of prefill and decode, bytes read, memory used."""

import time
from collections.abc import Sequence

from model.cache import Cache
from model.cost import read_bytes, step_bytes
from model.device import Runtime
from model.gpt import GPT
from model.memory import device_peak

WARM_UP = 2  # steps: the first decoding step may still run uncompiled, if the prompt was a single token


class GenerationStatistics:
    """Sums over one or several turns; a turn is timed from `begin` to the last `count`."""

    def __init__(self, model: GPT, cache: Cache | None, runtime: Runtime, *, n_samples: int = 1, rolling: bool = True):
        """`cache` is the cache of the prompt, before it is copied for each sample."""
        self._config, self._runtime, self._n_samples, self._rolling = model.config, runtime, n_samples, rolling
        self._model, self._warms_up = model, model.compiled_decode is not None and cache is not None
        self._cache_dtype = None if cache is None else cache.dtype
        self.cache_bytes: dict[str, int] = {}  # by kind of layer
        for spec, layer in zip(
            model.config.applied_layers, [] if cache is None else cache.layers, strict=cache is not None
        ):
            self.cache_bytes[spec.kind] = self.cache_bytes.get(spec.kind, 0) + layer.nbytes * n_samples
        self.n_prefilled = self.n_decoded = 0  # tokens of all rows
        self.prefill_s = self.decode_s = self.first_s = 0.0  # first_s: until the first token of the first turn
        self.warm_up_s: float | None = None  # the first decoding steps, where they compile
        self.bytes_read = 0  # lower bound for decoding: weights once per step, keys and values once per row
        self._starts: list[int] = []

    def begin(self, lengths: Sequence[int], past: int = 0) -> None:
        """Start timing a turn with prompts of these lengths, after `past` cached tokens."""
        self._starts, self._steps, self._n_prompt = [past + n for n in lengths], 0, sum(lengths)
        self._clock = time.perf_counter()

    def count(self, n_live: int) -> None:
        """Record a step, which produced tokens for n_live rows that have not ended."""
        now = time.perf_counter()
        if self._steps == 0:
            self.n_prefilled += self._n_prompt
            self.prefill_s += now - self._clock
            self.first_s = self.first_s or now - self._clock
        elif self._warms_up and self._steps <= WARM_UP:
            self.warm_up_s = (self.warm_up_s or 0.0) + now - self._clock
        else:
            self.n_decoded += n_live
            self.decode_s += now - self._clock
        self._steps += 1
        self._clock = now

    def end(self) -> None:
        """End the turn, and add the bytes read by its steps."""
        skipped = WARM_UP if self._warms_up else 0
        n = self._steps - 1 - skipped  # the first token comes from the prefill
        self._warms_up &= self._steps <= skipped
        if n < 1 or self._cache_dtype is None:
            return
        starts = [t + skipped for t in self._starts]
        kv = [read_bytes(self._config, t, t + n, self._cache_dtype, rolling=self._rolling) for t in starts]
        self.bytes_read += n * step_bytes(self._model) + self._n_samples * sum(kv)

    def lines(self) -> list[str]:
        """The statistics as lines of text; values that were not measured are left out."""
        out = []
        if self.prefill_s:
            rate = self.n_prefilled / self.prefill_s
            first = f"first token after {self.first_s * 1e3:.0f} ms"
            out.append(f"prefill {self.n_prefilled} tokens at {rate:.0f} tokens/s, {first}")
        if self.warm_up_s is not None:
            out.append(f"warm-up {self.warm_up_s:.1f} s: compiled, {WARM_UP} tokens")
        if self.n_decoded:
            read = f", {self.bytes_read / self.decode_s / 1e9:.2f} GB/s of weights and cache" if self.bytes_read else ""
            out.append(f"decode {self.n_decoded} tokens at {self.n_decoded / self.decode_s:.1f} tokens/s{read}")
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in self.cache_bytes.items())
        total = sum(self.cache_bytes.values())
        out.append(f"cache {total:,} bytes: {kinds}" if self.cache_bytes else "no cache")
        method, peak = device_peak(self._runtime.device)
        out.append(f"peak memory {peak / 2**20:.0f} MiB ({method})" if peak else f"peak memory {method}")
        return out
