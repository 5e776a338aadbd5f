"""The recall text: the same everywhere, asked at all distances, and told by nothing but itself."""

import json
from collections import Counter
from itertools import islice

import pytest
from conftest import ROOT

from data import recall
from data.catalog import open_text
from data.prepare import prepare
from data.recall import DISTANCE, KEYS, LENGTH, PASSKEY, VALUES, documents, questions
from model.errors import UserError

DOCUMENTS = list(islice(documents("train"), 30))


def test_documents_are_what_they_were_when_this_test_was_written():
    assert DOCUMENTS[0][:60] == "hBhBeUdReUhBdRhBdRdReUeUjClYdRlYlYgRgRgReUeUaQgRaQlYaQpAoPiB"
    assert next(documents("val", length=50)) == "bHiLpJaDjUgXjUaDgXpJiLiLpJmRbHpJeAnUmRnUnUmRhOfIhO"


def test_a_document_has_one_value_for_a_key_and_the_next_another():
    said = []
    for document in DOCUMENTS:
        pairs = {document[at : at + 2] for at in range(len(document) - 1) if document[at] in KEYS}
        assert len({pair[0] for pair in pairs}) == len(pairs) == len(KEYS)
        assert {pair[1] for pair in pairs} <= set(VALUES)
        said.append(frozenset(pairs))
    assert len(set(said)) == len(DOCUMENTS)


def test_every_value_is_as_likely_for_a_key_as_any_other():
    first = Counter(
        document[document.index("c") + 1]
        for document in islice(documents("train", length=300), 2600)
        if "c" in document
    )
    assert set(first) == set(VALUES)
    assert 60 < min(first.values()) < max(first.values()) < 140  # 100 each, give or take four deviations


def test_the_validation_split_repeats_no_document():
    assert not {document[:40] for document in DOCUMENTS} & {document[:40] for document in islice(documents("val"), 30)}


def test_questions_are_all_keys_seen_before_with_the_distance_to_the_value_they_had():
    document = next(documents("val", length=400))
    expected = []
    for at, key in enumerate(document):
        if (key in KEYS or key == PASSKEY) and (before := document.rfind(key, 0, at)) >= 0:
            cut_off = len(document) - at <= (5 if key == PASSKEY else 1)
            expected += [] if cut_off else [(key, at, at - (before + 1))]
    found = [(question.key, question.at, question.distance) for question in questions(document)]
    assert found == expected
    assert {key for key, *_ in found} >= {PASSKEY, *"abc"}


def test_a_passkey_is_asked_whole():
    document = "#12345#12345"
    assert [question.distance for question in questions(document)] == [5]
    assert list(questions(document[:-1])) == []


def test_every_octave_of_distances_has_its_questions():
    octaves = Counter(q.distance.bit_length() for document in DOCUMENTS for q in questions(document))
    asked = sum(octaves.values())
    assert all(octaves[n] / asked > 0.03 for n in range(1, DISTANCE.bit_length())), octaves  # from 1 to 256


def test_it_is_a_text_like_others(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "DOCUMENTS", {"train": 6, "val": 2})
    prepared = prepare("recall", "char", root=tmp_path, progress=False)
    assert prepared.tokenizer.n_vocab == len(KEYS) + len(VALUES) + 11 + 1  # digits, #, end-of-text
    for split, document in (("train", DOCUMENTS[0]), ("val", next(documents("val")))):
        tokens = prepared.split(split)
        assert tokens.n_tokens == recall.DOCUMENTS[split] * (LENGTH + 1)
        assert tokens.read(0, LENGTH + 1).tolist() == [*prepared.tokenizer.encode(document), prepared.tokenizer.eot]


@pytest.mark.parametrize("name", ["recal", "Recall", "recall-512"])
def test_a_name_that_is_nearly_recall_gets_advice(name):
    with pytest.raises(UserError, match=r"did you mean recall\?"):
        open_text(name)


def test_the_task_for_lm_eval_asks_held_out_documents_what_they_have_said():
    lines = (ROOT / "configs" / "lm_eval" / "recall.jsonl").read_text().splitlines()
    for line, text in zip(lines, islice(documents("val", length=256), 100), strict=True):
        found = json.loads(line)
        assert found["text"] == text
        assert found["asked"] in [question.at for question in questions(text) if question.key in KEYS]
        assert text[: found["asked"]].count(text[found["asked"] : found["asked"] + 2]) > 0
