"""AttentionSettings: the settings of softmax attention, and the checks between them."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field

from model.attention.rope import Rope, Scaling
from model.attention.sparse import Sparse
from model.attention.spec import KernelName
from model.shape import NetworkShape

Position = Literal["rope", "learned", "alibi", "none"]
PER_KIND = ("position", "rope_base", "rope_fraction", "rope_scaling", "rope_factor")  # may be tables by kind of layer


class AttentionSettings(NetworkShape):
    """Softmax attention: windows, sparse patterns, positions, scores.

    Some settings may be a table by kind of layer, that is by word of the pattern: {full = 1e6, swa = 1e4}.
    """

    window: Annotated[int, Field(ge=1)] | tuple[int, ...] | None = Field(
        None,
        description="keys that a query in an swa layer attends to, itself included; a list repeats over the swa layers",
    )
    head_windows: tuple[int, ...] = Field(
        (), description="windows in mswa layers, in tokens: the KV heads are split into equal groups, one per window"
    )
    window_everywhere: int | None = Field(
        None,
        ge=1,
        description="window of all layers, full ones too, in tokens: to decode a trained model through a window",
    )
    n_sink: int = Field(
        0, ge=0, description="attention sinks: first tokens that stay visible in sliding layers outside the window"
    )

    global_tokens: tuple[int, ...] = Field(
        (),
        description="in swa layers: positions that all later queries attend to, and that attend to all earlier keys",
    )
    n_random: int = Field(
        0,
        ge=0,
        lt=64,
        description="in swa layers: number of past blocks, each a window long, drawn at random for each block of "
        "queries",
    )
    sparse_block: int | None = Field(
        None, ge=1, description="in tokens: stride and window of strided layers, block size of fixed and star layers"
    )
    n_summary: int | None = Field(
        None, ge=1, description="in fixed layers: last keys of each block, which all later queries attend to"
    )
    star_context: int | None = Field(
        None,
        ge=0,
        description="in star layers: queries before this position attend to the first block and their own, later "
        "ones to all keys",
    )

    position: Position | dict[str, Position] = Field(
        "rope", description="position encoding: rope, learned (whole model), alibi, none; or a table by kind of layer"
    )
    rope_base: float | dict[str, float] = Field(10_000.0, description="RoPE base; or a table by kind of layer")
    rope_fraction: float | dict[str, float] = Field(
        1.0, description="share of each head that RoPE rotates, its first channels; or a table by kind of layer"
    )
    rope_scaling: Scaling | dict[str, Scaling] = Field(
        "none",
        description="RoPE scaling for longer contexts: none, linear, yarn, llama3; or a table by kind of layer",
    )
    rope_factor: float | dict[str, float] = Field(
        1.0, description="factor by which rope_scaling extends the context; or a table by kind of layer"
    )
    rope_in_cache: bool = Field(
        False,
        description="sliding layers rotate keys by place in the cache, as in StreamingLLM, instead of by position",
    )
    rope_trained: int | None = Field(
        None,
        ge=1,
        description="for yarn and llama3: context before the extension, in tokens",
    )
    rope_whole_ramp: bool = Field(False, description="round YaRN's ramp to whole channels, as transformers does")

    qk_norm: bool = Field(True, description="RMSNorm on queries and keys")
    qk_norm_over: Literal["head", "projection"] = Field(
        "head", description="qk_norm normalises each head, or the projection of all heads together"
    )
    attn_scale: float | None = Field(None, gt=0, description="scale of attention scores; none: 1 / sqrt(head_dim)")
    attn_softcap: float | None = Field(None, gt=0, description="soft-cap c: attention scores become c tanh(scores / c)")
    sink_logit: bool = Field(False, description="a learned logit per head in the denominator of the softmax")
    attn_gate: Literal["none", "head", "channel"] = Field(
        "none", description="sigmoid gate on the attention output, one number per head or per channel"
    )
    attn_bias: Literal["qkv", "all"] | None = Field(
        None,
        description="biases of attention alone, on q, k, v (qkv) or on the output too (all); none: as bias says",
    )
    kernel: KernelName = Field(
        "auto",
        description="attention kernel; auto: the one expected to be fastest; over a cache, masked replaces one that "
        "cannot be used there",
    )

    def per_kind(self, key: str, kind: str) -> Any:
        """The value of a setting that may be a table, for one kind of layer."""
        value = getattr(self, key)
        return value[kind] if isinstance(value, dict) else value

    def nth_window(self, kind: str, nth: int) -> int | None:
        """The window of the layer that is the nth of its kind, from 0."""
        if kind == "strided":
            return self.sparse_block
        if kind != "swa":
            return None
        return self.window[nth % len(self.window)] if isinstance(self.window, tuple) else self.window

    def sparse(self, kind: str, nth: int) -> Sparse | None:
        """The pattern beside the window of a layer, if it has one."""
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
        if self.per_kind("position", kind) != "rope":
            return None
        return Rope(
            base=self.per_kind("rope_base", kind),
            width=round(self.per_kind("rope_fraction", kind) * self.head_width),
            scaling=self.per_kind("rope_scaling", kind),
            factor=self.per_kind("rope_factor", kind),
            trained_length=self.rope_trained or 1,
            whole_ramp=self.rope_whole_ramp,
        )

    def check_attention(self, kinds: Collection[str]) -> None:
        """ValueError where settings exclude each other or lack one that these kinds of layers need."""
        self._check_patterns(kinds)
        if not self.qk_norm and self.qk_norm_over != "head":
            raise ValueError(f"qk_norm_over ({self.qk_norm_over}) has no effect with qk_norm = false: leave one out")
        if self.bias and self.attn_bias:
            raise ValueError(
                f"attn_bias ({self.attn_bias}) has no effect with bias = true, which sets all biases: leave one out"
            )
        if isinstance(self.window, tuple) and (not self.window or min(self.window) < 1):
            raise ValueError(f"window ({list(self.window)}) must be one or several numbers of keys, each at least 1")
        if "swa" in kinds and self.window is None:
            raise ValueError(f"pattern ({self.pattern!r}) has swa layers: give window, the number of keys a query sees")

    def _check_patterns(self, kinds: Collection[str]) -> None:
        if "mswa" in kinds:
            if not self.head_windows or min(self.head_windows) < 1 or self.kv_heads % len(self.head_windows):
                raise ValueError(
                    f"head_windows ({list(self.head_windows)}) of mswa layers must be numbers of keys, each at least "
                    f"1, as many as divide n_kv_head ({self.kv_heads})"
                )
            if self.per_kind("position", "mswa") == "alibi" or self.qk_norm_over == "projection":
                raise ValueError("mswa splits the heads: it excludes position = alibi and qk_norm_over = projection")
        if min(self.global_tokens, default=0) < 0:
            raise ValueError(f"global_tokens ({list(self.global_tokens)}) are positions: from 0 on")
        if (self.global_tokens or self.n_random) and "swa" not in kinds:
            raise ValueError(f"global_tokens and n_random need swa layers, and pattern ({self.pattern!r}) has none")
        for kind, keys in {
            "strided": ("sparse_block",),
            "fixed": ("sparse_block", "n_summary"),
            "star": ("sparse_block", "star_context"),
        }.items():
            for key in keys:
                if kind in kinds and getattr(self, key) is None:
                    raise ValueError(f"pattern ({self.pattern!r}) has {kind} layers: give {key}")
        if "fixed" in kinds and (self.n_summary or 0) > (self.sparse_block or 0):
            raise ValueError(f"n_summary ({self.n_summary}) must be at most sparse_block ({self.sparse_block})")

    def check_rope(self, kind: str) -> None:
        """ValueError where the rotation of one kind of layer cannot work."""
        if self.per_kind("rope_base", kind) <= 0:
            raise ValueError(f"rope_base ({self.rope_base}) must be above 0")
        position, scaling = self.per_kind("position", kind), self.per_kind("rope_scaling", kind)
        factor, fraction = self.per_kind("rope_factor", kind), self.per_kind("rope_fraction", kind)
        if position != "rope":
            for key, value, unused in (
                ("rope_scaling", scaling, "none"),
                ("rope_factor", factor, 1),
                ("rope_fraction", fraction, 1),
            ):
                if value != unused:
                    raise ValueError(f"{key} ({value}) needs position = rope, and {kind} layers have {position}")
            return
        if self.head_width % 2:
            raise ValueError(f"RoPE rotates pairs: head_dim ({self.head_width}) must be even")
        width = fraction * self.head_width
        if not 0 < fraction <= 1 or round(width) % 2 or abs(width - round(width)) > 1e-6:
            raise ValueError(
                f"rope_fraction ({fraction}) of head_dim ({self.head_width}) must be an even number of channels"
            )
        if (scaling == "none") != (factor == 1) or factor < 1:
            raise ValueError(
                f"rope_factor ({factor}) and rope_scaling ({scaling}) of {kind} layers: "
                "give both, with a factor above 1, or neither"
            )
        if scaling in ("yarn", "llama3") and (self.rope_trained is None or self.per_kind("rope_base", kind) <= 1):
            raise ValueError(
                f"rope_scaling ({scaling}) needs rope_trained ({self.rope_trained}), the context that it extends, "
                f"and a rope_base ({self.rope_base}) above 1"
            )
