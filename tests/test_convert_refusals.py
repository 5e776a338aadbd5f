"""What cannot be exported or imported: one line, and nothing left behind."""

import json
from pathlib import Path

import pytest
import torch
from conftest import save_run
from exported import GEMMA, MIXED
from safetensors.torch import load_file, save_file

from scripts.convert import __main__ as convert


@pytest.mark.parametrize(
    ("design", "parts"),
    [
        ({"attn_gate": "head"}, ["no class of transformers fits", "the nearest is Qwen3", "attn_gate (head)"]),
        ({"position": "alibi"}, ["does not support position (alibi)", "rope_base"]),
        (MIXED | {"window": (3, 5)}, ["the nearest is Qwen3", "window ((3, 5))"]),
        (MIXED | {"n_sink": 2}, ["the nearest is Qwen3", "n_sink (2)"]),
        ({"rope_fraction": 0.5}, ["the nearest is Qwen3", "rope_fraction (0.5)"]),
        ({"sink_logit": True, "attn_softcap": 3.0}, ["sink_logit (True)", "attn_softcap (3.0)"]),
        ({"pattern": "strided", "sparse_block": 4}, ["pattern (strided)"]),
        ({"pattern": "swa", "window": 4, "global_tokens": (2,)}, ["global_tokens ((2,))"]),
        ({"pattern": "linear"}, ["pattern ('linear'): no supported class of transformers has linear layers"]),
        ({"mlp": "relu2"}, ["mlp (relu2)"]),
        ({"attn_bias": "qkv"}, ["attn_bias (qkv)"]),
        (GEMMA | {"attn_scale": 0.3}, ["the nearest is Gemma 3", "attn_scale (0.3)"]),
        ({"n_embd": 20}, ["n_embd (20) must be a multiple of n_head (6)"]),
        ({"omits": "its experts"}, ["model.omits (its experts) must be none for transformers"]),
    ],
    ids=str,
)
def test_export_names_what_no_class_can_say(design, parts, tmp_path, program):
    save_run(tmp_path / "run", **{"n_embd": 24} | design)
    program(convert.main, "export", tmp_path / "run", "--to", tmp_path / "to").assert_refused(*parts)
    assert not (tmp_path / "to").exists()


def broken(path: Path, how: str) -> None:
    """Something that is wrong with a directory that was right."""
    config, tokenizer = path / "config.json", path / "tokenizer.json"
    values, tensors = json.loads(config.read_text()), load_file(path / "model.safetensors")
    match how:
        case "no config.json":
            config.unlink()
        case "config.json damaged":
            config.write_text("{")
        case "config.json a list":
            config.write_text("[]")
        case "no hidden_size":
            config.write_text(json.dumps({key: value for key, value in values.items() if key != "hidden_size"}))
        case "unknown architecture":
            config.write_text(json.dumps(values | {"model_type": "mamba"}))
        case "unknown activation":
            config.write_text(json.dumps(values | {"hidden_act": "relu"}))
        case "unknown rope_type":
            config.write_text(json.dumps(values | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}))
        case "other numbers of llama3":
            rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "high_freq_factor": 8.0}
            rope["original_max_position_embeddings"] = 64
            config.write_text(json.dumps(values | {"rope_parameters": rope}))
        case "numbers that do not fit":
            config.write_text(json.dumps(values | {"num_key_value_heads": 4}))
        case "another shape":
            config.write_text(json.dumps(values | {"intermediate_size": 30}))
        case "no weights":
            (path / "model.safetensors").unlink()
        case "weights cut short":
            whole = (path / "model.safetensors").read_bytes()
            (path / "model.safetensors").write_bytes(whole[:-9])
        case "a tensor missing":
            del tensors["model.norm.weight"]
            save_file(tensors, path / "model.safetensors")
        case "a tensor too many":
            save_file(tensors | {"model.layers.0.self_attn.sinks": torch.zeros(6)}, path / "model.safetensors")
        case "a shard missing":
            shards = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(tensors)}
            index = {"weight_map": shards}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
            save_file(tensors, path / "model-00001-of-00002.safetensors")
        case "no tokenizer":
            tokenizer.unlink()
        case "tokenizer damaged":
            tokenizer.write_text("{}")
        case "no byte-level BPE":
            content = json.loads(tokenizer.read_text()) | {"pre_tokenizer": {"type": "Metaspace"}}
            tokenizer.write_text(json.dumps(content))
        case "a normalizer":
            content = json.loads(tokenizer.read_text()) | {"normalizer": {"type": "Lowercase"}}
            tokenizer.write_text(json.dumps(content))
        case "no end-of-text":
            (path / "tokenizer_config.json").unlink()
        case "a smaller vocabulary than the tokenizer's":
            config.write_text(json.dumps(values | {"vocab_size": 200}))


@pytest.mark.parametrize("name", ["Llama"])
@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("no config.json", ["exported is not a model directory of transformers: it has no config.json"]),
        ("config.json damaged", ["config.json cannot be read"]),
        ("config.json a list", ["config.json must be a JSON object"]),
        ("no hidden_size", ["config.json: hidden_size is missing"]),
        ("unknown architecture", ["model_type (mamba) is not supported: it must be one of llama, mistral, qwen3"]),
        ("unknown activation", ["hidden_act (relu) is not supported for Llama: it must be one of silu"]),
        (
            "unknown rope_type",
            ["rope_type (longrope) is not supported: it must be one of default, linear, yarn, llama3"],
        ),
        ("other numbers of llama3", ["high_freq_factor (8.0) in rope_parameters is not supported: it must be 4.0"]),
        ("numbers that do not fit", ["config.json: ", "n_head (6) must be divisible by n_kv_head (4)"]),
        (
            "another shape",
            ["model.layers.0.mlp.gate_proj.weight is (28, 24), but config.json requires (30, 24)"],
        ),
        ("no weights", ["model.safetensors is missing: Sash needs all safetensors files"]),
        ("weights cut short", ["model.safetensors cannot be read", "copy it again"]),
        ("a tensor missing", ["the tensor model.norm.weight is missing"]),
        ("a tensor too many", ["the tensor model.layers.0.self_attn.sinks does not belong to a llama model"]),
        ("a shard missing", ["model-00002-of-00002.safetensors is missing"]),
        ("no tokenizer", ["tokenizer.json is missing: the directory has no tokenizer that Sash can read"]),
        ("tokenizer damaged", ["tokenizer.json cannot be read as a tokenizer"]),
        ("no byte-level BPE", ["tokenizer.json is not a byte-level BPE tokenizer"]),
        ("a normalizer", ["normalizer (Lowercase) must be none or one of NFC, NFD, NFKC, NFKD"]),
        ("no end-of-text", ["eos_token (None) must be one of the added tokens (<|endoftext|>)"]),
        ("a smaller vocabulary than the tokenizer's", ["the tokenizer has 257 ids, the model only 200"]),
    ],
)
def test_bad_directory_is_one_line_and_leaves_nothing(exported, name, how, parts, tmp_path, program):
    _, path = exported
    broken(path, how)
    program(convert.main, "import", path, "--to", tmp_path / "runs" / "new").assert_refused(*parts)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("name", ["Llama"])
def test_nothing_that_exists_is_overwritten(exported, name, tmp_path, program):
    _, path = exported
    for command, source in (("export", tmp_path / "run"), ("import", path)):
        program(convert.main, command, source, "--to", path).assert_refused(
            f"--to ({path}) must be a new or an empty directory"
        )
    program(convert.main, "import", tmp_path / "nowhere", "--to", tmp_path / "x").assert_refused(
        "nowhere is not a model"
    )
    program(convert.main, "export", tmp_path / "nowhere", "--to", tmp_path / "x").assert_refused("nowhere is not a run")


@pytest.mark.parametrize("name", ["Llama"])
def test_export_that_fails_leaves_nothing(exported, name, tmp_path, program, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scripts.convert.directory.write_tokenizer_json", fail)
    program(convert.main, "export", tmp_path / "run", "--to", tmp_path / "to").assert_refused("No space left")
    assert not list(tmp_path.glob("to*"))
