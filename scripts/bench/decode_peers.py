"""Other implementations of decoding, to compare with: transformers, and a cache grown by torch.cat.

Dimensions: B batch, K KV heads, S keys in the cache, T incoming tokens, D head_dim.
"""

from typing import Any

import torch
from torch import Tensor

from model.cache import Cache, KVCache
from model.config import ModelConfig
from model.context import ForwardContext
from model.device import Runtime
from model.gpt import GPT
from model.state import LayerState
from scripts.bench.peers import transformers_twin
from scripts.convert.families import attention_of


class Grown(KVCache):
    """KV cache of one layer as in simple programs: a new tensor for every token, cut to the window."""

    def __init__(self, k: Tensor, v: Tensor, window: int | None):
        super().__init__(k, v, max_length=None)
        self.window = window

    def update(self, k: Tensor, v: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        self.k, self.v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        if self.window is not None:
            self.k, self.v = self.k[:, :, -self.window :], self.v[:, :, -self.window :]
        end = ctx.past_bound + ctx.pos.shape[1]
        return self.k, self.v, torch.arange(end - self.k.shape[2], end, device=k.device)[None]


class Concatenated:
    """The uncompiled Sash model with `Grown` caches of random keys."""

    def __init__(self, batch_size: int, new_tokens: int, config: ModelConfig, runtime: Runtime, length: int):
        self.config, self.runtime, self.length = config, runtime, length
        torch.manual_seed(0)
        self.model, self.B = GPT(config).to(runtime.device, runtime.dtype).eval(), batch_size

    def prepare(self) -> None:
        layers: list[LayerState] = []
        for i in range(self.config.n_layer):
            spec, past = attention_of(self.config, i), self.length - 1
            kept = past if spec.window is None else min(past, spec.window)
            shape = (self.B, spec.n_kv_head, kept, spec.head_dim)
            k, v = (torch.randn(shape, device=self.runtime.device, dtype=self.runtime.dtype) for _ in "kv")
            layers.append(Grown(k, v, spec.window))
        self.cache = Cache(layers, self.B, self.runtime.device, self.runtime.dtype)
        self.cache.pos.fill_(past)
        self.cache.length = past

    def __call__(self, n: int) -> None:
        token = torch.zeros(self.B, 1, dtype=torch.long, device=self.runtime.device)
        for _ in range(n):
            token = self.model(token, cache=self.cache)[:, -1].argmax(dim=-1, keepdim=True)

    @property
    def cache_bytes(self) -> int:
        return self.cache.nbytes

    def held(self) -> list[Tensor]:
        return [x for layer in self.cache.layers for x in layer.tensors()]


class Transformers:
    """The transformers model with the same config, its caches filled with random keys."""

    def __init__(
        self, batch_size: int, new_tokens: int, config: ModelConfig, runtime: Runtime, length: int, *, static: bool
    ):
        torch.manual_seed(0)
        self.model = transformers_twin(config, use_cache=True).to(runtime.device, runtime.dtype).eval()
        self.config, self.runtime, self.length, self.static = config, runtime, length, static
        self.n, self.B = new_tokens, batch_size
        self.forward = torch.compile(self.model.forward) if static else self.model.forward

    def prepare(self) -> None:
        import transformers

        past = self.length - 1
        if self.static:
            kind = {"max_cache_len": self.length + self.n}
            self.cache: Any = transformers.StaticCache(config=self.model.config, **kind)
        else:
            self.cache = transformers.DynamicCache(config=self.model.config)
        for i in range(self.config.n_layer):
            spec = attention_of(self.config, i)
            shape = (self.B, spec.n_kv_head, past, spec.head_dim)
            k, v = (torch.randn(shape, device=self.runtime.device, dtype=self.runtime.dtype) for _ in "kv")
            self.cache.update(k, v, i)

    def __call__(self, n: int) -> None:
        token = torch.zeros(self.B, 1, dtype=torch.long, device=self.runtime.device)
        for i in range(n):
            position = torch.full((1, 1), self.length - 1 + i, device=self.runtime.device)
            out = self.forward(input_ids=token, past_key_values=self.cache, position_ids=position, use_cache=True)
            token = out.logits[:, -1].argmax(dim=-1, keepdim=True)

    @property
    def cache_bytes(self) -> int:
        return sum(x.nbytes for x in self.held())

    def held(self) -> list[Tensor]:
        return [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
