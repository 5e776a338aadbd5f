"""The chunked cross-entropy against the plain one."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equal, random_tokens
from networks import tiny_config, tiny_model

import model.loss
from model.loss import cross_entropy

B, T, C, V = 3, 7, 5, 31


@pytest.fixture
def problem():
    torch.manual_seed(0)
    x = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, C, dtype=torch.float64, requires_grad=True)
    targets = random_tokens(B, T)
    targets[0, 2] = targets[2] = -100
    return x, weight, targets


@pytest.fixture(params=[1, V, 4 * V, 1 << 23], ids=lambda n: f"{n}-elements")
def chunk_elements(request, monkeypatch):
    monkeypatch.setattr(model.loss, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(model.loss, "CACHED_ELEMENTS", 2 * V)


@pytest.mark.usefixtures("chunk_elements")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_gradients_equal_plain_cross_entropy(problem, reduction):
    x, weight, targets = problem
    plain = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), reduction=reduction)
    plain = plain.view(targets.shape) if reduction == "none" else plain
    ours = cross_entropy(x, weight, targets, reduction)
    assert_equal(ours, plain)
    weighting = torch.linspace(1, 2, ours.numel(), dtype=torch.float64).view_as(ours)
    for actual, expected in zip(
        torch.autograd.grad((ours * weighting).sum(), (x, weight)),
        torch.autograd.grad((plain * weighting).sum(), (x, weight)),
        strict=True,
    ):
        assert_equal(actual, expected)


@pytest.mark.usefixtures("chunk_elements")
def test_loss_is_the_same_without_gradients(problem):
    x, weight, targets = problem
    with torch.no_grad():
        without = cross_entropy(x, weight, targets)
    assert_equal(without, cross_entropy(x, weight, targets).detach())


def test_ignored_targets_cost_nothing_and_count_for_nothing(problem):
    x, weight, targets = problem
    losses = cross_entropy(x, weight, targets, "none")
    assert not losses[targets == -100].any()
    assert_equal(cross_entropy(x, weight, targets), losses.sum() / (targets != -100).sum())


def test_loss_of_nothing_but_ignored_targets_is_zero_with_zero_gradients(problem):
    x, weight, targets = problem
    loss = cross_entropy(x, weight, torch.full_like(targets, -100))
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, weight)))


def test_loss_of_no_tokens_has_gradients_of_zero(problem):
    x, weight, targets = problem
    grads = torch.autograd.grad(cross_entropy(x.flatten(0, -2)[:0], weight, targets.flatten()[:0]), (x, weight))
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_is_float32(problem, dtype):
    x, weight, targets = problem
    loss = cross_entropy(x.to(dtype), weight.to(dtype), targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(x, weight, targets).item(), rel=0.02)


def test_loss_does_not_hold_all_logits(problem, monkeypatch):
    x, weight, targets = problem
    monkeypatch.setattr(model.loss, "CHUNK_ELEMENTS", 4 * V)
    sizes, of_rows = [], model.loss._loss_and_slope
    monkeypatch.setattr(model.loss, "_loss_and_slope", lambda x, *args: sizes.append(x.numel()) or of_rows(x, *args))
    cross_entropy(x, weight, targets).backward()
    assert len(sizes) > 1
    assert sum(sizes) == targets.numel() * V
    assert max(sizes) <= 4 * V


@pytest.mark.parametrize("words", [1, 5, V - 1, V])
def test_parts_of_the_vocabulary_do_not_change_the_gradients(problem, words, monkeypatch):
    x, weight, targets = problem
    whole = torch.autograd.grad(cross_entropy(x, weight, targets), (x, weight))
    monkeypatch.setattr(model.loss, "CACHED_WORDS", words)
    monkeypatch.setattr(model.loss, "CHUNK_ELEMENTS", 4 * V)
    for got, expected in zip(torch.autograd.grad(cross_entropy(x, weight, targets), (x, weight)), whole, strict=True):
        assert_equal(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_model_loss_equals_cross_entropy_of_its_logits(reduction):
    network, idx, targets = tiny_model(tiny_config()), random_tokens(B, T), random_tokens(B, T, seed=9)
    targets[1, 3:] = -100
    plain = F.cross_entropy(network(idx).flatten(0, 1), targets.flatten(), reduction=reduction)
    assert_equal(network(idx, targets, reduction=reduction).flatten(), plain.flatten())


def test_uniform_guess_costs_log_of_the_vocabulary(problem):
    x, weight, targets = problem
    assert cross_entropy(x, weight * 0, targets).item() == pytest.approx(math.log(V))


def test_a_target_that_is_all_but_impossible_has_its_loss():
    x, head = torch.tensor([[1.0]]), torch.tensor([[0.0], [300.0], [0.0]])
    assert cross_entropy(x, head, torch.tensor([2])).item() == pytest.approx(300)
