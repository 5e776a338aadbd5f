"""Runs of every family that transformers has a class for, and the directories made of them."""

from pathlib import Path

import pytest
import torch
from conftest import save_run

from artifacts.run_dir import RunDir
from model.gpt import GPT
from scripts.convert import __main__ as convert
from training.optim import Optimizers

T, W = 29, 8  # more than three windows
LIKE_LLAMA = {"qk_norm": False, "tie_embeddings": False, "rope_base": 500.0, "norm_eps": 1e-5, "n_layer": 3}
GEMMA = {"norm": "rmsnorm+1", "norm_place": "sandwich", "mlp": "geglu", "scale_embeddings": True}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_trained": 16}
MIXED = {"pattern": "2:1", "window": W, "n_layer": 4}
GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "bias": True,
    "qk_norm": False,
    "mlp": "gelu-tanh",
    "head_dim": None,
    "n_kv_head": None,
    "block_size": 64,
}
DESIGNS = {
    "Llama": LIKE_LLAMA,
    "Llama tied, biases, yarn": LIKE_LLAMA | YARN | {"tie_embeddings": True, "bias": True},
    "Llama 3.1": LIKE_LLAMA | {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_trained": 64},
    "Mistral": LIKE_LLAMA | {"pattern": "swa", "window": W},
    "Qwen3": LIKE_LLAMA | {"qk_norm": True, "attn_bias": "all"},
    "Qwen3 mixed, linear scaling": MIXED | {"rope_scaling": "linear", "rope_factor": 2.0},
    "Gemma 2": GEMMA | MIXED | {"qk_norm": False, "attn_softcap": 2.0, "logit_softcap": 3.0, "attn_scale": 0.25},
    "Gemma 3": GEMMA
    | MIXED
    | {
        "rope_base": {"swa": 100.0, "full": 1e4},
        "rope_scaling": {"swa": "none", "full": "linear"},
        "rope_factor": {"swa": 1.0, "full": 8.0},
    },
    "OLMo 3": MIXED
    | YARN
    | {
        "head_dim": None,
        "qk_norm_over": "projection",
        "norm_place": "post",
        "rope_whole_ramp": True,
        "rope_scaling": {"swa": "none", "full": "yarn"},
        "rope_factor": {"swa": 1.0, "full": 4.0},
    },
    "GPT-2": GPT2,
    "GPT-2 untied, gelu": GPT2 | {"mlp": "gelu", "tie_embeddings": False},
}


@pytest.fixture
def exported(tmp_path, name, program) -> tuple[GPT, Path]:
    """A run of random weights, and the directory made of it."""
    model, to = save_run(tmp_path / "run", **{"n_embd": 24} | DESIGNS[name]), tmp_path / "exported"
    with torch.no_grad():
        for table in filter(None, (model.wte, model.wpe)):
            table.weight *= 8  # or biases decide, and greedy text repeats one token
    RunDir(tmp_path / "run").save(model, Optimizers([torch.optim.AdamW(model.parameters())]), {"step": 4}, best=True)
    ended = program(convert.main, "export", tmp_path / "run", "--to", to)
    assert (ended.code, ended.err) == (0, "")
    return model, to
