"""What a run recalls, by distance: against a network that looks up and nothing else."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import PNG, random_tokens, run_program, save_run
from evaluated import figures
from networks import tiny_config, tiny_model
from torch import Tensor, nn

from data.recall import CHANCE, KEYS, PASSKEY, documents
from scripts import evaluate as script
from scripts.probes import recall, subject


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
    assert "recall, context 128 tokens, window W = 12, reach of all layers together 22 tokens" in shown
    assert ["chance", "3.8%", "0.001%"] in [line.split() for line in shown.splitlines()]
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
    assert "note: trained on pydocs, not on recall: expect accuracy close to chance" in capsys.readouterr().out


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
