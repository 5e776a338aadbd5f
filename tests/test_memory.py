"""Measured memory is a count of bytes that can be made by hand, and the same each time."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import run_config
from networks import tiny_config, tiny_model
from torch import nn

import train
from model import memory
from model.memory import PeakMemory, device_peak, measure_peak, process_peak_bytes, total_bytes
from training.memory import training_tensors
from training.optim import Optimizers

CPU = torch.device("cpu")
KB = 256  # float32 numbers in 1024 bytes


def peak_of(work, held=()) -> PeakMemory:
    with measure_peak(CPU, held) as peak:
        work()
    return peak


def up_and_down() -> None:
    """7 KiB at its highest: 2 + 5, after 4 + 2 and before 1 + 5."""
    a, b = torch.empty(4 * KB), torch.empty(2 * KB)
    del a
    c = torch.empty(5 * KB)
    del b
    d = torch.empty(KB)
    del c, d


def test_the_peak_is_what_lived_at_once():
    assert peak_of(up_and_down).bytes == 7 * 1024


def test_what_lived_before_counts_too():
    held = [torch.empty(3 * KB), torch.empty(KB, dtype=torch.float64)]
    assert peak_of(up_and_down, held).bytes == (7 + 3 + 2) * 1024


def test_what_an_operation_makes_on_the_way_counts():
    x = torch.ones(10 * KB)
    assert peak_of(lambda: (x + x).mul(x).neg_(), [x]).bytes == 3 * 10 * 1024


def test_nothing_costs_nothing():
    assert peak_of(lambda: None).bytes == 0


def test_a_backward_pass_is_counted_whole():
    x, weight = torch.ones(8, 4 * KB), nn.Parameter(torch.ones(4 * KB))
    run = lambda: (x * weight).sum().backward()
    run()  # warm up: the gradient is there
    product, gradient = 8 * 4 * 1024, 4 * 1024
    assert product < peak_of(run, [x, weight, weight.grad]).bytes - 10 * 4 * 1024 <= product + 2 * gradient + 64


def test_two_measurements_of_the_same_work_are_equal():
    model, idx = tiny_model(tiny_config(), dtype=torch.float32), torch.arange(26).view(2, 13)
    step = lambda: model(idx, idx).backward()
    step()
    assert peak_of(step).bytes == peak_of(step).bytes > 0


def test_a_failure_passes_through_and_the_next_measurement_works():
    with pytest.raises(RuntimeError, match="size"):
        peak_of(lambda: torch.ones(9) + torch.ones(8))
    assert peak_of(up_and_down).bytes == 7 * 1024


def test_the_method_is_named_and_reserved_is_absent_on_a_cpu():
    peak = peak_of(up_and_down)
    assert peak.method == "cpu-live-tensors"
    assert peak.reserved_bytes is None


def test_what_cannot_be_measured_is_absent_and_said():
    with measure_peak(torch.device("mps")) as peak:
        pass
    assert (peak.method, peak.bytes, peak.process_bytes) == ("not measured on mps", None, None)


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system forgets no high-water mark")
def test_the_process_peak_is_of_the_block_alone():
    code = """
import torch
from model.memory import measure_peak

def peak_mib(n_mib):
    with measure_peak(torch.device("cpu")) as peak:
        torch.ones(n_mib << 20, dtype=torch.uint8)
    return peak.process_bytes >> 20

peak_mib(100)  # which nothing after it remembers
print(peak_mib(0), peak_mib(64))
"""  # a process of its own: one that has run other tests may free their memory at any moment
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, during = map(int, ended.stdout.split())
    assert 48 < during - before < 80


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux says it there")
def test_the_process_peak_is_absent_where_it_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(memory, "_reset_process_peak", lambda: False)
    assert peak_of(up_and_down).process_bytes is None


def test_the_largest_size_of_this_process_is_known_and_named():
    method, peak = device_peak(CPU)
    assert method == "process"
    assert peak == process_peak_bytes() > 10 << 20


def test_a_storage_is_counted_once_and_whole():
    x = torch.empty(8, KB)
    assert total_bytes([x, x[3], x.T, x.view(-1)]) == total_bytes([x[3]]) == 8 * 1024


def test_training_tensors_are_weights_gradients_and_state():
    model = tiny_model(tiny_config(), dtype=torch.float32)
    n = sum(p.numel() for p in model.parameters())
    optimizers = Optimizers([torch.optim.AdamW(model.parameters())])
    sizes = [total_bytes(training_tensors(model, optimizers))]
    model(torch.arange(9)[None], torch.arange(9)[None]).backward()
    sizes.append(total_bytes(training_tensors(model, optimizers)))
    optimizers.step()
    sizes.append(total_bytes(training_tensors(model, optimizers)))
    counters = 4 * len(list(model.parameters()))
    assert sizes == [4 * n, 8 * n, 12 * n + counters]


def test_two_runs_have_the_same_peaks(tmp_path, text, unmeasured_speed):
    keys = ("peak_memory_train_bytes", "peak_memory_eval_bytes")
    train.run(run_config(tmp_path, text, "warm-up", train={"max_steps": 2}))
    one, other = (train.run(run_config(tmp_path, text, name, train={"max_steps": 6})).summary for name in "ab")
    assert [one[key] for key in keys] == [other[key] for key in keys]
    assert one["peak_memory_train_bytes"] > one["peak_memory_eval_bytes"] > 4 * 3 * one["n_params"]
