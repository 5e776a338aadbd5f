"""C++ that is compiled where it is first needed."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from model.cpu import cpp_build as build
from model.cpu.cpp_build import BuildError, compiler, library

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "twice"
    folder.mkdir()
    (folder / "twice.h").write_text("constexpr long TIMES = 2;\n")
    (folder / "twice.cpp").write_text('#include "twice.h"\nextern "C" long twice(long n) { return TIMES * n; }\n')
    return folder


def kept(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@needs_compiler
def test_a_library_is_compiled_once_and_says_so(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert library(source).twice(21) == 42
    assert capsys.readouterr().err == "note: compiling twice for this processor, once\n"
    (path,) = kept(tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    assert library(source).twice(4) == 8
    assert kept(tmp_path) == [path]
    assert capsys.readouterr().err == ""


@needs_compiler
def test_a_library_of_other_source_is_another(source, tmp_path):
    library(source)
    (source / "twice.h").write_text("constexpr long TIMES = 3;\n")
    assert library(source).twice(2) == 6
    assert len(kept(tmp_path)) == 2


@needs_compiler
def test_a_library_that_is_not_whole_is_compiled_again(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", str)  # a library that this process has loaded cannot be cut short
        path = Path(library(source))  # not there is as good
    assert not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF")
    assert library(source).twice(5) == 10
    assert kept(tmp_path) == [path]


@needs_compiler
def test_what_the_compiler_says_is_one_line(source, tmp_path):
    (source / "twice.cpp").write_text("long twice(long n) { return TIMES * n; }\nlong thrice(long n) { return m; }\n")
    with pytest.raises(BuildError) as refused:
        library(source)
    assert "'TIMES'" in str(refused.value).replace("‘", "'").replace("’", "'")
    assert "\n" not in str(refused.value)
    assert kept(tmp_path) == []


def test_nothing_to_compile_with_is_said(source, monkeypatch):
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler here"):
        library(source)


@needs_compiler
def test_a_place_that_cannot_be_written_is_said(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(BuildError, match="Not a directory"):
        library(source)


@needs_compiler
def test_what_cannot_be_loaded_is_said(source, monkeypatch):
    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(BuildError, match="failed to map segment"):
        library(source)
