"""Generate text from a trained run:  python generate.py runs/shakespeare --prompt "To be" --max-new-tokens 500

The text goes to standard output as it is made, the statistics to standard error. More in docs/generation.md.
"""

import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from itertools import chain, islice

import torch
import tyro
from torch import Tensor

from artifacts.run_dir import RunDir
from cli.program import exit_with_one_line, out_of_memory, stop_signals
from data.tokenizer import Tokenizer
from inference.cache_parity import agreement
from inference.compiled_decode import should_compile, use_compiled_decode
from inference.options import Options, read_prompts
from inference.quantize import quantize
from inference.sampling import LogProbs, Sampler, pad_right, stream
from inference.statistics import Meter
from inference.streaming import through_window
from inference.transcript import Transcript
from model.device import Runtime, resolve
from model.errors import UserError
from model.gpt import GPT

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the largest logit


def generate(options: Options) -> int:
    """Print text, then what it cost; return the exit code."""
    options.check_ranges()
    runtime = resolve(options.device, options.dtype, "off")
    model, tokenizer = load(options, runtime)
    n_steps = 0 if options.cache == "none" else options.max_new_tokens
    use_compiled_decode(model, should_compile(options.compile, model, runtime, n_steps))
    sampler = Sampler(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        n_vocab=tokenizer.n_vocab,
    )
    run = converse if options.interactive else complete
    try:
        return run(model, tokenizer, sampler, options, runtime)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fewer = "--max-length" if options.interactive else "--max-new-tokens, --num-samples or prompts"
        raise UserError(
            f"there is not enough memory: take fewer {fewer}, or --window, with which the cache does not grow"
        ) from None


def load(options: Options, runtime: Runtime) -> tuple[GPT, Tokenizer]:
    """The model to decode with, and its tokenizer."""
    model, tokenizer = RunDir.of(options.run).load(options.run, options.checkpoint)
    if options.window is not None:
        in_cache = options.positions == "in-cache"
        model = through_window(model, options.window, options.n_sink, rope_in_cache=in_cache)
        if in_cache and not any(getattr(spec, "rope_in_cache", False) for spec in model.config.layers):
            raise UserError("--positions in-cache says how keys are rotated, and no layer of this run rotates them")
    model = model.to(runtime.device, runtime.dtype).eval()
    return quantize(model) if options.weights == "int8" else model, tokenizer


def cache_dtype(options: Options) -> torch.dtype | None:
    """None: as the weights."""
    return torch.int8 if options.cache_dtype == "int8" else None


def complete(model: GPT, tokenizer: Tokenizer, sampler: Sampler, options: Options, runtime: Runtime) -> int:
    """Continue every prompt, and every sample of it, in one batch."""
    prompts, rolling, n_new = read_prompts(options, tokenizer), options.cache == "rolling", options.max_new_tokens
    idx, lengths = pad_right(prompts, runtime.device)
    P = idx.shape[1]
    if model.wpe is not None and P + n_new - 1 > (limit := model.config.block_size):  # the last one is not read
        advice = f"take --max-new-tokens {limit + 1 - P} at most" if limit >= P else "shorten the prompt"
        raise UserError(
            f"{P} tokens of prompt and {n_new} new ones are more than the {limit} learned positions of this model "
            f"(block_size): {advice}, or train with position = rope"
        )
    cache = (
        None
        if options.cache == "none"
        else model.new_cache(len(prompts), P + n_new, dtype=cache_dtype(options), rolling=rolling)
    )
    meter = Meter(model, cache, runtime, n_samples=options.num_samples, rolling=rolling)
    drawn = LogProbs(tokenizer.n_vocab) if options.json else None
    tokens = stream(
        *(model, cache, idx, sampler),
        lengths=lengths,
        n_samples=options.num_samples,
        chunk=options.chunk,
        watch=drawn,
    )
    del cache  # where samples part, each has a cache of its own
    with reported(meter):
        meter.begin([len(prompt) for prompt in prompts])
        transcript = Transcript(
            tokenizer,
            ["" if prompt == [tokenizer.eot] else tokenizer.decode(prompt) for prompt in prompts],
            n_samples=options.num_samples,
            stop=options.stop,
            stop_at_end=options.stop_at_end,
            records=options.json,
            keep=options.check,
        )
        stopped = write(islice(tokens, n_new), transcript, meter, drawn)
    if stopped:
        return 128 + stopped
    return check(model, prompts, transcript, options) if options.check else 0


def converse(model: GPT, tokenizer: Tokenizer, sampler: Sampler, options: Options, runtime: Runtime) -> int:
    """Continue what the user adds, line by line, in one text of which every token is read once."""
    cache = model.new_cache(1, options.max_length, dtype=cache_dtype(options), rolling=options.cache == "rolling")
    limit, reached = cache.max_length, f"full layers have room for {options.max_length} tokens (--max-length)"
    if model.wpe is not None and model.config.block_size < (limit or math.inf):
        limit, reached = model.config.block_size, f"the learned positions end at {model.config.block_size} (block_size)"
    meter = Meter(model, cache, runtime, rolling=options.cache == "rolling")
    seen = sampler.new_seen(1, model.config.vocab, runtime.device)
    unread = read_prompts(options, tokenizer)[0] if options.prompt or options.prompt_file else []
    with reported(meter):
        while (line := ask()) is not None:
            try:
                ids = unread + tokenizer.encode(line) or [tokenizer.eot]
            except UserError as error:
                print(error, file=sys.stderr)
                continue
            n_new = options.max_new_tokens
            if limit is not None:
                n_new = min(n_new, limit + 1 - cache.length - len(ids))  # the last one is not read
            if n_new < 1:
                print(f"{reached}: {cache.length} are used, {len(ids)} more do not fit", file=sys.stderr)
                continue
            idx = torch.tensor([ids], device=runtime.device)
            meter.begin([len(ids)], past=cache.length)
            tokens = islice(stream(model, cache, idx, sampler, chunk=options.chunk, seen=seen), n_new)
            transcript = Transcript(tokenizer, [""], stop=options.stop, stop_at_end=options.stop_at_end, keep=True)
            if write(tokens, transcript, meter) == signal.SIGTERM:
                return 128 + signal.SIGTERM
            made = transcript.rows[0].tokens
            unread = made[-1:]
            if len(made) == n_new < options.max_new_tokens:
                print(f"{reached}, and they are used: begin again", file=sys.stderr)
    return 0


def ask() -> str | None:
    """A line of the user's, None at the end; at a terminal there is a mark, and lines can be edited."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401
    try:
        line = input("> " if at_terminal else "")
        line.encode()  # what is not UTF-8 may have come through as surrogates
    except EOFError:
        return None
    except UnicodeError:
        raise UserError("standard input is not UTF-8") from None
    return line


def write(tokens: Iterator[Tensor], transcript: Transcript, meter: Meter, drawn: LogProbs | None = None) -> int | None:
    """Show what is drawn until every text has ended; the signal that came in between, if one did."""
    try:
        first = next(tokens)  # Ctrl-C while the prompt is read ends that at once
        with stop_signals() as stopped:
            for token in chain([first], tokens):
                if drawn is None:
                    ids, logprobs = token.tolist(), None
                else:  # both in one copy from the device
                    ids, logprobs = torch.stack((token.float(), drawn.last)).tolist()
                meter.count(len(transcript.live))
                transcript.add([int(i) for i in ids], logprobs)
                if stopped or not transcript.live:
                    break
            transcript.finish("interrupted" if stopped else "length")
    finally:
        meter.end()
    return stopped[0] if stopped else None


@contextmanager
def reported(meter: Meter) -> Iterator[None]:
    """Say on standard error what it cost, where Ctrl-C or a closed pipe ends it too."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        print("", *meter.lines(), sep="\n", file=sys.stderr)
        raise
    print("", *meter.lines(), sep="\n", file=sys.stderr)


def check(model: GPT, prompts: list[list[int]], transcript: Transcript, options: Options) -> int:
    """Logits with a cache, as generating computes them, against those without; 1 if they differ too much."""
    texts = [prompts[row.prompt] + row.tokens for row in transcript.rows]
    lengths = [len(prompts[row.prompt]) for row in transcript.rows]
    found = agreement(model, texts, lengths, rolling=options.cache == "rolling", chunk=options.chunk)
    dtype = model.lm_head.weight.dtype
    allowed = TOLERANCE[dtype] * max(1.0, found.largest)
    verdict = f"{'within' if found.difference <= allowed else 'BEYOND'} the {allowed:.2e}"
    print(
        f"check: logits differ by at most {found.difference:.2e}, {verdict} of {str(dtype).removeprefix('torch.')}; "
        f"the likeliest token is the same at {found.n_same} of {found.n_positions}",
        file=sys.stderr,
    )
    return 0 if found.difference <= allowed else 1


def main() -> None:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where it cannot write all characters
    raise SystemExit(generate(tyro.cli(Options, prog="generate.py", description=__doc__)))


if __name__ == "__main__":
    exit_with_one_line(main)
