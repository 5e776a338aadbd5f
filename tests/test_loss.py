"""The chunked cross-entropy against the plain one."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equal, needs_amx, random_tokens
from networks import tiny_config, tiny_model

import model.loss
from model import cpu
from model.cpu import loss_rows
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
    monkeypatch.setattr(loss_rows, "CACHED_ELEMENTS", 2 * V)


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
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_z_loss_is_in_the_gradients_alone(problem, reduction, softcap):
    x, weight, targets = problem
    logits = (x @ weight.T).flatten(0, 1)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    real = targets.flatten() != -100
    reduced = lambda losses: losses.sum() / real.sum() if reduction == "mean" else losses.view(B, T)
    plain = F.cross_entropy(logits, targets.flatten(), reduction="none")
    ours = cross_entropy(x, weight, targets, reduction, softcap=softcap, z_loss=0.1)
    assert_equal(ours, reduced(plain))
    minimised = reduced(plain + 0.1 * logits.logsumexp(1).square() * real)
    weighting = torch.linspace(1, 2, ours.numel(), dtype=torch.float64).view_as(ours)
    for actual, expected in zip(
        torch.autograd.grad((ours * weighting).sum(), (x, weight)),
        torch.autograd.grad((minimised * weighting).sum(), (x, weight)),
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
    sizes, of_rows = [], model.loss._loss_and_grad
    monkeypatch.setattr(model.loss, "_loss_and_grad", lambda x, *args: sizes.append(x.numel()) or of_rows(x, *args))
    cross_entropy(x, weight, targets).backward()
    assert len(sizes) > 1
    assert sum(sizes) == targets.numel() * V
    assert max(sizes) <= 4 * V


@pytest.mark.parametrize("words", [1, 5, V - 1, V])
def test_parts_of_the_vocabulary_do_not_change_the_gradients(problem, words, monkeypatch):
    x, weight, targets = problem
    whole = torch.autograd.grad(cross_entropy(x, weight, targets), (x, weight))
    monkeypatch.setattr(loss_rows, "VOCABULARY_CHUNK", words)
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


@needs_amx
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("words", [1, 15, 16, 17, 31, 32, 300, 4099])
def test_rows_in_cpp_equal_exact_ones(words, z_loss):
    logits = (8 * torch.randn(13, words)).bfloat16()
    logits[8] -= 300
    targets, weights = torch.randint(words, (13,)), torch.linspace(-1, 2, 13)
    targets[3], targets[5], targets[6] = words - 1, 0, -100
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    z = z_loss * exact.logsumexp(1).square() * (targets != -100)
    ((losses + z) * weights).sum().backward()
    assert_equal(model.loss._loss_and_grad(logits, targets, None, None, z_loss).double(), losses.detach(), 2e-5)
    assert_equal(model.loss._loss_and_grad(logits, targets, weights, None, z_loss).double(), losses.detach(), 2e-5)
    assert ((logits - exact.grad).abs() <= exact.grad.abs() / 256 + 1e-6).all()  # rounded to bfloat16, no more


@needs_amx
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_in_cpp_equals_the_one_without(problem, reduction, monkeypatch):
    x, weight, targets = (p if p.dtype == torch.long else p.detach().bfloat16().requires_grad_() for p in problem)

    def loss_and_gradients():
        loss = cross_entropy(x, weight, targets, reduction)
        return loss.detach(), *torch.autograd.grad(loss.sum(), (x, weight))  # the sum's gradient is one number for all

    calls, in_cpp = [], cpu.loss_and_grad
    monkeypatch.setattr(cpu, "loss_and_grad", lambda *args: calls.append(1) or in_cpp(*args))
    ours = loss_and_gradients()
    assert calls
    monkeypatch.setattr(loss_rows, "cpp_ops", lambda: None)
    for got, expected in zip(ours, loss_and_gradients(), strict=True):
        assert_equal(got.double(), expected.double(), 1e-2)
    assert len(calls) == (1 if reduction == "mean" else 2)


@needs_amx
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_in_cpp(bad):
    logits = torch.zeros(2, 40).bfloat16()
    logits[1, 33] = bad
    losses = model.loss._loss_and_grad(logits, torch.tensor([4, 4]), None, None, 0.0)
    assert losses[0].item() == pytest.approx(math.log(40))
    assert losses[1].isnan()


@needs_amx
def test_targets_of_any_layout_and_width_in_cpp():
    logits, targets = torch.randn(5, 40).bfloat16(), torch.tensor([4, 5, -100, 39, 0])
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    for same in (targets.int(), targets.repeat_interleave(2)[::2]):
        assert_equal(model.loss._loss_and_grad(logits, same, None, None, 0.0), expected, 2e-5)


@needs_amx
def test_no_rows_have_no_losses_in_cpp():
    logits, targets = torch.zeros(0, 40).bfloat16(), torch.zeros(0, dtype=torch.long)
    assert model.loss._loss_and_grad(logits, targets, torch.zeros(0), None, 0.0).shape == (0,)


@needs_amx
def test_a_target_beyond_the_vocabulary_is_refused_in_cpp():
    with pytest.raises(IndexError, match="target 40 is not one of 40 tokens"):
        model.loss._loss_and_grad(torch.zeros(2, 40).bfloat16(), torch.tensor([4, 40]), None, None, 0.0)


@needs_amx
def test_what_the_cpp_does_not_know_goes_without(monkeypatch):
    monkeypatch.setattr(cpu, "loss_and_grad", None)
    for dtype, softcap in ((torch.bfloat16, 3.0), (torch.float32, None)):
        losses = model.loss._loss_and_grad(torch.zeros(2, 40, dtype=dtype), torch.tensor([4, 5]), None, softcap, 0.0)
        assert losses.tolist() == pytest.approx([math.log(40)] * 2)


@needs_amx
def test_the_loss_in_cpp_is_an_operator():
    logits, targets = torch.randn(5, 40).bfloat16(), torch.tensor([4, 5, -100, 39, 0])
    for weights in (None, torch.rand(5)):
        torch.library.opcheck(cpu.loss_and_grad, (logits, targets, weights, 0.1))  # for estimates of memory, too
