"""Pictures of plots: whole, of the kind that their names say."""

import pytest

from scripts.figure import known, new_figure, save_figure


@pytest.mark.parametrize(
    ("name", "begins"), [("a.png", b"\x89PNG"), ("a", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_a_name_says_which_kind_of_picture_it_is(tmp_path, name, begins):
    save_figure(new_figure("x", ["y"])[0], tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(begins)


def test_a_picture_that_cannot_be_drawn_leaves_the_one_before(tmp_path):
    (tmp_path / "a.png").write_bytes(b"before")
    figure, (axes,) = new_figure("x", ["y"])
    axes.set_title("$\\nonsense$")
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(figure, tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"before"


def test_points_without_a_value_are_left_out():
    assert list(known([1, 2, 3], [0.5, None, 0.0])) == [(1, 3), (0.5, 0.0)]
