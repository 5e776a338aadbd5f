"""Convert to and from Hugging Face transformers:  python -m scripts.convert export runs/shakespeare --to exported

An exported directory loads with AutoModelForCausalLM and AutoTokenizer, without any code from Sash; docs/convert.md
shows vLLM and GGUF. An imported model becomes a run, which generate.py can use.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from pydantic import AfterValidator

from artifacts import checkpoint
from artifacts.run_dir import RunDir
from cli.options import Command, options_class, run_subcommand
from cli.program import exit_with_one_line
from configs.load import build
from configs.schema import RunConfig
from model.device import long_dtype
from model.errors import UserError
from model.gpt import GPT
from scripts.convert import directory
from scripts.convert.families import of_type
from scripts.convert.fit import fitting
from scripts.convert.tensors import to_ours, to_theirs

TUNE = "tune.toml"  # in an imported run


@options_class
class Export:
    """Export a run as a directory that transformers can load."""

    run: tyro.conf.Positional[Path]
    """directory of a run, or of one of its checkpoints"""
    to: Path
    """directory to create"""
    checkpoint: Literal["best", "latest"] = "best"
    """checkpoint to export"""
    dtype: Annotated[Literal["float32", "bfloat16", "fp32", "bf16"], AfterValidator(long_dtype)] = "float32"
    """dtype of the exported weights"""


@options_class
class Import:
    """Import a transformers model (safetensors, with a byte-level BPE tokenizer) as a run."""

    directory: tyro.conf.Positional[Path]
    """directory with config.json, model.safetensors or its shards, and tokenizer.json"""
    to: Path
    """directory to create for the run, such as runs/imported"""


def export(options: Export) -> None:
    """Export a run to a new directory that transformers can load; it appears complete or not at all."""
    model, tokenizer = RunDir.of(options.run).load(options.run, options.checkpoint)
    config = model.config
    family = fitting(config)
    state = checkpoint.unique_tensors(model.to(getattr(torch, options.dtype)))
    values = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": options.dtype}
    with directory.new_directory(options.to) as path:
        directory.write(
            path,
            config=values | family.theirs(config),
            tensors=to_theirs(state, family.model_type, config.norm_place),
            tokenizer=tokenizer,
            max_length=config.block_size,
        )
    print(f"{options.to}: {family.architecture}, {options.dtype}")


def import_(options: Import) -> None:
    """Import a transformers model as a new run; it appears complete or not at all."""
    source = options.directory
    values = directory.read_config(source)
    family = of_type(values)
    tokenizer = directory.read_tokenizer(source, name=source.resolve().name)
    model_values = family.ours(values)
    run_values = {"name": options.to.name, "out_dir": str(options.to.parent), "model": model_values}
    block = model_values["block_size"]
    run_values["train"] = {"global_batch_tokens": -(-8192 // block) * block}
    config = build(RunConfig, run_values, source=lambda _: f"{source / 'config.json'}: ")
    if tokenizer.n_vocab > config.model.vocab:
        raise UserError(f"{source}: the tokenizer has {tokenizer.n_vocab} ids, the model only {config.model.vocab}")
    model = GPT(config.model)
    expected = checkpoint.unique_tensors(model)
    tensors = to_ours(directory.read_tensors(source), expected, family.model_type, config.model.norm_place)
    model.load_state_dict(tensors, strict=False)  # tied weights appear only once in the file
    with directory.new_directory(options.to) as path:
        run = RunDir(path)
        run.begin(config, {"data": "none", "imported_from": str(source)})
        saved = checkpoint.write(run.checkpoints, checkpoint.content(model), step=0, state={"progress": {"step": 0}})
        for name in ("latest", "best"):
            checkpoint.point(run.checkpoints, name, saved)
        tokenizer.save(path / "tokenizer.json")
        (path / TUNE).write_text(to_tune(config, options.to), encoding="utf-8")
    print(f"{options.to}: {family.architecture}; to generate from it: python generate.py {options.to}")


def to_tune(config: RunConfig, run: Path) -> str:
    """A TOML config for fine-tuning: a run with the weights, model and tokenizer of this one."""

    def toml(x: object) -> str:
        if isinstance(x, dict):
            return "{" + ", ".join(f"{key} = {toml(value)}" for key, value in x.items()) + "}"
        return json.dumps("none" if x is None else x)

    sections = config.model_dump(include={"model", "train"}, exclude_unset=True) | {"data": {"tokenizer": str(run)}}
    head = f"# Fine-tunes an imported model: python train.py {run / TUNE} --data.text TEXT"
    lines = [head, f"init_from = {toml(str(run))}"]
    for name, values in sections.items():
        lines += ["", f"[{name}]", *(f"{key} = {toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    commands: dict[str, Command] = {"export": (export, Export), "import": (import_, Import)}
    run_subcommand(commands, prog="python -m scripts.convert", description=__doc__)


if __name__ == "__main__":
    exit_with_one_line(main)
