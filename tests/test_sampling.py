"""Drawing the next token: what is drawn has the right odds, and depends on nothing but seed, sample and position."""

from itertools import islice

import pytest
import scipy.stats
import torch
from conftest import random_tokens
from hypothesis import given
from hypothesis import strategies as st
from networks import VOCAB, make_sampler, tiny_config, tiny_model
from torch import Tensor

from inference import sampling
from inference.sampling import LogProbs, Sampler, gumbel, prefill, stream

N = 20_000
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5


def draws(sampler: Sampler, logits: Tensor = LOGITS, n: int = N) -> Tensor:
    """(n,) tokens at n positions of one sample."""
    return sampler.next(logits.expand(n, -1), torch.arange(n), torch.zeros(n, dtype=torch.long))


def text(
    model, cache, prompt: Tensor, n: int = 20, *, lengths=None, n_samples: int = 1, chunk: int = 512, **sampler
) -> Tensor:
    """(B, P) -> (B * n_samples, n) what the model goes on with."""
    tokens = stream(model, cache, prompt, make_sampler(**sampler), lengths=lengths, n_samples=n_samples, chunk=chunk)
    return torch.stack(list(islice(tokens, n)), dim=1)


def odds_are_right(tokens: Tensor, p: Tensor) -> bool:
    """Whether a chi-square test finds nothing odd in these draws; rare tokens are taken together."""
    order = p.argsort(descending=True)
    common = order[p[order] * len(tokens) >= 8]
    seen = torch.bincount(tokens, minlength=len(p)).double()
    found, expected = seen[common].tolist(), (p[common].double() * len(tokens)).tolist()
    rest = len(tokens) - sum(expected)
    if rest > 1:
        found, expected = [*found, len(tokens) - sum(found)], [*expected, rest]
    return scipy.stats.chisquare(found, expected, sum_check=False).pvalue > 1e-3


# What is drawn.


@pytest.mark.parametrize("top", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_temperature_zero_takes_the_likeliest(top):
    logits = torch.randn(7, VOCAB)
    tokens = make_sampler(temperature=0, **top).next(logits, torch.arange(7), torch.arange(7))
    assert torch.equal(tokens, logits.argmax(dim=1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_odds_of_the_softmax(temperature):
    assert odds_are_right(draws(make_sampler(temperature=temperature)), (LOGITS / temperature).softmax(0))


def test_samples_are_drawn_with_the_odds_of_the_softmax_too():
    tokens = make_sampler().next(LOGITS.expand(N, -1), torch.full((N,), 5), torch.arange(N))
    assert odds_are_right(tokens, LOGITS.softmax(0))


def test_seeds_are_drawn_with_the_odds_of_the_softmax_too():
    zero = torch.zeros(1, dtype=torch.long)
    tokens = torch.cat([make_sampler(seed=seed).next(LOGITS[None], zero, zero) for seed in range(3000)])
    assert odds_are_right(tokens, LOGITS.softmax(0))


def test_neighbouring_positions_are_independent():
    tokens = draws(make_sampler(), torch.zeros(5))
    pairs = torch.bincount(5 * tokens[:-1] + tokens[1:], minlength=25).view(5, 5)
    assert scipy.stats.chi2_contingency(pairs.numpy()).pvalue > 1e-3


def test_a_logit_of_minus_infinity_is_never_drawn():
    logits = LOGITS.clone()
    logits[::2] = -torch.inf
    tokens = draws(make_sampler(), logits)
    assert (tokens % 2 == 1).all()
    assert odds_are_right(tokens, logits.softmax(0))


@pytest.mark.parametrize("k", [1, 2, 5, VOCAB - 1, VOCAB, VOCAB + 9])
def test_top_k_draws_the_k_likeliest_with_their_odds(k):
    tokens = draws(make_sampler(top_k=k))
    allowed = LOGITS.topk(min(k, VOCAB)).indices
    assert set(tokens.tolist()) <= set(allowed.tolist())
    p = torch.zeros(VOCAB)
    p[allowed] = LOGITS[allowed].softmax(0)
    assert k == 1 or odds_are_right(tokens, p)


@pytest.mark.parametrize(
    ("top_p", "allowed"),
    [(0.05, {3}), (0.4, {3}), (0.41, {0, 3}), (0.7, {0, 3}), (0.71, {0, 2, 3}), (0.9, {0, 2, 3}), (0.91, {0, 1, 2, 3})],
)
def test_top_p_draws_the_fewest_that_together_reach_it(top_p, allowed):
    p = torch.tensor([0.3 - 1e-4, 0.1 - 1e-4, 0.2 - 1e-4, 0.4 + 3e-4])  # reaches 0.4, 0.7, 0.9, 1.0
    tokens = draws(make_sampler(top_p=top_p), p.log())
    assert set(tokens.tolist()) == allowed
    within = torch.tensor([p[i] if i in allowed else 0.0 for i in range(4)])
    assert len(allowed) == 1 or odds_are_right(tokens, within / within.sum())


def test_top_p_of_one_leaves_everything():
    assert torch.equal(draws(make_sampler(top_p=1.0)), draws(make_sampler()))


def test_top_p_counts_after_top_k_and_temperature():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert set(draws(make_sampler(top_k=2, top_p=0.56), p.log()).tolist()) == {0}  # 0.4 / 0.7 reaches it
    assert set(draws(make_sampler(temperature=0.1, top_p=0.9), p.log()).tolist()) == {0}


@pytest.mark.parametrize(
    ("min_p", "allowed"), [(1e-3, {0, 1, 2, 3}), (0.24, {0, 1, 2, 3}), (0.26, {0, 2, 3}), (0.6, {0, 3}), (1.0, {3})]
)
def test_min_p_draws_those_at_least_this_part_as_likely_as_the_likeliest(min_p, allowed):
    p = torch.tensor([0.3, 0.1, 0.2, 0.4])
    tokens = draws(make_sampler(min_p=min_p), p.log())
    assert set(tokens.tolist()) == allowed
    within = torch.tensor([p[i] if i in allowed else 0.0 for i in range(4)])
    assert len(allowed) == 1 or odds_are_right(tokens, within / within.sum())


def test_a_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_what_was_seen():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.1]])
    likeliest = lambda seen, logits=logits: int(
        make_sampler(temperature=0, repetition_penalty=1.5).next(
            logits, *[torch.zeros(1).long()] * 2, torch.tensor([seen])
        )
    )
    assert likeliest([False] * 4) == 0
    assert likeliest([True, False, False, False]) == 1  # 1.33 is less than 1.5
    assert likeliest([True, True, False, False]) == 0
    assert likeliest([False, False, True, False], logits.flip(1) - 9) == 3  # nothing changes for the likeliest
    assert likeliest([False, False, False, True], logits.flip(1) - 9) == 2  # -7 * 1.5 is less than -7.5


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"min_p": 0.2},
        {"top_k": 5},
        {"top_p": 0.6},
        {"repetition_penalty": 0.7, "min_p": 0.1},
    ],
    ids=str,
)
def test_what_may_be_drawn_is_what_transformers_allows(monkeypatch, options):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle: install the test group")
    prompt, logits = random_tokens(2, 9), torch.stack([LOGITS, LOGITS.flip(0)])
    kinds = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    order = ("repetition_penalty", None, "top_k", "top_p", "min_p")
    expected = logits
    for name in order:
        if name is None:
            expected = expected / 0.7
        elif name in options:
            expected = kinds[name](options[name])(prompt, expected)
    found = {}
    monkeypatch.setattr(sampling, "gumbel", lambda *_: found.setdefault("noise", torch.zeros(VOCAB)))
    monkeypatch.setattr(Tensor, "argmax", lambda self, dim: found.setdefault("scores", self))
    sampler, zeros = make_sampler(temperature=0.7, **options), torch.zeros(2, dtype=torch.long)
    seen = sampler.new_seen(2, VOCAB, prompt.device)
    if seen is not None:
        seen.scatter_(1, prompt, True)
    sampler.next(logits, zeros, zeros, seen)
    torch.testing.assert_close(found["scores"], expected)


def test_what_a_row_has_seen_is_its_own_prompt_and_text():
    model, prompts = sliding_model(), random_tokens(2, 9)
    sampler, lengths = make_sampler(repetition_penalty=1.2), torch.tensor([9, 4])
    seen = sampler.new_seen(2, VOCAB, prompts.device)
    drawn = list(islice(stream(model, model.new_cache(2, 40), prompts, sampler, lengths=lengths, seen=seen), 6))
    for row, n in enumerate([9, 4]):
        had = {*prompts[row, :n].tolist(), *(int(tokens[row]) for tokens in drawn[:-1])}
        assert set(seen[row].nonzero()[:, 0].tolist()) == had


@pytest.mark.parametrize("sampler", [{}, {"temperature": 0}, {"top_k": 40}, {"top_p": 0.9999}], ids=str)
def test_ids_that_pad_the_vocabulary_are_never_drawn(sampler):
    logits = LOGITS.clone()
    logits[25:] = 50.0
    tokens = draws(make_sampler(n_vocab=25, **sampler), logits)
    assert tokens.max() < 25
    assert torch.equal(tokens, draws(make_sampler(**sampler), LOGITS[:25]))


def test_rows_may_have_thresholds_of_their_own():
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    pos, sample = torch.tensor([3, 3]), torch.tensor([0, 0])
    both = make_sampler(top_k=2, top_p=0.8).next(logits, pos, sample)
    each = [make_sampler(top_k=2, top_p=0.8).next(row[None], pos[:1], sample[:1]) for row in logits]
    assert torch.equal(both, torch.cat(each))


# The noise.


def test_noise_has_the_distribution_of_gumbel():
    noise = gumbel(0, torch.zeros(40, dtype=torch.long), torch.arange(40), 1000)
    assert scipy.stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3


@pytest.mark.parametrize("bits", [0, 0xFFFFFFFF, 0xFFFFFF00, 0xFF, 0x80000000])
def test_noise_is_finite_whatever_the_bits(monkeypatch, bits):
    monkeypatch.setattr(sampling, "hash32", lambda x: torch.full_like(x, bits))
    assert gumbel(0, torch.zeros(2, dtype=torch.long), torch.arange(2), 3).isfinite().all()


@pytest.mark.slow
def test_noise_is_finite_in_a_hundred_million_draws():
    rows = torch.zeros(4, dtype=torch.long)
    assert all(gumbel(0, rows, torch.arange(p, p + 4), 1 << 20).isfinite().all() for p in range(0, 96, 4))


def test_noise_depends_on_the_seed_the_sample_and_the_position():
    at = lambda seed, sample, pos: gumbel(seed, torch.tensor([sample]), torch.tensor([pos]), 9)[0].tolist()
    found = [at(0, 0, 0), at(1, 0, 0), at(0, 1, 0), at(0, 0, 1), at(0, 1, 1), at(1, 1, 0)]
    assert len({tuple(noise) for noise in found}) == len(found)
    assert at(3, 4, 5) == at(3, 4, 5)


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**40 + 7])
def test_any_seed_will_do(seed):
    assert gumbel(seed, torch.tensor([0]), torch.tensor([0]), 5).isfinite().all()


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draws(make_sampler(), n=3)
    assert torch.equal(torch.get_rng_state(), before)


# The same seed gives the same text, however it is computed.

PROMPT = random_tokens(1, 11)
WARM = {"temperature": 1.2, "seed": 5}


def sliding_model():
    return tiny_model(tiny_config(pattern="swa full", window=4, n_sink=1))


def expected_text(model, prompt: Tensor = PROMPT) -> Tensor:
    return text(model, None, prompt, **WARM)


@pytest.mark.parametrize("rolling", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 10, 11, 512])
def test_neither_cache_nor_chunks_change_the_text(chunk, rolling):
    model = sliding_model()
    cache = model.new_cache(1, 40, rolling=rolling)
    assert torch.equal(text(model, cache, PROMPT, chunk=chunk, **WARM), expected_text(model))


@given(chunk=st.integers(1, 30), n_prompt=st.integers(1, 30), window=st.integers(1, 9), n_sink=st.integers(0, 3))
def test_neither_cache_nor_chunks_change_the_text_of_any_prompt(chunk, n_prompt, window, n_sink):
    model = tiny_model(tiny_config(pattern="swa", window=window, n_sink=n_sink))
    prompt = random_tokens(1, n_prompt)
    found = text(model, model.new_cache(1, n_prompt + 8), prompt, 8, chunk=chunk, **WARM)
    assert torch.equal(found, text(model, None, prompt, 8, **WARM))


def test_a_batch_does_not_change_the_text_of_its_first_row():
    model, prompts = sliding_model(), random_tokens(3, 11)
    together = text(model, model.new_cache(3, 40), prompts, **WARM)
    assert torch.equal(together[:1], expected_text(model, prompts[:1]))
    assert torch.equal(together, expected_text(model, prompts))


def test_the_same_prompt_twice_in_a_batch_gives_the_same_text_twice():
    model = sliding_model()
    rows = text(model, model.new_cache(3, 40), PROMPT.expand(3, -1), **WARM)
    assert torch.equal(rows, expected_text(model).expand(3, -1))


def test_samples_of_one_prompt_differ_and_the_first_is_that_of_a_single_run():
    model = sliding_model()
    rows = text(model, model.new_cache(1, 40), PROMPT, n_samples=5, **WARM)
    assert len({tuple(row) for row in rows.tolist()}) == 5
    assert torch.equal(rows[:1], expected_text(model))


@pytest.mark.parametrize("cached", [True, False])
def test_samples_of_several_prompts_are_those_of_each_alone(cached):
    model, prompts, lengths = sliding_model(), random_tokens(3, 11), [4, 11, 1]
    cache = model.new_cache(3, 40) if cached else None
    rows = text(model, cache, prompts, lengths=torch.tensor(lengths), n_samples=2, **WARM)
    alone = [text(model, None, prompts[b : b + 1, :n], n_samples=2, **WARM) for b, n in enumerate(lengths)]
    assert torch.equal(rows, torch.cat(alone))


def test_one_prefill_serves_all_samples(monkeypatch):
    model, widths = sliding_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **kw: (widths.append(tuple(idx.shape)), forward(idx, **kw))[1])
    text(model, model.new_cache(1, 40), PROMPT, 3, n_samples=4)
    assert widths == [(1, 11), (4, 1), (4, 1)]


def test_float32_gives_one_text_with_and_without_a_cache():
    model = sliding_model().float()
    assert torch.equal(text(model, model.new_cache(1, 40), PROMPT, chunk=3, **WARM), expected_text(model))


def test_seeds_give_different_texts():
    model = sliding_model()
    found = [text(model, model.new_cache(1, 40), PROMPT, seed=seed).tolist()[0] for seed in range(4)]
    assert len(set(map(tuple, found))) == 4


def test_a_stream_draws_each_token_with_the_noise_of_its_sample_and_position():
    model, idx, sampler = sliding_model(), PROMPT.expand(2, -1), make_sampler(**WARM)
    with torch.no_grad():
        for n in range(20):
            token = sampler.next(model(idx)[:, -1], torch.full((2,), 11 + n), torch.arange(2))
            idx = torch.cat((idx, token[:, None]), dim=1)
    assert torch.equal(text(model, model.new_cache(1, 40), PROMPT, n_samples=2, **WARM), idx[:, 11:])


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("n", [1, 7])
def test_a_text_that_goes_on_later_is_the_text_in_one_go(n, penalty):
    model, sampler = sliding_model(), make_sampler(repetition_penalty=penalty, **WARM)
    cache, seen = model.new_cache(1, 40), sampler.new_seen(1, VOCAB, PROMPT.device)
    first = list(islice(stream(model, cache, PROMPT, sampler, seen=seen), n))
    rest = list(islice(stream(model, cache, first[-1][None], sampler, seen=seen), 20 - n))
    assert torch.equal(torch.stack(first + rest, dim=1), text(model, None, PROMPT, repetition_penalty=penalty, **WARM))


def test_a_watch_sees_the_logits_of_every_draw():
    model, seen = sliding_model(), []
    watch = lambda logits, tokens: seen.append((logits.clone(), tokens.clone()))
    drawn = list(islice(stream(model, model.new_cache(1, 40), PROMPT, make_sampler(**WARM), watch=watch), 5))
    whole = torch.cat((PROMPT, *(token[:, None] for token in drawn[:-1])), dim=1)
    assert torch.equal(torch.cat([tokens for _, tokens in seen]), torch.cat(drawn))
    torch.testing.assert_close(torch.cat([logits for logits, _ in seen]), model(whole)[0, 10:].detach())


def test_log_probabilities_are_the_models_own_over_the_ids_that_exist():
    logits, tokens = torch.stack([LOGITS, LOGITS.flip(0)]), torch.tensor([4, 0])
    logprobs = LogProbs(25)
    logprobs(logits, tokens)
    torch.testing.assert_close(logprobs.last, logits[:, :25].softmax(dim=1).log()[[0, 1], tokens])


def test_greedy_text_is_the_argmax_at_every_step():
    model, idx = sliding_model(), PROMPT
    with torch.no_grad():
        for _ in range(20):
            idx = torch.cat((idx, model(idx)[:, -1:].argmax(dim=-1)), dim=1)
    found = text(model, model.new_cache(1, 40), PROMPT, temperature=0)
    assert torch.equal(found, idx[:, PROMPT.shape[1] :])


def test_a_stream_goes_on_where_a_cache_rolls():
    model = tiny_model(tiny_config(pattern="swa", window=4, n_sink=1))
    cache = model.new_cache(1, 12)
    assert torch.equal(text(model, cache, PROMPT, 60, **WARM), text(model, None, PROMPT, 60, **WARM))
    assert cache.nbytes == model.new_cache(1, 9999).nbytes


@pytest.mark.parametrize("chunk", [1, 4, 11, 512])
def test_prefill_gives_the_logits_of_the_next_token(chunk):
    model = sliding_model()
    logits = prefill(model, model.new_cache(1, 11), PROMPT, chunk=chunk)
    torch.testing.assert_close(logits, model(PROMPT)[:, -1].detach(), rtol=1e-12, atol=1e-12)
