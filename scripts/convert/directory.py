"""Read and write model directories of transformers: config.json, safetensors, tokenizer.json."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.huggingface_tokenizer import read_tokenizer_json, write_tokenizer_json
from data.tokenizer import EOT, Tokenizer
from model.errors import UserError
from scripts.convert.rope import Values

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory to fill; it is renamed to `path` on success and removed on failure."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--to ({path}) must be a new or an empty directory")
    partial = path.with_name(path.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write(path: Path, *, config: Values, tensors: dict[str, Tensor], tokenizer: Tokenizer, max_length: int) -> None:
    """Write all files that AutoModelForCausalLM and AutoTokenizer need into an empty directory."""
    special = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "pad_token_id": None}
    _write_json(path / "config.json", config | special)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    (path / WEIGHTS).chmod((path / "config.json").stat().st_mode)  # safetensors creates it readable by its owner only
    _write_json(path / "generation_config.json", special)
    write_tokenizer_json(tokenizer, path / "tokenizer.json")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    _write_json(path / "tokenizer_config.json", names | {"eos_token": EOT, "bos_token": EOT})


def read_config(path: Path) -> Values:
    """Read config.json. UserError if there is none."""
    try:
        values = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is not a model directory of transformers: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path / 'config.json'} must be a JSON object")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the weights from one file or all shards. UserError with the name of a missing or damaged file."""
    files = [WEIGHTS]
    if (path / INDEX).is_file():
        try:
            files = sorted(set(json.loads((path / INDEX).read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path / INDEX} cannot be read: {error!r}") from None
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing: Sash needs all safetensors files of a model")
        try:
            tensors |= load_file(path / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path / name} cannot be read ({error}): copy it again") from None
    return tensors


def read_tokenizer(path: Path, *, name: str) -> Tokenizer:
    """Read the tokenizer, with the end-of-text token from tokenizer_config.json."""
    try:
        eos = json.loads((path / "tokenizer_config.json").read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        eos = None
    end = eos.get("content") if isinstance(eos, dict) else eos
    return read_tokenizer_json(path / "tokenizer.json", name=name, end=end)


def _write_json(path: Path, values: Values) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
