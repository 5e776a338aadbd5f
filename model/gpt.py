"""GPT: a decoder whose layers mix tokens as the pattern says.

Dimensions: B batch, T time, C n_embd, V vocab_size.
"""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.cache import Cache
from model.config import ModelConfig
from model.context import PADDING, AuxiliaryLosses, ForwardContext
from model.errors import UserError
from model.layers import MLP, Linear, make_norm, to_autocast_dtype
from model.loss import cross_entropy
from model.mixers import MIXERS
from model.mixers.base import Mixer, MixerSpec
from model.state import LayerState

Tensors = dict[str, Tensor]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): (B, T, C) -> (B, T, C). Norms stand before, after, or both."""

    def __init__(self, config: ModelConfig, word: str, spec: MixerSpec):
        super().__init__()

        def norm(there: bool) -> nn.Module:
            if not there:
                return nn.Identity()
            return make_norm(config.norm, config.n_embd, eps=config.norm_eps, bias=config.bias)

        before, after = config.norm_place != "post", config.norm_place != "pre"
        self.norm_1, self.out_norm_1 = norm(before), norm(after)
        self.mixer: Mixer = MIXERS[word](spec)
        self.norm_2, self.out_norm_2 = norm(before), norm(after)
        self.mlp = MLP(config.mlp, config.n_embd, config.mlp_hidden, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, ctx: ForwardContext, passed: Tensors, state: LayerState | None = None
    ) -> tuple[Tensor, Tensors, Tensors]:
        """Returns x, the tensors passed on to later layers, and the auxiliary losses of this layer."""
        ctx.passed, ctx.losses = dict(passed), {}
        x = x + self.dropout(self.out_norm_1(self.mixer(to_autocast_dtype(self.norm_1(x)), ctx, state)))
        x = x + self.dropout(self.out_norm_2(self.mlp(to_autocast_dtype(self.norm_2(x)))))
        return x, ctx.passed, ctx.losses


class CompiledDecode(Protocol):
    """Runs layers and head for one token of each row as compiled code: inference.compiled_decode has it."""

    def layer(
        self, block: nn.Module, x: Tensor, ctx: ForwardContext, passed: Tensors, state: LayerState
    ) -> tuple[Tensor, Tensors, Tensors]: ...

    def linear(self, linear: nn.Module, x: Tensor) -> Tensor: ...


class GPT(nn.Module):
    """Tokens to logits, or to their loss. Training and decoding differ by `cache` alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # store only each layer's input, recompute the rest in the backward pass
        self.compiled_decode: CompiledDecode | None = None
        self.wte = nn.Embedding(config.vocab, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(
            Block(config, word, spec) for word, spec in zip(config.kinds, config.layers, strict=True)
        )
        self._distinct = [i for i, spec in enumerate(config.layers) if spec not in config.layers[:i]]
        self.ln_f = make_norm(config.norm, config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    @property
    def mixers(self) -> list[Mixer]:
        return [block.mixer for block in self.h]  # type: ignore[misc]

    def init_weights(self) -> None:
        """As GPT-2: normal with std init_std, projections onto the residual stream scaled down with depth.

        A mixer may then initialise its own parameters otherwise.
        """
        n_sublayers = 2 * self.config.n_layer * self.config.loops
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = (self.config.init_std or 1 / math.sqrt(p.shape[1])) if name.startswith("h.") else 0.02
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=std / math.sqrt(n_sublayers) if residual else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for mixer in self.mixers:
            mixer.init_weights()

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        *,
        lengths: Tensor | None = None,
        star_context: int | Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
        last_only: bool = False,
        auxiliary: AuxiliaryLosses | None = None,
    ) -> Tensor:
        """(B, T) tokens -> (B, T, V) logits; with targets (B, T) their float32 cross-entropy, a mean or (B, T).

        Targets of -100 are ignored. `lengths` (B,) counts the real tokens of right-padded rows. `last_only` returns the
        logits after each row's last real token, (B, 1, V). With a cache, idx continues what the cache has seen, and no
        gradient is kept. `star_context`, a number or (B,), is the context length of star layers for this text; a cache
        remembers it. The mean has the value of the cross-entropy and the gradient of that plus all auxiliary losses;
        `auxiliary` receives their values.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):  # a cache holds values, not graphs
            ctx = self._context(idx, cache, lengths, star_context)
            x = self.wte(idx)  # (B, T, C)
            if self.config.scale_embeddings:
                x = x * math.sqrt(x.shape[-1])
            if self.wpe is not None:
                x = x + self.wpe(ctx.pos.clamp(min=0))
            x = self.dropout(x)
            x, losses = self._layers(x, ctx, cache)
            if cache is not None:
                cache.advance(ctx)
            if last_only:
                x = x[:, -1:] if lengths is None else _last_real(x, lengths)  # (B, 1, C)
            x, cap, z_loss = self.ln_f(x), self.config.logit_softcap, self.config.z_loss
            if targets is not None:
                loss = cross_entropy(x, self.lm_head.weight, targets, reduction, softcap=cap, z_loss=z_loss)
                if losses and reduction == "mean":
                    extra = torch.stack(list(losses.values())).sum()
                    loss = loss + (extra - extra.detach())  # its gradient without its value
                if auxiliary is not None:
                    auxiliary.values = {name: value.detach() for name, value in losses.items()}
                return loss
            compiled = self._compiled_for(ctx)
            logits = self.lm_head(x) if compiled is None else compiled.linear(self.lm_head, x)
            return logits if cap is None else cap * torch.tanh(logits / cap)

    def _layers(self, x: Tensor, ctx: ForwardContext, cache: Cache | None) -> tuple[Tensor, Tensors]:
        """All layers, `loops` times; with their auxiliary losses, added up by name."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        for i in self._distinct:
            self.h[i].mixer.prepare(ctx, x.device, dtype)  # type: ignore[union-attr, operator]
        compiled, passed, losses = self._compiled_for(ctx), Tensors(), Tensors()
        for i, block in enumerate(list(self.h) * self.config.loops):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, passed, new = checkpoint(block, x, ctx, passed, use_reentrant=False)
            elif cache is not None and compiled is not None:
                x, passed, new = compiled.layer(block, x, ctx, passed, cache.layers[i])
            else:
                x, passed, new = block(x, ctx, passed, None if cache is None else cache.layers[i])
            for name, value in new.items():
                losses[name] = losses[name] + value if name in losses else value
        return x, losses

    def kernel_names(self, T: int, dtype: torch.dtype) -> str:
        """The kernels of training on T tokens, by kind of layer: "swa tiles, full sdpa-causal"."""
        device = self.lm_head.weight.device
        return ", ".join(dict.fromkeys(f"{m.spec.kind} {m.kernel_name(T, device, dtype)}" for m in self.mixers))

    def _context(
        self, idx: Tensor, cache: Cache | None, lengths: Tensor | None, star_context: int | Tensor | None = None
    ) -> ForwardContext:
        """Positions of the incoming tokens: the only place that counts them."""
        T = idx.shape[1]
        added = T if lengths is None else lengths
        self._check_room(added, T, cache)
        star = None if star_context is None else torch.as_tensor(star_context, device=idx.device).view(-1)  # (B or 1,)
        if cache is not None:
            cache.star_context = star = cache.star_context if star is None else star
        pos = torch.arange(T, device=idx.device)[None]  # (1, T)
        if cache is None and lengths is None:
            return ForwardContext(pos=pos, added=T, star_context=star)
        past = idx.new_zeros(1) if cache is None else cache.pos
        uniform = lengths is None and (cache is None or not cache.ragged)
        if uniform:
            past = past[:1]
        pos = past[:, None] + pos  # (B or 1, T)
        if lengths is not None:
            pos = torch.where(torch.arange(T, device=idx.device) < lengths[:, None], pos, PADDING)  # (B, T)
        return ForwardContext(
            pos=pos,
            contiguous=lengths is None and (cache is None or cache.length == 0),
            padded=lengths is not None,
            uniform=uniform,
            past=None if cache is None else past,
            added=added,
            past_bound=0 if cache is None else cache.length,
            star_context=star,
        )

    def _compiled_for(self, ctx: ForwardContext) -> CompiledDecode | None:
        """Compiled layers, where this pass is one token of each row over a cache of several."""
        single = ctx.pos.shape[1] == 1 and ctx.past_bound > 1 and not ctx.padded
        return self.compiled_decode if single else None

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
                n = int(rows.max()) if isinstance(rows, Tensor) else rows  # it was an upper bound: now look
                if n > limit:
                    raise UserError(f"{n} tokens are more than the {limit} of {what}")

    def new_cache(
        self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None, rolling: bool = True
    ) -> Cache:
        """An empty cache for sequences of up to max_length tokens, of the weights' dtype unless another is given.

        rolling False: sliding layers keep every key too, as a cache without windows would.
        """
        weight = self.lm_head.weight
        dtype = dtype or weight.dtype
        size = (batch_size, max_length, weight.device, dtype)
        states = [mixer.new_cache(*size, rolling=rolling) for mixer in self.mixers * self.config.loops]
        return Cache(states, batch_size, weight.device, dtype)


def _last_real(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, C) -> (B, 1, C): each row's last real token."""
    return x.gather(1, (lengths - 1).clamp(min=0)[:, None, None].expand(-1, -1, x.shape[2]))
