"""Convert between Sash tokenizers and `tokenizer.json`, the format of the Hugging Face `tokenizers` library."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import tiktoken

from data.bpe import byte_of_letter
from data.tokenizer import EOT, NormalForm, Tokenizer
from model.errors import UserError

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NORMAL_FORMS = get_args(NormalForm)


def write_tokenizer_json(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer.json that encodes identically, except that it parses `<|endoftext|>` in text as the token."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    encoding = tokenizer.encoding
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    letter = {value: letter for letter, value in byte_of_letter().items()}
    spell = lambda token: "".join(letter[value] for value in token)
    vocabulary = {spell(token): rank for token, rank in ranks.items()} | special
    merges = [merge for token in sorted(ranks, key=ranks.__getitem__) if (merge := _merge(token, ranks))]
    made = tokenizers.Tokenizer(
        # ignore_merges: a word that is a token is never split, as in tiktoken
        models.BPE(vocabulary, [(spell(a), spell(b)) for a, b in merges], ignore_merges=True)
    )
    words = pre_tokenizers.Split(tokenizers.Regex(_for_oniguruma(encoding._pat_str)), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    if tokenizer.normal_form is not None:
        made.normalizer = getattr(normalizers, tokenizer.normal_form)()
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    made.save(str(path))


def read_tokenizer_json(path: Path, *, name: str, end: str | None) -> Tokenizer:
    """Read a byte-level BPE tokenizer whose end-of-text token is `end`. UserError for any other kind of tokenizer."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        model, added = content["model"], content.get("added_tokens", [])
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the directory has no tokenizer that Sash can read") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a tokenizer: {error!r}") from None
    pattern = _pattern(content.get("pre_tokenizer") or {})
    if model.get("type") != "BPE" or pattern is None:
        raise UserError(
            f"{path} is not a byte-level BPE tokenizer (model type {model.get('type')}), the only kind Sash can read"
        )
    normal_form = (content.get("normalizer") or {}).get("type")
    if normal_form not in (None, *NORMAL_FORMS):
        raise UserError(f"{path}: normalizer ({normal_form}) must be none or one of {', '.join(NORMAL_FORMS)}")
    special = {token["content"]: token["id"] for token in added}
    if end is None or end not in special:
        raise UserError(f"{path}: eos_token ({end}) must be one of the added tokens ({', '.join(special)})")
    byte_of = byte_of_letter()
    try:
        ranks = {
            bytes(byte_of[letter] for letter in token): rank
            for token, rank in model["vocab"].items()
            if token not in special
        }
    except KeyError as error:
        raise UserError(f"{path} is not a byte-level BPE tokenizer: a token contains {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not _ordered(model["merges"], model["vocab"]):
        raise UserError(f"{path}: Sash needs token ids in the order of the merges, and these are not")
    special = {EOT if token == end else token: id for token, id in special.items()}
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(encoding, normal_form)


def _merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that a token is merged from, found by encoding it without itself; None for a single byte."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _for_oniguruma(pattern: str) -> str:
    """Translate tiktoken's pattern for Oniguruma: drop possessive quantifiers; `$` becomes `\\z`, as it ends a line."""
    return re.sub(r"(?<!\\)\$", r"\\z", re.sub(r"([+*?]|\{\d+(?:,\d*)?\})\+", r"\1", pattern))


def _pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """The pre-tokenization pattern; None if the pre-tokenizer is not byte-level."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = [s["pattern"]["Regex"] for s in steps if s.get("type") == "Split" and "Regex" in s.get("pattern", {})]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    return patterns[0] if len(steps) == 2 and patterns and not last.get("use_regex", True) else None


def _ordered(merges: list, vocabulary: dict[str, int]) -> bool:
    """Whether token ids follow the order of the merges."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    made = [vocabulary.get(a + b, -1) for a, b in pairs]
    return all(x < y for x, y in pairwise(made))
