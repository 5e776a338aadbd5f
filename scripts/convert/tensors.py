"""Rename weights between Sash and transformers."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from model.errors import UserError

MODULES = {  # modules of a layer, without the second norm, whose name depends on norm_place
    "mixer.c_q": "self_attn.q_proj",
    "mixer.c_k": "self_attn.k_proj",
    "mixer.c_v": "self_attn.v_proj",
    "mixer.c_proj": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "norm_1": "input_layernorm",
    "out_norm_1": "post_attention_layernorm",
    "out_norm_2": "post_feedforward_layernorm",
}
SECOND_NORM = {"pre": "post_attention_layernorm", "sandwich": "pre_feedforward_layernorm", "post": ""}
OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
GPT2_MODULES = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "mixer.c_proj": "attn.c_proj",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
}
GPT2_OUTSIDE = {"wte": "transformer.wte", "wpe": "transformer.wpe", "ln_f": "transformer.ln_f", "lm_head": "lm_head"}
BUFFERS = re.compile(r"rotary_emb\.|\.attn\.(masked_)?bias$")  # not weights, but found in old files


def to_theirs(state: dict[str, Tensor], model_type: str, norm_place: str) -> dict[str, Tensor]:
    """Convert a state dict of Sash to the names and layouts of transformers."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if model_type == "gpt2":
            if ".mixer.c_q." in name:
                qkv = [state[name.replace("c_q", c)] for c in ("c_q", "c_k", "c_v")]
                theirs[_gpt2_name(name)] = torch.cat(qkv).T if name.endswith("weight") else torch.cat(qkv)
            elif ".mixer.c_k." not in name and ".mixer.c_v." not in name:
                theirs[_gpt2_name(name)] = tensor.T if _transposed(name) else tensor
        else:
            theirs[_name(name, norm_place)] = tensor
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


def to_ours(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], model_type: str, norm_place: str
) -> dict[str, Tensor]:
    """Convert weights of transformers to the names and shapes of `expected`. UserError if a tensor does not fit."""
    tensors = dict(_with_prefix(tensors, model_type))
    ours: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, like in expected.items():
        their_name = _gpt2_name(name) if model_type == "gpt2" else _name(name, norm_place)
        if their_name not in tensors:
            raise UserError(f"the tensor {their_name} is missing")
        tensor = tensors[their_name]
        used.add(their_name)
        if model_type == "gpt2" and re.search(r"mixer\.c_[qkv]\.", name):
            if tensor.shape[-1] % 3:
                raise UserError(
                    f"the tensor {their_name} is {tuple(tensor.shape)}: its columns must divide into q, k and v"
                )
            tensor = tensor.chunk(3, dim=-1)["qkv".index(name[name.index(".c_") + 3])]
        if model_type == "gpt2" and _transposed(name):
            tensor = tensor.T
        if tensor.shape != like.shape:
            raise UserError(
                f"the tensor {their_name} is {tuple(tensor.shape)}, but config.json requires {tuple(like.shape)}"
            )
        ours[name] = tensor.to(like.dtype).contiguous()
    if unused := tensors.keys() - used - {"lm_head.weight"}:
        raise UserError(f"the tensor {min(unused)} does not belong to a {model_type} model with this config.json")
    return ours


def _with_prefix(tensors: dict[str, Tensor], model_type: str) -> Iterator[tuple[str, Tensor]]:
    """Drop buffers, and add the prefix that the original GPT-2 files lack."""
    for name, tensor in tensors.items():
        if not BUFFERS.search(name):
            bare = model_type == "gpt2" and not name.startswith(("transformer.", "lm_head."))
            yield f"transformer.{name}" if bare else name, tensor


def _name(name: str, norm_place: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    theirs = SECOND_NORM[norm_place] if inner == "norm_2" else MODULES[inner]
    return f"model.layers.{layer}.{theirs}.{kind}"


def _gpt2_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in GPT2_OUTSIDE:
        return f"{GPT2_OUTSIDE[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    theirs = "attn.c_attn" if re.fullmatch(r"mixer\.c_[qkv]", inner) else GPT2_MODULES[inner]
    return f"transformer.h.{layer}.{theirs}.{kind}"


def _transposed(name: str) -> bool:
    """Whether GPT-2 stores this weight transposed (Conv1D)."""
    return bool(re.search(r"\.c_\w+\.weight$", name))
