"""What `auto` comes to on hardware that is here, and on hardware that is not."""

import importlib
import os
import platform
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import run_program
from networks import tiny_config, tiny_model

from model import device
from model.cpu import processor
from model.device import COMPILE_FROM_FLOPS, compile_blocks, matmul_rate, resolve
from model.errors import UserError

LONG, SHORT = 2 * COMPILE_FROM_FLOPS, COMPILE_FROM_FLOPS / 2


@pytest.fixture
def hardware(monkeypatch):
    """Pretend: GPUs of a compute capability, MPS, what the CPU multiplies, a C++ compiler."""

    def pretend(*, capability=None, n_gpus=1, mps=False, cpu=(), compiler=True, triton=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus if capability else 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "a GPU")
        monkeypatch.setattr(torch.mps, "is_available", lambda: mps, raising=False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(cpu), raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: "/a/compiler" if compiler else None)
        monkeypatch.setitem(sys.modules, "torch.utils._triton", SimpleNamespace(has_triton=lambda: triton))

    return pretend


@pytest.mark.parametrize(
    ("here", "kind"),
    [
        ({"capability": (8, 0)}, "cuda"),
        ({"capability": (8, 0), "mps": True}, "cuda"),
        ({"mps": True}, "mps"),
        ({}, "cpu"),
    ],
    ids=str,
)
def test_auto_takes_the_fastest_device_that_is_there(hardware, here, kind):
    hardware(**here)
    assert resolve().device.type == kind


@pytest.mark.parametrize("asked", ["cpu", "cuda", "cuda:1"])
def test_a_device_that_is_there_is_taken_as_asked(hardware, asked):
    hardware(capability=(8, 0), n_gpus=2)
    runtime = resolve(asked)
    assert runtime.device == torch.device(asked)
    assert "as asked" in runtime.why


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(hardware, asked):
    hardware()
    with pytest.raises(UserError) as error:
        resolve(asked)
    assert str(error.value) == f"device ({asked}) is not there; here there is cpu: take one of them, or auto"


def test_a_gpu_beyond_the_last_is_refused(hardware):
    hardware(capability=(8, 0), n_gpus=2)
    with pytest.raises(UserError, match=r"^device \(cuda:2\) is not there; here there is cuda, cpu: take one of them"):
        resolve("cuda:2")


@pytest.mark.parametrize("asked", ["gpu", "", "cuda:x", "cdua"])
def test_a_word_that_is_no_device_is_refused_with_those_that_are(hardware, asked):
    hardware(mps=True)
    with pytest.raises(UserError) as error:
        resolve(asked)
    assert str(error.value) == f"device ({asked}) is unknown; here there is mps, cpu, or auto"


@pytest.mark.parametrize(
    ("here", "dtype"),
    [
        ({"capability": (8, 0)}, torch.bfloat16),
        ({"capability": (7, 5)}, torch.float32),
        ({"mps": True}, torch.float32),
        ({"cpu": {"amx_bf16": True}}, torch.bfloat16),
        ({"cpu": {"avx512_bf16": True, "amx_bf16": False}}, torch.bfloat16),
        ({"cpu": {"avx512_bf16": False, "avx2": True}}, torch.float32),
        ({}, torch.float32),
    ],
    ids=str,
)
def test_auto_is_bfloat16_where_the_hardware_multiplies_it(hardware, here, dtype):
    hardware(**here)
    assert resolve().dtype == dtype


def test_a_torch_that_cannot_name_what_the_cpu_has_takes_float32(hardware, monkeypatch):
    hardware()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert resolve().dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_is_taken_as_asked(hardware, dtype):
    hardware(cpu={"amx_bf16": dtype == "float32"})
    assert resolve(dtype=dtype).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("here", "flops", "on"),
    [
        ({"capability": (8, 0)}, 0, True),
        ({"capability": (8, 0), "triton": False}, LONG, False),
        ({"mps": True}, LONG, False),
        ({}, LONG, True),
        ({}, SHORT, False),
        ({"compiler": False}, LONG, False),
    ],
    ids=str,
)
def test_auto_compiles_where_it_pays(hardware, here, flops, on):
    hardware(**here)
    assert resolve(flops=flops).compile == on


@pytest.mark.parametrize("asked", ["on", "off"])
def test_compile_is_taken_as_asked(hardware, asked):
    hardware(compiler=False)
    assert resolve(compile=asked, flops=LONG).compile == (asked == "on")


def test_compiled_code_is_kept_for_later_runs_unless_a_place_is_given(hardware, monkeypatch, tmp_path):
    hardware()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    resolve(compile="off")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    resolve(compile="on")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "sash" / "inductor" / processor.fingerprint())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    resolve(compile="on")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_compiled_code_is_kept_apart_for_processors_that_differ(monkeypatch):
    """Code for AVX-512 gave wrong numbers where torch's kernels were those of AVX2, and would end on a lesser CPU."""
    both = {"amx_bf16": True, "avx512_bf16": True, "cpu_name": "x"}
    seen = set()
    for vectors in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda vectors=vectors: vectors)
        for features in (both, both | {"amx_bf16": False}, {}):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=features: found, raising=False)
            used = features if vectors == "AVX512" else {}
            assert processor.has_amx() == used.get("amx_bf16", False)
            assert processor.has_avx512_bf16() == used.get("avx512_bf16", False)
            assert processor.fingerprint() == processor.fingerprint()
            seen.add(processor.fingerprint())
    assert len(seen) == 6


@pytest.mark.parametrize(("cpu_name", "said"), [("Some Maker", "Some Maker, "), (None, "")])
def test_one_line_says_what_was_chosen_and_why(hardware, cpu_name, said):
    hardware(cpu={"amx_bf16": True, "cpu_name": cpu_name})
    assert resolve("cpu", flops=SHORT).why == (
        f"device cpu ({said}{torch.get_num_threads()} threads, as asked), dtype bfloat16 (multiplied natively here), "
        "compile off (too short a job to pay for it)"
    )


def test_autocast_multiplies_in_the_dtype_and_float32_changes_nothing():
    x = torch.ones(3, 3)
    for dtype in ("float32", "bfloat16"):
        with resolve("cpu", dtype).autocast():
            assert (x @ x).dtype == getattr(torch, dtype)


def test_compiled_layers_keep_the_names_of_their_weights():
    model = tiny_model(tiny_config())
    names = list(model.state_dict())
    compile_blocks(model)
    assert list(model.state_dict()) == names


def test_the_measured_rate_is_positive_however_slow_the_hardware():
    assert matmul_rate(resolve("cpu", "float32"), seconds=0) > 0


def test_measuring_the_rate_draws_nothing_from_the_training_rng():
    before = torch.get_rng_state()
    matmul_rate(resolve("cpu", "float32"), seconds=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_importing_probes_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", None, raising=False)
    fresh = importlib.util.module_from_spec(device.__spec__)
    monkeypatch.setitem(sys.modules, "fresh_device", fresh)
    device.__spec__.loader.exec_module(fresh)


FAULTS = """
import resource, torch
from model.device import resolve
resolve("cpu")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(*(faults() for _ in range(40)))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other settings")
def test_memory_that_was_freed_is_used_again_on_a_cpu_without_new_pages():
    """After some tries: glibc before 2.38 keeps small ends that it cuts off, seven of a size, between what is freed."""
    ended = run_program("-c", FAULTS)
    assert ended.code == 0, ended.err
    found = [int(word) for word in ended.out.split()]
    assert len(found) == 40
    assert max(found[20:]) < 16, found  # new pages are 32 each time, if they are huge
