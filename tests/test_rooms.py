"""Rooms and arrows that import-linter (make lint) does not see: the programs, and what importing the network loads."""

import ast
import sys

import pytest
from conftest import ROOT, run_program

ROOMS = {"training", "inference", "artifacts", "configs", "data", "cli", "scripts", "train", "generate"}


def test_importing_the_network_loads_nothing_else_of_ours():
    code = "import sys, model.gpt; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    ended = run_program("-c", code)
    loaded = set(ended.out.split())
    assert "model" in loaded, ended
    assert not loaded & ROOMS
    assert not loaded & {"wandb", "datasets", "tiktoken", "tyro"}


@pytest.mark.parametrize(
    ("program", "others"), [("train", "generate scripts inference"), ("generate", "train scripts")]
)
def test_programs_stand_below_scripts_and_apart(program, others):
    tree = ast.parse((ROOT / f"{program}.py").read_text(encoding="utf-8"))
    modules = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert modules - set(sys.stdlib_module_names) <= ROOMS - set(others.split()) | {
        "torch",
        "tqdm",
        "tyro",
        "pydantic",
        "model",
    }


def test_no_file_but_tests_is_longer_than_300_lines():
    files = [path for room in (*ROOMS, "model") for path in (ROOT / room).rglob("*.py")] + list(ROOT.glob("*.py"))
    longest = max(files, key=lambda path: len(path.read_text(encoding="utf-8").splitlines()))
    assert len(longest.read_text(encoding="utf-8").splitlines()) <= 300, longest
