"""Recall by distance: does the model still predict the value of a key that it read this many tokens ago?"""

from itertools import islice
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from data.recall import CHANCE, PASSKEY, PASSKEY_DIGITS, documents, questions
from model.config import ModelConfig
from model.errors import UserError
from scripts.figure import known, new_figure
from scripts.probes.options import Options
from scripts.probes.results import Curve, Found, column, table
from scripts.probes.subject import Subject

TOKENS = 131_072  # tokens of held-out documents, by default
PROBES = ("recall", "passkey")


def recall(subject: Subject, options: Options) -> Found:
    """Accuracy on held-out documents of one context each, by octave of the distance and relative to the window."""
    context = options.context or subject.config.model.block_size
    n_tokens = options.tokens if isinstance(options.tokens, int) else TOKENS
    asked = answers(subject, context=context, n_documents=max(1, n_tokens // context))
    window, reach = window_and_reach(subject.config.model)
    octaves = sorted(set(asked["octave"]))
    distance = asked["distance"]
    parts = {"all distances": distance > 0}
    if window is not None:
        parts["below W"] = distance < window
        parts["W to 2W"] = (distance >= window) & (distance < 2 * window)
        parts["from 2W"] = distance >= 2 * window
    if reach is not None:
        parts["beyond reach"] = distance > reach
    parts |= {f"distance {span(octave)}": asked["octave"] == octave for octave in octaves}

    figures: dict[str, float] = {}
    lines: list[tuple[str, ...]] = [("", "questions", "letter accuracy", "passkey accuracy")]
    for part, inside in parts.items():
        right = asked[inside].groupby("probe")["right"].mean()
        for probe, share in right.items():
            where = [] if part == "all distances" else [part]
            name = column(f"{probe}_accuracy", *where, context=options.context, dtype=options.dtype)
            figures[name] = float(share)
        cells = (f"{right[probe]:.1%}" if probe in right else "no questions" for probe in PROBES)
        lines.append((part, f"{inside.sum():,}", *cells))
    lines.append(("chance", "", f"{CHANCE:.1%}", f"{10**-PASSKEY_DIGITS:.3%}"))

    by_octave = asked.groupby(["probe", "octave"])["right"].mean()
    content = {"distance": octaves, "window": window, "reach": reach, "chance": CHANCE}
    content |= {probe: [by_octave.get((probe, octave)) for octave in octaves] for probe in PROBES}
    head = f"recall, context {context} tokens" + ("" if window is None else f", window W = {window}")
    head += "" if reach is None else f", reach of all layers together {reach} tokens"
    if not subject.config.data.text.startswith("recall"):
        head += f"\nnote: trained on {subject.config.data.text}, not on recall: expect accuracy close to chance"
    curve = Curve(name="recall_by_distance", content=content, draw=_draw)
    return Found(figures=figures, text=f"{head}\n{table(lines)}", curve=curve)


@torch.inference_mode()
def answers(subject: Subject, *, context: int, n_documents: int) -> pd.DataFrame:
    """One row per question in held-out documents of `context` tokens: probe, distance, octave, and whether it is right.

    An answer is right if greedy decoding would write it: if the letter, or every digit of the passkey after the correct
    digits before it, is the most likely token.
    """
    subject.check_context(context)
    runtime, texts = subject.runtime, list(islice(documents("val", length=context + 1), n_documents))
    ids = torch.tensor([_encode(subject, text) for text in texts])  # (documents, context + 1)
    likeliest = []
    batches = ids[:, :-1].split(subject.batch_rows(context))
    for idx in tqdm(batches, desc="recall", unit="batch", leave=False, disable=None):
        with runtime.autocast():
            likeliest.append(subject.model(idx.to(runtime.device)).argmax(dim=-1).cpu())
    right = (torch.cat(likeliest) == ids[:, 1:]).numpy()  # (documents, context): the token after each
    rows = [
        (
            "passkey" if question.key == PASSKEY else "recall",
            question.distance,
            1 << (question.distance.bit_length() - 1),
            right[n, question.at : question.at + (PASSKEY_DIGITS if question.key == PASSKEY else 1)].all(),
        )
        for n, text in enumerate(texts)
        for question in questions(text)
    ]
    if not rows:
        raise UserError(f"--recall: a context of {context} tokens is too short for any question; use a longer one")
    return pd.DataFrame(rows, columns=["probe", "distance", "octave", "right"])


def _encode(subject: Subject, text: str) -> list[int]:
    ids = subject.tokenizer.encode(text)
    if len(ids) != len(text):
        raise UserError(
            f"--recall needs one token per character, but the tokenizer {subject.tokenizer.name} merges characters: "
            "train with the tokenizer char or byte, as configs/recall.toml does"
        )
    return ids


def span(octave: int) -> str:
    return f"{octave}-{2 * octave - 1}" if octave > 1 else "1"


def window_and_reach(config: ModelConfig) -> tuple[int | None, int | None]:
    """The narrowest window (None: no sliding layers) and the reach of all layers together (None: unlimited)."""
    windows = [getattr(spec, "window", None) for spec in config.layers]
    sliding = [window for window in windows if window is not None]
    endless = len(sliding) < len(windows) or config.n_sink
    return min(sliding, default=None), None if endless else sum(window - 1 for window in sliding)


def _draw(content: dict[str, Any]):
    figure, (axes,) = new_figure("tokens between a key and its value", ["accuracy"])
    for probe, name in zip(PROBES, ("letters", "passkeys of five digits"), strict=True):
        axes.semilogx(*known(content["distance"], content[probe]), "o-", ms=3, base=2, label=name)
    axes.set_xticks(content["distance"], [span(first) for first in content["distance"]])
    axes.axhline(content["chance"], color="grey", lw=0.8, ls="--", label="chance (letters)")
    for name, style in (("window", ":"), ("reach", "-.")):
        if content[name] is not None:
            axes.axvline(content[name], color="grey", lw=0.8, ls=style, label=name)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    return figure
