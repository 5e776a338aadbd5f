"""Two processes train as one does. They talk through gloo on a CPU; all runs here share one start of torchrun."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import command_line, run_config, run_program, run_values

import train
from artifacts.run_dir import RunDir
from model.errors import UserError
from training.distributed import DistributedContext

STEPS = 20
CONSTANT = {"schedule": "constant", "warmup_steps": 3}
OPTIMIZERS = {"adamw": CONSTANT | {"optimizer": "adamw", "adamw_lr": 1e-2}, "muon": CONSTANT}
LONG = {"max_steps": STEPS, "eval_every": 5, "checkpoint_every": 10}
HALF = LONG | {"max_steps": 10}
DROPOUT = {"model": {"dropout": 0.2}, "optim": OPTIMIZERS["adamw"]}

# What two processes do: name -> changes. A name in HALVES is begun by one process, or gone on with by one.
TOGETHER = {
    f"{method}-{name}": {"optim": optim, "train": LONG | {"parallel": method}}
    for method in ("ddp", "fsdp")
    for name, optim in OPTIMIZERS.items()
} | {
    "accumulated-ddp": {"optim": OPTIMIZERS["adamw"], "train": LONG | {"micro_batch": 1, "parallel": "ddp"}},
    "accumulated-fsdp": {
        "optim": OPTIMIZERS["adamw"],
        "train": LONG | {"micro_batch": 1, "parallel": "fsdp", "activation_checkpointing": True},
    },
    "dropout": DROPOUT | {"train": LONG | {"micro_batch": 3, "parallel": "fsdp"}},
    "1-to-ddp": {"optim": OPTIMIZERS["muon"], "train": LONG | {"parallel": "ddp"}},
    "1-to-fsdp": {"optim": OPTIMIZERS["muon"], "train": LONG | {"parallel": "fsdp"}},
    "1-sharded-to-fsdp": {"optim": OPTIMIZERS["muon"], "train": LONG | {"parallel": "fsdp", "checkpoint": "sharded"}},
    "ddp-to-1": {"optim": OPTIMIZERS["muon"], "train": HALF | {"parallel": "ddp"}},
    "fsdp-to-1": {"optim": OPTIMIZERS["muon"], "train": HALF | {"parallel": "fsdp"}},
    "fsdp-sharded-to-1": {"optim": OPTIMIZERS["muon"], "train": HALF | {"parallel": "fsdp", "checkpoint": "sharded"}},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parallel")


def alone(out: Path, text: Path, name: str, **changes) -> RunDir:
    """A run of this process, unless it is finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "matmul_rate", lambda runtime: 1e12)
        return RunDir(train.run(run_config(out, text, name, **changes)).path)


@pytest.fixture(scope="module")
def found(out, text) -> dict:
    """Everything that needs two processes."""
    for name in TOGETHER:
        if name.startswith("1-"):
            kind = {"checkpoint": "sharded"} if "sharded" in name else {}
            alone(out, text, name, optim=OPTIMIZERS["muon"], train=HALF | kind)
    jobs = out / "jobs.json"
    jobs.write_text(json.dumps([run_values(out, text, name, **changes) for name, changes in TOGETHER.items()]))
    ended = run_program("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, two_processes(), jobs)
    assert ended.code == 0, ended.err
    assert ended.out.count("2 processes, fsdp, ") == sum(
        "fsdp" in changes["train"]["parallel"] for changes in TOGETHER.values()
    )
    for name in ("fsdp-to-1", "fsdp-sharded-to-1"):
        shutil.copytree(out / name, out / f"{name}-as-it-was")
    return json.loads((out / "jobs.found.json").read_text())


def two_processes() -> Path:
    return Path(__file__).with_name("two_processes.py")


def largest_difference(one: RunDir, other: RunDir) -> float:
    """Of the losses of any step or evaluation."""
    a, b = one.metrics(), other.metrics()
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, STEPS + 1))
    assert [("val_loss" in x) for x in a] == [("val_loss" in x) for x in b]
    return max(
        abs(x[key] - y[key]) for x, y in zip(a, b, strict=True) for key in ("train_loss", "val_loss") if key in x
    )


# float32 adds in another order: 5e-7 was found. Muon divides each direction of a gradient by its size, in bfloat16, so
# rounding grows where a direction is small: 1e-4 was found with copies, with shards, and in one process with other
# micro-batches alike.
TOLERANCE = {"adamw": 1e-5, "muon": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(out, text, found, method, name):
    one = alone(out, text, name, optim=OPTIMIZERS[name], train=LONG)
    assert largest_difference(one, RunDir(out / f"{method}-{name}")) < TOLERANCE[name]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddp", "fsdp"])
def test_two_processes_that_accumulate_have_the_losses_of_one(out, text, found, method):
    one = alone(out, text, "adamw", optim=OPTIMIZERS["adamw"], train=LONG)
    assert largest_difference(one, RunDir(out / f"accumulated-{method}")) < TOLERANCE["adamw"]


@pytest.mark.slow
def test_dropout_too_is_that_of_one_process_with_the_same_micro_batch(out, text, found):
    one = alone(out, text, "dropout-alone", **DROPOUT, train=LONG | {"micro_batch": 3})
    assert largest_difference(one, RunDir(out / "dropout")) < TOLERANCE["adamw"]
    without = alone(out, text, "adamw", optim=OPTIMIZERS["adamw"], train=LONG)
    assert largest_difference(one, without) > 0.01


@pytest.mark.slow
def test_given_equal_gradients_sharded_weights_move_as_whole_ones(found):
    assert found["deviation"]["muon"] == 0.0
    assert found["deviation"]["adamw"] < 1e-7  # its vectorised arithmetic ends elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddp", "fsdp"])
def test_auxiliary_losses_and_passed_tensors_are_those_of_one_process(found, method):
    value_off, gradient_off, value = found["auxiliary"][method]
    assert value > 1e-3
    assert value_off < 1e-6 * value + 1e-8
    assert gradient_off < 1e-5


@pytest.mark.slow
def test_gradients_are_exchanged_once_a_step_however_many_micro_batches_it_has(found):
    for once, with_four in found["exchanges"].values():
        assert once == with_four > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the threads of a process are seen on Linux alone")
def test_no_thread_that_frees_tensors_is_left_when_python_ends(found):
    assert found["gloo_threads_in_it"] > 0
    assert found["gloo_threads_after_it"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TOGETHER if "-to-" in name])
def test_another_number_of_processes_goes_on_with_a_run(out, text, found, name):
    changes = TOGETHER[name] | {"train": TOGETHER[name]["train"] | {"max_steps": STEPS}}
    run = alone(out, text, name, **changes)
    whole = alone(out, text, "muon", optim=OPTIMIZERS["muon"], train=LONG)
    assert largest_difference(run, whole) < TOLERANCE["muon"]


@pytest.mark.slow
def test_sharded_checkpoints_are_parts_from_each_process_and_whole_ones_single_files(out, found):
    names = {
        kind: RunDir(out / f"fsdp{kind}-to-1-as-it-was").checkpoints / "step_00000010" for kind in ("", "-sharded")
    }
    files = {kind: {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} for kind, path in names.items()}
    assert files[""] == {"model.safetensors", "optimizer.safetensors", "state.json"}
    parts = {f"{what}/{part}" for what in ("model", "optimizer") for part in (".metadata", *PARTS)}
    assert files["-sharded"] == parts | {"state.json"}


PARTS = ("__0_0.distcp", "__1_0.distcp")


@pytest.mark.slow
def test_a_damaged_part_of_a_sharded_checkpoint_is_refused_by_its_name(out, text, found, tmp_path):
    run = alone(tmp_path, text, "sharded", train={"checkpoint": "sharded"})
    part = run.latest().path / "optimizer" / PARTS[0]
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{part} is missing or damaged"):
        run.latest()


@pytest.mark.slow
def test_a_sharded_checkpoint_is_read_by_a_process_without_others(out, text, found):
    one, other = (RunDir(out / f"fsdp{kind}-to-1-as-it-was") for kind in ("", "-sharded"))
    models = [run.load(run.checkpoints / "step_00000010")[0] for run in (one, other)]
    for name, p in models[0].named_parameters():
        assert torch.equal(p, dict(models[1].named_parameters())[name]), name


# What cannot work.


def test_rows_that_processes_cannot_share_are_refused(out, text):
    config = run_config(out, text)
    with pytest.raises(UserError) as error:
        config.rows_at_once(n_processes=4)
    assert str(error.value) == (
        "train.global_batch_tokens (96) are 6 rows of block_size, which 4 processes cannot share: give a multiple of 64"
    )


def test_a_micro_batch_that_does_not_divide_a_share_is_refused(out, text):
    config = run_config(out, text, train={"micro_batch": 6})
    with pytest.raises(UserError) as error:
        config.rows_at_once(n_processes=2)
    assert str(error.value) == "train.micro_batch (6) must divide the 3 rows of a step that each of 2 processes has"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 6, 7])
def test_evaluation_is_shared_out_evenly_and_nothing_counts_twice(size, n):
    batches = [(torch.full((1, 2), i), torch.full((1, 2), i)) for i in range(n)]
    shares = [list(DistributedContext(rank=rank, size=size).split_batches(batches, -100)) for rank in range(size)]
    assert {len(share) for share in shares} == {-(-n // size)}
    counted = sorted(int(targets[0, 0]) for share in shares for _, targets in share if targets[0, 0] != -100)
    assert counted == list(range(n))


@pytest.mark.slow
def test_a_user_error_is_one_line_of_each_process(tmp_path, text):
    command = command_line(tmp_path, text, train={"global_batch_tokens": 48})
    ended = run_program("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py", *command)
    assert ended.code != 0
    said = {line for line in ended.err.splitlines() if line.startswith(("train.py:", "train.py ("))}
    refusal = "train.global_batch_tokens (48) are 3 rows of block_size, which 2 processes cannot share: give a multiple"
    assert said  # torchrun ends the others as soon as one has ended
    assert said <= {f"train.py (process 1): {refusal} of 32", f"train.py: {refusal} of 32"}
    assert "in run_in" not in ended.err  # torchrun has a traceback of its own
    assert not (tmp_path / "run").exists()
