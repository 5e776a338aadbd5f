"""Tokenizers: bytes, characters, trained BPE and tiktoken's, all as a `tiktoken.Encoding` with an end-of-text token."""

import base64
import difflib
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken

from data.atomic import write_atomically
from data.bpe import PATTERN, learn_ranks
from data.network import reachable
from data.text import encodable
from model.errors import UserError

EOT = "<|endoftext|>"
NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
TIKTOKEN_CACHE = Path(__file__).parent / "cache" / "tiktoken"

_TIKTOKEN_URLS = {
    "gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
    "cl100k_base": ("encodings/cl100k_base.tiktoken",),
    "o200k_base": ("encodings/o200k_base.tiktoken",),
}
_TIKTOKEN_HOST = "https://openaipublic.blob.core.windows.net/"

_ANYTHING = r"[\s\S]{1,64}"  # byte and char tokenizers need no pre-tokenization; short pieces are fastest
_LONG_BLANK = re.compile(r"(\s{100000})")  # tiktoken's regex engine overflows on about 400,000 blanks in a row
_FORMAT = "sash-tokenizer-1"


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; `encode` treats the string `<|endoftext|>` as ordinary text."""

    encoding: tiktoken.Encoding
    normal_form: NormalForm | None = None  # Unicode normalization before encoding (NFC for Qwen); None: none

    @property
    def name(self) -> str:
        """Name of the vocabulary: "gpt2", "byte", "char", "bpe-4096"."""
        return self.encoding.name

    @property
    def n_vocab(self) -> int:
        """Number of ids, including end-of-text and ids without a token."""
        return self.encoding.n_vocab

    @property
    def eot(self) -> int:
        """Id of the end-of-text token."""
        return self.encoding.eot_token

    @cached_property
    def digest(self) -> str:
        """Hash of pattern, ranks and special tokens: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text. UserError for a character that is not in the vocabulary."""
        text = encodable(text)
        if self.normal_form is not None:
            text = unicodedata.normalize(self.normal_form, text)
        self._check_writable(text)
        if len(text) < 100_000:
            return self.encoding.encode_ordinary(text)
        return [token for part in _LONG_BLANK.split(text) if part for token in self.encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts in parallel threads."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self.encode, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; ids without a token are skipped."""
        return self.encoding.decode_bytes([token for token in ids if token not in self._unused])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of each token, (n_vocab,) int32; 0 for special tokens."""
        counts = np.zeros(self.n_vocab, dtype=np.int32)
        for token, rank in self._ranks.items():
            counts[rank] = len(token)
        return counts

    def save(self, path: Path | str) -> None:
        """Write a self-contained file, from which `load` needs no network."""
        write_atomically(Path(path), json.dumps(self._content() | {"name": self.name, "digest": self.digest}).encode())

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a file written by `save`. UserError if it is missing or damaged."""
        try:
            saved = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise UserError(
                f"{path}: the tokenizer cannot be read ({error.strerror}); prepare the text again"
            ) from None
        except ValueError:
            raise UserError(f"{path}: damaged, not JSON; copy it again, or prepare the text again") from None
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise UserError(f"{path}: not a tokenizer saved by Sash; prepare the text again")
        try:
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(saved["tokens"])}
            tokenizer = _make(saved["name"], saved["pattern"], ranks, saved["special_tokens"], saved.get("normal_form"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error!r}); copy it again, or prepare the text again") from None
        if tokenizer.digest != saved.get("digest"):
            raise UserError(
                f"{path}: damaged, its digest is {tokenizer.digest}, not {saved.get('digest')}; copy it again"
            )
        return tokenizer

    @property
    def _ranks(self) -> dict[bytes, int]:
        return self.encoding._mergeable_ranks

    def _content(self) -> dict[str, object]:
        tokens = [base64.b64encode(token).decode() for token in sorted(self._ranks, key=self._ranks.__getitem__)]
        special = self.encoding._special_tokens
        content: dict[str, object] = {
            "format": _FORMAT,
            "pattern": self.encoding._pat_str,
            "special_tokens": special,
            "tokens": tokens,
        }
        return content if self.normal_form is None else content | {"normal_form": self.normal_form}

    @cached_property
    def _unused(self) -> frozenset[int]:
        used = {*self._ranks.values(), *self.encoding._special_tokens.values()}
        return frozenset(range(self.n_vocab)) - used

    @cached_property
    def _unwritable(self) -> frozenset[int]:
        """Bytes that are not in the vocabulary; tiktoken would panic on them."""
        return frozenset(value for value in range(256) if bytes([value]) not in self._ranks)

    def _check_writable(self, text: str) -> None:
        if not self._unwritable or self._unwritable.isdisjoint(text.encode()):
            return
        character = next(character for character in text if not self._unwritable.isdisjoint(character.encode()))
        byte = next(byte for byte in character.encode() if byte in self._unwritable)
        raise UserError(
            f"the character {character!r} (byte {byte:#04x}) never occurred in the text that this {self.name} "
            "tokenizer was made from; leave it out, or train with the tokenizer byte or bpe-4096"
        )


def make_tokenizer(name: str, corpus: Callable[[], Iterator[str]] | None = None) -> Tokenizer:
    """Make a tokenizer by name, or load a saved one by its path; `char` and `bpe-N` are trained on the corpus.

    `bpe-N` has N ids, including end-of-text. A corpus too small for N gives fewer, and the name says how many.
    """
    check_name(name)
    if file := saved_file(name):
        return Tokenizer.load(file)
    if name in _TIKTOKEN_URLS:
        return Tokenizer(_from_tiktoken(name))
    if name == "byte":
        return _make(name, _ANYTHING, {bytes([value]): value for value in range(256)})
    if corpus is None:
        raise UserError(f"tokenizer {name} must be trained on a text; give one, or use byte, which needs no training")
    if name == "char":
        seen: set[int] = set()
        for text in corpus():
            seen.update(text.encode())
        if not seen:
            raise UserError("tokenizer char: the text to make it from is empty")
        return _make(name, _ANYTHING, {bytes([value]): rank for rank, value in enumerate(sorted(seen))})
    ranks = learn_ranks(corpus(), n_ranks=int(name.removeprefix("bpe-")) - 1)
    return _make(f"bpe-{len(ranks) + 1}", PATTERN, ranks)


def saved_file(name: str) -> Path | None:
    """The file of a tokenizer named by a path, to a run's directory or to the file; None for all other names."""
    if "/" not in name and os.sep not in name and not name.endswith(".json"):
        return None
    path = Path(name)
    return path if path.suffix == ".json" else path / "tokenizer.json"


def check_name(name: str) -> None:
    """Raise a UserError unless `make_tokenizer` knows the name."""
    if file := saved_file(name):
        if not file.is_file():
            raise UserError(f"tokenizer {name}: there is no {file}; give the directory of a run")
        return
    known = ("byte", "char", *_TIKTOKEN_URLS, "bpe-4096")
    size = re.fullmatch(r"bpe-(\d+)", name)
    if size and int(size[1]) < 257:
        raise UserError(f"tokenizer {name}: the size must be at least 257: the 256 bytes and end-of-text")
    if not size and name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]}?" if near else "choose one of them"
        raise UserError(f"tokenizer {name!r} must be one of {', '.join(known)} (or another bpe-N); {advice}")


def _make(
    name: str,
    pattern: str,
    ranks: dict[bytes, int],
    special: dict[str, int] | None = None,
    normal_form: NormalForm | None = None,
) -> Tokenizer:
    special = special or {EOT: len(ranks)}
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(encoding, normal_form)


def _from_tiktoken(name: str) -> tiktoken.Encoding:
    """Load one of tiktoken's vocabularies from the cache, or download it there."""
    own_cache = not {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"} & set(os.environ)
    if own_cache:
        os.environ["TIKTOKEN_CACHE_DIR"] = str(TIKTOKEN_CACHE)
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or TIKTOKEN_CACHE)
    urls = [_TIKTOKEN_HOST + path for path in _TIKTOKEN_URLS[name]]
    cached = all((folder / hashlib.sha1(url.encode()).hexdigest()).exists() for url in urls)
    try:
        if not cached and not reachable(_TIKTOKEN_HOST):
            raise ConnectionError("no network")
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer {name} is not in {folder} and cannot be downloaded ({error}); set TIKTOKEN_CACHE_DIR to a "
            "folder that contains it, or use the tokenizer byte or bpe-4096, which need no network"
        ) from None
    finally:
        if own_cache:
            del os.environ["TIKTOKEN_CACHE_DIR"]
