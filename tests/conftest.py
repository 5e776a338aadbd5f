"""What the tests share: small networks whose sizes all differ, ways of feeding them in chunks, and runs of a second."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from networks import SMALL, VOCAB, tiny_model
from torch import Tensor

import generate
from artifacts.run_dir import RunDir
from cli.program import exit_with_one_line
from configs.load import load
from configs.schema import RunConfig
from data.tokenizer import make_tokenizer
from model.cache import Cache
from model.config import ModelConfig
from model.cost import cache_bytes
from model.cpu.cpp_build import keep_compiled_code
from model.cpu.cpp_ops import native
from model.gpt import GPT
from model.memory import PeakMemory
from training.optim import Optimizers

pytest_plugins = ["studies", "evaluated", "planted", "training_runs", "exported"]  # what only some of the tests share

os.environ.setdefault("HF_HUB_OFFLINE", "1")
keep_compiled_code()  # before anything imports torch's compiler, which would settle on a place of its own
native()  # what this compiles at first no test is to wait for, or to read about
torch.set_num_threads(1)  # networks this small gain nothing from more, and lose much where the machine is busy
settings.register_profile("sash", deadline=None, derandomize=True, database=None, max_examples=25)
settings.register_profile("long", settings.get_profile("sash"), derandomize=False, max_examples=500)
settings.load_profile("sash")

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG"  # how such a file begins
needs_amx = pytest.mark.skipif(native() is None, reason="needs AMX and a C++ compiler")
PATIENCE_S = 300  # with a process: it ends what hangs, and is far more than a busy machine needs


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def cut(sizes: Sequence[int], total: int) -> list[int]:
    """The sizes as far as the total, the last one cut, or the rest added."""
    out: list[int] = []
    while (rest := total - sum(out)) > 0:
        out.append(min(sizes[len(out)], rest) if len(out) < len(sizes) else rest)
    return out


def tensors_of(cache: Cache) -> list[Tensor]:
    """All tensors that the layers' states hold."""
    states = [part for state in cache.layers for part in getattr(state, "parts", [state])]
    return [x for state in states for x in vars(state).values() if isinstance(x, Tensor)]


@torch.no_grad()
def logits_in_chunks(model: GPT, idx: Tensor, sizes: Sequence[int], cache: Cache | None = None) -> Tensor:
    """(B, T) -> (B, T, V), fed to the cache in chunks of these sizes, as `cut` makes them add up."""
    cache = model.new_cache(len(idx), idx.shape[1]) if cache is None else cache
    return torch.cat([model(chunk, cache=cache) for chunk in idx.split(cut(sizes, idx.shape[1]), dim=1)], dim=1)


@torch.no_grad()
def logits_ragged(
    model: GPT, rows: Sequence[Tensor], lengths: Sequence[Sequence[int]], cache: Cache, *, junk_seed: int = 2
) -> list[list[Tensor]]:
    """Feed chunk after chunk of right-padded rows, lengths[chunk][row] real tokens each; logits of each row's tokens.

    Pads are random tokens and every chunk has one column of them more than it needs.
    """
    out: list[list[Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    for n, counts in enumerate(lengths):
        idx = random_tokens(len(rows), max(counts) + 1, seed=junk_seed + n)
        for b, count in enumerate(counts):
            idx[b, :count] = rows[b][done[b] : done[b] + count]
        logits = model(idx, cache=cache, lengths=torch.tensor(counts))
        assert logits.isfinite().all(), "a padded position is not finite"
        for b, count in enumerate(counts):
            out[b].append(logits[b, :count])
            done[b] += count
    return out


@torch.no_grad()
def assert_contract(config: ModelConfig, idx: Tensor, sizes: Sequence[int], *, t: int, spare: int = 0) -> None:
    """A network of the config is causal, decodes in any chunks as it trains, and its cache has the bytes predicted."""
    model, T, near = tiny_model(config), idx.shape[1], 1e-6 if config.rope_in_cache else 1e-12
    room = T if config.position == "learned" else T + spare
    cache, plain = model.new_cache(len(idx), room), model(idx)
    later = torch.cat((idx[:, :t], (idx[:, t:] + 1) % VOCAB), dim=1)
    assert_equal(model(later)[:, :t], plain[:, :t], near)
    assert_equal(model(idx[:, :t]), plain[:, :t], near)
    assert_equal(logits_in_chunks(model, idx, sizes, cache), plain, near)
    predicted = cache_bytes(config, room, batch_size=len(idx), dtype=torch.float64)
    assert predicted == cache.nbytes == sum(x.nbytes for x in tensors_of(cache))


# Runs: a network of a millisecond, on a few kB of sentences.

RUN = {
    "device": "cpu",
    "dtype": "float32",
    "compile": "off",
    "model": {"block_size": 16, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 24, "pattern": "swa full"},
    "data": {"tokenizer": "byte"},
    "train": {"max_steps": 12, "global_batch_tokens": 96, "eval_every": 5, "log_every": 1, "checkpoint_every": 4},
    "log": {"progress": False},
}
RUN["model"]["window"] = 5


def sentences(n: int = 90) -> str:
    """Lines that differ and can be learned, with characters of one to four bytes."""
    who, what = ("The cat", "A naïve dog", "日本の猫", "My 😀 friend", "Nobody"), ("sees", "hears", "paints", "forgets")
    return "".join(f"{who[i % 5]} {what[i % 4]} {i * i % 97} “{'old' if i % 3 else 'new'}” things.\n" for i in range(n))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of sentences; beside it lie its tokens, prepared once."""
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text(sentences(), encoding="utf-8")
    return path


def run_values(out: Path, text: Path, name: str, **changes) -> dict:
    """What load() takes for a tiny run out/name; changes are keys, or sections of them."""
    values = RUN | {"name": name, "out_dir": str(out)}
    values["data"] = RUN["data"] | {"text": str(text), "dir": str(text.parent / "prepared")}
    for key, change in changes.items():
        values[key] = values.get(key, {}) | change if isinstance(change, dict) else change
    return values


def run_config(out: Path, text: Path, name: str = "run", **changes) -> RunConfig:
    return load(None, run_values(out, text, name, **changes))


def command_line(out: Path, text: Path, name: str = "run", **changes) -> list[str]:
    """The same run as arguments of train.py."""
    arguments: list[str] = []
    for key, value in run_values(out, text, name, **changes).items():
        for option, x in (
            {f"{key}.{k}": v for k, v in value.items()}.items() if isinstance(value, dict) else [(key, value)]
        ):
            arguments += [f"--{option}", str(x)] if not isinstance(x, bool) else [("--" if x else "--no-") + option]
    return [a.replace("--no-log.", "--log.no-") for a in arguments]


def save_run(path: Path, *, seed: int = 0, **model) -> GPT:
    """A run directory that generates: random float32 weights and the byte tokenizer, nothing trained."""
    tokenizer = make_tokenizer("byte")
    config = load(None, {"name": path.name, "out_dir": str(path.parent), "model": SMALL | {"vocab_size": 257} | model})
    network = tiny_model(config.model, seed=seed, dtype=torch.float32)
    run = RunDir(path)
    run.begin(config, {"data": "none"})
    run.save(network, Optimizers([torch.optim.AdamW(network.parameters())]), {"step": 3}, best=True)
    tokenizer.save(path / "tokenizer.json")
    return network


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    out: str
    err: str

    def assert_refused(self, *parts: str) -> None:
        """Exit code 2 and one line on standard error that says all parts."""
        assert self.code == 2, self
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        assert [part for part in parts if part not in self.err] == [], self.err


Program = Callable[..., Ended]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Call a program's main() as the command line would, in this process."""

    def call(main: Callable[[], None], *arguments: object, name: str = "program.py") -> Ended:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            exit_with_one_line(main)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        return Ended(code, *capsys.readouterr())

    return call


@pytest.fixture
def unmeasured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each run the fraction of a second in which it measures what the hardware multiplies."""
    monkeypatch.setattr("train.matmul_rate", lambda runtime: 1e12)


@pytest.fixture
def unmeasured_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each run the profiler, which takes longer than its training."""
    nothing = lambda device, held=(): nullcontext(PeakMemory(method="not measured"))
    monkeypatch.setattr("training.trainer.measure_peak", nothing)


@pytest.fixture
def unmeasured(unmeasured_speed: None, unmeasured_memory: None) -> None:
    """Runs that measure nothing of the hardware."""


# Generating.

CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories of networks with the same random weights: full, sliding, all sliding, learned positions."""
    root = tmp_path_factory.mktemp("runs")
    save_run(root / "full")
    save_run(root / "sliding", pattern="swa full", window=4, n_sink=1)
    save_run(root / "swa", pattern="swa", window=3, n_sink=1)
    save_run(root / "learned", position="learned")
    return root


@pytest.fixture
def say(program: Program, runs: Path) -> Callable[..., Ended]:
    """Generate from one of the runs."""

    def call(run: str | Path, *arguments: object) -> Ended:
        return program(generate.main, runs / run, *arguments, *CPU, name="generate.py")

    return call


@pytest.fixture
def speak(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let the network say these bytes, and note each piece that is written."""

    def script(content: bytes, *, then: int | None = None) -> list[str]:
        tokens = [*content] + ([then] if then is not None else [])
        said = lambda *_, **__: (torch.tensor([token]) for token in [*tokens, *([ord("~")] * 999)])
        monkeypatch.setattr(generate, "stream", said)
        written: list[str] = []
        write = sys.stdout.write
        monkeypatch.setattr(sys.stdout, "write", lambda x: (written.append(x), write(x))[1])
        return written

    return script


def start_program(*arguments: object, **options) -> subprocess.Popen[str]:
    """A real process from the checkout, with one thread; one that dies outside of Python says where it was."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


def run_program(*arguments: object, **options) -> Ended:
    """A real process, to its end."""
    process = start_program(*arguments, **options)
    out, err = process.communicate(timeout=PATIENCE_S)
    return Ended(process.returncode, out, err)


class FakeWandb:
    """What Metrics may call of wandb; anything else is an AttributeError, as a login would be."""

    def __init__(self, api_key: str | None = None):
        self.api = SimpleNamespace(api_key=api_key)
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = False

    def init(self, **arguments: Any) -> "FakeWandb":
        self.started = arguments
        return self

    def log(self, record: dict[str, Any], step: int) -> None:
        self.logged.append((dict(record), step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """wandb without a key, and without wandb."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return fake
