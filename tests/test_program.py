"""How programs end: exit codes and one line for what went wrong."""

import pytest
import torch

from cli.program import exit_with_one_line
from model.errors import UserError


def no_room_on_a_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def no_room_on_a_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")


def no_room_in_python() -> None:
    raise MemoryError("Unable to allocate 8.00 EiB")


@pytest.mark.parametrize("main", [no_room_on_a_cpu, no_room_on_a_device, no_room_in_python])
def test_memory_that_is_wanting_is_one_line(program, main):
    program(main).assert_refused("program.py: there is not enough memory: ", "allocate")


def test_another_runtimeerror_is_a_bug_and_keeps_its_traceback(program):
    def main() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        program(main)


@pytest.mark.parametrize(
    ("file", "said"), [("train.py", "train.py: "), ("scripts/ablate/__main__.py", "ablate: "), ("a/b.py", "b.py: ")]
)
def test_a_program_of_several_files_says_its_own_name(monkeypatch, capsys, file, said):
    monkeypatch.setattr("sys.argv", [file])

    def main() -> None:
        raise UserError("no")

    with pytest.raises(SystemExit, match=r"^2$"):
        exit_with_one_line(main)
    assert capsys.readouterr().err == f"{said}no\n"
