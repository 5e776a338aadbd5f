import hashlib
import http.server
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import catalog, files, hub, pydocs
from data.catalog import HUB_TEXTS, NAMES, open_text
from data.hub import open_hub
from data.network import fetch, reachable
from data.text import Text
from model.errors import UserError

SOURCES = {source.name: source for source in HUB_TEXTS}


def documents(text: Text, split: str = "train") -> list[str]:
    """Join the pieces of each document."""
    found, current = [], ""
    for piece in text.splits[split]():
        current += piece.text
        if piece.ends_document:
            found.append(current)
            current = ""
    assert current == ""
    return found


def write_parquet(path: Path, **columns: list) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches inside the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.slow
def test_pydocs_is_some_megabytes_of_documentation_in_an_order_that_stays():
    found = documents(open_text("pydocs"))
    assert sum(len(text) for text in found) > 1_500_000
    assert found == documents(open_text("pydocs"))
    headings = [text.splitlines()[0] for text in found]
    assert 'The "with" statement' in "\n".join(found)
    assert 'The "textwrap" module' in headings
    assert headings != sorted(headings)


def test_pydocs_reads_like_documentation():
    text = next(text for text in documents(open_text("pydocs")) if text.startswith('The "textwrap" module\n'))
    assert text.startswith('The "textwrap" module\n*********************\n\nText wrapping and filling.\n\n')
    assert "\n\nwrap(text, width=70, **kwargs)\n\n   Wrap a single paragraph of text, returning" in text
    assert "\n\n\n" not in text
    assert " \n" not in text


def test_pydocs_has_no_tests_and_no_tables():
    headings = "\n".join(text.splitlines()[0] for text in documents(open_text("pydocs")))
    assert not [name for name in ("test.support", ".tests", "idle_test", "encodings", "pydoc_data") if name in headings]


def test_pydocs_does_not_say_twice_what_the_reference_says_once():
    found = documents(open_text("pydocs"))
    topics = [text for text in found if " module\n***" not in text]
    paragraphs = [part for text in topics for part in set(text.split("\n\n")) if len(part) > 200]
    assert len(set(paragraphs)) > 0.97 * len(paragraphs)


def test_pydocs_signatures_leave_out_self_and_annotations():
    source = '''
class A(B):
    """Doc of A."""
    def __init__(self, x: int, *, y=2): ...
    def f(self, /, a: str = "s") -> int:
        """Doc of f."""
    @staticmethod
    def g(a):
        """Doc of g."""
    @property
    def h(self):
        """Doc of h."""
    async def k(self, *selfish):
        """Doc
           of k."""
    def nothing(self): ...
if True:
    def top(self): "Doc of top."
'''
    entries = list(pydocs._entries(pydocs.ast.parse(source), prefix=""))
    assert entries == [
        "class A(x, *, y=2)\n\n   Doc of A.",
        "A.f(a='s')\n\n   Doc of f.",
        "A.g(a)\n\n   Doc of g.",
        "A.h\n\n   Doc of h.",
        "async A.k(*selfish)\n\n   Doc\n   of k.",
        "top(self)\n\n   Doc of top.",
    ]


@pytest.mark.slow
def test_importing_loads_none_of_the_libraries_that_some_machines_lack():
    code = "import sys, data.prepare; print([m for m in ('datasets', 'tokenizers', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_opening_a_name_reads_nothing():
    for name in NAMES:
        assert open_text(name).name == name


@pytest.mark.parametrize(
    ("name", "advice"), [("shakespere", "did you mean shakespeare?"), ("zzzzzz", "choose one of them")]
)
def test_unknown_name_gets_the_nearest_one(name, advice):
    with pytest.raises(UserError) as error:
        open_text(name)
    assert str(error.value) == (
        f"text '{name}' must be one of pydocs, shakespeare, recall, wikitext103, tinystories, fineweb-edu, "
        f"or a file or folder; {advice}"
    )


@pytest.mark.parametrize("path", ["missing.txt", "no/such/folder"])
def test_missing_path_is_said(path):
    with pytest.raises(UserError) as error:
        open_text(path)
    assert str(error.value) == (
        f"{path}: no such file or folder; give a .txt, .md, .jsonl, .parquet file or a folder of such files"
    )


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.txt").write_text("plain é\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.md").write_text("# mark\n")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one\\ntwo", "id": 1}\n\n{"text": ""}\n{"text": null}\n{"text": "\\ud800"}\n'
    )
    write_parquet(tmp_path / "z.parquet", id=[1, 2, 3], text=["row é", None, "last"])
    (tmp_path / "ignored.pdf").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("no")
    text = open_text(str(tmp_path))
    assert documents(text) == ["one\ntwo", "\ufffd", "plain é\n", "# mark\n", "row é", "last"]
    assert (text.name, text.own_val) == (tmp_path.name, False)


def test_a_large_plain_file_comes_in_pieces_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_CHARS", 10)
    path = tmp_path / "a.txt"
    path.write_text("öne two three\nfour\nfive six seven\n" + "x" * 45)
    pieces = list(open_text(str(path)).splits["train"]())
    assert "".join(piece.text for piece in pieces) == path.read_text()
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [piece.text for piece in pieces[:2]] == ["öne two three\n", "four\nfive six seven\n"]
    assert max(len(piece.text) for piece in pieces) <= 20


def test_line_ends_and_byte_order_mark_of_windows_are_read_as_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert documents(open_text(str(tmp_path / "a.txt"))) == ["one\ntwo\n"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("position", [3, 11, 12, 40])
def test_bytes_that_are_not_utf8_are_located(tmp_path, monkeypatch, suffix, position):
    monkeypatch.setattr(files, "PIECE_CHARS", 4)
    path = tmp_path / f"old{suffix}"
    path.write_bytes(b"a" * (position - 2) + "é".encode() + b"\xe9 and more")
    with pytest.raises(UserError) as error:
        documents(open_text(str(path)))
    assert str(error.value) == (
        f"{path}: the byte at offset {position} is not UTF-8; convert the file, for example with "
        f"`iconv -f LATIN1 -t UTF-8 old{suffix} > old-utf8{suffix}`"
    )


def test_utf16_and_a_character_cut_off_at_the_end_are_not_utf8_either(tmp_path):
    (tmp_path / "a.txt").write_text("wide", encoding="utf-16")
    with pytest.raises(UserError, match=r"offset 0 is not UTF-8.*iconv -f UTF-16"):
        documents(open_text(str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").write_bytes("whole é".encode()[:-1])
    with pytest.raises(UserError, match="offset 6 is not UTF-8"):
        documents(open_text(str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 1}', "no column 'text', it has columns 'body', 'id'; rename the column with the text"),
        ('["x"]', "no column 'text', it has list; rename the column with the text"),
        ('{"text": 5}', "'text' is 5; it must be a string"),
        ("{text: x}", "invalid JSON (Expecting property name enclosed in double quotes"),
    ],
)
def test_a_jsonl_line_without_text_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        documents(open_text(str(path)))
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_a_parquet_file_without_text_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", body=["x"], id=[1])
    with pytest.raises(UserError, match="no column 'text', it has columns 'body', 'id'"):
        documents(open_text(path))
    path = write_parquet(tmp_path / "a.parquet", text=[1])
    with pytest.raises(UserError, match="column 'text' has type int64; it must hold strings"):
        documents(open_text(path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="damaged parquet file"):
        documents(open_text(path))


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(
        UserError, match=r"a.pdf: only .txt, .md, .jsonl, .parquet files can be read; rename it to .txt"
    ):
        open_text(str(tmp_path / "a.pdf"))
    with pytest.raises(UserError, match=r"the folder has 1 files, but no .txt, .md, .jsonl, .parquet file"):
        open_text(str(tmp_path))


def test_a_changed_file_is_another_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = open_text(str(path)).identity
    path.write_text("three")
    assert open_text(str(path)).identity != before


def test_tinystories_rows_are_documents(tmp_path, own_cache):
    local = {
        "train": write_parquet(tmp_path / "train.parquet", text=["Once é.\n\nThe end.", "", "Two"]),
        "validation": write_parquet(tmp_path / "val.parquet", text=["Three"]),
    }
    text = open_hub(replace(SOURCES["tinystories"], builder="parquet", data_files=local))
    assert text.own_val
    assert documents(text, "train") == ["Once é.\n\nThe end.", "Two"]
    assert documents(text, "val") == ["Three"]


def test_wikitext_lines_are_joined_into_articles(tmp_path, own_cache):
    lines = ["", " = One = \n", "", " First . \n", " = = Part = = \n", " a = b \n", " = not a title = \n", ""]
    local = write_parquet(tmp_path / "a.parquet", text=[*lines, " = Two = \n", "", " Second . \n"])
    source = replace(
        SOURCES["wikitext103"], builder="parquet", config=None, data_files={"train": local, "validation": local}
    )
    assert documents(open_hub(source)) == [
        " = One = \n\n First . \n = = Part = = \n a = b \n = not a title = \n",
        " = Two = \n\n Second . \n",
    ]


def test_fineweb_streams_and_holds_out_its_first_documents(tmp_path, own_cache):
    rows = [f"page {i}" for i in range(7)]
    local = write_parquet(tmp_path / "a.parquet", text=rows, id=rows, url=rows, score=[3.5] * 7, token_count=[9] * 7)
    source = replace(SOURCES["fineweb-edu"], builder="parquet", config=None, data_files={"train": local}, held_out=3)
    text = open_hub(source)
    assert documents(text, "val") == ["page 0", "page 1", "page 2"]
    assert documents(text, "train") == ["page 3", "page 4", "page 5", "page 6"]


def test_hub_text_without_a_text_column_is_named(tmp_path, own_cache):
    local = {"train": write_parquet(tmp_path / "a.parquet", story=["x"])}
    source = replace(SOURCES["tinystories"], builder="parquet", data_files=local)
    with pytest.raises(UserError, match="tinystories: no column 'text', it has columns 'story'"):
        documents(open_hub(source))


@pytest.mark.parametrize("name", ["wikitext103", "tinystories", "fineweb-edu"])
@pytest.mark.parametrize("told", [True, False], ids=["HF_HUB_OFFLINE", "unreachable"])
def test_offline_hub_text_is_one_quick_line_with_advice(name, told, monkeypatch, own_cache):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", told)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", told)
    monkeypatch.setattr(hub, "reachable", lambda url: False)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        next(open_text(name).splits["train"]())
    assert time.monotonic() - start < 2
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{name}: Couldn't reach '{SOURCES[name].builder}' on the Hub")
    assert message.endswith(
        "run the same command on a machine with a network (the prepared folder can be copied), "
        "or use pydocs, which needs no network"
    )
    assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is told


def test_nothing_answers_where_nothing_listens():
    assert not reachable("http://127.0.0.1:9/")


def test_offline_shakespeare_is_one_line_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "CACHE", tmp_path)
    monkeypatch.setattr(catalog, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(UserError) as error:
        open_text("shakespeare").splits["train"]()
    assert str(error.value) == (
        "http://127.0.0.1:9/input.txt cannot be downloaded (ConnectionError); download it on a machine with a "
        f"network and copy it to {tmp_path / 'shakespeare.txt'}, or use pydocs, which needs no network"
    )


def test_fetch_downloads_once_and_refuses_other_bytes(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.txt").write_text("To be")
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.txt"
        assert reachable(url)
        with pytest.raises(UserError, match="sent 5 bytes that are not the expected text"):
            fetch(url, tmp_path / "got.txt", sha256="0" * 64)
        assert not (tmp_path / "got.txt").exists()
        fetch(url, tmp_path / "got.txt", sha256=hashlib.sha256(b"To be").hexdigest())
        server.shutdown()
    assert fetch(url, tmp_path / "got.txt", sha256="not asked again").read_text() == "To be"
