"""ModelConfig: every number of a network, checked together before anything is allocated."""

import difflib
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from model.attention.dispatch import Kernel
from model.attention.rope import Rope, Scaling
from model.attention.sparse import Sparse
from model.checks import check_patterns, check_rope, check_tables
from model.layers import GATED, MLPName, NormName
from model.mixers import MIXERS
from model.mixers.attention import AttentionSpec
from model.mixers.base import MixerSpec
from model.section import Section

Position = Literal["rope", "learned", "alibi", "none"]


class ModelConfig(Section):
    """A network's shape. Frozen; building one that cannot work raises with the key and its value.

    Where a setting takes a table by kind of layer, it is by word of the pattern: {full = 1e6, swa = 1e4}.
    """

    vocab_size: int | None = Field(None, ge=2, description="rows of the embedding; none: as many as the tokenizer has")
    block_size: int = Field(256, ge=1, description="training context in tokens")
    n_layer: int = Field(6, ge=1, description="number of layers")
    n_head: int = Field(6, ge=1, description="query heads per layer")
    n_kv_head: int | None = Field(
        None, ge=1, description="KV heads: n_head is MHA, 1 is MQA, between is GQA; none: n_head"
    )
    n_embd: int = Field(384, ge=1, description="width of the residual stream")
    head_dim: int | None = Field(None, ge=1, description="width of a head; none: n_embd / n_head")

    pattern: str = Field("full", description='mixer of each layer, tiled over depth: "full", "swa*5 full", or "5:1"')
    window: Annotated[int, Field(ge=1)] | tuple[int, ...] | None = Field(
        None, description="keys that a query of an swa layer sees, itself included; several: tiled over the swa layers"
    )
    head_windows: tuple[int, ...] = Field(
        (), description="windows of the heads of mswa layers: the KV heads in as many equal parts"
    )
    window_everywhere: int | None = Field(
        None, ge=1, description="window of every layer, full ones too: how a trained model is decoded through a window"
    )
    n_sink: int = Field(0, ge=0, description="first tokens that stay visible in sliding layers whatever the window")

    global_tokens: tuple[int, ...] = Field(
        (), description="positions that swa layers see from everywhere, and that see all"
    )
    n_random: int = Field(
        0, ge=0, lt=64, description="past blocks, each a window long, drawn for each block of queries of swa layers"
    )
    sparse_block: int | None = Field(
        None, ge=1, description="stride of strided and fixed layers, tokens of a block of star layers"
    )
    n_summary: int | None = Field(
        None, ge=1, description="last columns of each block that all later queries of fixed layers see"
    )
    star_context: int | None = Field(
        None, ge=0, description="tokens of the context of star layers: queries behind it see all"
    )

    position: Position | dict[str, Position] = Field(
        "rope", description="how positions enter: rope, learned (whole model), alibi, none; or a table by kind of layer"
    )
    rope_base: float | dict[str, float] = Field(10_000.0, description="RoPE base; or a table by kind of layer")
    rope_fraction: float | dict[str, float] = Field(
        1.0, description="part of each head that RoPE rotates, its first dimensions; or a table by kind of layer"
    )
    rope_scaling: Scaling | dict[str, Scaling] = Field(
        "none",
        description="how RoPE is stretched beyond its training: linear, yarn, llama3; or a table by kind of layer",
    )
    rope_factor: float | dict[str, float] = Field(
        1.0, description="how many times longer rope_scaling makes the context; or a table by kind of layer"
    )
    rope_in_cache: bool = Field(
        False, description="sliding layers rotate keys by place in the cache, as StreamingLLM does, not by position"
    )
    rope_trained: int | None = Field(None, ge=1, description="context in tokens that yarn and llama3 stretch")
    rope_whole_ramp: bool = Field(False, description="yarn begins and ends at whole dimensions, as transformers has it")

    qk_norm: bool = Field(True, description="RMSNorm on queries and keys")
    qk_norm_over: Literal["head", "projection"] = Field(
        "head", description="what qk_norm normalises: each head, or the projection of all heads"
    )
    attn_scale: float | None = Field(
        None, gt=0, description="what attention scores are multiplied by; none: 1 / sqrt(head_dim)"
    )
    attn_softcap: float | None = Field(None, gt=0, description="c: attention scores are c tanh(scores / c)")
    sink_logit: bool = Field(False, description="a learned logit per head in the denominator of the softmax")
    attn_gate: Literal["none", "head", "channel"] = Field(
        "none", description="sigmoid gate of what attention gives, a number per head or per channel"
    )
    attn_bias: Literal["qkv", "all"] | None = Field(
        None, description="biases in attention alone: qkv, or all, its output too; none: as bias says"
    )
    logit_softcap: float | None = Field(None, gt=0, description="c: output logits are c tanh(logits / c)")

    norm: NormName = Field(
        "rmsnorm", description="normalisation around each sublayer; rmsnorm+1 multiplies by 1 + weight"
    )
    norm_place: Literal["pre", "post", "sandwich"] = Field(
        "pre", description="norms before each sublayer, after it (inside the residual), or both"
    )
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norms")
    mlp: MLPName = Field("swiglu", description="feed-forward layer")
    mlp_width: int | None = Field(
        None, ge=1, description="hidden width of it; none: 4 n_embd, for swiglu and geglu 8/3 n_embd rounded up to 64"
    )
    bias: bool = Field(False, description="biases in linear layers and layernorms")
    tie_embeddings: bool = Field(True, description="lm_head shares the weights of wte")
    scale_embeddings: bool = Field(False, description="embeddings times sqrt(n_embd)")
    init_std: float | None = Field(
        0.02, gt=0, description="of the layers' matrices at first; none: 1 / sqrt(their inputs), alike at every width"
    )
    kernel: Kernel = Field(
        "auto", description="of attention without a cache: sdpa, tiles, amx, flex, masked; auto: the fastest"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on embeddings and on what each sublayer adds")
    z_loss: float = Field(
        0.0, ge=0, description="training minimises z_loss * log(Z)**2 too, which no loss that is shown contains"
    )
    without: str | None = Field(
        None, description="what of a published design is left out here: then no parameters and FLOPs are stated"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head}), or head_dim be given"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head ({self.n_head}) must be divisible by n_kv_head ({self.n_kv_head})")
        kinds = set(self.kinds)
        check_tables(self, kinds)
        check_patterns(self, kinds)
        for kind in kinds:
            check_rope(self, kind)
        if not self.qk_norm and self.qk_norm_over != "head":
            raise ValueError(f"qk_norm_over ({self.qk_norm_over}) means nothing with qk_norm = false: leave one out")
        if self.bias and self.attn_bias:
            raise ValueError(
                f"attn_bias ({self.attn_bias}) means nothing with bias = true, which has all: leave one out"
            )
        if isinstance(self.window, tuple) and (not self.window or min(self.window) < 1):
            raise ValueError(f"window ({list(self.window)}) must be one or several numbers of keys, each at least 1")
        if "swa" in kinds and self.window is None:
            raise ValueError(f"pattern ({self.pattern!r}) has swa layers: give window, the number of keys a query sees")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """The word of each layer: the pattern tiled over depth and cut at n_layer."""
        words = expand_pattern(self.pattern)
        return tuple(words[i % len(words)] for i in range(self.n_layer))

    @property
    def layers(self) -> tuple[MixerSpec, ...]:
        """The expanded pattern: all that each layer's mixer is built from."""
        kinds = self.kinds
        return tuple(MIXERS[kind].spec_from(self, kind, kinds[:i].count(kind)) for i, kind in enumerate(kinds))

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def mlp_hidden(self) -> int:
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.n_embd // (3 * 64)) * 64 if self.mlp in GATED else 4 * self.n_embd

    @property
    def vocab(self) -> int:
        """vocab_size, known: building a network without it is a bug of the caller."""
        assert self.vocab_size is not None, "vocab_size comes from the tokenizer: model_copy(update={'vocab_size': n})"
        return self.vocab_size

    def of_kind(self, key: str, kind: str):
        """The value of a per-kind setting for one kind of layer."""
        value = getattr(self, key)
        return value[kind] if isinstance(value, dict) else value

    def nth_window(self, kind: str, nth: int) -> int | None:
        """The window of a layer that nth others of its kind come before."""
        if kind == "strided":
            return self.sparse_block
        if kind != "swa":
            return None
        return self.window[nth % len(self.window)] if isinstance(self.window, tuple) else self.window

    def sparse(self, kind: str, nth: int) -> Sparse | None:
        """What a layer sees beside its window."""
        block = self.sparse_block or 1
        match kind:
            case "swa" if self.global_tokens or self.n_random:
                block = self.nth_window(kind, nth) or 1
                return Sparse(rule="global", block=block, tokens=self.global_tokens, n_random=self.n_random, seed=nth)
            case "strided":
                return Sparse(rule="strided", block=block)
            case "fixed":
                return Sparse(rule="fixed", block=block, n_summary=self.n_summary or 0)
            case "star":
                return Sparse(rule="star", block=block, context=self.star_context or 0)
        return None

    def rope(self, kind: str) -> Rope | None:
        """The rotation of one kind of layer."""
        if self.of_kind("position", kind) != "rope":
            return None
        return Rope(
            base=self.of_kind("rope_base", kind),
            width=round(self.of_kind("rope_fraction", kind) * self.head_width),
            scaling=self.of_kind("rope_scaling", kind),
            factor=self.of_kind("rope_factor", kind),
            trained_length=self.rope_trained or 1,
            whole_ramp=self.rope_whole_ramp,
        )

    def sliding(self, window: int, n_sink: int, *, rope_in_cache: bool = False) -> Self:
        """The same weights with every layer sliding, whatever it was trained as. Raises as building does."""
        changes = {"window_everywhere": window, "n_sink": n_sink, "rope_in_cache": rope_in_cache}
        return type(self)(**(self.model_dump() | changes))

    def stretched(self, scaling: Scaling, factor: float) -> Self | None:
        """The same weights where rotations over all tokens reach further than block_size; None where nothing does.

        Layers with a window stay: none of their distances is beyond it. Those that are stretched already do too.
        """
        free = {
            kind
            for kind, spec in zip(self.kinds, self.layers, strict=True)
            if isinstance(spec, AttentionSpec) and spec.rope and spec.window is None and spec.rope.scaling == "none"
        }
        if not free:
            return None
        own = lambda key, new: {kind: new if kind in free else self.of_kind(key, kind) for kind in set(self.kinds)}
        changes = {"rope_scaling": own("rope_scaling", scaling), "rope_factor": own("rope_factor", factor)}
        return type(self)(**(self.model_dump() | changes | {"rope_trained": self.rope_trained or self.block_size}))

    def notes(self) -> Iterator[str]:
        """What is allowed and probably not meant, one line each."""
        parts = [part for spec in self.layers for part in getattr(spec, "parts", (spec,))]
        windows = [part.window for part in parts if isinstance(part, AttentionSpec) and part.window is not None]
        if self.window is not None and "swa" not in self.kinds:
            yield f"window ({self.window}) is used by no layer: pattern ({self.pattern!r}) has no swa"
        if self.n_sink and not windows:
            yield f"n_sink ({self.n_sink}) is used by no layer: pattern ({self.pattern!r}) has no swa"
        if windows and min(windows) >= self.block_size:
            yield f"window ({min(windows)}) covers block_size ({self.block_size}): in training every layer sees all"


def expand_pattern(pattern: str) -> tuple[str, ...]:
    """One period of a pattern as words: "swa*2 full" and "2:1" are both ("swa", "swa", "full"). ValueError if not."""
    if ":" in pattern:
        match = re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*", pattern)
        if not match or (n_swa := int(match[1])) + (n_full := int(match[2])) < 1:
            raise ValueError(
                f'pattern ({pattern!r}): a ratio is "a:b", a swa layers to b full ones, a + b >= 1, as "5:1"'
            )
        return ("swa",) * n_swa + ("full",) * n_full
    words: list[str] = []
    for item in pattern.split():
        match = re.fullmatch(r"(\w+)(?:\*([1-9]\d{0,3}))?", item)
        if not match or match[1] not in MIXERS:
            near = difflib.get_close_matches(item.split("*")[0], MIXERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f'pattern ({pattern!r}): {item!r} is no layer; words are {", ".join(MIXERS)}, as "swa*5 full"{hint}'
            )
        words += [match[1]] * int(match[2] or 1)
    if not words:
        raise ValueError(f'pattern ({pattern!r}) is empty; words are {", ".join(MIXERS)}, as "swa*5 full" or "5:1"')
    return tuple(words)


def describe_layers(layers: tuple[MixerSpec, ...]) -> str:
    """The expanded layers, short: "swa*5 full"."""
    runs = [(word, len(list(run))) for word, run in groupby(spec.kind for spec in layers)]
    return " ".join(word if n == 1 else f"{word}*{n}" for word, n in runs)
