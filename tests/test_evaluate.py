"""Evaluation is weighted by token, and bits per byte are nats over the bytes of a text that can be counted."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_tokens
from networks import tiny_config, tiny_model
from torch import Tensor, nn

from data.loader import Tokens, eval_batches
from data.prepare import prepare
from data.tokenizer import make_tokenizer
from model.device import resolve
from training.evaluate import Evaluation, evaluate

RUNTIME = resolve("cpu", "float32", "off")
ONE_BYTE = np.ones(31, dtype=np.int32)


class Uniform(nn.Module):
    """Every token costs log 2 times its id in nats."""

    def forward(self, idx: Tensor, targets: Tensor, *, reduction: str) -> Tensor:
        assert reduction == "none"
        return torch.where(targets == -100, 0.0, targets * math.log(2))


def run(model: nn.Module, batches, token_bytes=ONE_BYTE) -> Evaluation:
    return evaluate(model, batches, token_bytes, RUNTIME)


def stream(path: Path, ids: Tensor) -> Tokens:
    ids.numpy().astype("<u2").tofile(path)
    return Tokens(path=path, dtype=np.dtype("<u2"), n_tokens=len(ids), name="val")


def test_the_loss_is_the_mean_over_tokens_and_not_over_batches():
    batches = [
        (torch.zeros(2, 3).long(), torch.full((2, 3), 4)),
        (torch.zeros(1, 3).long(), torch.tensor([[9, -100, -100]])),
    ]
    result = run(Uniform(), batches)
    assert result.n_tokens == 7
    assert result.loss == pytest.approx((6 * 4 + 9) / 7 * math.log(2))
    assert result.perplexity == pytest.approx(math.exp(result.loss))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_the_batch_size_does_not_change_it(tmp_path, batch_size):
    model, tokens = tiny_model(tiny_config(pattern="swa full", window=3)), stream(tmp_path / "a", random_tokens(101))
    one = run(model, eval_batches(tokens, block_size=8, batch_size=1))
    other = run(model, eval_batches(tokens, block_size=8, batch_size=batch_size))
    assert other.n_tokens == one.n_tokens == 100
    assert other.loss == pytest.approx(one.loss, rel=1e-12)


def test_it_equals_the_loss_of_each_token_by_itself(tmp_path):
    model, ids = tiny_model(tiny_config()), random_tokens(22)
    result = run(model, eval_batches(stream(tmp_path / "a", ids), block_size=8, batch_size=2))
    nats = []
    for t in range(21):
        start = t - t % 8  # the context of a token begins with its window
        with torch.no_grad():
            logits = model(ids[None, start : t + 1])[0, -1]
        nats.append(-logits.log_softmax(0)[ids[t + 1]].item())
    assert result.loss == pytest.approx(sum(nats) / 21, rel=1e-9)


def test_bits_per_byte_are_all_bits_over_the_bytes_of_the_targets():
    token_bytes = np.arange(31, dtype=np.int32) % 4  # of 5: 1, of 6: 2, of 7: 3; of 8: none
    result = run(Uniform(), [(torch.zeros(1, 5).long(), torch.tensor([[5, 6, 7, 8, -100]]))], token_bytes)
    assert result.bits_per_byte == pytest.approx((5 + 6 + 7 + 8) / (1 + 2 + 3))


@pytest.mark.parametrize("tokenizer", ["byte", "bpe-300"])
def test_bits_per_byte_equal_a_count_by_hand_on_text_that_is_not_ascii(tmp_path, tokenizer):
    line = "Die naïve Katze 猫 sieht überall 😀 und 😀....\n"
    assert (len(line), len(line.encode())) == (44, 54)
    (tmp_path / "a.txt").write_text(line * 40, encoding="utf-8")  # the last tenth of it is 4 lines
    prepared = prepare(str(tmp_path / "a.txt"), tokenizer, root=tmp_path, progress=False)
    val = prepared.split("val")
    ids = torch.from_numpy(val.read(0, val.n_tokens).astype(np.int64))
    model = tiny_model(tiny_config(vocab_size=prepared.tokenizer.n_vocab, block_size=256))
    result = run(model, eval_batches(val, block_size=256, batch_size=1), prepared.tokenizer.token_bytes())

    with torch.no_grad():
        nats = -model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None]).sum().item()
    n_bytes = 4 * 54 - len(prepared.tokenizer.decode_bytes([int(ids[0])]))  # the first token is never a target
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-9)


def test_a_uniform_network_over_bytes_has_the_bits_of_its_vocabulary():
    tokenizer = make_tokenizer("byte")
    model = tiny_model(tiny_config(vocab_size=tokenizer.n_vocab))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids = torch.tensor(tokenizer.encode("naïve 猫 😀!"))[None]
    assert ids.shape[1] == len("naïve 猫 😀!".encode())
    result = run(model, [(ids[:, :-1], ids[:, 1:])], tokenizer.token_bytes())
    assert result.bits_per_byte == pytest.approx(math.log2(257))
    assert result.perplexity == pytest.approx(257, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_as_before(training):
    model = tiny_model(tiny_config(dropout=0.5)).train(training)
    idx = random_tokens(2, 9)
    one, other = (run(model, [(idx[:, :-1], idx[:, 1:])]) for _ in "ab")
    assert one == other
    assert model.training == training


def test_no_gradient_is_kept_and_nothing_is_drawn():
    model, idx = tiny_model(tiny_config(dropout=0.5)).train(), random_tokens(2, 9)
    before = torch.get_rng_state()
    run(model, [(idx[:, :-1], idx[:, 1:])])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_hopeless_loss_has_a_perplexity_that_is_finite():
    result = run(Uniform(), [(torch.zeros(1, 1).long(), torch.tensor([[30_000]]))], np.ones(30_001, dtype=np.int32))
    assert math.isfinite(result.perplexity)
    assert result.loss > 700
