"""Coordinate check: does a learning rate transfer across widths?  python -m scripts.coordinates configs/demo.toml

Networks of several widths, with a fixed head_dim, take a few optimizer steps at the config's peak learning rates, in
float32 on the CPU. Then the change of each module's output on a fixed batch is reported (muP, arXiv 2203.03466). If it
grows with the width (exponent above 0), a learning rate tuned on a narrow network may be too high for a wide one.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import field_validator
from torch import Tensor, nn
from tqdm import tqdm

from cli.options import Count, as_arguments, options_class, validated
from cli.program import exit_with_one_line
from configs.load import build, with_options
from configs.schema import RunConfig
from data.loader import TrainLoader
from data.prepare import Prepared, prepare
from model.config import ModelConfig
from model.errors import UserError
from model.gpt import GPT
from scripts.bench.timing import exponent
from scripts.figure import legend, new_figure, save_figure
from scripts.report.tables import table
from training.optim import make_optimizers

PARTS = ("embedding", "mixers", "MLPs", "last norm", "logits")


@options_class
class Options:
    """Options in addition to the keys of the config."""

    widths: tuple[Count, ...] = (64, 128, 256, 512)
    """values of n_embd to compare, at least two"""
    steps: Count = 10
    """optimizer steps before the outputs are compared"""
    to: Path | None = None
    """file for a plot of output change against width"""

    @field_validator("widths")
    @classmethod
    def _several(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(widths)) < 2:
            raise ValueError("must be at least two different numbers: a single width shows no trend")
        return widths


def of_width(config: RunConfig, width: int, vocab_size: int) -> RunConfig:
    """The config with this n_embd and the same head_dim; n_head follows. UserError if heads do not fit the width."""
    model, head = config.model, config.model.head_width
    n_head, rest = divmod(width, head)
    kv_heads, rest_kv = divmod(n_head * model.kv_heads, model.n_head)
    if rest or rest_kv or not kv_heads:
        least = head * model.n_head // model.kv_heads
        raise UserError(
            f"--widths ({width}) must be multiples of {least}: head_dim is {head}, with {model.n_head} query heads for "
            f"{model.kv_heads} KV heads"
        )
    mlp_width = model.mlp_width and model.mlp_width * width // model.n_embd
    shape = {"n_embd": width, "n_head": n_head, "n_kv_head": kv_heads, "mlp_width": mlp_width, "vocab_size": vocab_size}
    return config.model_copy(update={"model": build(ModelConfig, model.model_dump() | shape)})


def changes(config: RunConfig, prepared: Prepared, steps: int) -> dict[str, float]:
    """Root mean square change of each part's output after `steps` steps, averaged over layers."""
    torch.manual_seed(config.seed)
    model, T = GPT(config.model), config.model.block_size
    optimizers = make_optimizers(model, **config.optim.numbers)
    loader = TrainLoader(prepared.split("train"), block_size=T, global_rows=config.global_rows, seed=config.seed)
    same = range(min(2, config.global_rows))
    probe = loader.rows(steps, same)[0]
    before = outputs(model, probe)
    for step in range(steps):
        idx, targets = loader.rows(step, range(config.global_rows))
        model(idx, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizers.step()
    moved = {key: (y - before[key]).square().mean().sqrt().item() for key, y in outputs(model, probe).items()}
    mean = lambda part: [x for key, x in moved.items() if key.split("/")[0] == part]
    return {part: sum(mean(part)) / len(mean(part)) for part in PARTS}


@torch.no_grad()
def outputs(model: GPT, idx: Tensor) -> dict[str, Tensor]:
    """The output of each part, by name and layer."""
    found: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda _, __, y: found.update({name: y.float()})

    parts: dict[str, nn.Module] = {"embedding": model.wte, "last norm": model.ln_f, "logits": model.lm_head}
    for i, block in enumerate(model.h):
        parts |= {f"mixers/{i}": block.mixer, f"MLPs/{i}": block.mlp}  # type: ignore[dict-item]
    hooks = [module.register_forward_hook(record(name)) for name, module in parts.items()]
    try:
        model.eval()(idx)
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    return found


def draw(widths: list[int], found: list[dict[str, float]], path: Path) -> None:
    """Plot the change against width, one line per part."""
    figure, (axes,) = new_figure("n_embd", ["RMS change of the output"])
    for part in PARTS:
        axes.plot(widths, [row[part] for row in found], marker="o", markersize=4, label=part)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(widths, [str(width) for width in widths])
    legend(figure, axes)
    save_figure(figure, path)


def main() -> None:
    config, given = with_options(None, "python -m scripts.coordinates", __doc__ or "", as_arguments(Options))
    options = validated(Options, given)
    widths, steps = list(options.widths), options.steps
    prepared = prepare(config.data.text, config.data.tokenizer, root=config.data.dir, progress=config.log.progress)
    configs = [of_width(config, width, config.model.vocab_size or prepared.tokenizer.n_vocab) for width in widths]
    found = [changes(c, prepared, steps) for c in tqdm(configs, unit="width", disable=None)]
    rows = [
        {"RMS change of": part}
        | {str(width): f"{row[part]:.3g}" for width, row in zip(widths, found, strict=True)}
        | {"exponent": f"{exponent(widths, [row[part] for row in found]):.2f}"}
        for part in PARTS
    ]
    print(f"after {steps} steps, by n_embd\n\n{table(rows)}")
    if options.to is not None:
        draw(widths, found, options.to)
        print(options.to)


if __name__ == "__main__":
    exit_with_one_line(main)
