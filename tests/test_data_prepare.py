import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import PATIENCE_S

from data import prepare as preparing
from data.prepare import Prepared, beyond, open_prepared, prepare, until
from data.text import Piece, Text
from data.tokenizer import EOT, Tokenizer, make_tokenizer
from model.errors import UserError

FILES = ("train.bin", "val.bin", "tokenizer.json", "meta.json")
PROSE = "".join(f"{i} green bottles hang “naïvely” on the wall.\n" for i in range(40))


@pytest.fixture
def lines(tmp_path) -> str:
    """A text of 60 documents."""
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i} says é {'x' * i}."}) + "\n" for i in range(60)))
    return str(path)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def quietly(text: str, tokenizer: str, root: Path) -> Prepared:
    return prepare(text, tokenizer, root=root, progress=False)


def everything(prepared: Prepared, split: str) -> str:
    tokens = prepared.split(split)
    return prepared.tokenizer.decode(tokens.read(0, tokens.n_tokens).tolist())


def content(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe-300"])
def test_the_splits_are_the_text(tmp_path, tokenizer):
    prepared = quietly(write(tmp_path / "a.txt", PROSE), tokenizer, tmp_path)
    text = everything(prepared, "train").removesuffix(EOT) + everything(prepared, "val").removesuffix(EOT)
    assert text == PROSE


def test_the_folder_holds_four_files_and_nothing_else_is_left(tmp_path):
    prepared = quietly(write(tmp_path / "my text.txt", PROSE), "bpe-300", tmp_path / "root")
    assert prepared.directory.name.startswith("my-text-bpe-300-")
    assert sorted(file.name for file in prepared.directory.iterdir()) == sorted(FILES)
    assert [path for path in (tmp_path / "root").iterdir() if "partial" in path.name or "tmp" in path.name] == []


def test_every_document_is_followed_by_end_of_text(tmp_path):
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "a.txt", "a" * 60)
    write(tmp_path / "two" / "b.txt", "b" * 40)
    prepared = quietly(str(tmp_path / "two"), "byte", tmp_path)
    assert everything(prepared, "train") == "a" * 60 + EOT + "b" * 30 + EOT
    assert everything(prepared, "val") == "b" * 10 + EOT


def test_meta_counts_what_the_files_hold(tmp_path, lines):
    prepared = quietly(lines, "byte", tmp_path)
    for name, meta in (("train", prepared.meta.train), ("val", prepared.meta.val)):
        ids = prepared.split(name).read(0, meta.n_tokens)
        assert meta.n_documents == (ids == prepared.tokenizer.eot).sum()
        assert meta.n_bytes == prepared.tokenizer.token_bytes()[ids].sum() == meta.n_tokens - meta.n_documents
    total = prepared.meta.train.n_bytes + prepared.meta.val.n_bytes
    assert prepared.meta.val.n_bytes == total // 10


@pytest.mark.parametrize("cut", range(1, 13))
def test_the_cut_for_validation_keeps_characters_whole(cut):
    pieces = [Piece("aé", ends_document=False), Piece("日b"), Piece("😀c")]  # 3 + 4 + 5 bytes
    head, tail = list(until(iter(pieces), cut)), list(beyond(iter(pieces), cut))
    assert "".join(piece.text for piece in head + tail) == "aé日b😀c"
    assert cut <= sum(len(piece.text.encode()) for piece in head) <= cut + 3
    assert head[-1].ends_document
    assert all(piece.text for piece in head + tail)


def test_a_source_with_its_own_validation_split_keeps_it(tmp_path, monkeypatch):
    splits = {"train": lambda: iter([Piece("train")]), "val": lambda: iter([Piece("its own")])}
    monkeypatch.setattr(preparing, "open_text", lambda text: Text(name=text, origin="", identity="", splits=splits))
    prepared = quietly("two-splits", "byte", tmp_path)
    assert (everything(prepared, "train"), everything(prepared, "val")) == ("train" + EOT, "its own" + EOT)


def test_the_vocabulary_is_learned_from_the_training_part_alone(tmp_path):
    prepared = quietly(write(tmp_path / "a.txt", "ab " * 300 + "xyz" * 33), "bpe-280", tmp_path)
    tokens = [prepared.tokenizer.decode_bytes([i]) for i in range(prepared.tokenizer.n_vocab)]
    assert b" ab" in tokens
    assert not [token for token in tokens if len(token) > 1 and b"y" in token]


def test_char_can_write_the_validation_part_too(tmp_path):
    prepared = quietly(write(tmp_path / "a.txt", "a" * 90 + "b" * 10), "char", tmp_path)
    assert (prepared.tokenizer.n_vocab, everything(prepared, "val")) == (3, "b" * 10 + EOT)


def test_ids_take_two_bytes_up_to_65536_of_them_and_four_beyond(tmp_path, monkeypatch):
    for n_vocab, dtype in ((1 << 16, "<u2"), ((1 << 16) + 1, "<u4")):
        ranks = {bytes([value]): value for value in range(256)}
        special = {EOT: n_vocab - 1}
        encoding = tiktoken.Encoding("large", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)
        large = Tokenizer(encoding)
        monkeypatch.setattr(preparing, "make_tokenizer", lambda name, corpus, large=large: large)
        prepared = quietly(write(tmp_path / "a.txt", PROSE), "byte", tmp_path / dtype)
        assert prepared.meta.dtype == dtype
        assert prepared.split("val").read(0, prepared.meta.val.n_tokens)[-1] == n_vocab - 1


def test_preparing_again_opens_what_is_there(tmp_path, lines, monkeypatch):
    first = quietly(lines, "byte", tmp_path)
    monkeypatch.setattr(preparing, "_make", None)
    assert quietly(lines, "byte", tmp_path).digest == first.digest


def test_another_tokenizer_or_a_changed_file_gets_a_folder_of_its_own(tmp_path):
    path = write(tmp_path / "a.txt", PROSE)
    folders = {quietly(path, name, tmp_path).directory for name in ("byte", "char", "bpe-300", "bpe-301")}
    write(tmp_path / "a.txt", PROSE + "More.")
    folders.add(quietly(path, "byte", tmp_path).directory)
    assert len(folders) == 5


def test_a_prepared_folder_can_be_copied_and_named_as_the_text(tmp_path, lines):
    original = quietly(lines, "byte", tmp_path)
    copy = original.directory.rename(tmp_path / "elsewhere")
    assert quietly(str(copy), "byte", tmp_path).digest == original.digest
    with pytest.raises(UserError, match=r"elsewhere: prepared with tokenizer byte, not bpe-300; set data.tokenizer"):
        quietly(str(copy), "bpe-300", tmp_path)


def test_a_text_too_small_for_the_vocabulary_says_what_it_gave(tmp_path):
    prepared = quietly(write(tmp_path / "a.txt", "tick tock " * 9), "bpe-4096", tmp_path)
    assert f"too small for bpe-4096: the tokenizer is {prepared.tokenizer.name}" in prepared.summary()
    assert prepared.tokenizer.n_vocab < 300


def test_the_summary_tells_sizes_tokens_and_bytes_per_token(tmp_path, capsys):
    path = write(tmp_path / "a.txt", "x" * 1000)
    prepared = prepare(path, "byte", root=tmp_path)
    train = prepared.summary().splitlines()[1].split()
    assert train == ["train", "901", "tokens", "900", "bytes", "1", "documents", "1.00", "bytes", "per", "token"]
    assert prepared.summary() in capsys.readouterr().out


def test_quiet_is_quiet(tmp_path, lines, capfd):
    quietly(lines, "bpe-300", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_documents_from_mixed_files_and_parquet_are_all_there(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write(folder / "a.txt", "plain " * 30)
    write(folder / "b.md", "# mark " * 30)
    write(folder / "c.jsonl", '{"text": "json"}\n' * 9)
    pq.write_table(pa.table({"text": ["row"] * 9}), folder / "d.parquet")
    prepared = quietly(str(folder), "byte", tmp_path)
    documents = (everything(prepared, "train") + everything(prepared, "val")).split(EOT)
    assert documents[:3] == ["plain " * 30, "# mark " * 30, "json"]
    assert "".join(documents).count("row") == 9


# Interrupted work goes on to the same bytes.

SLOW_WORKER = """
import sys, time
from pathlib import Path
from data import prepare
from data.tokenizer import Tokenizer

prepare.BATCH_BYTES = 60
encode_batch = Tokenizer.encode_batch
Tokenizer.encode_batch = lambda self, texts: time.sleep(0.02) or encode_batch(self, texts)
prepare.prepare(sys.argv[1], "byte", root=Path(sys.argv[2]), progress=False)
"""


def start_slow_worker(text: str, root: Path) -> subprocess.Popen:
    arguments = [sys.executable, "-c", SLOW_WORKER, text, str(root)]
    return subprocess.Popen(arguments, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)


def pieces_done(root: Path) -> int:
    states = list(root.glob("*.partial/state.json"))
    return json.loads(states[0].read_bytes())["splits"]["train"]["pieces"] if states else 0


def fail_at(call: int, function, error: BaseException):
    """Wrap a function so that one of its calls raises."""
    calls = iter(range(1, 1_000_000))

    def wrapped(*args):
        if next(calls) == call:
            raise error
        return function(*args)

    return wrapped


def final_folders(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.is_dir() and not path.name.endswith(".partial")]


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_final_and_the_next_one_goes_on_to_the_same_bytes(tmp_path, lines, monkeypatch):
    expected = content(quietly(lines, "byte", tmp_path / "undisturbed").directory)
    root = tmp_path / "killed"
    worker = start_slow_worker(lines, root)
    end = time.monotonic() + PATIENCE_S
    while pieces_done(root) < 10:
        assert worker.poll() is None, worker.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)
    worker.kill()
    assert worker.wait() == -signal.SIGKILL
    assert final_folders(root) == []

    done = pieces_done(root)
    with open(next(root.glob("*.partial/train.bin")), "ab") as file:
        file.write(b"written, but not recorded")
    encoded = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encoded.append(text) or encode(self, text))
    resumed = quietly(lines, "byte", root)
    assert content(resumed.directory) == expected
    assert done >= 10
    assert not [text for text in encoded if text.startswith(f"Document {done - 1} ")]


@pytest.mark.slow
def test_two_processes_at_once_make_one_whole_folder(tmp_path, lines):
    expected = content(quietly(lines, "byte", tmp_path / "alone").directory)
    workers = [start_slow_worker(lines, tmp_path / "both") for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0], [worker.stderr.read() for worker in workers]
    (folder,) = final_folders(tmp_path / "both")
    assert content(tmp_path / "both" / folder) == expected


@pytest.mark.parametrize("call", [1, 2, 9])
def test_ctrl_c_leaves_nothing_final_and_the_next_start_goes_on_to_the_same_bytes(tmp_path, lines, monkeypatch, call):
    expected = content(quietly(lines, "bpe-270", tmp_path / "undisturbed").directory)
    monkeypatch.setattr(preparing, "BATCH_BYTES", 150)
    with monkeypatch.context() as patch:
        encode_batch = Tokenizer.encode_batch
        patch.setattr(Tokenizer, "encode_batch", fail_at(call, encode_batch, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            quietly(lines, "bpe-270", tmp_path / "stopped")
    assert final_folders(tmp_path / "stopped") == []
    assert content(quietly(lines, "bpe-270", tmp_path / "stopped").directory) == expected


def test_a_full_disk_is_one_line_and_the_next_start_goes_on(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(preparing, "BATCH_BYTES", 150)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_at(9, os.fsync, OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError) as error:
            quietly(lines, "byte", tmp_path / "full")
    assert str(error.value).endswith(": the disk is full; free some space and run the same command again, it resumes")
    assert final_folders(tmp_path / "full") == []
    assert pieces_done(tmp_path / "full") > 0
    expected = content(quietly(lines, "byte", tmp_path / "roomy").directory)
    assert content(quietly(lines, "byte", tmp_path / "full").directory) == expected


# What cannot be prepared, or not opened.


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the text is empty"), ("tiny", "the text has 4 bytes, too few to hold out a tenth for validation")],
)
def test_a_text_without_enough_text_is_refused_and_leaves_nothing(tmp_path, text, message):
    path = write(tmp_path / "a.txt", text)
    with pytest.raises(UserError) as error:
        quietly(path, "byte", tmp_path / "root")
    assert str(error.value) == f"a: {message} ({path}); use a longer text"
    assert [name for name in os.listdir(tmp_path / "root") if not name.endswith(".lock")] == []


def test_bytes_that_are_not_utf8_are_refused_and_leave_nothing(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine " * 20 + b"\xff")
    with pytest.raises(UserError, match="the byte at offset 100 is not UTF-8"):
        quietly(str(tmp_path / "a.txt"), "byte", tmp_path / "root")
    assert [name for name in os.listdir(tmp_path / "root") if not name.endswith(".lock")] == []


def test_an_unknown_tokenizer_is_refused_before_anything_is_made(tmp_path, lines):
    with pytest.raises(UserError, match="did you mean gpt2"):
        quietly(lines, "gpt-2", tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_truncated_token_file_is_refused(tmp_path, lines):
    prepared = quietly(lines, "byte", tmp_path)
    path = prepared.directory / "val.bin"
    os.truncate(path, path.stat().st_size - 2)
    n_tokens = prepared.meta.val.n_tokens
    with pytest.raises(UserError) as error:
        open_prepared(prepared.directory)
    assert str(error.value) == (
        f"{path}: has {2 * n_tokens - 2} bytes, but {n_tokens} tokens of <u2 take {2 * n_tokens}; "
        "delete the folder and prepare the text again"
    )


def test_a_missing_token_file_is_refused(tmp_path, lines):
    prepared = quietly(lines, "byte", tmp_path)
    (prepared.directory / "train.bin").unlink()
    with pytest.raises(UserError, match=r"train.bin: has 0 bytes, but"):
        open_prepared(prepared.directory)


def test_tokens_of_another_tokenizer_are_refused(tmp_path, lines):
    prepared = quietly(lines, "byte", tmp_path)
    make_tokenizer("char", lambda: iter(["other"])).save(prepared.directory / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json: this is char \(\w+\), but the tokens were made with byte"):
        open_prepared(prepared.directory)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (None, "not a prepared text: meta.json is missing"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": "sash-tokens-1"}', "damaged"),
        ('{"format": "other"}', "format is 'other', not 'sash-tokens-1'; prepare the text again"),
    ],
)
def test_a_folder_with_a_foreign_meta_file_is_refused_in_one_line(tmp_path, lines, meta, message):
    path = quietly(lines, "byte", tmp_path).directory / "meta.json"
    path.unlink() if meta is None else path.write_text(meta)
    with pytest.raises(UserError) as error:
        open_prepared(path.parent)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_dtype_in_meta_is_what_the_files_hold(tmp_path, lines):
    prepared = quietly(lines, "byte", tmp_path)
    raw = np.fromfile(prepared.directory / "val.bin", dtype="<u2")
    assert (prepared.split("val").read(3, 9) == raw[3:12]).all()


def test_where_there_is_no_terminal_no_bar_is_drawn(tmp_path, capsys):
    prepare(write(tmp_path / "a.txt", PROSE), "bpe-300", root=tmp_path / "root")
    ended = capsys.readouterr()
    assert ended.err == ""
    assert str(tmp_path / "root") in ended.out
