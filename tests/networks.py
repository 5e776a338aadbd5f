"""Small networks whose sizes all differ, and strategies that draw any design of one."""

import torch
from hypothesis import strategies as st

from inference.params import SamplingParams
from inference.sampling import Sampler
from model.config import ModelConfig
from model.gpt import GPT
from model.mixers import MIXERS

VOCAB = 31
SMALL = {
    "vocab_size": VOCAB,
    "block_size": 16,
    "n_layer": 2,
    "n_head": 6,
    "n_kv_head": 2,
    "head_dim": 8,
    "n_embd": 20,
    "mlp_width": 28,
}


def by_kind(value: object, **others: object) -> dict[str, object]:
    """A value for every kind of layer, and others for some."""
    return dict.fromkeys(MIXERS, value) | others


DESIGNS = st.fixed_dictionaries(  # what may stand beside anything else
    {
        "n_layer": st.integers(1, 4),
        "n_kv_head": st.sampled_from([None, 1, 2, 3, 6]),
        "pattern": st.sampled_from(
            ["full", "swa", "2:1", "full swa", "linear", "linear*2 swa full", "strided fixed", "star swa", "mswa full"]
        ),
        "window": st.one_of(st.integers(1, 20), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
        "n_sink": st.integers(0, 5),
        "sparse_block": st.integers(2, 5),
        "n_summary": st.integers(1, 2),
        "star_context": st.integers(0, 30),
        "kernel": st.sampled_from(["auto", "tiles", "masked"]),
        "attn_scale": st.sampled_from([None, 0.2]),
        "attn_softcap": st.sampled_from([None, 1.5]),
        "logit_softcap": st.sampled_from([None, 2.0]),
        "sink_logit": st.booleans(),
        "attn_gate": st.sampled_from(["none", "head", "channel"]),
        "norm": st.sampled_from(["rmsnorm", "rmsnorm+1", "layernorm"]),
        "norm_place": st.sampled_from(["pre", "post", "sandwich"]),
        "mlp": st.sampled_from(["swiglu", "geglu", "gelu", "gelu-tanh", "relu2"]),
        "tie_embeddings": st.booleans(),
        "scale_embeddings": st.booleans(),
    }
)
POSITIONS = st.sampled_from(  # of which one excludes another's numbers
    [
        {"position": "rope"},
        {"position": "rope", "rope_fraction": 0.5},
        {"position": "rope", "rope_scaling": "linear", "rope_factor": 4.0},
        {"position": "rope", "rope_scaling": "yarn", "rope_factor": 4.0, "rope_trained": 40, "rope_whole_ramp": True},
        {
            "position": by_kind("none", swa="rope"),
            "rope_scaling": by_kind("none", swa="yarn"),
            "rope_factor": by_kind(1.0, swa=2.0),
            "rope_trained": 40,
        },
        {"position": by_kind("none", swa="alibi", full="rope")},
        {"position": "alibi"},
        {"position": "none"},
        {"position": "learned", "block_size": 26},
    ]
)
QK_NORMS = st.sampled_from([{"qk_norm": False}, {}, {"qk_norm_over": "projection"}])
BIASES = st.sampled_from([{}, {"bias": True}, {"attn_bias": "qkv"}, {"attn_bias": "all"}])


def design(*parts: dict) -> dict:
    """The parts together, and as many windows for the heads of mswa layers as fit. Tiles know no sparse patterns."""
    whole = {key: value for part in parts for key, value in part.items()}
    if {"strided", "fixed", "star"} & set(whole["pattern"].split()):
        whole["kernel"] = "auto"
    return whole | {"head_windows": {1: (3,), 3: (2, 7, 4)}.get(whole["n_kv_head"], (2, 5))}


def fits(design: dict) -> bool:
    """Whether what mswa layers exclude is absent."""
    return "mswa" not in design["pattern"] or (design["position"] != "alibi" and "qk_norm_over" not in design)


designs = st.builds(design, DESIGNS, POSITIONS, QK_NORMS, BIASES).filter(fits)


def tiny_config(**overrides) -> ModelConfig:
    """A network of a millisecond: H=6, K=2, D=8, C=20, 28 hidden, 31 words, 2 layers."""
    return ModelConfig(**(SMALL | overrides))


def tiny_model(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> GPT:
    """Its weights are large and nothing is 0 or 1, so that every part moves the logits."""
    torch.manual_seed(seed)
    model = GPT(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.shape[-1] ** -0.5) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    return model


def make_sampler(*, n_vocab: int | None = None, temperature: float = 1.0, **params) -> Sampler:
    """A sampler that changes nothing unless it is told to."""
    return Sampler(SamplingParams(temperature=temperature, **params), n_vocab=n_vocab)
