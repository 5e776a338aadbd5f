"""The table of mixers: a word of the pattern and the module that it builds. docs/add-a-mixer.md adds one.

A mixer is a module with `spec_from(config, kind, nth)`, which says all its numbers in a frozen record; `Mixer(spec)`;
`forward(x, step, cache=None)`, (B, T, C) -> (B, T, C); and `new_cache(batch_size, max_length, device, dtype, rolling)`,
its own state object (`model.cache.LayerState`). The record counts: `model.mixers.base.MixerSpec`.
"""

from model.mixers.attention import Attention
from model.mixers.linear import LinearAttention
from model.mixers.multi_window import MultiWindowAttention

MIXERS: dict[str, type[Attention | MultiWindowAttention | LinearAttention]] = {
    **dict.fromkeys(("full", "swa", "strided", "fixed", "star"), Attention),
    "mswa": MultiWindowAttention,
    "linear": LinearAttention,
}
