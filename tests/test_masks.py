"""The picture of who sees whom, and the attention that is drawn in it."""

import pytest
import torch
from conftest import assert_equal, random_tokens, save_run
from networks import tiny_config, tiny_model

from model.attention.mask import attention_mask
from model.mixers.attention import Attention
from scripts import masks
from scripts.masks import weights_of

T = 19


@pytest.mark.parametrize(
    "design",
    [
        {"pattern": "swa full", "window": 4, "n_sink": 1},
        {"pattern": "swa", "window": 4, "sink_logit": True, "attn_gate": "channel", "position": "alibi"},
        {"pattern": "strided", "sparse_block": 3, "n_kv_head": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_weights_are_where_keys_are_visible_and_give_the_layers_output(design):
    model = tiny_model(tiny_config(**design))
    for block in model.h:
        mixer, found = block.mixer, {}
        assert isinstance(mixer, Attention)
        mixer.register_forward_hook(lambda m, args, out, found=found: found.update(args=args, out=out))
        model(random_tokens(1, T))
        weights = weights_of(mixer, found["args"]).double()  # (H, T, T)
        seen = attention_mask(torch.arange(T)[None], torch.arange(T)[None], mixer.spec)[0]
        assert torch.equal(weights > 0, seen.expand(6, -1, -1))
        total = weights.sum(dim=-1)
        assert (total < 1).all() if mixer.sink_logit is not None else torch.allclose(total, torch.ones(6, T).double())
        x = found["args"][0]
        v = mixer.c_v(x).view(T, -1, 8).transpose(0, 1).repeat_interleave(6 // mixer.spec.n_kv_head, dim=0)
        y = (weights @ v).transpose(0, 1).flatten(1)  # (T, H D)
        if mixer.c_gate is not None:
            y = y * torch.sigmoid(mixer.c_gate(x))[0]
        assert_equal(mixer.c_proj(y)[None], found["out"], 1e-5)


def test_each_kind_of_layer_of_a_config_is_drawn_with_its_pairs(tmp_path, program):
    config = tmp_path / "mixed.toml"
    config.write_text('[model]\npattern = "swa*2 full"\nn_layer = 6\nn_head = 4\nn_embd = 32\nwindow = [3, 5]\n')
    ended = program(masks.main, config, "--tokens", 10, "--to", tmp_path / "masks.png")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[:3] == [
        "swa, window 3 (layer 0, 3): 27 of 55 pairs of 10 positions are visible",
        "swa, window 5 (layer 1, 4): 40 of 55 pairs of 10 positions are visible",
        "full (layer 2, 5): 55 of 55 pairs of 10 positions are visible",
    ]
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("design", [{"pattern": "swa linear", "window": 3}, {"position": "learned"}], ids=str)
def test_what_a_run_pays_is_drawn_too(design, tmp_path, program):
    save_run(tmp_path / "run", **design)
    ended = program(masks.main, "--run", tmp_path / "run", "--to", tmp_path / "masks.png")
    assert (ended.code, ended.err) == (0, "")
    assert (tmp_path / "masks.png").stat().st_size > 10_000


def test_what_cannot_be_drawn_is_one_line(tmp_path, program):
    program(masks.main).assert_refused("a config and --run exclude each other, and neither was given: give one of them")
    program(masks.main, "configs/demo.toml", "--tokens", 1).assert_refused("--tokens (1) must be at least 2")
    program(masks.main, "configs/demo.toml", "--to", "a.bmp").assert_refused(
        "--to (a.bmp) must end in .png, .svg or .pdf"
    )
    program(masks.main, "--run", tmp_path).assert_refused("is not a run")
    save_run(tmp_path / "run")
    program(masks.main, "--run", tmp_path / "run", "--text", "a").assert_refused("--text has 1 tokens")
