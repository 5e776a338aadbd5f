"""Generate text from a trained run:  python generate.py runs/shakespeare --prompt "To be" --max-new-tokens 500

The text goes to standard output as it is made, the statistics to standard error.
"""

import codecs
import math
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from configs.program import exit_with_one_line, stop_signals
from configs.run_dir import RunDir
from data.tokenizer import Tokenizer
from model.cache import Cache
from model.device import DType, Runtime, resolve
from model.errors import UserError
from model.gpt import GPT
from model.memory import device_peak
from model.sampling import Sampler, stream
from model.streaming import through_window

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the largest logit


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Generate text from a trained run."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's directory, or one of its checkpoints."""
    prompt: str | None = None
    """What to continue; without one a new document is begun."""
    prompt_file: Path | None = None
    """Take the prompt from a file; - is standard input."""
    max_new_tokens: int = 200
    """How many tokens to add at most; block_size does not bound it."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw among the k likeliest only."""
    top_p: float | None = None
    """Draw among the likeliest that together reach this probability only."""
    seed: int = 0
    """The same seed and prompt give the same text."""
    stop_at_end: bool = True
    """Stop where the model ends its document."""
    cache: Literal["rolling", "full", "none"] = "rolling"
    """rolling: sliding layers keep their window alone; full: every layer keeps all; none: recompute every token."""
    window: int | None = None
    """Decode through a window: every layer slides with it, whatever it was trained as."""
    n_sink: int = 0
    """With --window: first tokens that stay visible."""
    checkpoint: Literal["best", "latest"] = "best"
    """Which checkpoint of the run."""
    check: bool = False
    """Compare the logits with those computed without a cache; exit code 1 beyond what the dtype explains."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    dtype: DType = "auto"
    """Of weights and cache."""


def generate(options: Options) -> int:
    """Print text, then what it cost; return the exit code."""
    check_options(options)
    runtime = resolve(options.device, options.dtype, "off")
    model, tokenizer = load(options, runtime)
    prompt = read_prompt(options, tokenizer)
    if model.wpe is not None and len(prompt) > model.config.block_size:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, more than the {model.config.block_size} of the learned positions "
            "of this model (block_size): shorten it, or train with position = rope"
        )
    length = len(prompt) + options.max_new_tokens
    cache = None if options.cache == "none" else model.new_cache(1, length, rolling=options.cache == "rolling")
    sampler = Sampler(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        n_vocab=tokenizer.n_vocab,
    )
    idx = torch.tensor([prompt], device=runtime.device)
    tokens = (int(token) for token in islice(stream(model, cache, idx, sampler), options.max_new_tokens))
    write = codecs.getincrementaldecoder("utf-8")(errors="replace").decode  # never half a character

    sys.stdout.write(tokenizer.decode(prompt) if prompt != [tokenizer.eot] else "")
    made: list[int] = []
    times = [time.perf_counter()]
    with stop_signals() as stopped:
        for token in tokens:
            times.append(time.perf_counter())
            if stopped or (token == tokenizer.eot and options.stop_at_end):
                break
            made.append(token)
            sys.stdout.write(write(tokenizer.decode_bytes([token])))
            sys.stdout.flush()
    print(write(b"", final=True))
    report(times, len(prompt), cache, runtime)
    if stopped:
        return 128 + stopped[0]
    return check(model, prompt + made, len(prompt), options) if options.check else 0


def check_options(options: Options) -> None:
    """UserError for a value out of its range."""
    wrong = {
        "max_new_tokens": options.max_new_tokens < 1,
        "temperature": not 0 <= options.temperature < math.inf,
        "top_k": options.top_k is not None and options.top_k < 1,
        "top_p": options.top_p is not None and not 0 < options.top_p <= 1,
        "window": options.window is not None and options.window < 1,
        "n_sink": options.n_sink < 0,
    }
    for name, bad in wrong.items():
        if bad:
            raise UserError(f"--{name.replace('_', '-')} ({getattr(options, name)}) is out of range, see --help")
    if options.n_sink and options.window is None:
        raise UserError(f"--n-sink ({options.n_sink}) means something with --window only: give one")
    if options.check and options.cache == "none":
        raise UserError("--check compares a cache with none: take --cache rolling or full")


def load(options: Options, runtime: Runtime) -> tuple[GPT, Tokenizer]:
    """The model to decode with, and its tokenizer."""
    saved, tokenizer = RunDir.of(options.run).load(options.run, options.checkpoint)
    model = saved if options.window is None else through_window(saved, options.window, options.n_sink)
    return model.to(runtime.device, runtime.dtype).eval(), tokenizer


def read_prompt(options: Options, tokenizer: Tokenizer) -> list[int]:
    """Token ids to continue; the end-of-text token, after which a new document begins, where no prompt is given."""
    text = options.prompt
    if options.prompt_file is not None:
        if text is not None:
            raise UserError("--prompt and --prompt-file were both given: take one")
        try:
            text = sys.stdin.read() if str(options.prompt_file) == "-" else options.prompt_file.read_text("utf-8")
        except UnicodeDecodeError as error:
            where = f"{options.prompt_file} is not UTF-8 at byte {error.start}"
            raise UserError(f"{where}: convert it, as with iconv -f latin1 -t utf-8") from None
    if text is None:
        return [tokenizer.eot]
    if not text:
        raise UserError("the prompt is empty: give at least a character, or leave --prompt out to begin a new document")
    return tokenizer.encode(text)


def report(times: list[float], n_prompt: int, cache: Cache | None, runtime: Runtime) -> None:
    """Speed and memory, to standard error."""
    lines = []
    if len(times) > 1:
        first = times[1] - times[0]
        lines.append(
            f"prefill {n_prompt} tokens at {n_prompt / first:.0f} tokens/s, first token after {first * 1e3:.0f} ms"
        )
    if len(times) > 2:
        n, seconds = len(times) - 2, times[-1] - times[1]
        lines.append(f"decode {n} tokens at {n / seconds:.1f} tokens/s")
    lines.append("no cache" if cache is None else f"cache {cache.nbytes:,} bytes")
    method, peak = device_peak(runtime.device)
    lines.append(f"peak memory {peak / 2**20:.0f} MiB ({method})" if peak else f"peak memory {method}")
    print("\n" + "\n".join(lines), file=sys.stderr)


@torch.inference_mode()
def check(model: GPT, ids: list[int], n_prompt: int, options: Options) -> int:
    """Logits with a cache, a chunk and then token by token, against one pass without; 1 if they differ too much."""
    idx = torch.tensor([ids], device=model.lm_head.weight.device)
    cache = model.new_cache(1, len(ids), rolling=options.cache == "rolling")
    parts = [idx[:, :n_prompt], *idx[:, n_prompt:].split(1, dim=1)]
    cached = torch.cat([model(part, cache=cache) for part in parts], dim=1)
    plain = model(idx)
    difference = (cached - plain).abs().max().item()
    allowed = TOLERANCE[plain.dtype] * max(1.0, plain.abs().max().item())
    verdict = "within" if difference <= allowed else "BEYOND"
    dtype = str(plain.dtype).removeprefix("torch.")
    print(f"check: logits differ by at most {difference:.2e}, {verdict} the {allowed:.2e} of {dtype}", file=sys.stderr)
    return 0 if difference <= allowed else 1


def main() -> None:
    raise SystemExit(generate(tyro.cli(Options, prog="generate.py", description=__doc__)))


if __name__ == "__main__":
    exit_with_one_line(main)
