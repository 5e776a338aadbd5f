"""What generates, used without a program: it prints nothing, and one loaded model serves any number of texts."""

import threading
from collections.abc import Iterable

import pytest
import torch
from networks import make_sampler

from data.tokenizer import make_tokenizer
from inference import statistics
from inference.generation import Delta, Generation
from inference.loading import LoadedModel, load
from inference.params import CacheParams, ModelParams, SamplingParams
from inference.sampling import stream
from inference.session import Session, complete
from model.cost import cache_bytes
from model.errors import UserError

BYTE = make_tokenizer("byte")
CPU = ModelParams(device="cpu", dtype="float32", compile="off")


@pytest.fixture(scope="module")
def loaded(runs) -> LoadedModel:
    return load(runs / "sliding", CPU)


def sampling(n: int = 10, **params) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": n, "stop_at_end": False} | params)


def text_of(deltas: Iterable[Delta], row: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.row == row)


def tokens_of(deltas: Iterable[Delta], row: int = 0) -> list[int]:
    return [delta.token for delta in deltas if delta.row == row and delta.token is not None]


def expected_tokens(loaded: LoadedModel, text: str, n: int, **params) -> list[int]:
    """Recomputed for each token, without a cache."""
    sampler = make_sampler(n_vocab=257, **{"temperature": 0.8} | params)
    tokens = stream(loaded.model, None, torch.tensor([loaded.encode(text)]), sampler)
    return [int(next(tokens)) for _ in range(n)]


@pytest.fixture
def script(monkeypatch):
    """Let the model say these bytes."""

    def say(content: bytes) -> None:
        said = lambda *_, **__: (torch.tensor([token]) for token in [*content, *[ord("~")] * 99])
        monkeypatch.setattr("inference.session.stream", said)

    return say


# One text.


def test_nothing_is_printed(loaded, runs, capsys):
    session = Session(load(runs / "sliding", CPU), sampling())
    deltas = [*complete(loaded, [loaded.encode("To be")], sampling(), logprobs=True), *session.turn("x")]
    assert len(deltas) == 2 * (10 + 1)
    assert capsys.readouterr() == ("", "")


def test_a_completion_is_the_models_own_stream(loaded):
    assert tokens_of(complete(loaded, [loaded.encode("To be")], sampling())) == expected_tokens(loaded, "To be", 10)


def test_nothing_is_computed_before_it_is_asked_for(loaded, script, monkeypatch):
    made = []
    tokens = lambda *_, **__: (made.append(n) or torch.tensor([97]) for n in range(99))
    monkeypatch.setattr("inference.session.stream", tokens)
    generation = complete(loaded, [[1]], sampling())
    assert made == []
    next(generation), next(generation)
    assert made == [0, 1]


def test_rows_are_samples_of_prompts(loaded):
    prompts = [loaded.encode(text) for text in ("To be", "or")]
    deltas = list(complete(loaded, prompts, sampling(num_samples=3)))
    alone = [list(complete(loaded, [prompt], sampling(num_samples=3))) for prompt in prompts]
    assert [tokens_of(deltas, row) for row in range(6)] == [tokens_of(alone[p], s) for p in (0, 1) for s in range(3)]


def test_log_probabilities_come_where_they_are_asked_for(loaded):
    prompt = loaded.encode("To be")
    (*with_them, _), (*without, _) = (
        complete(loaded, [prompt], sampling(), logprobs=wanted) for wanted in (True, False)
    )
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt + tokens_of(with_them)]))[0, len(prompt) - 1 : -1, :257]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens_of(with_them))[:, None])[:, 0]
    assert [delta.logprob for delta in with_them] == pytest.approx(expected.tolist(), abs=1e-4)
    assert {delta.logprob for delta in without} == {None}


# How a text ends.


@pytest.mark.parametrize(
    ("said", "params", "text", "finish", "stop"),
    [
        (b"abcdefghijk", {}, "abcdefghij", "length", None),
        (b"one\nROMEO: two", {"stop": ("\nROMEO:", "never"), "max_new_tokens": 50}, "one", "stop", "\nROMEO:"),
        (b"one\nROM", {"stop": ("\nROMEO:",), "max_new_tokens": 7}, "one\nROM", "length", None),
        ("é".encode()[:1], {"max_new_tokens": 1}, "\ufffd", "length", None),
    ],
)
def test_a_text_ends_with_a_reason(loaded, script, said, params, text, finish, stop):
    script(said)
    deltas = list(complete(loaded, [[1]], sampling(**params)))
    assert (text_of(deltas), deltas[-1].finish, deltas[-1].stop) == (text, finish, stop)
    assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_the_end_of_the_document_ends_the_text_with_its_token(loaded, monkeypatch):
    said = lambda *_, **__: (torch.tensor([token]) for token in (97, BYTE.eot, 98))
    monkeypatch.setattr("inference.session.stream", said)
    first, last = complete(loaded, [[1]], sampling(stop_at_end=True))
    assert (first.text, last.text, last.token, last.finish) == ("a", "", BYTE.eot, "end")


def test_cancelling_ends_it_after_the_token_in_the_making(loaded):
    generation = complete(loaded, [loaded.encode("To be")], sampling(99))
    deltas = [next(generation) for _ in range(4)]
    generation.cancel()
    deltas += generation
    assert (len(deltas), deltas[-1].finish, deltas[-1].token) == (4 + 1, "interrupted", None)
    assert generation.n_steps == 4


def test_another_thread_may_cancel(loaded):
    generation = complete(loaded, [loaded.encode("To be")], sampling(10**4))
    begun, deltas = threading.Event(), []

    def read() -> None:
        for delta in generation:
            deltas.append(delta)
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    generation.cancel()
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert deltas[-1].finish == "interrupted"


def test_a_batch_is_cancelled_in_every_row(loaded):
    generation = complete(loaded, [loaded.encode("To be")], sampling(99, num_samples=3))
    next(generation)
    generation.cancel()
    assert [delta.finish for delta in generation] == [None, None, *["interrupted"] * 3]


# Turns.


@pytest.mark.parametrize("run", ["sliding", "swa", "full"])
def test_turns_equal_one_long_text(runs, run):
    network = load(runs / run, CPU)
    session, ids = Session(network, sampling(5)), []
    for line in ("To be", ", or not", ""):
        made = tokens_of(session.turn(line))
        ids = ids + network.tokenizer.encode(line)
        assert made == tokens_of(complete(network, [ids], sampling(5)))
        ids = ids + made
    assert session.statistics.n_decoded == 3 * 4


def test_a_turn_that_was_cancelled_or_closed_is_part_of_the_text(loaded):
    greedy, ids = sampling(20, temperature=0), BYTE.encode("To be")
    session = Session(loaded, greedy)
    turn = session.turn("To be")
    ids += [next(turn).token for _ in range(3)]
    turn.close()
    ids += BYTE.encode("!")
    turn = session.turn("!")
    made = [next(turn).token]
    turn.cancel()
    list(turn)
    assert made == tokens_of(complete(loaded, [ids], sampling(1, temperature=0)))
    ids += made
    assert tokens_of(session.turn("")) == tokens_of(complete(loaded, [ids], greedy))


def test_a_turn_that_was_never_begun_adds_nothing(loaded):
    session = Session(loaded, sampling())
    session.turn("never read")
    assert tokens_of(session.turn("To be")) == expected_tokens(loaded, "To be", 10)


def test_a_turn_that_is_not_over_keeps_the_next_one_away(loaded):
    session = Session(loaded, sampling())
    next(session.turn("To be"))
    with pytest.raises(UserError, match="the turn before is not over"):
        session.turn("x")


def test_a_turn_that_does_not_fit_leaves_the_session_as_it_was(loaded):
    session = Session(loaded, sampling(4), CacheParams(max_length=12))
    list(session.turn("To be"))
    with pytest.raises(UserError, match=r"full layers have room for 12 tokens \(max_length\): 8 are used, 10 more"):
        session.turn("123456789")
    turn = session.turn("x")
    made = tokens_of(turn)
    assert len(made) == 12 + 1 - 8 - 2
    assert turn.out_of_room


@pytest.mark.parametrize(
    ("params", "said"),
    [((sampling(num_samples=2), None), "num_samples"), ((None, CacheParams(cache="none")), "cache (none)")],
)
def test_what_a_conversation_cannot_have_is_refused(loaded, params, said):
    with pytest.raises(UserError) as error:
        Session(loaded, *params)
    assert said in str(error.value)


# Several on one model.


def test_sessions_on_one_model_do_not_disturb_each_other(loaded):
    alone = [
        [tokens_of(Session(loaded, sampling(20, seed=seed)).turn(text))] for seed, text in ((1, "To be"), (2, "or"))
    ]
    turns = [Session(loaded, sampling(20, seed=seed)).turn(text) for seed, text in ((1, "To be"), (2, "or"))]
    among = [tokens_of(deltas) for deltas in zip(*zip(*turns, strict=True), strict=True)]
    assert [[x] for x in among] == alone


def test_threads_on_one_model_do_not_disturb_each_other(loaded):
    prompts, found = ["To be", "or", "not", "x" * 9], {}

    def read(text: str) -> None:
        found[text] = tokens_of(complete(loaded, [loaded.encode(text)], sampling(30)))

    threads = [threading.Thread(target=read, args=(text,)) for text in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {text: expected_tokens(loaded, text, 30) for text in prompts}


# Statistics.


def test_statistics_count_tokens_and_bytes(loaded, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(statistics.time, "perf_counter", lambda: next(now))
    prompts = [loaded.encode(text) for text in ("To be", "or")]
    generation = complete(loaded, prompts, sampling(num_samples=2))
    assert isinstance(generation, Generation)
    list(generation)
    found = generation.statistics
    assert (found.n_prefilled, found.prefill_s) == (7, 1)
    assert (found.n_decoded, found.decode_s) == (4 * 9, 9)
    expected = cache_bytes(loaded.model.config, 5 + 10, batch_size=4, dtype=torch.float32)
    assert sum(found.cache_bytes.values()) == expected


# Parameters.


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"min_p": 2}, {"stop": ("",)}, {"temprature": 1}],
    ids=str,
)
def test_sampling_parameters_out_of_range_or_unknown_are_refused(wrong):
    with pytest.raises(ValueError, match="1 validation error"):
        SamplingParams(**wrong)


def test_every_parameter_is_described():
    for params in (SamplingParams, CacheParams, ModelParams):
        assert [name for name, field in params.model_fields.items() if not field.description] == []
