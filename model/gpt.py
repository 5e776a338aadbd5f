"""GPT: a decoder whose layers mix tokens as the pattern says.

Dimensions: B batch, T time, C n_embd, V vocab_size.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inference import compiled_decode as decode
from model.cache import Cache, LayerState
from model.config import ModelConfig
from model.context import PADDING, Step
from model.cpu.matmul import Linear, to_product_dtype
from model.errors import UserError
from model.layers import MLP, make_norm
from model.loss import cross_entropy
from model.mixers import MIXERS
from model.mixers.base import MixerSpec


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): (B, T, C) -> (B, T, C). Norms stand before, after, or both."""

    def __init__(self, config: ModelConfig, spec: MixerSpec):
        super().__init__()

        def norm(there: bool) -> nn.Module:
            if not there:
                return nn.Identity()
            return make_norm(config.norm, config.n_embd, eps=config.norm_eps, bias=config.bias)

        before, after = config.norm_place != "post", config.norm_place != "pre"
        self.norm_1, self.out_norm_1 = norm(before), norm(after)
        self.mixer = MIXERS[spec.kind](spec)  # type: ignore[arg-type]  # the table says which record is whose
        self.norm_2, self.out_norm_2 = norm(before), norm(after)
        self.mlp = MLP(config.mlp, config.n_embd, config.mlp_hidden, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, step: Step, cache: LayerState | None = None) -> Tensor:
        x = x + self.dropout(self.out_norm_1(self.mixer(to_product_dtype(self.norm_1(x)), step, cache)))
        return x + self.dropout(self.out_norm_2(self.mlp(to_product_dtype(self.norm_2(x)))))


class GPT(nn.Module):
    """Tokens to logits, or to their loss. Training and decoding differ by `cache` alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # in training: keep each layer's input alone and compute the rest again
        self.fused = False  # in decoding: a token of each row goes through compiled layers
        self.wte = nn.Embedding(config.vocab, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, spec) for spec in config.layers)
        self.ln_f = make_norm(config.norm, config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's: normal with 0.02 (`init_std`), and what writes to the residual stream smaller with depth."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = (self.config.init_std or 1 / math.sqrt(p.shape[1])) if name.startswith("h.") else 0.02
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer) if residual else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        *,
        lengths: Tensor | None = None,
        context: int | Tensor | None = None,
        auxiliary=None,  # STUB
        reduction: Literal["mean", "none"] = "mean",
        last_only: bool = False,
    ) -> Tensor:
        """(B, T) tokens -> (B, T, V) logits; with targets (B, T) their float32 cross-entropy, a mean or (B, T).

        Targets of -100 are ignored. `lengths` (B,) counts the real tokens of right-padded rows. `last_only` returns the
        logits after each row's last real token, (B, 1, V). With a cache, idx continues what the cache has seen, and no
        gradient is kept. `context`, a number or (B,), is star layers' own for this text, which a cache remembers.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):  # a cache holds values, not graphs
            step = self._step(idx, cache, lengths, context)
            x = self.wte(idx)  # (B, T, C)
            if self.config.scale_embeddings:
                x = x * math.sqrt(x.shape[-1])
            if self.wpe is not None:
                x = x + self.wpe(step.pos.clamp(min=0))
            x = self.dropout(x)
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            for spec in set(self.config.layers):
                spec.prepare(step, x.device, dtype)
            for i, block in enumerate(self.h):
                if self.activation_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, step, use_reentrant=False)
                elif step.fused and cache is not None:
                    x = decode.layer(block, x, step, cache.layers[i])
                else:
                    x = block(x, step, None if cache is None else cache.layers[i])
            if cache is not None:
                cache.advance(step)
            if last_only:
                x = x[:, -1:] if lengths is None else _last_real(x, lengths)  # (B, 1, C)
            x, cap, z_loss = self.ln_f(x), self.config.logit_softcap, self.config.z_loss
            if targets is not None:
                return cross_entropy(x, self.lm_head.weight, targets, reduction, softcap=cap, z_loss=z_loss)
            logits = decode.product(self.lm_head, x) if step.fused else self.lm_head(x)
            return logits if cap is None else cap * torch.tanh(logits / cap)

    def kernel_names(self, T: int, dtype: torch.dtype) -> str:
        """The attention kernels of training on T tokens, by kind of layer: "swa tiles, full sdpa-causal"."""
        device = self.lm_head.weight.device
        return ", ".join(dict.fromkeys(f"{s.kind} {s.kernel_name(T, device, dtype)}" for s in self.config.layers))

    def _step(
        self, idx: Tensor, cache: Cache | None, lengths: Tensor | None, context: int | Tensor | None = None
    ) -> Step:
        """Where the incoming tokens stand: the only place that counts positions."""
        T = idx.shape[1]
        added = T if lengths is None else lengths
        self._check_room(added, T, cache)
        before = None if context is None else torch.as_tensor(context, device=idx.device).view(-1)  # (B or 1,)
        if cache is not None:
            cache.context = before = cache.context if before is None else before
        pos = torch.arange(T, device=idx.device)[None]  # (1, T)
        if cache is None and lengths is None:
            return Step(pos=pos, added=T, context=before)
        past = idx.new_zeros(1) if cache is None else cache.pos
        uniform = lengths is None and (cache is None or not cache.ragged)
        if uniform:
            past = past[:1]
        pos = past[:, None] + pos  # (B or 1, T)
        if lengths is not None:
            pos = torch.where(torch.arange(T, device=idx.device) < lengths[:, None], pos, PADDING)  # (B, T)
        return Step(
            pos=pos,
            contiguous=lengths is None and (cache is None or cache.length == 0),
            padded=lengths is not None,
            uniform=uniform,
            past=None if cache is None else past,
            added=added,
            past_bound=0 if cache is None else cache.length,
            context=before,
            fused=self.fused and T == 1 and lengths is None and cache is not None and cache.length > 1,
        )

    def _check_room(self, added: int | Tensor, T: int, cache: Cache | None) -> None:
        """UserError if this pass goes beyond the learned positions or the cache."""
        limits = {
            "the learned positions of this model (block_size); train with position = rope to go further": (
                None if self.wpe is None else self.wpe.num_embeddings
            ),
            "the cache (max_length); make it larger": None if cache is None else cache.max_length,
        }
        n = T if cache is None else cache.length + T
        for what, limit in limits.items():
            if limit is not None and n > limit:
                rows = added if cache is None else cache.pos + added
                n = int(rows.max()) if isinstance(rows, Tensor) else rows  # it was a bound: now look
                if n > limit:
                    raise UserError(f"{n} tokens are more than the {limit} of {what}")

    def new_cache(
        self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None, rolling: bool = True
    ) -> Cache:
        """An empty cache for sequences of up to max_length tokens, of the weights' dtype unless another is given.

        rolling False: sliding layers keep every key too, as a cache that knows no windows would.
        """
        weight = self.lm_head.weight
        room = (batch_size, max_length, weight.device, dtype or weight.dtype)
        layers = [block.mixer.new_cache(*room, rolling=rolling) for block in self.h]  # type: ignore[union-attr, operator]
        return Cache(layers, batch_size, weight.device)


def _last_real(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, C) -> (B, 1, C): each row's last real token."""
    return x.gather(1, (lengths - 1).clamp(min=0)[:, None, None].expand(-1, -1, x.shape[2]))
