"""The benchmark of decoding: that all candidates compute the same, and that its figures are what they are called."""

import json

import pytest
import torch
from conftest import assert_equal, random_tokens, run_config

import train
from cli.options import validated
from model import cost
from model.device import memory_rate, resolve
from model.errors import UserError
from model.gpt import GPT
from scripts.bench import decode
from scripts.bench.decode_peers import Concatenated, Grown, Transformers

TINY = {"n_layer": 6, "n_embd": 24, "n_head": 6, "n_kv_head": 2, "vocab_size": 31, "window": 4}
TINY |= {"lengths": (12, 20), "new_tokens": 5, "rounds": 1, "dtype": "float32", "device": "cpu", "compile": "off"}
VARIANTS = ("mha", "gqa", "swa", "gqa+swa", "sliding")


def options(**changes) -> decode.Options:
    return decode.Options(**(TINY | changes))


def test_variants_are_the_layers_that_they_are_called():
    layers = {name: options().config(name).layers for name in VARIANTS}
    assert {name: sum(x.window == 4 for x in specs) for name, specs in layers.items()} == {
        "mha": 0,
        "gqa": 0,
        "swa": 5,
        "gqa+swa": 5,
        "sliding": 6,
    }
    assert {name: specs[0].n_kv_head for name, specs in layers.items()} == {
        "mha": 6,
        "gqa": 2,
        "swa": 6,
        "gqa+swa": 2,
        "sliding": 6,
    }


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_cache_that_grows_computes_the_same(variant):
    config = options().config(variant)
    torch.manual_seed(0)
    model, idx = GPT(config).double().eval(), random_tokens(2, 13)
    cache = model.new_cache(2, 13)
    expected = [model(column, cache=cache) for column in idx.split(1, dim=1)]
    cache.reset()
    empty = lambda spec: torch.zeros(2, spec.n_kv_head, 0, spec.head_dim, dtype=torch.float64)
    cache.layers = [Grown(empty(spec), empty(spec), spec.window) for spec in config.layers]
    got = [model(column, cache=cache) for column in idx.split(1, dim=1)]
    assert_equal(torch.cat(got), torch.cat(expected))


@pytest.mark.parametrize("variant", ["gqa", "gqa+swa"])
@torch.no_grad()
def test_what_transformers_decodes_has_our_shape_and_our_cache(variant):
    runtime, config = resolve("cpu", "float32"), options().config(variant)
    theirs = Transformers(options().batch_size, options().new_tokens, config, runtime, 12, static=False)
    assert sum(p.numel() for p in theirs.model.parameters()) == cost.n_params(config)
    theirs.prepare()
    theirs(3)
    tokens = [4 - 1 if spec.window else 11 + 3 for spec in config.layers]  # the window without the token itself
    assert theirs.cache_bytes == sum(2 * n * 2 * 4 * 4 for n in tokens)


@torch.no_grad()
def test_a_static_cache_has_all_its_slots_and_gives_the_same_logits(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    runtime, config = resolve("cpu", "float32"), options().config("swa")
    said, token = [], torch.zeros(1, 1, dtype=torch.long)
    for static in (False, True):
        theirs = Transformers(options().batch_size, options().new_tokens, config, runtime, 12, static=static)
        torch.manual_seed(1)
        theirs.prepare()
        said.append(theirs.forward(input_ids=token, past_key_values=theirs.cache, use_cache=True).logits)
    assert_equal(said[1], said[0], 1e-5)
    slots = [4 if spec.window else 12 + 5 for spec in config.layers]
    assert theirs.cache_bytes == sum(2 * n * 6 * 4 * 4 for n in slots)


@torch.no_grad()
def test_our_clock_starts_where_the_text_has_that_length():
    runtime, config = resolve("cpu", "float32"), options().config("swa")
    ours = decode.Ours(options(), config, runtime, 12, "as-dtype", "as-dtype")
    for _ in range(2):
        ours.prepare()
        ours(5)
        assert (ours.cache.length, ours.cache.pos.tolist()) == (11 + 5, [11 + 5])
    grown = Concatenated(options().batch_size, options().new_tokens, config, runtime, 12)
    grown.prepare()
    grown(5)
    assert grown.cache.length == 11 + 5
    assert [x.k.shape[2] for x in grown.cache.layers] == [4] * 5 + [16]


def test_decoding_is_measured_beside_its_peers(tmp_path, capsys):
    file, picture = tmp_path / "decode.json", tmp_path / "decode.png"
    peers = ("transformers", "concat")
    decode.decode(options(variants=("mha", "swa"), peer=peers, weights=("as-dtype", "int8"), json=file, plot=picture))
    found = json.loads(file.read_text())
    names = ["sash", "sash, int8 weights", *peers]
    assert [row["name"] for row in found["rows"]] == names * 4
    assert [row["length"] for row in found["rows"]] == [12] * 8 + [20] * 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    for row in found["rows"]:
        assert row["peak_bytes_above_weights"] >= row["cache_bytes"]
        if row["name"] == "sash":
            config = options().config(row["attention"])
            assert row["cache_bytes"] == cost.cache_bytes(config, row["length"] + 5, dtype=torch.float32)
            assert row["bytes_per_s"] == pytest.approx(row["read_bytes_per_token"] * row["tokens_per_s"])
            assert row["share_of_memory_rate"] == pytest.approx(row["bytes_per_s"] / found["memory_bytes_per_s"])
    assert "in 8 bits: not measured" in capsys.readouterr().out


@pytest.mark.usefixtures("unmeasured")
def test_what_eight_bits_change_of_a_trained_run_is_said(tmp_path, text, capsys):
    run = train.run(run_config(tmp_path, text)).path
    file = tmp_path / "decode.json"
    decode.decode(options(lengths=(4,), variants=("swa",), run=run, tokens=200, json=file))
    found = {row["int8"]: row["perplexity"] for row in json.loads(file.read_text())["perplexity"]}
    assert list(found) == ["nothing", "weights", "cache", "weights and cache"]
    assert len(set(found.values())) == 4
    assert all(x == pytest.approx(found["nothing"], rel=0.02) for x in found.values())
    assert "weights and cache" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"lengths": (12, 2)}, {"new_tokens": 2}, {"n_layer": 0}, {"rounds": 0}], ids=str)
def test_numbers_below_their_least_are_refused(changes):
    (name, value), *_ = changes.items()
    lowest = value[-1] if isinstance(value, tuple) else value
    with pytest.raises(UserError, match=rf"^--{name.replace('_', '-')} \({lowest}\) must be at least [13]$"):
        validated(decode.Options, TINY | changes)


def test_memory_is_read_at_a_rate_that_hardware_has():
    assert 1e8 < memory_rate(resolve("cpu", "float32"), seconds=0.05) < 1e13
