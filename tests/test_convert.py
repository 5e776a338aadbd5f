"""Runs as directories of transformers and back: the logits, tokens and bits of an implementation that is not ours."""

import json
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import assert_equal, logits_in_chunks, random_tokens, save_run
from exported import DESIGNS, YARN, T, W
from networks import tiny_config, tiny_model
from safetensors.torch import load_file

import generate
import train
from artifacts.run_dir import RunDir
from data.huggingface_tokenizer import read_tokenizer_json, write_tokenizer_json
from data.tokenizer import Tokenizer, make_tokenizer
from model.context import ForwardContext
from scripts.convert import __main__ as convert

each_design = pytest.mark.parametrize("name", DESIGNS)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the oracle: install the test group")


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
    x, step = torch.randn(2, T, 24), ForwardContext(pos=torch.arange(T)[None])
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
