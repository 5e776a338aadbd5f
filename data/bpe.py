"""Train a byte-level BPE vocabulary with the `tokenizers` library and convert it to tiktoken's format."""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

# GPT-4's pre-tokenization pattern, but with at most two digits per token, which suits small vocabularies.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_STRETCH = r"[\s\S]{1,500}"  # training is quadratic in the length of a word, and a page of blanks would be one word
LEARN_BYTES = 1 << 28  # a vocabulary trained on the first 256 MiB hardly differs from one trained on more


def learn_ranks(texts: Iterable[str], *, n_ranks: int) -> dict[bytes, int]:
    """Return n_ranks ranks, including the 256 single bytes; fewer if the text has too few repeated pairs to merge."""
    return ranks_of(learn(texts, n_ranks=n_ranks).to_str())


def learn(texts: Iterable[str], *, n_ranks: int) -> "tokenizers.Tokenizer":
    """Train a `tokenizers.Tokenizer`; deterministic for the same texts."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    stretches = pre_tokenizers.Split(tokenizers.Regex(_STRETCH), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, stretches, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_ranks, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_head(texts), trainer)
    return tokenizer


def ranks_of(tokenizer_json: str) -> dict[bytes, int]:
    """Convert a trained tokenizer: each byte's rank is its value; merged tokens follow in the order of their merges."""
    vocabulary: dict[str, int] = json.loads(tokenizer_json)["model"]["vocab"]
    byte_of = byte_of_letter()
    learned = sorted((token for token in vocabulary if len(token) > 1), key=vocabulary.__getitem__)
    ranks = {bytes([value]): value for value in range(256)}
    ranks.update((bytes(byte_of[letter] for letter in token), 256 + i) for i, token in enumerate(learned))
    return ranks


def _head(texts: Iterable[str]) -> Iterator[str]:
    n_bytes = 0
    for text in texts:
        yield text
        n_bytes += len(text.encode())
        if n_bytes >= LEARN_BYTES:
            return


def byte_of_letter() -> dict[str, int]:
    """Invert GPT-2's byte-to-unicode mapping: printable bytes map to themselves, the others to characters from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}
