"""Checkpoints appear whole or not at all, and come back as they were or are refused."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_equal, random_tokens
from networks import tiny_config, tiny_model
from safetensors import SafetensorError, safe_open
from torch import Tensor

from artifacts import checkpoint, files
from artifacts import safetensors_io as tensors
from model.config import ModelConfig
from model.errors import UserError
from model.gpt import GPT
from training.optim import Optimizers

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def make_training(config: ModelConfig | None = None, *, seed: int = 0) -> tuple[GPT, Optimizers]:
    model = tiny_model(config or tiny_config(), seed=seed)
    return model, Optimizers([torch.optim.AdamW(model.parameters(), lr=0.1)])


def train(model: GPT, optimizers: Optimizers, seed: int = 3) -> None:
    """A step that moves weights and optimizer state."""
    idx = random_tokens(2, 9, seed=seed)
    model(idx, idx).backward()
    optimizers.step()


def save(root: Path, training: tuple[GPT, Optimizers], step: int = 7) -> Path:
    model, optimizers = training
    return checkpoint.write(root, checkpoint.content(model, optimizers), step=step, state={"kept": step})


def everything(training: tuple[GPT, Optimizers]) -> dict[str, Tensor]:
    """All that training goes on from."""
    model, optimizers = training
    names = {p: name for name, p in model.named_parameters()}
    state = {f"{names[p]}.{slot}": x for p, slots in optimizers.state.items() for slot, x in slots.items()}
    return {name: x.clone() for name, x in model.state_dict().items()} | state


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture
def saved(tmp_path) -> Path:
    train(*(training := make_training()))
    return save(tmp_path, training)


@pytest.fixture
def trained() -> tuple[GPT, Optimizers]:
    train(*(training := make_training()))
    return training


def stored(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


# What is saved comes back.


@pytest.mark.parametrize("model", [{}, {"tie_embeddings": False}, {"norm": "layernorm", "bias": True, "mlp": "gelu"}])
def test_weights_and_optimizer_come_back(tmp_path, model):
    train(*(training := make_training(tiny_config(**model))))
    before = everything(training)
    path = save(tmp_path, training)
    train(*(other := make_training(tiny_config(**model), seed=5)))
    checkpoint.load_training(*other, checkpoint.read(path))
    assert_same(everything(other), before)


def test_a_loaded_network_goes_on_as_the_saved_one_would(tmp_path, trained):
    path = save(tmp_path, trained)
    train(*trained, seed=4)
    checkpoint.load_training(*(other := make_training(seed=5)), checkpoint.read(path))
    train(*other, seed=4)
    assert_same(everything(other), everything(trained))


def test_state_is_json_that_any_program_reads(saved):
    state = json.loads((saved / "state.json").read_text())
    assert (state["format"], state["step"], state["kept"]) == (checkpoint.FORMAT, 7, 7)
    assert sorted(state["sha256"]) == ["model.safetensors", "optimizer.safetensors"]
    assert checkpoint.read(saved).step == 7


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    names = {}
    for tied in (True, False):
        config = tiny_config(tie_embeddings=tied)
        path = save(tmp_path / str(tied), make_training(config))
        names[tied] = stored(path / "model.safetensors")
        model = GPT(config).double()
        checkpoint.load_model(model, checkpoint.read(path))
        assert (model.lm_head.weight is model.wte.weight) == tied
        assert_equal(model.state_dict()["lm_head.weight"], tiny_model(config).state_dict()["lm_head.weight"])
    assert len(names[False]) == len(names[True]) + 1
    assert [shape for shape in names[True].values() if shape == (31, 20)] == [(31, 20)]


def test_a_network_alone_is_saved_without_optimizer(tmp_path, trained):
    path = checkpoint.write(tmp_path, checkpoint.content(trained[0]), step=1, state={})
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "state.json"]
    checkpoint.load_model(make_training(seed=5)[0], checkpoint.read(path))
    with pytest.raises(UserError, match=r"optimizer\.safetensors cannot be read"):
        checkpoint.load_training(*make_training(), checkpoint.read(path))


def test_a_checkpoint_can_be_moved(tmp_path, saved, trained):
    moved = shutil.move(tmp_path, tmp_path.with_name(f"{tmp_path.name}-moved"))
    checkpoint.load_training(*trained, checkpoint.read(moved / saved.name))
    shutil.rmtree(moved)


# It appears by rename or not at all.

STAGES = {
    "weights": ("artifacts.safetensors_io.save_file", 1),
    "optimizer": ("artifacts.safetensors_io.save_file", 2),
    "state": ("artifacts.checkpoint.write_json", 1),
    "first sync": ("os.fsync", 1),
    "a later sync": ("os.fsync", 3),
    "rename": ("pathlib.Path.rename", 1),
}
FULL = OSError(errno.ENOSPC, "No space left on device")
FULL_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def fail_at(monkeypatch: pytest.MonkeyPatch, where: str, call: int, error: BaseException) -> None:
    """Let one call of a function raise."""
    module, _, name = where.rpartition(".")
    owner: object = {
        "artifacts.checkpoint": checkpoint,
        "artifacts.safetensors_io": tensors,
        "os": os,
        "pathlib.Path": Path,
    }[module]
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_on_the_way_leaves_no_checkpoint_and_the_next_try_makes_it(
    tmp_path, monkeypatch, trained, stage, error
):
    with monkeypatch.context() as patch:
        fail_at(patch, *STAGES[stage], error)
        with pytest.raises(type(error)):
            save(tmp_path, trained)
    assert checkpoint.list_steps(tmp_path) == []
    path = save(tmp_path, trained)
    assert checkpoint.list_steps(tmp_path) == [path] == list(tmp_path.iterdir())
    assert checkpoint.read(path).step == 7


@pytest.mark.parametrize("stage", ["weights", "optimizer"])
def test_a_disk_that_fills_while_tensors_are_written_is_an_oserror_and_leaves_nothing(
    tmp_path, monkeypatch, trained, stage
):
    fail_at(monkeypatch, *STAGES[stage], FULL_SAFETENSORS)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, trained)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_parts_are_written_is_an_oserror_and_leaves_nothing(tmp_path, monkeypatch, trained):
    fail_at(monkeypatch, "os.fsync", 1, FULL)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.write(tmp_path, checkpoint.content(*trained, kind="sharded"), step=7, state={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "rename"])
def test_a_failure_while_a_step_is_saved_again_keeps_the_first(tmp_path, monkeypatch, trained, stage):
    path = save(tmp_path, trained)
    fail_at(monkeypatch, *STAGES[stage], FULL)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, trained)
    assert checkpoint.read(path).step == 7


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path, trained):
    (tmp_path / "step_00000007.tmp").mkdir()
    (tmp_path / "step_00000007.tmp" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.list_steps(tmp_path) == []
    path = save(tmp_path, trained)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)


def test_everything_is_synced_before_the_name_appears(tmp_path, monkeypatch, trained):
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename
    name_of = lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc here")
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(name_of(handle)) or fsync(handle))
    monkeypatch.setattr(Path, "rename", lambda self, to: synced.append("rename") or rename(self, to))
    save(tmp_path, trained)
    assert set(FILES) <= set(synced[: synced.index("rename")])


def test_steps_are_listed_oldest_first(tmp_path, trained):
    paths = [save(tmp_path, trained, step) for step in (90, 1000, 7, 100_000_001)]
    assert checkpoint.list_steps(tmp_path) == [paths[2], paths[0], paths[1], paths[3]]


def test_a_checkpoint_that_is_being_removed_is_none(tmp_path, monkeypatch, saved):
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.remove(saved)
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.read(saved)


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a", "old")
    with monkeypatch.context() as patch:
        fail_at(patch, "os.fsync", 1, FULL)
        with pytest.raises(OSError, match="No space"):
            files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    files.write_text(tmp_path / "a", "new é")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "new é"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


# Pointers.


def test_a_pointer_is_one_line_that_names_a_checkpoint_beside_it(tmp_path, saved):
    checkpoint.point(tmp_path, "latest", saved)
    assert (tmp_path / "latest").read_text() == "step_00000007\n"
    assert checkpoint.pointed(tmp_path, "latest") == saved


@pytest.mark.parametrize("content", [None, "step_00000009\n"])
def test_a_pointer_to_nothing_points_nowhere(tmp_path, saved, content):
    if content:
        (tmp_path / "latest").write_text(content)
    assert checkpoint.pointed(tmp_path, "latest") is None


# What is damaged is refused in one line.


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        checkpoint.read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "one byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "flipped in the header": lambda file: flip(file, 20),
    "flipped in the last byte": lambda file: flip(file, -1),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tensor_file_is_refused_by_its_name(saved, damage, name):
    DAMAGES[damage](saved / name)
    assert refusal(saved) == f"{saved / name} is missing or damaged: its bytes are not those that were written"


@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing"])
def test_a_damaged_state_is_refused(saved, damage):
    DAMAGES[damage](saved / "state.json")
    assert refusal(saved).startswith(f"{saved} is not a checkpoint: state.json cannot be read (")


@pytest.mark.parametrize("content", ["[]", "null", "7", '"state"', '{"format": 1}', '{"format": 1, "sha256": []}'])
def test_a_state_that_is_something_else_is_refused(saved, content):
    (saved / "state.json").write_text(content)
    assert str(saved) in refusal(saved)


def test_a_flipped_bit_anywhere_in_the_state_is_refused(saved):
    content = (saved / "state.json").read_bytes()
    taken = ""
    for at in range(len(content)):
        flip(saved / "state.json", at)
        try:
            checkpoint.read(saved)
            taken += chr(content[at])
        except UserError:
            pass
        (saved / "state.json").write_bytes(content)
    assert taken == ""


def test_a_directory_without_a_state_is_no_checkpoint(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path} is not a checkpoint: state.json cannot be read (")


def test_another_format_is_refused_with_both_numbers(saved):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"format": 99}))
    assert refusal(saved) == f"{saved} has checkpoint format 99, this version reads {checkpoint.FORMAT}"


@pytest.mark.parametrize(
    ("model", "tensor"),
    [
        ({"n_layer": 3}, r"h\.2\.[\w.]+ is missing in the checkpoint and \(\d+(, \d+)?,?\) in the model"),
        ({"n_layer": 1}, r"h\.1\.[\w.]+ is \(\d+(, \d+)?,?\) in the checkpoint and missing in the model"),
        ({"mlp_width": 30}, r"h\.0\.mlp\.[\w.]+ is \(.*28.*\) in the checkpoint and \(.*30.*\) in the model"),
        ({"vocab_size": 33}, r"\w+\.weight is \(31, 20\) in the checkpoint and \(33, 20\) in the model"),
        ({"tie_embeddings": False}, r"\w+\.weight is missing in the checkpoint and \(31, 20\) in the model"),
        ({"qk_norm": False}, r"h\.0\.mixer\.k_norm\.weight is \(8,\) in the checkpoint and missing in the model"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_another_shape_is_refused_with_the_tensor_and_leaves_the_network_as_it_was(saved, model, tensor):
    network = tiny_model(tiny_config(**model), seed=5)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    with pytest.raises(UserError) as error:
        checkpoint.load_model(network, checkpoint.read(saved))
    assert re.fullmatch(rf"{re.escape(str(saved))} is of another shape: {tensor}", str(error.value)), error.value
    assert_same(network.state_dict(), before)
