"""Draw the attention mask of each kind of layer:  python -m scripts.masks configs/presets/gemma3-tiny.toml

For a trained run, its attention weights on a text are drawn below the masks, averaged over heads and layers of a kind:
python -m scripts.masks --run runs/shakespeare --to masks.png
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from pydantic import Field, field_validator
from torch import Tensor

from artifacts.run_dir import RunDir
from cli.options import options_class, parse
from cli.program import exit_with_one_line
from configs.load import load
from data.tokenizer import Tokenizer
from model.attention.mask import attention_mask
from model.attention.spec import AttentionSpec
from model.errors import UserError
from model.gpt import GPT
from model.mixers.attention import Attention
from model.mixers.base import MixerSpec
from model.mixers.multi_window import MultiWindowSpec
from scripts.figure import save_figure

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows of "
TEXT += "outrageous fortune, or to take arms against a sea of troubles, and by opposing end them."


@options_class
class Options:
    """Draw the attention mask of each kind of layer in a config or a run."""

    config: tyro.conf.Positional[Path | None] = None
    """config file; give either a config or --run"""
    run: Path | None = None
    """directory of a run; its attention weights are drawn too"""
    tokens: Annotated[int, Field(ge=2, le=2048)] = 64
    """number of queries and of keys in each mask, in tokens"""
    text: str = TEXT
    """with --run: text to draw the attention weights for, cut to --tokens tokens"""
    to: Path = Path("runs/masks.png")
    """output file: .png, .svg or .pdf"""

    @field_validator("to")
    @classmethod
    def _a_picture(cls, to: Path) -> Path:
        if to.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError("must end in .png, .svg or .pdf")
        return to


def masks(options: Options) -> None:
    """Save the figure and print the number of visible pairs for each kind of layer."""
    if (options.config is None) == (options.run is None):
        given = "neither was" if options.config is None else "both were"
        raise UserError(f"a config and --run exclude each other, and {given} given: give one of them")
    if options.run is None:
        T, paid = options.tokens, {}
        layers = load(options.config).model.layers
    else:
        model, tokenizer = RunDir.of(options.run).load(options.run)
        layers = model.config.layers
        paid = attention_paid(model, tokenizer, options)
        T = len(next(iter(paid.values()))) if paid else options.tokens
    kinds = {spec: describe(spec, layers) for spec in dict.fromkeys(part for layer in layers for part in parts(layer))}
    rows = 2 if paid else 1
    figure = Figure(figsize=(3.2 * len(kinds), 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, len(kinds), squeeze=False)
    for column, (spec, name) in enumerate(kinds.items()):
        draw(axes[0][column], seen(spec, T), name)
        if paid:
            weights = paid.get(spec)
            draw_paid(axes[1][column], None if weights is None else weights.numpy())
        pairs = int(seen(spec, T).sum())
        print(f"{name}: {pairs} of {T * (T + 1) // 2} pairs of {T} positions are visible")
    save_figure(figure, options.to)
    print(options.to)


def parts(spec: MixerSpec) -> tuple[MixerSpec, ...]:
    """The masks to draw for a layer: several if its heads have different windows."""
    return spec.parts if isinstance(spec, MultiWindowSpec) else (spec,)


def seen(spec: MixerSpec, T: int) -> Tensor:
    """Attention mask (T, T), True where a query attends to a key; causal for mixers without keys."""
    pos = torch.arange(T)[None]
    return attention_mask(pos, pos, spec)[0, 0] if isinstance(spec, AttentionSpec) else torch.ones(T, T).tril() > 0


def describe(spec: MixerSpec, layers: tuple[MixerSpec, ...]) -> str:
    """Kind, window and indices of the layers with this spec."""
    like = [str(i) for i, other in enumerate(layers) if spec in parts(other)]
    window = f", window {spec.window}" if isinstance(spec, AttentionSpec) and spec.window is not None else ""
    shown = ", ".join(like[:6]) + (", …" if len(like) > 6 else "")
    return f"{spec.kind}{window} (layer {shown})"


@torch.inference_mode()
def attention_paid(model: GPT, tokenizer: Tokenizer, options: Options) -> dict[MixerSpec, Tensor]:
    """Attention weights (T, T) on the text for each kind of layer, averaged over its heads and layers."""
    ids = tokenizer.encode(options.text)[: options.tokens]
    if len(ids) < 2:
        raise UserError(f"--text has {len(ids)} tokens and must have at least 2: use a longer text")
    if model.wpe is not None:
        ids = ids[: model.config.block_size]
    found: dict[MixerSpec, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(
                lambda mixer, args, _: found.setdefault(mixer.spec, []).append(weights_of(mixer, args).mean(dim=0))
            )
    model.eval()(torch.tensor([ids]))
    return {spec: torch.stack(weights).mean(dim=0) for spec, weights in found.items()}


def weights_of(mixer: Attention, args: tuple) -> Tensor:
    """Attention weights (H, T, T) of one sequence, with any kernel.

    The layer runs again with one-hot values in place of its own and output gates open, so that its outputs are the
    weights.
    """
    T, H, K, D = args[0].shape[1], mixer.spec.n_head, mixer.spec.n_kv_head, mixer.spec.head_dim
    parts: list[Tensor] = []
    read = lambda _, inputs: parts.append(inputs[0].view(T, H, D).transpose(0, 1))
    for start in range(0, T, D):
        keys = torch.eye(T, T + D)[:, start : start + D]  # (T, D) one-hot channels for the next D keys
        hooks = [
            mixer.c_v.register_forward_hook(lambda _, __, v, keys=keys: keys.repeat(1, K)[None].to(v)),
            mixer.c_proj.register_forward_pre_hook(read),
        ]
        if mixer.c_gate is not None:
            hooks.append(mixer.c_gate.register_forward_hook(lambda _, __, g: torch.full_like(g, torch.inf)))
        try:
            mixer.forward(*args)  # bypasses its own hooks
        finally:
            for hook in hooks:
                hook.remove()
    return torch.cat(parts, dim=2)[:, :, :T].float()


def draw(axes: Axes, mask: Tensor, title: str) -> None:
    """Draw a mask: visible pairs dark, one row per query, one column per key."""
    axes.imshow(mask.numpy(), cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("key")
    axes.set_ylabel("query")


def draw_paid(axes: Axes, weights: np.ndarray | None) -> None:
    """Draw the weight of each key for each query, on a logarithmic scale."""
    if weights is None:
        axes.axis("off")
        return
    image = axes.imshow(np.maximum(weights, 1e-4), cmap="magma", norm=LogNorm(1e-4, 1), interpolation="nearest")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.figure.colorbar(image, ax=axes, shrink=0.7, label="attention weight")


def main() -> None:
    masks(parse(Options, prog="python -m scripts.masks", description=__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
