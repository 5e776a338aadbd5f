"""What programs share: how they end, and what they are told at once."""

from types import SimpleNamespace

import pytest
import torch

from cli.program import at_least, exit_with_one_line
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


@pytest.mark.parametrize("fine", [3, None, "all", (3, 9), ()])
def test_what_is_not_below_its_least_passes(fine):
    at_least(SimpleNamespace(n_rows=fine), n_rows=3)


@pytest.mark.parametrize(("wrong", "shown"), [(2, "2"), (-1, "-1"), ((3, 2), "2")])
def test_a_number_below_its_least_is_shown_with_its_option(wrong, shown):
    with pytest.raises(UserError) as error:
        at_least(SimpleNamespace(n_rows=wrong), n_rows=3)
    assert str(error.value) == f"--n-rows ({shown}) must be at least 3"


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
