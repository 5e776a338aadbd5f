import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from data import bpe, pydocs, tokenizer
from data.tokenizer import EOT, Tokenizer, make_tokenizer
from model.errors import UserError

MIXED = "Hello, wörld!  It's 12345 — 日本語 “quoted” 😀\r\n\n\tx = [1, 2]  # ٣٤٥\u0085\u2028 a\u0301"
PROSE = "".join(f"The {i}th of 1{i}0 naïve cats wasn't   there; she'll say “日本語” — maybe.\n\n" for i in range(60))
SHARED = Path(__file__).parents[2] / "shared" / "tiktoken"


def made(name: str) -> Tokenizer:
    return make_tokenizer(name, lambda: iter([MIXED, PROSE]))


@pytest.mark.parametrize("name", ["byte", "char", "bpe-257", "bpe-300", "bpe-700"])
def test_text_survives_encoding_and_decoding(name):
    tokenizer = made(name)
    for text in (MIXED, PROSE, ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["byte", "char", "bpe-300"])
def test_every_tokenizer_has_end_of_text_as_its_last_id_and_never_makes_it_from_text(name):
    tokenizer = make_tokenizer(name, lambda: iter([MIXED + EOT]))
    assert tokenizer.eot == tokenizer.n_vocab - 1
    assert tokenizer.decode([tokenizer.eot]) == EOT
    assert tokenizer.eot not in tokenizer.encode(EOT)


def test_byte_ids_are_the_bytes():
    assert made("byte").encode(MIXED) == list(MIXED.encode())
    assert made("byte").n_vocab == 257


def test_char_has_one_id_for_each_byte_that_occurs_in_byte_order():
    tokenizer = make_tokenizer("char", lambda: iter(["cab\n", "bad é"]))  # bytes: \n space a b c d c3 a9
    assert tokenizer.n_vocab == 8 + 1
    assert [tokenizer.decode_bytes([i]) for i in range(8)] == [b"\n", b" ", b"a", b"b", b"c", b"d", b"\xa9", b"\xc3"]


def test_char_names_the_character_that_it_cannot_write():
    tokenizer = make_tokenizer("char", lambda: iter(["abc"]))
    with pytest.raises(UserError) as error:
        tokenizer.encode("abcéd")
    assert str(error.value) == (
        "the character 'é' (byte 0xc3) never occurred in the text that this char tokenizer was made from; "
        "leave it out, or train with the tokenizer byte or bpe-4096"
    )


@pytest.mark.parametrize("text", ["lone \ud800 surrogate", " " * 1_000_000 + "x", "\n" * 1_000_000 + " y"])
def test_text_that_tiktoken_cannot_take_is_encoded(text):
    written = text.replace("\ud800", "\ufffd")
    assert made("bpe-300").decode(made("bpe-300").encode(text)) == written


def test_learning_from_a_page_of_blanks_does_not_take_forever():
    start = time.process_time()  # a busy machine costs other time
    assert make_tokenizer("bpe-300", lambda: iter([" " * 200_000 + "x"])).n_vocab <= 300
    assert time.process_time() - start < 5


@pytest.mark.slow
def test_learned_bpe_encodes_as_the_library_that_learned_it():
    documents = list(pydocs.documents())
    corpus = documents[:40]
    library = bpe.learn(corpus, n_ranks=1999)
    ours = make_tokenizer("bpe-2000", lambda: iter(corpus))
    letter_of = {byte: letter for letter, byte in bpe.byte_of_letter().items()}
    for held_out in (MIXED, PROSE, *documents[40:60]):
        tokens = [ours.decode_bytes([i]) for i in ours.encode(held_out)]
        assert ["".join(letter_of[byte] for byte in token) for token in tokens] == library.encode(held_out).tokens


def test_learning_twice_gives_the_same_vocabulary():
    assert made("bpe-500").digest == made("bpe-500").digest


def test_bpe_has_the_asked_number_of_ids_and_tells_the_true_one_for_a_small_text():
    assert (made("bpe-300").n_vocab, made("bpe-300").name) == (300, "bpe-300")
    small = make_tokenizer("bpe-4096", lambda: iter(["abab abab"]))
    assert small.n_vocab < 270
    assert small.name == f"bpe-{small.n_vocab}"


def test_bpe_learns_from_no_more_than_the_head_of_a_large_text(monkeypatch):
    monkeypatch.setattr(bpe, "LEARN_BYTES", len(PROSE.encode()))

    def endless():
        while True:
            yield PROSE

    assert make_tokenizer("bpe-400", endless).digest == make_tokenizer("bpe-400", lambda: iter([PROSE])).digest


def test_token_bytes_counts_utf8_bytes_and_nothing_for_special_tokens():
    char = make_tokenizer("char", lambda: iter(["aé"]))
    assert char.token_bytes().tolist() == [1, 1, 1, 0]
    bpe_300 = made("bpe-300")
    assert bpe_300.token_bytes().dtype == np.int32
    assert bpe_300.token_bytes()[bpe_300.encode(PROSE)].sum() == len(PROSE.encode())


def test_batch_encodes_as_one_by_one():
    tokenizer = made("bpe-300")
    texts = [MIXED, "", PROSE, "x"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("name", ["byte", "char", "bpe-300"])
def test_saved_tokenizer_loads_as_it_was(name, tmp_path):
    tokenizer = made(name)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.name, loaded.digest, loaded.n_vocab, loaded.eot) == (
        name,
        tokenizer.digest,
        tokenizer.n_vocab,
        tokenizer.eot,
    )
    assert loaded.encode(MIXED) == tokenizer.encode(MIXED)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_digest_tells_vocabularies_apart():
    assert len({made(name).digest for name in ("byte", "char", "bpe-300", "bpe-301")}) == 4


def damage_json(saved: bytes) -> bytes:
    return saved[: len(saved) // 2]


def damage_token(saved: bytes) -> bytes:
    content = json.loads(saved)
    content["tokens"][-1] = content["tokens"][0] + "AAAA"
    return json.dumps(content).encode()


def damage_pattern(saved: bytes) -> bytes:
    return json.dumps(json.loads(saved) | {"pattern": "("}).encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_json, "damaged, not JSON; copy it again"),
        (damage_token, "damaged, its digest is"),
        (damage_pattern, "damaged (ValueError("),
        (lambda saved: b"{}", "not a tokenizer saved by Sash"),
        (lambda saved: b"[]", "not a tokenizer saved by Sash"),
    ],
)
def test_damaged_tokenizer_file_is_refused_in_one_line(damage, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    made("bpe-300").save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        Tokenizer.load(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_missing_tokenizer_file_is_a_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json: the tokenizer cannot be read \(No such file or directory\)"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gpt3",
            "tokenizer 'gpt3' must be one of byte, char, gpt2, cl100k_base, o200k_base, bpe-4096 (or another bpe-N); "
            "did you mean gpt2?",
        ),
        (
            "zzz",
            "tokenizer 'zzz' must be one of byte, char, gpt2, cl100k_base, o200k_base, bpe-4096 (or another bpe-N); "
            "choose one of them",
        ),
        ("bpe-256", "tokenizer bpe-256: the size must be at least 257: the 256 bytes and end-of-text"),
        ("char", "tokenizer char must be trained on a text; give one, or use byte, which needs no training"),
    ],
)
def test_names_that_cannot_be_made_get_one_line(name, message):
    with pytest.raises(UserError) as error:
        make_tokenizer(name)
    assert str(error.value) == message


def test_offline_tiktoken_vocabulary_is_one_line_with_advice(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer, "reachable", lambda url: False)
    with pytest.raises(UserError) as error:
        make_tokenizer("cl100k_base")
    assert str(error.value) == (
        f"tokenizer cl100k_base is not in {tmp_path} and cannot be downloaded (no network); set TIKTOKEN_CACHE_DIR to "
        "a folder that contains it, or use the tokenizer byte or bpe-4096, which need no network"
    )


def test_our_tiktoken_cache_is_used_only_where_the_user_has_none_and_only_for_the_time_of_use(tmp_path, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr(tokenizer, "TIKTOKEN_CACHE", tmp_path / "ours")
    monkeypatch.setattr(tokenizer, "reachable", lambda url: False)
    with pytest.raises(UserError, match="ours"):
        make_tokenizer("cl100k_base")
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


@pytest.fixture
def gpt2(monkeypatch) -> Tokenizer:
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not SHARED.is_dir():
            pytest.skip("GPT-2's vocabulary is not here: TIKTOKEN_CACHE_DIR is not set")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED))
    return make_tokenizer("gpt2")


def test_gpt2_is_the_vocabulary_that_everybody_knows(gpt2, tmp_path):
    assert (gpt2.n_vocab, gpt2.eot) == (50257, 50256)
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.token_bytes()[[31373, 995, 50256]].tolist() == [5, 6, 0]
    gpt2.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(MIXED) == gpt2.encode(MIXED)


def test_ids_without_a_token_decode_to_nothing():
    gap = tokenizer._make("gap", tokenizer._ANYTHING, {b"a": 0, b"b": 1}, {EOT: 4})
    assert (gap.n_vocab, gap.decode([0, 2, 3, 1])) == (5, "ab")
    assert gap.token_bytes().tolist() == [1, 1, 0, 0, 0]
