"""NetworkShape: the numbers of a network that every mixer may read."""

from typing import Literal, TypeVar

from pydantic import Field

from model.layers import GATED, MLPName, NormName
from model.section import Section

S = TypeVar("S", bound=Section)


class NetworkShape(Section):
    """Width, depth, and everything outside the mixers."""

    vocab_size: int | None = Field(None, ge=2, description="rows of the embedding; none: the tokenizer's vocabulary")
    block_size: int = Field(256, ge=1, description="training context in tokens")
    n_layer: int = Field(6, ge=1, description="number of layers")
    loops: int = Field(
        1, ge=1, description="number of times the stack of layers is applied, with the same weights (looped depth)"
    )
    n_head: int = Field(6, ge=1, description="query heads per layer")
    n_kv_head: int | None = Field(
        None, ge=1, description="KV heads per layer: n_head is MHA, 1 is MQA, anything between is GQA; none: n_head"
    )
    n_embd: int = Field(384, ge=1, description="width of the residual stream")
    head_dim: int | None = Field(None, ge=1, description="width of a head; none: n_embd / n_head")
    pattern: str = Field(
        "full",
        description='mixer of each layer, repeated over the depth: "full", "swa*5 full", "(swa*3 linear)*2 full", or '
        'the ratio "5:1" of swa to full',
    )

    norm: NormName = Field("rmsnorm", description="kind of norm; rmsnorm+1 multiplies by 1 + weight, as in Gemma")
    norm_place: Literal["pre", "post", "sandwich"] = Field(
        "pre",
        description="norm before each sublayer (pre), after it in the residual branch (post), or both",
    )
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norms")
    mlp: MLPName = Field("swiglu", description="kind of MLP")
    mlp_width: int | None = Field(
        None,
        ge=1,
        description="hidden width of the MLP; none: 4 n_embd; if gated, 8/3 n_embd rounded up to a multiple of 64",
    )
    bias: bool = Field(False, description="biases in linear layers and layernorms")
    tie_embeddings: bool = Field(True, description="lm_head shares the weights of wte")
    scale_embeddings: bool = Field(False, description="multiply embeddings by sqrt(n_embd)")
    logit_softcap: float | None = Field(None, gt=0, description="soft-cap c: output logits become c tanh(logits / c)")
    init_std: float | None = Field(
        0.02, gt=0, description="standard deviation of initial weight matrices in layers; none: 1 / sqrt(fan_in)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate on embeddings and on each sublayer's output")
    z_loss: float = Field(
        0.0, ge=0, description="coefficient of the z-loss, log(Z)**2; excluded from all reported losses"
    )
    omits: str | None = Field(
        None,
        description="in a preset: components of the published model that the config leaves out; if set, parameter and "
        "FLOP counts are not reported",
    )

    def own(self, word: str, settings: type[S]) -> S:
        """The section [model.WORD] of a mixer, which is of this class."""
        section = getattr(self, word)
        assert isinstance(section, settings)
        return section

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

    def check_shape(self) -> None:
        """ValueError where heads do not divide."""
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head}), or head_dim be given"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head ({self.n_head}) must be divisible by n_kv_head ({self.n_kv_head})")
