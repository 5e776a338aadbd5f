"""The options of generate.py: what each means, which values it takes, and the prompts they name."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data.tokenizer import Tokenizer
from model.device import DType, Switch
from model.errors import UserError

LARGEST = 10**15  # for which 64 bits have room to spare
COUNTS = {
    "max_new_tokens": (1, LARGEST),
    "num_samples": (1, 10_000),
    "top_k": (1, LARGEST),
    "chunk": (1, LARGEST),
    "max_length": (2, LARGEST),
    "window": (1, LARGEST),
    "n_sink": (0, LARGEST),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Generate text from a trained run."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's directory, or one of its checkpoints."""

    prompt: str | None = None
    """What to continue; without one a new document is begun."""
    prompt_file: Path | None = None
    """Take the prompt from a file; - is standard input."""
    prompts: Path | None = None
    """Take a prompt from each line of a file, and continue them together; - is standard input."""
    interactive: bool = False
    """Ask for text, line by line, and continue it; the cache is kept from one line to the next."""
    max_new_tokens: int = 200
    """How many tokens to add at most, to each prompt or line; block_size does not bound it."""
    num_samples: int = 1
    """How many continuations of each prompt, which is read once for all."""

    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw among the k likeliest only."""
    top_p: float | None = None
    """Draw among the likeliest that together reach this probability only."""
    min_p: float | None = None
    """Draw among those only that are at least this part as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the text already has become less likely."""
    seed: int = 0
    """The same seed and prompt give the same text, whatever the batch, the chunks and the cache."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End the text before this string; may be given several times."""
    stop_at_end: bool = True
    """End the text where the model ends its document."""
    json: bool = False
    """Write a line of JSON for each text: its tokens, and their log-probabilities as the model has them."""

    cache: Literal["rolling", "full", "none"] = "rolling"
    """rolling: sliding layers keep their window alone; full: every layer keeps all; none: recompute every token."""
    chunk: int = 512
    """Read prompts so many tokens at a time; fewer take less memory and change no text."""
    max_length: int = 8192
    """With --interactive: tokens that full layers have room for, yours and the model's."""
    window: int | None = None
    """Decode through a window: every layer slides with it, whatever it was trained as."""
    n_sink: int = 0
    """With --window: first tokens that stay visible."""
    positions: Literal["absolute", "in-cache"] = "absolute"
    """With --window: rotate keys by their position in the text, or by place in the cache, as StreamingLLM does."""

    checkpoint: Literal["best", "latest"] = "best"
    """Which checkpoint of the run."""
    check: bool = False
    """Compare the logits with those computed without a cache; exit code 1 beyond what the dtype explains."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    dtype: DType = "auto"
    """Of weights and cache."""
    weights: Literal["as-dtype", "int8"] = "as-dtype"
    """int8: matrices in 8 bits with a scale for each row, which loses a little and halves what a step reads."""
    cache_dtype: Literal["as-dtype", "int8"] = "as-dtype"
    """int8: keys and values in 8 bits with a scale each, which loses a little and about halves the cache."""
    compile: Switch = "auto"
    """Compile the layers for decoding: some seconds at first, then two to four times the speed. auto: where the
    tokens to come are enough for that."""

    def check_ranges(self) -> None:
        """UserError for a value out of its range, or options that do not go together."""
        allowed = {
            name: (value is None or least <= value <= most, f"{least} to {most}")
            for name, (least, most) in COUNTS.items()
            for value in [getattr(self, name)]
        }
        allowed |= {
            "temperature": (0 <= self.temperature < math.inf, "0 or above"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 < self.min_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 changes nothing"),
            "stop": (all(self.stop), "a text that is not empty"),
        }
        for name, (right, what) in allowed.items():
            if not right:
                value = "''" if name == "stop" else getattr(self, name)
                raise UserError(f"--{name.replace('_', '-')} ({value}) is out of range: it must be {what}")
        sources = [f"--{name.replace('_', '-')}" for name in ("prompt", "prompt_file", "prompts") if self._given(name)]
        if len(sources) > 1:
            raise UserError(f"{' and '.join(sources)} were both given: take one")
        for name in ("n_sink", "positions"):
            if self.window is None and self._given(name):
                raise UserError(
                    f"--{name.replace('_', '-')} ({getattr(self, name)}) says how a window slides: give --window"
                )
        if self.check and self.cache == "none":
            raise UserError("--check compares a cache with none: take --cache rolling or full")
        if self.cache_dtype == "int8" and self.cache == "none":
            raise UserError("--cache-dtype int8 says how a cache is kept, and --cache none keeps none")
        if self.cache_dtype == "int8" and self.check:
            raise UserError("--check asks whether a cache changes the logits, which --cache-dtype int8 does a little")
        if self.interactive and self.cache == "none":
            raise UserError("--interactive keeps a cache from line to line: take --cache rolling or full")
        if self.interactive and str(self.prompt_file) == "-":
            raise UserError("--interactive takes your lines from standard input: give --prompt-file another file")
        for name in ("prompts", "num_samples", "json", "check"):
            if self.interactive and self._given(name):
                raise UserError(f"--interactive continues one text, line by line: leave out --{name.replace('_', '-')}")

    def _given(self, name: str) -> bool:
        return getattr(self, name) != type(self).__dataclass_fields__[name].default


def read_prompts(options: Options, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each prompt; where none is given the end-of-text token, after which a document begins."""
    if options.prompts is not None:
        lines = _read(options.prompts).removesuffix("\n").split("\n")
        for number, line in enumerate(lines, 1):
            if not line:
                raise UserError(f"{options.prompts}: line {number} is empty: each line is a prompt, take it out")
        return [tokenizer.encode(line) for line in lines]
    text = options.prompt if options.prompt_file is None else _read(options.prompt_file)
    if text is None:
        return [[tokenizer.eot]]
    if not text:
        raise UserError("the prompt is empty: give at least a character, or leave --prompt out to begin a new document")
    return [tokenizer.encode(text)]


def _read(path: Path) -> str:
    """A file's text, or standard input's; line ends are read as \\n."""
    content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        name = "standard input" if str(path) == "-" else path
        where = f"{name} is not UTF-8 at byte {error.start}"
        raise UserError(f"{where}: convert it, as with iconv -f latin1 -t utf-8") from None
