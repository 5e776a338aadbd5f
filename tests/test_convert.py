"""Runs as directories of transformers and back: the logits, tokens and bits of an implementation that is not ours."""

import json
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import assert_equal, logits_in_chunks, random_tokens, save_run, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

import generate
import train
from configs.run_dir import RunDir
from data.exchange import read_tokenizer_json, write_tokenizer_json
from data.tokenizer import Tokenizer, make_tokenizer
from model.gpt import GPT
from model.optim import Optimizers
from model.step import Step
from scripts.convert import __main__ as convert

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
each_design = pytest.mark.parametrize("name", DESIGNS)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the oracle: install the test group")


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


def theirs(transformers, path: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, record_property) -> None:
    """No farther apart than 1e-4; how far is told with --junitxml (docs/convert.md)."""
    difference = (actual - expected).abs().max().item()
    record_property("largest difference", difference)
    assert difference <= 1e-4


@each_design
@torch.no_grad()
def test_exported_logits_equal_ours_past_three_windows(transformers, exported, name, record_property):
    ours, path = exported
    idx, oracle = random_tokens(3, T), theirs(transformers, path)
    assert type(oracle).__name__.startswith(name.split()[0].replace("OLMo", "Olmo").replace("-", ""))
    assert oracle.dtype == torch.float32
    assert_near(oracle(idx).logits, ours(idx), record_property)


@each_design
@torch.no_grad()
def test_greedy_decoding_with_both_caches_writes_the_same(transformers, exported, name, record_property):
    ours, path = exported
    prompt, oracle = random_tokens(4, 3), theirs(transformers, path)
    written = oracle.generate(prompt, max_new_tokens=T, do_sample=False, use_cache=True, eos_token_id=None)
    cache, idx = ours.new_cache(4, 3 + T), prompt
    logits = [ours(prompt, cache=cache, last_only=True)]
    for _ in range(T):
        new = logits[-1].argmax(dim=-1)  # (4, 1)
        idx = torch.cat((idx, new), dim=1)
        logits.append(ours(new, cache=cache))
    assert torch.equal(written, idx)
    assert_near(torch.cat(logits, dim=1), oracle(idx).logits[:, 2:], record_property)
    assert len(idx[:, 3:].unique()) > 3, "the text repeats one token"


@each_design
def test_round_trip_keeps_every_bit_and_every_setting(exported, name, tmp_path, program):
    ours, path = exported
    assert program(convert.main, "import", path, "--to", tmp_path / "back").code == 0
    back, tokenizer = RunDir.of(tmp_path / "back").load(tmp_path / "back")
    assert back.config.kinds == ours.config.kinds
    assert back.config.layers == ours.config.layers
    assert back.state_dict().keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
    assert tokenizer.encode("a naïve 日本 😀") == make_tokenizer("byte").encode("a naïve 日本 😀")
    again = tmp_path / "again"
    assert program(convert.main, "export", tmp_path / "back", "--to", again).code == 0
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (path / file).read_bytes()


@each_design
@torch.no_grad()
def test_what_transformers_saves_is_imported_with_its_logits(
    transformers, exported, name, tmp_path, program, record_property
):
    _, path = exported
    oracle, saved = theirs(transformers, path), tmp_path / "saved"
    for p in oracle.parameters():
        p.normal_(std=0.3)
    oracle.save_pretrained(saved, max_shard_size="20KB")
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(saved)
    assert (saved / "model.safetensors.index.json").is_file(), "it is to be in shards"
    ended = program(convert.main, "import", saved, "--to", tmp_path / "ours")
    assert (ended.code, ended.err) == (0, "")
    ours, _ = RunDir.of(tmp_path / "ours").load(tmp_path / "ours")
    idx = random_tokens(2, T)
    assert_near(logits_in_chunks(ours, idx, [5, 1, 11]), oracle(idx).logits, record_property)


@pytest.mark.parametrize("name", ["Qwen3 mixed, linear scaling"])
def test_imported_run_generates(exported, name, tmp_path, program):
    _, path = exported
    program(convert.main, "import", path, "--to", tmp_path / "back")
    ended = program(generate.main, tmp_path / "back", "--prompt", "abc", "--max-new-tokens", 30, "--check")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("abc")


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", ["Llama", "OLMo 3", "GPT-2"])
def test_imported_run_is_trained_on(exported, name, tmp_path, program, text):
    ours, path = exported
    program(convert.main, "import", path, "--to", tmp_path / "back")
    line = ("--data.text", text, "--data.dir", tmp_path / "data", "--out-dir", tmp_path, "--name", "tuned")
    numbers = ("--train.max-steps", 1, "--optim.muon-lr", 1e-12, "--optim.adamw-lr", 1e-12, "--device", "cpu")
    ended = program(train.main, tmp_path / "back" / "tune.toml", *line, *numbers, "--dtype", "float32")
    assert ended.code == 0, ended.err
    tuned, tokenizer = RunDir.of(tmp_path / "tuned").load(tmp_path / "tuned")
    assert tuned.config == RunDir.of(tmp_path / "back").config().model
    assert tokenizer.digest == Tokenizer.load(tmp_path / "back" / "tokenizer.json").digest
    for key, tensor in ours.state_dict().items():
        assert_equal(tuned.state_dict()[key], tensor, 1e-6)


@pytest.mark.parametrize("name", ["Llama"])
def test_bfloat16_export_is_the_rounded_weights(exported, name, tmp_path, program):
    ours, _ = exported
    program(convert.main, "export", tmp_path / "run", "--to", tmp_path / "half", "--dtype", "bfloat16")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], ours.wte.weight.bfloat16())
    config, weights = (tmp_path / "half" / name for name in ("config.json", "model.safetensors"))
    assert json.loads(config.read_text())["dtype"] == "bfloat16"
    assert weights.stat().st_mode == config.stat().st_mode, "others may read the one and not the other"


def test_gpt_oss_attention_equals_theirs(transformers, record_property):
    """Learned sinks, YaRN, biases; its experts are nothing that a dense layer could equal."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    numbers = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 24}
    rope = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "truncate": False}
    rope |= {"original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
    numbers |= {"sliding_window": W, "num_hidden_layers": 2, "rope_parameters": rope, "max_position_embeddings": 64}
    config = transformers.GptOssConfig(**numbers, attn_implementation="eager")
    design = {"pattern": "swa full", "window": W, "rope_base": 500.0, "sink_logit": True, "attn_bias": "all"}
    model = tiny_model(tiny_config(n_embd=24, qk_norm=False, **YARN, **design), dtype=torch.float32)
    x, step = torch.randn(2, T, 24), Step(pos=torch.arange(T)[None])
    causal = torch.arange(T)[:, None] - torch.arange(T)
    for i, block in enumerate(model.h):
        mixer, attention = block.mixer, GptOssAttention(config, layer_idx=i)
        names = {"c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_proj": "o_proj"}
        for ours, its in names.items():
            getattr(attention, its).load_state_dict(getattr(mixer, ours).state_dict())
        attention.sinks.data = mixer.sink_logit.data
        seen = (causal >= 0) & ((causal < W) | (i == 1))
        mask = torch.zeros(T, T).masked_fill(~seen, -torch.inf)[None, None]
        with torch.no_grad():
            expected, _ = attention(x, GptOssRotaryEmbedding(config)(x, step.pos), mask)
            assert_near(mixer(x, step), expected, record_property)


TEXTS = [
    "To be, or not to be: that is the question.\n\n  It's 12345 o'clock;\tnaïve 日本の猫 😀 paints “old” things…   ",
    "   \n\n \r\n  x\n",
    "don't DON'T we'LL 1234567 !!!???\n\n\n\tend   ",
    "def f(x):\n    return x ** 2  # squares\n\n\n",
    "\n",
    " ",
    "éèê ñ ß Ω я ج ไทย \u200b zero\u00a0width",
]


@pytest.mark.parametrize("kind", ["byte", "char", "bpe-400"])
def test_auto_tokenizer_gives_the_same_tokens(transformers, kind, tmp_path, program):
    ours = make_tokenizer(kind, lambda: iter(TEXTS * 20))
    save_run(tmp_path / "run", n_embd=24, vocab_size=ours.n_vocab)
    ours.save(tmp_path / "run" / "tokenizer.json")
    assert program(convert.main, "export", tmp_path / "run", "--to", tmp_path / "exported").code == 0
    assert program(convert.main, "import", tmp_path / "exported", "--to", tmp_path / "back").code == 0
    its = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    back = Tokenizer.load(tmp_path / "back" / "tokenizer.json")
    for text in TEXTS:
        ids = ours.encode(text)
        assert its.encode(text, add_special_tokens=False) == ids
        assert its.decode(ids, clean_up_tokenization_spaces=False) == text
        assert back.encode(text) == ids
    assert (its.eos_token_id, back.eot, back.n_vocab) == (ours.eot, ours.eot, ours.n_vocab)


@pytest.mark.parametrize("form", ["NFC", "NFKD"])
def test_a_normal_form_of_unicode_is_applied_and_kept(transformers, form, tmp_path):
    made = make_tokenizer("bpe-400", lambda: iter(TEXTS * 20))
    write_tokenizer_json(Tokenizer(made.encoding, form), tmp_path / "tokenizer.json")
    its = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    read_tokenizer_json(tmp_path / "tokenizer.json", name="its", end="<|endoftext|>").save(tmp_path / "ours.json")
    ours, composed = Tokenizer.load(tmp_path / "ours.json"), "naïve ﬁ é"
    decomposed = unicodedata.normalize("NFD", composed)
    assert ours.encode(composed) == ours.encode(decomposed) != made.encode(decomposed if form == "NFC" else composed)
    for text in (*TEXTS, composed, decomposed):
        assert its.encode(text, add_special_tokens=False) == ours.encode(text)
    assert ours.digest != made.digest


SHARED = Path(__file__).parents[2] / "shared" / "tiktoken"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="tiktoken's vocabularies are not here")
def test_gpt2s_vocabulary_gives_the_same_tokens_in_the_tokenizers_library(tmp_path, monkeypatch):
    import tokenizers

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED))
    ours = make_tokenizer("gpt2")
    write_tokenizer_json(ours, tmp_path / "tokenizer.json")
    its = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, Path(__file__).read_text(encoding="utf-8")]:
        assert its.encode(text, add_special_tokens=False).ids == ours.encode(text)
    assert its.token_to_id("<|endoftext|>") == ours.eot == 50256


@pytest.mark.parametrize(
    ("design", "parts"),
    [
        ({"attn_gate": "head"}, ["no class of transformers fits", "Qwen3 comes nearest", "attn_gate (head)"]),
        ({"position": "alibi"}, ["cannot say position (alibi)", "rope_base"]),
        (MIXED | {"window": (3, 5)}, ["Qwen3 comes nearest", "window ((3, 5))"]),
        (MIXED | {"n_sink": 2}, ["Qwen3 comes nearest", "n_sink (2)"]),
        ({"rope_fraction": 0.5}, ["Qwen3 comes nearest", "rope_fraction (0.5)"]),
        ({"sink_logit": True, "attn_softcap": 3.0}, ["sink_logit (True)", "attn_softcap (3.0)"]),
        ({"pattern": "strided", "sparse_block": 4}, ["pattern (strided)"]),
        ({"pattern": "swa", "window": 4, "global_tokens": (2,)}, ["global_tokens ((2,))"]),
        ({"pattern": "linear"}, ["pattern ('linear'): no class of transformers has linear layers"]),
        ({"mlp": "relu2"}, ["mlp (relu2)"]),
        ({"attn_bias": "qkv"}, ["attn_bias (qkv)"]),
        (GEMMA | {"attn_scale": 0.3}, ["Gemma 3 comes nearest", "attn_scale (0.3)"]),
        ({"n_embd": 20}, ["n_embd (20) must be a multiple of n_head (6)"]),
        ({"without": "its experts"}, ["without its experts (model.without)"]),
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
        ("no config.json", ["exported is no model that transformers wrote: it has no config.json"]),
        ("config.json damaged", ["config.json cannot be read"]),
        ("config.json a list", ["config.json is no object"]),
        ("no hidden_size", ["config.json does not say hidden_size"]),
        ("unknown architecture", ["model_type (mamba) is not known; known are llama, mistral, qwen3"]),
        ("unknown activation", ["hidden_act (relu) is no activation that Sash knows for Llama"]),
        ("unknown rope_type", ["rope_type (longrope) is not known; known are default, linear, yarn, llama3"]),
        ("other numbers of llama3", ["high_freq_factor (8.0) of the rotation is nothing that Sash has"]),
        ("numbers that do not fit", ["config.json: ", "n_head (6) must be divisible by n_kv_head (4)"]),
        (
            "another shape",
            ["model.layers.0.mlp.gate_proj.weight is (28, 24), and config.json makes it (30, 24)"],
        ),
        ("no weights", ["model.safetensors is missing: Sash reads safetensors"]),
        ("weights cut short", ["model.safetensors cannot be read", "copy it again"]),
        ("a tensor missing", ["the tensor model.norm.weight is missing"]),
        ("a tensor too many", ["the tensor model.layers.0.self_attn.sinks is nothing that llama has"]),
        ("a shard missing", ["model-00002-of-00002.safetensors is missing"]),
        ("no tokenizer", ["tokenizer.json is missing: the directory has no tokenizer that Sash reads"]),
        ("tokenizer damaged", ["tokenizer.json cannot be read as a tokenizer"]),
        ("no byte-level BPE", ["tokenizer.json is no byte-level BPE"]),
        ("a normalizer", ["its normalizer (Lowercase) is none that Sash has: NFC, NFD, NFKC, NFKD"]),
        ("no end-of-text", ["eos_token (None) is none of its added tokens (<|endoftext|>)"]),
        ("a smaller vocabulary than the tokenizer's", ["the tokenizer has 257 ids, the model 200"]),
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
            "exists and is not empty: give another --to"
        )
    program(convert.main, "import", tmp_path / "nowhere", "--to", tmp_path / "x").assert_refused("nowhere is no model")
    program(convert.main, "export", tmp_path / "nowhere", "--to", tmp_path / "x").assert_refused("nowhere is no run")


@pytest.mark.parametrize("name", ["Llama"])
def test_export_that_fails_leaves_nothing(exported, name, tmp_path, program, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scripts.convert.directory.write_tokenizer_json", fail)
    program(convert.main, "export", tmp_path / "run", "--to", tmp_path / "to").assert_refused("No space left")
    assert not list(tmp_path.glob("to*"))
