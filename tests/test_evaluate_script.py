"""Evaluating a run: the numbers of training again, any text and context, streams, recall; kept with the run."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_tokens, run_config, run_program, save_run, tiny_config, tiny_model
from torch import Tensor, nn

import train
from configs.run_dir import RunDir
from data.loader import IGNORED, TokenArray, eval_batches, stream_hash
from data.recall import CHANCE, KEYS, PASSKEY, documents
from data.tokenizer import make_tokenizer
from model import streaming
from model.evaluate import LossByPosition
from model.gpt import GPT
from scripts import evaluate as script
from scripts.probes import recall, subject
from scripts.probes.options import Options
from scripts.probes.results import FILE, Found, column, keep
from scripts.probes.stream import sample

PNG = b"\x89PNG"
LINE = "Die naïve Katze 猫 sieht überall 😀 und 😀....\n"  # 44 characters, 54 bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory, text) -> Path:
    """A run of a second on sentences with characters of one to four bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "matmul_rate", lambda runtime: 1e12)
        changes = {"max_steps": 9, "eval_every": 3, "eval_tokens": 200}
        return train.run(run_config(tmp_path_factory.mktemp("runs"), text, train=changes)).path


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The same run with no evaluations."""
    (tmp_path / "run").mkdir()
    for part in run.iterdir():
        if not part.name.startswith(("evaluations", "loss_", "recall_")):
            (tmp_path / "run" / part.name).symlink_to(part)
    return tmp_path / "run"


@pytest.fixture
def random_run(tmp_path) -> Path:
    """A byte-level network with random weights."""
    save_run(tmp_path / "random", pattern="swa full", window=5)
    return tmp_path / "random"


def figures(path: Path, **options) -> dict[str, float]:
    return script.evaluate(Options(run=path, **options))


def loaded(path: Path) -> tuple[GPT, Tensor]:
    """A run's best network and the first 201 tokens of its validation split."""
    run = RunDir(path)
    model, _ = run.load(path)
    tokens = subject._validation(run, run.config())
    return model.eval(), torch.from_numpy(tokens.read(0, 201).astype(np.int64))


def nats(model: GPT, ids: Tensor, start: int, t: int) -> float:
    """Of the token after t, from all tokens from start on."""
    with torch.no_grad():
        return -model(ids[None, start : t + 1])[0, -1].log_softmax(0)[ids[t + 1]].item()


# Perplexity.


@pytest.mark.parametrize("which", ["best", "latest"])
def test_without_options_it_is_what_training_reported_to_the_last_digit(run, which):
    found = figures(run, checkpoint=which)
    step = RunDir(run).checkpoint(which).step
    reported = next(line for line in RunDir(run).metrics() if line["step"] == step)
    assert found == {key: reported[f"val_{key}"] for key in ("loss", "perplexity", "bits_per_byte")}
    if which == "latest":
        assert found["loss"] == RunDir(run).summary()["val_loss"]


def test_batches_are_those_of_training_and_of_as_many_tokens_in_another_context(run):
    opened = script.open_subject(run, "best", device=None, dtype=None)
    assert opened.batch_rows(16) == opened.config.micro_rows == 6
    assert (opened.batch_rows(32), opened.batch_rows(10), opened.batch_rows(1000)) == (3, 9, 1)


def test_the_stream_is_the_one_that_training_hashed(run, capsys):
    figures(run)
    assert f"validation: 200 tokens, context 16, stride 16, stream {RunDir(run).summary()['stream_hash']}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(("context", "stride"), [(16, 5), (11, 3), (24, 1), (16, 16)])
def test_each_token_counts_once_after_its_own_context(copy, context, stride):
    model, ids = loaded(copy)
    expected = []
    for t in range(200):
        window = 0 if t < context else -(-(t - context + 1) // stride)  # the first that reaches it
        expected.append(nats(model, ids, window * stride, t))
    conditions = f"{f'context={context},' if context != 16 else ''}{f'stride={stride}' if stride != context else ''}"
    name = f"loss[{conditions}]" if conditions else "loss"
    assert figures(copy, context=context, stride=stride)[name] == pytest.approx(sum(expected) / 200, rel=1e-5)


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 43, 100])
@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("max_tokens", [None, 14, 50])
def test_windows_that_overlap_count_every_target_once_and_in_order(n_tokens, stride, max_tokens):
    tokens = TokenArray(ids=np.arange(n_tokens), name="val")
    seen, starts = [], []
    batches = eval_batches(tokens, block_size=7, batch_size=3, max_tokens=max_tokens, stride=stride)
    for idx, targets in batches:
        assert idx.shape[1] == 7 >= idx.shape[0] * 7 / 3
        counted = targets != IGNORED
        assert torch.equal(targets[counted], idx[counted] + 1)
        seen += targets[counted].tolist()
        starts += idx[:, 0].tolist()
    assert seen == list(range(1, min(n_tokens, 1 + (max_tokens or n_tokens))))
    assert starts == list(range(0, len(starts) * stride, stride))


def test_another_stride_is_another_stream():
    tokens = TokenArray(ids=np.arange(50), name="val")
    assert stream_hash(tokens, 7, stride=7) == stream_hash(tokens, 7)
    assert len({stream_hash(tokens, 7, stride=n) for n in (1, 2, 7)}) == 3


def test_bits_per_byte_of_another_text_equal_a_count_by_hand(random_run, tmp_path):
    (tmp_path / "katze.txt").write_text(LINE * 2, encoding="utf-8")
    found = figures(random_run, text=str(tmp_path / "katze.txt"), context=200, dtype="float32", device="cpu")
    model, _ = RunDir(random_run).load(random_run)
    ids = torch.tensor([*(LINE * 2).encode(), 256])  # the byte tokenizer; end-of-text ends the document
    bits = sum(nats(model.eval(), ids, 0, t) for t in range(108)) / math.log(2)
    (bits_per_byte,) = (value for name, value in found.items() if name.startswith("bits_per_byte"))
    assert bits_per_byte == pytest.approx(bits / 107, rel=1e-5)  # the first byte is no target, end-of-text no byte


def test_tokens_and_texts_stand_in_the_names_of_columns(copy, tmp_path):
    (tmp_path / "katze.txt").write_text(LINE * 9, encoding="utf-8")
    few = figures(copy, tokens=50)
    everything = figures(copy, tokens="all")
    other = figures(copy, text=str(tmp_path / "katze.txt"))
    assert list(few)[1] == "perplexity[tokens=50]"
    n_tokens = subject._validation(RunDir(copy), RunDir(copy).config()).n_tokens - 1
    assert list(everything)[1] == f"perplexity[tokens={n_tokens}]"
    assert list(other)[1].startswith("perplexity[text=katze-")
    assert set(json.loads((copy / FILE).read_text())) == {"evaluated_step", *few, *everything, *other}


# Loss by position.


def test_loss_by_position_is_the_mean_of_the_losses_there(copy):
    model, ids = loaded(copy)
    losses = np.array([nats(model, ids, t - t % 16, t) for t in range(192)]).reshape(12, 16)
    rest = [nats(model, ids, 192, t) for t in range(192, 200)]  # the last context is half full
    found = figures(copy, by_position=True)
    curve = json.loads((copy / "loss_by_position.json").read_text())
    assert curve["position"][:5] == [1, 2, 3, 4, 5]
    assert curve["loss"][0] == pytest.approx((losses[:, 0].sum() + rest[0]) / 13, rel=1e-5)
    assert curve["position"][-1] == pytest.approx(14.5)  # of the bin from 13 to 16
    assert curve["loss"][-1] == pytest.approx(losses[:, 12:].mean(), rel=1e-5)
    assert found["loss_last_quarter"] == pytest.approx(losses[:, 12:].mean(), rel=1e-5)
    assert found["loss"] == json.loads((copy / FILE).read_text())["loss"]


def test_bins_hold_every_target_once():
    by_position = LossByPosition(100)
    losses, targets = torch.rand(3, 100, dtype=torch.float64), torch.zeros(3, 100).long()
    targets[2, 40:] = -100
    losses[2, 40:] = 0
    by_position.add(losses, targets)
    positions, means = by_position.curve()
    edges = [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19, 23, 27, 32, 38, 45, 54, 64, 76, 91, 101]
    assert len(positions) == len(means) == len(edges) - 1
    for start, end, position, mean in zip(edges, edges[1:], positions, means, strict=False):
        inside = slice(start - 1, end - 1)
        n = (targets[:, inside] == 0).sum()
        assert mean == pytest.approx((losses[:, inside].sum() / n).item())
        assert start <= position < end
    assert by_position.tail(0.25) == pytest.approx(losses[:2, 75:].mean().item())


def test_positions_that_overlapping_windows_leave_out_are_absent(copy):
    figures(copy, by_position=True, stride=4, tokens=200)
    curve = json.loads((copy / "loss_by_position.json").read_text())
    assert curve["position"][0] == 1  # the first window counts all
    assert len(curve["position"]) == len(curve["loss"])


def test_what_no_context_is_long_enough_for_is_absent(copy):
    found = figures(copy, by_position=True, tokens=5)
    assert set(found) == {f"{name}[tokens=5]" for name in ("loss", "perplexity", "bits_per_byte")}
    assert json.loads((copy / "loss_by_position.json").read_text())["position"] == [1, 2, 3, 4, 5]


# Contexts longer than those of training.


def test_contexts_are_doubled_and_rope_over_all_tokens_is_stretched_with_them(copy, capsys):
    found = figures(copy, extrapolate=70, plot=True)
    as_trained = [figures(copy, context=n)[f"perplexity[context={n}]"] for n in (32, 64)]
    assert [found[f"perplexity[context={n}]"] for n in (32, 64)] == as_trained
    assert found["perplexity"] == figures(copy)["perplexity"]
    model, ids = loaded(copy)  # a layer with a window of 5, then a full one
    for scaling in ("linear", "yarn"):
        table = {"swa": "none", "full": scaling}
        changes = {"rope_scaling": table, "rope_factor": {"swa": 1.0, "full": 4.0}, "rope_trained": 16}
        stretched = GPT(type(model.config)(**model.config.model_dump() | changes))
        stretched.load_state_dict(model.state_dict())
        losses = [nats(stretched, ids, t - t % 64, t) for t in range(200)]
        name = f"perplexity[context=64,rope={scaling}]"
        assert found[name] == pytest.approx(math.exp(sum(losses) / 200), rel=1e-5)
    assert len(found) == 3 + 2 * 2
    curve = json.loads((copy / "perplexity_by_context.json").read_text())
    assert (curve["context"], curve["block_size"]) == ([16, 32, 64], 16)
    assert curve["perplexity"]["as trained"] == [found["perplexity"], *as_trained]
    assert curve["perplexity"]["yarn"][0] is None
    assert (copy / "perplexity_by_context.png").read_bytes().startswith(PNG)
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("design", "n", "said"),
    [
        ({"position": "learned"}, 1, "the learned positions of this model end at 16, and so do these contexts"),
        ({"position": "alibi"}, 3, "no layer has plain RoPE over all tokens: there is nothing to stretch"),
        ({"pattern": "swa", "window": 4}, 3, "no layer has plain RoPE over all tokens"),
        ({"rope_scaling": "yarn", "rope_factor": 4.0, "rope_trained": 4}, 3, "no layer has plain RoPE over all tokens"),
    ],
    ids=str,
)
def test_what_cannot_go_on_or_be_stretched_is_said(tmp_path, text, capsys, design, n, said):
    save_run(tmp_path / "run", **design)
    options = {"text": str(text), "tokens": 150, "device": "cpu", "dtype": "float32"}
    assert len(figures(tmp_path / "run", extrapolate=64, **options)) == n
    assert said in capsys.readouterr().out


# Streams.


def test_a_stream_is_decoded_through_the_window_and_recomputed(copy, capsys):
    found = figures(copy, stream=True, window=6, n_sink=(0, 2), length=150, samples=31)
    model, ids = loaded(copy)
    runtime = script.open_subject(copy, "best", device=None, dtype=None).runtime
    at = sample(150, 31)
    recomputed = torch.tensor([nats(model, ids, max(0, t - 5), t) for t in at.tolist()])
    losses = {
        k: streaming.streamed_losses(streaming.through_window(model, 6, k), ids[:151], runtime, chunk=1) for k in (0, 2)
    }
    above = min((losses[k][at] - recomputed for k in (0, 2)), key=lambda difference: difference.std())
    floor = found["recomputed_perplexity[context=6,length=150]"]
    assert math.log(floor) in [pytest.approx((losses[k].mean() - above.mean()).item(), rel=1e-5) for k in (0, 2)]
    for k in (0, 2):
        setting = f"[window=6,n_sink={k},length=150]"
        perplexity = found[f"stream_perplexity{setting}"]
        assert perplexity == pytest.approx(losses[k].mean().exp().item(), rel=1e-5)
        assert found[f"stream_minus_recomputed{setting}"] == pytest.approx(math.log(perplexity / floor), abs=1e-9)
    streams = json.loads((copy / "loss_in_stream.json").read_text())["streams"]
    assert list(streams) == ["window 6, 0 sinks", "window 6, 2 sinks", "recomputed from 6"]
    assert "a stream of 150 tokens, 31 of them recomputed" in capsys.readouterr().out


def test_where_every_target_is_recomputed_nothing_is_estimated(copy):
    found = figures(copy, stream=True, window=6, length=100, samples=100)
    model, ids = loaded(copy)
    exact = sum(nats(model, ids, max(0, t - 5), t) for t in range(100)) / 100
    assert found["recomputed_perplexity[context=6,length=100]"] == pytest.approx(math.exp(exact), rel=1e-5)
    content = json.loads((copy / "loss_in_stream.json").read_text())
    assert content["position"][0] == 100 / 64
    assert content["streams"]["recomputed from 6"][0] == pytest.approx(
        sum(nats(model, ids, 0, t) for t in range(4)) / 4, rel=1e-5
    )


@pytest.mark.parametrize(("N", "n"), [(10, 3), (1000, 7), (8192, 512), (5, 5), (5, 9)])
def test_a_sample_has_one_target_of_each_part_of_the_stream(N, n):
    at = sample(N, n)
    assert torch.equal(at, sample(N, n))
    assert (at * min(n, N) // N).tolist() == list(range(min(n, N)))


def test_a_window_wider_than_that_of_training_is_said(copy, capsys):
    figures(copy, stream=True, window=6, length=40)
    assert "note: layers that were trained with a window of 5 now see 6 tokens" in capsys.readouterr().out
    figures(copy, stream=True, window=5, length=40)
    assert "note" not in capsys.readouterr().out


def test_without_a_window_it_streams_as_trained(copy):
    found = figures(copy, stream=True, length=120)
    model, ids = loaded(copy)
    with torch.no_grad():
        losses = model(ids[None, :120], ids[None, 1:121], reduction="none")
    assert found["stream_perplexity[length=120]"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert set(found) == {f"{name}[length=120]" for name in ("stream_perplexity", "stream_minus_recomputed")} | {
        "recomputed_perplexity[context=16,length=120]"
    }


def test_the_attention_that_first_tokens_get_is_a_column_for_each_layer(copy, capsys):
    found = figures(copy, attention_to_first=2)
    by_layer = [found[f"attention_to_first[layer={i},k=2]"] for i in (0, 1)]
    assert found["attention_to_first[k=2]"] == pytest.approx(sum(by_layer) / 2)
    assert 0 < by_layer[0] < by_layer[1] < 1  # the window of layer 0 loses them
    equal = sum(2 / n for n in range(3, 17)) / 14
    assert f"where attention to all is equal  {equal:.4f}" in capsys.readouterr().out


# Recall.


class LooksUp(nn.Module):
    """Answers every question whose value is at most `sight` tokens back, and says nothing that could be right else."""

    def __init__(self, sight: int):
        super().__init__()
        self.sight, self.wpe = sight, None

    def forward(self, idx: Tensor) -> Tensor:
        logits = torch.zeros(*idx.shape, 257)
        logits[:, :, 0] = 0.5
        for b, row in enumerate(bytes(row.tolist()) for row in idx):
            for t in range(len(row)):
                hash_at = row.rfind(b"#", max(0, t - 4), t + 1)  # it is in the midst of a passkey
                n = t - hash_at if hash_at >= 0 else 0
                key = row[t - n : t + 1]
                before = row.rfind(key, 0, t)
                if chr(key[0]) in KEYS + PASSKEY and before >= 0 and t - before - len(key) < self.sight:
                    logits[b, t, row[before + len(key)]] = 1.0
        return logits


def lookup_subject(sight: int, tmp_path: Path) -> subject.Subject:
    save_run(tmp_path / "run", block_size=128, pattern="swa", window=12)
    opened = subject.open_subject(tmp_path / "run", "best", device="cpu", dtype="float32")
    fields = {name: getattr(opened, name) for name in opened.__slots__}
    return subject.Subject(**fields | {"model": LooksUp(sight)})


def test_what_is_in_sight_is_recalled_and_nothing_else(tmp_path):
    found = recall.answers(lookup_subject(20, tmp_path), context=96, n_documents=7)
    assert found["right"].equals(found["distance"] <= 20)
    assert set(found["probe"]) == {"recall", "passkey"}
    assert found["right"].sum() > 20 < (~found["right"]).sum()


def test_a_key_has_to_be_said_before_it_is_asked(tmp_path):
    found = recall.answers(lookup_subject(10**6, tmp_path), context=96, n_documents=7)
    assert found["right"].all()
    texts = [document[:96] for document in islice(documents("val", length=97), 7)]
    assert (found["probe"] == "recall").sum() == sum(text.count(key) - (key in text) for text in texts for key in KEYS)


def test_recall_is_told_by_octaves_and_by_windows(tmp_path, monkeypatch, capsys):
    opened = lookup_subject(20, tmp_path)
    monkeypatch.setattr(script, "open_subject", lambda *_, **__: opened)
    found = figures(tmp_path / "run", recall=True, tokens=7 * 128, plot=True)
    for probe in ("recall", "passkey"):
        assert found[f"{probe}_accuracy[distance 8-15]"] == 1.0
        assert 0 < found[f"{probe}_accuracy[distance 16-31]"] < 1
        assert found[f"{probe}_accuracy[distance 32-63]"] == 0.0
        assert found[f"{probe}_accuracy[below W]"] == 1.0
        assert 0 < found[f"{probe}_accuracy[W to 2W]"] < 1  # to 24
        assert found[f"{probe}_accuracy[from 2W]"] == found[f"{probe}_accuracy[beyond reach]"] == 0.0
        assert 0 < found[f"{probe}_accuracy"] < 1
    shown = capsys.readouterr().out
    assert "recall in 128 tokens, W = 12, all layers together reach 22 tokens back" in shown
    assert ["by", "chance", "3.8%", "0.001%"] in [line.split() for line in shown.splitlines()]
    curve = json.loads((tmp_path / "run" / "recall_by_distance.json").read_text())
    assert curve["distance"] == [1, 2, 4, 8, 16, 32, 64]
    assert curve["recall"][3:6] == [1.0, found["recall_accuracy[distance 16-31]"], 0.0]
    assert curve["passkey"][0] is None  # no passkey is so near
    assert (tmp_path / "run" / "recall_by_distance.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("pattern", ["swa", "swa swa full"])
def test_beyond_the_reach_of_all_windows_no_value_can_be_known(pattern):
    """What makes chance the best that a sliding network can do there: its answer does not depend on the value."""
    config = tiny_config(n_layer=3, pattern=pattern, window=4, block_size=40)
    window, reach = recall.window_and_reach(config)
    assert (window, reach) == (4, 9 if pattern == "swa" else None)
    model, text = tiny_model(config), random_tokens(1, 30)
    for distance in (1, 8, 9, 10, 25):
        other = text.clone()
        other[0, 29 - distance] = (text[0, 29 - distance] + 1) % 31
        with torch.no_grad():
            same = torch.equal(model(text)[0, 29], model(other)[0, 29])
        assert same == (reach is not None and distance > reach), distance


def test_reach_is_not_known_where_sinks_stay_or_a_layer_sees_all():
    assert recall.window_and_reach(tiny_config()) == (None, None)
    assert recall.window_and_reach(tiny_config(pattern="swa", window=4, n_sink=1)) == (4, None)
    assert recall.window_and_reach(tiny_config(pattern="swa full", window=4)) == (4, None)


def test_a_network_that_knows_nothing_of_recall_is_said_to(random_run, capsys):
    found = figures(random_run, recall=True, tokens=600, context=200, device="cpu")
    assert found["recall_accuracy[context=200]"] < 4 * CHANCE
    assert "note: trained on pydocs, not on recall: expect little more than chance" in capsys.readouterr().out


@pytest.mark.slow
def test_the_config_learns_recall_and_windows_alone_do_not(tmp_path):
    """Minutes: one full layer of four brings back what the windows of the others hide."""
    found = {}
    for name, pattern in (("rescued", "3:1"), ("windows", "swa")):
        line = ["configs/recall.toml", "--model.pattern", pattern, "--out_dir", str(tmp_path), "--name", name]
        ended = run_program("train.py", *line, "--log.no-progress")
        assert ended.code == 0, ended.err
        found[name] = figures(tmp_path / name, recall=True)
    assert found["rescued"]["recall_accuracy[from 2W]"] > 0.8
    assert found["windows"]["recall_accuracy[beyond reach]"] < 2 * CHANCE
    assert found["windows"]["passkey_accuracy[beyond reach]"] < 0.01


# What is kept and printed.


def test_evaluations_are_added_to_what_is_there(copy):
    first, second = figures(copy), figures(copy, attention_to_first=1)
    kept = json.loads((copy / FILE).read_text())
    assert kept == {"evaluated_step": RunDir(copy).checkpoint().step, **first, **second}


def test_figures_of_another_checkpoint_are_dropped_and_that_is_said(tmp_path, capsys):
    keep(tmp_path, 5, [Found(figures={"a": 1.0}, text="")], plot=False)
    keep(tmp_path, 5, [Found(figures={"b": 2.0}, text="")], plot=False)
    assert json.loads((tmp_path / FILE).read_text()) == {"evaluated_step": 5, "a": 1.0, "b": 2.0}
    assert capsys.readouterr().err == ""
    keep(tmp_path, 7, [Found(figures={"b": 3.0}, text="")], plot=False)
    assert json.loads((tmp_path / FILE).read_text()) == {"evaluated_step": 7, "b": 3.0}
    assert "was of step 5, and is begun anew with step 7" in capsys.readouterr().err


def test_evaluations_that_end_together_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: keep(tmp_path, 1, [Found(figures={f"{n}": n}, text="")], plot=False), range(24)))
    assert len(json.loads((tmp_path / FILE).read_text())) == 25


def test_a_column_says_what_it_was_measured_under():
    assert column("loss") == "loss"
    assert column("loss", context=None) == "loss"
    assert column("recall", "below W", context=5, k=0) == "recall[below W,context=5,k=0]"


def test_plots_lie_beside_what_they_show(copy):
    figures(copy, by_position=True, stream=True, window=5, n_sink=(0, 1), length=60, plot=True)
    for name in ("loss_by_position", "loss_in_stream"):
        assert (copy / f"{name}.png").read_bytes().startswith(PNG)
        assert json.loads((copy / f"{name}.json").read_text())
    assert not list(copy.glob("*.tmp"))


def test_json_on_standard_output_has_every_digit(program, copy):
    ended = program(script.main, copy, "--json")
    found = json.loads(ended.out)
    assert found["figures"] == {k: v for k, v in json.loads((copy / FILE).read_text()).items() if k != "evaluated_step"}
    assert found["step"] == RunDir(copy).checkpoint().step


def test_the_table_has_the_four_digits_that_training_prints(program, copy):
    ended = program(script.main, copy)
    found = json.loads((copy / FILE).read_text())
    printed = {line.rpartition("  ")[0].strip(): line.split()[-1] for line in ended.out.splitlines() if "  " in line}
    assert printed["bits per byte"] == f"{found['bits_per_byte']:.4f}"
    assert printed["perplexity"] == f"{found['perplexity']:.4f}"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--context", 0], "--context (0) must be at least 1"),
        (["--tokens", -1], "--tokens (-1) must be at least 1"),
        (["--attention-to-first", 0], "--attention-to-first (0) must be at least 1"),
        (["--attention-to-first", 16], "--attention-to-first (16) must be below the context (16)"),
        (["--attention-to-first", 1, "--context", 9999], "less than a context (9999)"),
        (["--extrapolate", 16], "--extrapolate (16) must be more than the context of training (16)"),
        (["--extrapolate", 64, "--stride", 4], "--extrapolate takes contexts of its own: leave out --context and"),
        (["--stride", 17], "--stride (17) is more than the context (16)"),
        (["--window", 4], "--window (4) means something with --stream only"),
        (["--length", 4], "--length (4) means something with --stream only"),
        (["--stream", "--n-sink", 1], "--n-sink (1) means something with --window only"),
        (["--stream", "--window", 4, "--n-sink", 2, 2], "--n-sink (2 2) must be numbers from 0 on, each once"),
        (["--stream", "--window", 4, "--n-sink", -1], "--n-sink (-1) must be numbers from 0 on, each once"),
        (["--stream", "--length", 99999], "--length (99999) is more than the "),
        (["--recall", "--context", 2, "--tokens", 60], "--recall: a context of 2 tokens is too short to ask anything"),
        (["--text", "nowhere.txt"], "nowhere.txt: there is no such file or folder"),
        (["--device", "abacus"], "device (abacus) is unknown"),
    ],
)
def test_what_cannot_be_gets_a_line(program, copy, wrong, said):
    program(script.main, copy, *wrong).assert_refused(said)
    assert not (copy / FILE).exists()


def test_the_line_begins_with_the_name_of_the_program(tmp_path):
    ended = run_program("-m", "scripts.evaluate", tmp_path / "nowhere")
    assert (ended.code, ended.err) == (2, f"evaluate.py: {tmp_path / 'nowhere'} is no run: it has no config.json\n")


def test_learned_positions_cannot_be_left(program, tmp_path):
    save_run(tmp_path / "run", position="learned")
    (tmp_path / "long.txt").write_text(LINE * 9, encoding="utf-8")
    text = ("--text", tmp_path / "long.txt", "--device", "cpu")
    for wrong in (["--context", 17], ["--stream", "--window", 4], ["--recall", "--context", 20]):
        program(script.main, tmp_path / "run", *wrong, *text).assert_refused("the 16 of the learned positions")


def test_a_tokenizer_that_joins_letters_cannot_be_asked(program, copy, monkeypatch):
    joining = make_tokenizer("bpe-300", lambda: iter(["hBhBhBaUaU" * 50]))
    opened = subject.open_subject(copy, "best", device="cpu", dtype=None)
    fields = {name: getattr(opened, name) for name in opened.__slots__} | {"tokenizer": joining}
    monkeypatch.setattr(script, "open_subject", lambda *_, **__: subject.Subject(**fields))
    program(script.main, copy, "--recall").assert_refused("asks for single characters", "train with the tokenizer char")


def test_a_text_that_changed_since_training_is_no_validation_stream(program, random_run, tmp_path, text):
    path = random_run / "config.json"
    content = json.loads(path.read_text())
    content["config"]["data"] |= {"text": str(text), "tokenizer": "byte", "dir": str(text.parent / "prepared")}
    path.write_text(json.dumps(content))
    program(script.main, random_run).assert_refused(
        "is not the one of this run any more", "give another text with --text"
    )


def test_a_damaged_file_of_evaluations_is_not_overwritten(program, copy):
    (copy / FILE).write_text("[1]")
    program(script.main, copy).assert_refused(f"{copy / FILE} is damaged (it holds a list): remove it")
    assert (copy / FILE).read_text() == "[1]"
