"""Supported classes of transformers, and the translation between their config.json and ModelConfig."""

from dataclasses import dataclass, field

from model.attention.spec import AttentionSpec
from model.config import ModelConfig
from model.errors import UserError
from scripts.convert.rope import Values, need, our_rope, their_rope

TYPES = {"full": "full_attention", "swa": "sliding_attention"}  # kind of layer in our pattern -> in layer_types
MLPS = {  # (activation in transformers, gated) -> model.mlp; gelu_new is an older name of the tanh approximation
    ("silu", True): "swiglu",
    ("gelu_pytorch_tanh", True): "geglu",
    ("gelu", False): "gelu",
    ("gelu_new", False): "gelu-tanh",
    ("gelu_pytorch_tanh", False): "gelu-tanh",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model class of transformers."""

    name: str
    architecture: str
    model_type: str
    activation_key: str = "hidden_act"
    windows: str = "by layer"  # which layers can slide: "none", "all", or "by layer"
    biases: tuple[str, ...] = ("attention_bias",)  # supported keys, of attention_bias and mlp_bias
    own_head_dim: bool = True  # head_dim may differ from hidden_size / num_attention_heads
    rope_by_kind: bool = False  # each kind of layer has its own RoPE parameters
    scaled: bool = False  # it has the key query_pre_attn_scalar
    softcaps: dict[str, str] = field(default_factory=dict)  # key of ModelConfig -> key of config.json
    fixed: Values = field(default_factory=dict)  # values of ModelConfig that the class implies

    def theirs(self, config: ModelConfig) -> Values:
        """config.json of this class, as close to the ModelConfig as the class allows."""
        ropes = {kind: config.rope(kind) for kind in dict.fromkeys(config.kinds)}
        kinds = ["full" if attention_of(config, i).window is None else "swa" for i in range(config.n_layer)]
        window = next((w for i in range(config.n_layer) if (w := attention_of(config, i).window) is not None), None)
        values: Values = {
            "vocab_size": config.vocab,
            "hidden_size": config.n_embd,
            "intermediate_size": config.mlp_hidden,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.kv_heads,
            "max_position_embeddings": config.block_size,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            self.activation_key: "silu" if self.fixed.get("mlp") != "geglu" else "gelu_pytorch_tanh",
        }
        if self.own_head_dim:
            values["head_dim"] = config.head_width
        if "attention_bias" in self.biases:
            values["attention_bias"] = config.bias or config.attn_bias == "all"
        if "mlp_bias" in self.biases:
            values["mlp_bias"] = config.bias
        if self.windows != "none":
            values["sliding_window"] = window
        if self.windows == "by layer":
            values["layer_types"] = [TYPES[kind] for kind in kinds]
            if self.model_type == "qwen3":
                values["use_sliding_window"] = window is not None
        if self.scaled:
            values["query_pre_attn_scalar"] = round((attention_of(config, 0).scale or config.head_width**-0.5) ** -2)
        for ours, key in self.softcaps.items():
            values[key] = getattr(config, ours)
        first = next(iter(ropes.values()))
        if self.rope_by_kind:
            values["rope_parameters"] = {TYPES[kind]: their_rope(ropes.get(kind, first)) for kind in TYPES}
        else:
            values["rope_parameters"] = their_rope(first)
        return values

    def ours(self, values: Values) -> Values:
        """The arguments of ModelConfig for a config.json. UserError for values that Sash does not support."""
        n_layer, n_head, width = (
            need(values, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
        )
        types = self._types(values, n_layer)
        activation = str(values.get(self.activation_key, values.get("hidden_act")))
        mlp = MLPS.get((activation, True))
        if mlp is None:
            known = ", ".join(name for name, gated in MLPS if gated)
            raise UserError(
                f"{self.activation_key} ({activation}) is not supported for {self.name}: it must be one of {known}"
            )
        attention_bias, mlp_bias = (bool(values.get(key)) for key in ("attention_bias", "mlp_bias"))
        if (mlp_bias and not attention_bias) or (attention_bias and "attention_bias" not in self.biases):
            raise UserError(
                f"attention_bias ({attention_bias}) with mlp_bias ({mlp_bias}) is not supported for {self.name}"
            )
        scale = values.get("query_pre_attn_scalar") if self.scaled else None
        head_dim = values.get("head_dim") or width // n_head
        return (
            {
                "vocab_size": need(values, "vocab_size"),
                "block_size": need(values, "max_position_embeddings"),
                "n_layer": n_layer,
                "n_head": n_head,
                "n_kv_head": values.get("num_key_value_heads") or n_head,
                "n_embd": width,
                "head_dim": head_dim,
                "mlp_width": need(values, "intermediate_size"),
                "mlp": mlp,
                "norm_eps": values.get("rms_norm_eps", 1e-6),
                "tie_embeddings": values.get("tie_word_embeddings", self.model_type.startswith("gemma")),
                "bias": mlp_bias,
                "attn_bias": "all" if attention_bias and not mlp_bias else None,
                "attn_scale": None if scale in (None, head_dim) else scale**-0.5,
                "qk_norm": False,
                "pattern": _pattern(types),
                "window": values.get("sliding_window") if "swa" in types else None,
            }
            | {ours: values.get(key) for ours, key in self.softcaps.items()}
            | self._ropes(values, types)
            | self.fixed
        )

    def _types(self, values: Values, n_layer: int) -> list[str]:
        """The kind of each layer: "full" or "swa"."""
        window = values.get("sliding_window")
        if self.windows == "none" or window is None or values.get("use_sliding_window") is False:
            return ["full"] * n_layer
        if self.windows == "all":
            return ["swa"] * n_layer
        kinds = {theirs: ours for ours, theirs in TYPES.items()}
        types = need(values, "layer_types")
        if len(types) != n_layer or not kinds.keys() >= set(types):
            raise UserError(f"layer_types ({types}) must be a list of {n_layer}, each one of {', '.join(kinds)}")
        return [kinds[word] for word in types]

    def _ropes(self, values: Values, types: list[str]) -> Values:
        """The RoPE settings of ModelConfig: a value if all kinds of layers have the same, otherwise a table by kind."""
        parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
        base = values.get("rope_theta", 10_000.0)
        by_kind = {}
        for kind in dict.fromkeys(types):
            if TYPES["full"] in parameters:
                own = parameters[TYPES[kind]]
            elif self.rope_by_kind and kind == "swa":  # the form before transformers 5
                own = {"rope_theta": values.get("rope_local_base_freq", base)}
            else:
                own = parameters
            by_kind[kind] = our_rope({"rope_theta": base} | own)
        merged: Values = {}
        for key in dict.fromkeys(key for rope in by_kind.values() for key in rope):
            table = {kind: rope[key] for kind, rope in by_kind.items() if key in rope}
            same = len(set(table.values())) == 1
            if key in ("rope_trained", "rope_whole_ramp") and not same:
                raise UserError(f"{key} ({table}) must be the same for all kinds of layers")
            merged[key] = next(iter(table.values())) if same else table
        return merged


GEMMA = {"norm": "rmsnorm+1", "norm_place": "sandwich", "mlp": "geglu", "scale_embeddings": True}
FAMILIES = (
    Family(
        name="Llama",
        architecture="LlamaForCausalLM",
        model_type="llama",
        windows="none",
        biases=("attention_bias", "mlp_bias"),
    ),
    Family(name="Mistral", architecture="MistralForCausalLM", model_type="mistral", windows="all", biases=()),
    Family(
        name="Qwen3",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        fixed={"qk_norm": True},
    ),
    Family(
        name="OLMo 3",
        architecture="Olmo3ForCausalLM",
        model_type="olmo3",
        own_head_dim=False,
        rope_by_kind=True,
        fixed={"qk_norm": True, "qk_norm_over": "projection", "norm_place": "post"},
    ),
    Family(
        name="Gemma 2",
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        activation_key="hidden_activation",
        scaled=True,
        softcaps={"attn_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
        fixed=GEMMA,
    ),
    Family(
        name="Gemma 3",
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        activation_key="hidden_activation",
        rope_by_kind=True,
        scaled=True,
        softcaps={"logit_softcap": "final_logit_softcapping"},
        fixed=GEMMA | {"qk_norm": True},
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Family:
    """GPT-2, whose config.json has different keys."""

    name: str = "GPT-2"
    architecture: str = "GPT2LMHeadModel"
    model_type: str = "gpt2"

    def theirs(self, config: ModelConfig) -> Values:
        return {
            "vocab_size": config.vocab,
            "n_positions": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.mlp_hidden,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "attn_pdrop": 0.0,
            "activation_function": "gelu" if config.mlp == "gelu" else "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
        }

    def ours(self, values: Values) -> Values:
        activation = values.get("activation_function", "gelu_new")
        if (activation, False) not in MLPS:
            known = ", ".join(name for name, gated in MLPS if not gated)
            raise UserError(f"activation_function ({activation}) is not supported for GPT-2: it must be one of {known}")
        for key, usual in {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}.items():
            if values.get(key, usual) != usual:
                raise UserError(f"{key} ({values[key]}) is not supported for GPT-2: it must be {usual}")
        return {
            "vocab_size": need(values, "vocab_size"),
            "block_size": need(values, "n_positions"),
            "n_embd": (width := need(values, "n_embd")),
            "n_layer": need(values, "n_layer"),
            "n_head": need(values, "n_head"),
            "mlp_width": values.get("n_inner") or 4 * width,
            "mlp": MLPS[activation, False],
            "norm_eps": values.get("layer_norm_epsilon", 1e-5),
            "tie_embeddings": values.get("tie_word_embeddings", True),
            "position": "learned",
            "norm": "layernorm",
            "bias": True,
            "qk_norm": False,
        }


ALL: tuple[Family | GPT2Family, ...] = (*FAMILIES, GPT2Family())


def of_type(values: Values) -> Family | GPT2Family:
    """The class that a config.json belongs to. UserError if it is not supported."""
    for family in ALL:
        if values.get("model_type") == family.model_type:
            return family
    known = ", ".join(family.model_type for family in ALL)
    raise UserError(f"model_type ({values.get('model_type')}) is not supported: it must be one of {known}")


def attention_of(config: ModelConfig, i: int) -> AttentionSpec:
    """The spec of one layer, which must be an attention layer."""
    spec = config.layers[i]
    assert isinstance(spec, AttentionSpec)
    return spec


def _pattern(words: list[str]) -> str:
    """The shortest pattern that yields these layers when repeated."""
    period = next(n for n in range(1, len(words) + 1) if all(w == words[i % n] for i, w in enumerate(words)))
    return " ".join(words[:period])
