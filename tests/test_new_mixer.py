"""docs/add-a-mixer.md holds: its file and its line in a copy of the tree make a mixer that everything knows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE_S, ROOT, Ended, sentences

ROOMS = ("model", "training", "inference", "artifacts", "configs", "data", "cli", "scripts", "tests")
MODEL = ["--model.pattern", "decay full", "--model.n-layer", 2, "--model.n-head", 4, "--model.n-embd", 24]
MODEL += ["--model.block-size", 16, "--model.decay.rank", 5, "--model.decay.penalty", 0.25]
TRAIN = ["--train.max-steps", 12, "--train.global-batch-tokens", 96, "--train.eval-every", 6, "--train.log-every", 1]
TRAIN += [
    "--train.checkpoint-every",
    4,
    "--log.no-progress",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--compile",
    "off",
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the page's mixer in it."""
    root = tmp_path_factory.mktemp("tree")
    for room in ROOMS:
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__", "prepared", "cache"))
    for name in ("train.py", "generate.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    page = (ROOT / "docs" / "add-a-mixer.md").read_text(encoding="utf-8")
    file, line = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (root / "model" / "mixers" / "decay.py").write_text(file, encoding="utf-8")
    table = root / "model" / "mixers" / "__init__.py"
    content = table.read_text(encoding="utf-8").replace(
        '    "linear": LinearAttention,\n', line + '    "linear": LinearAttention,\n'
    )
    assert line in content
    table.write_text(
        content.replace("from model.mixers.linear", "from model.mixers.decay import Decay\nfrom model.mixers.linear")
    )
    (root / "text.txt").write_text(sentences(), encoding="utf-8")
    return root


def run(tree: Path, *arguments: object) -> Ended:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    return Ended(done.returncode, done.stdout, done.stderr)


def train(tree: Path, name: str, *more: object) -> Ended:
    data = ["--data.text", "text.txt", "--data.tokenizer", "byte", "--data.dir", "prepared"]
    return run(tree, "train.py", "--name", name, *data, *MODEL, *TRAIN, *more)


def losses_by_step(run: Path) -> dict[int, tuple[float, float]]:
    """The training loss and the auxiliary loss of each line of metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["train_loss"], line["aux_decay_penalty"]) for line in lines}


@pytest.fixture(scope="module")
def trained(tree: Path) -> Path:
    """A run that was trained in one go."""
    ended = train(tree, "whole")
    assert ended.code == 0, ended
    return tree / "runs" / "whole"


def test_it_trains_with_its_settings_and_reports_its_loss_apart(trained):
    config = json.loads((trained / "config.json").read_text())["config"]["model"]
    assert config["decay"] == {"decay": 0.9, "rank": 5, "penalty": 0.25}
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert all(0 < line["aux_decay_penalty"] < 1 for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.slow
def test_it_resumes_as_if_it_had_never_stopped(tree, trained):
    assert train(tree, "cut", "--train.max-steps", 7).code == 0
    assert train(tree, "cut").code == 0
    whole, cut = losses_by_step(trained), losses_by_step(tree / "runs" / "cut")
    assert cut == whole


@pytest.mark.slow
def test_it_generates_compiled_and_not_and_its_cache_is_right(tree, trained):
    common = [
        "generate.py",
        trained,
        "--prompt",
        "The cat",
        "--max-new-tokens",
        24,
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    plain = run(tree, *common, "--check", "--temperature", 0)
    assert plain.code == 0, plain
    assert "cache" in plain.err
    if shutil.which("g++"):
        compiled = run(tree, *common, "--compile", "on", "--temperature", 0)
        assert (compiled.code, compiled.out) == (0, plain.out)


@pytest.mark.slow
def test_help_and_errors_know_its_settings(tree):
    ended = run(tree, "-c", "import sys; sys.argv = ['train.py', '--help']; import train; train.main()")
    box = ended.out[ended.out.index("model.decay options") :]
    assert "share of the moving average that is kept per token" in box
    for arguments, said in (
        (["--model.decay.decay", 1.5], "model.decay.decay (1.5)"),
        (["--model.decay.rank", 1], "model.decay: penalty (0.25) needs a rank (1) of at least 2"),
    ):
        ended = train(tree, "never", *arguments)
        assert ended.code == 2
        assert said in ended.err
    (tree / "typo.toml").write_text('[model]\npattern = "decay"\n[model.decay]\nrnk = 4\n')
    ended = run(tree, "train.py", "typo.toml")
    assert (ended.code, ended.err) == (2, "train.py: typo.toml: model.decay.rnk is unknown; did you mean rank?\n")


@pytest.mark.slow
def test_it_passes_the_contract(tree):
    tests = ["tests/test_mixers.py", "tests/test_compiled_decode.py", "tests/test_cost.py"]
    ended = run(tree, "-m", "pytest", "-v", "-k", "decay", "-p", "no:cacheprovider", *tests)
    assert ended.code == 0, ended.out[-3000:]
    assert int(re.search(r"(\d+) passed", ended.out)[1]) >= 40
