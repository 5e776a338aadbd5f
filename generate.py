"""Generate text from a trained run:

  python generate.py runs/shakespeare --prompt "To be" --max-new-tokens 500
  python generate.py runs/shakespeare --interactive                          type lines, which the model continues
  python generate.py runs/shakespeare --prompts prompts.txt --num-samples 3  a batch: one prompt per line of a file
  python generate.py runs/shakespeare --window 256 --n-sink 4                decode through a sliding window

The text goes to standard output as it is generated, statistics to standard error. More in docs/generation.md.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Self

import torch
import tyro
from pydantic import model_validator

from cli.options import options_class, parse
from cli.program import exit_with_one_line, out_of_memory, stop_signals
from inference.cache_parity import cache_parity
from inference.generation import Generation
from inference.loading import LoadedModel, load
from inference.params import CacheParams, ModelParams, SamplingParams
from inference.session import Session, complete
from inference.statistics import GenerationStatistics
from inference.transcript import Transcript
from model.errors import UserError

TOLERANCE = {  # of --check: relative to the largest logit, by dtype
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 0.01,
    torch.bfloat16: 0.05,
}


@options_class
class Input:
    """Text to continue; without it, the model begins a new document."""

    prompt: str | None = None
    """text to continue"""
    prompt_file: Path | None = None
    """read the prompt from a file; - is standard input"""
    prompts: Path | None = None
    """read one prompt from each line of a file and continue them as one batch; - is standard input"""
    interactive: bool = False
    """read lines from you and continue the text after each; the cache is kept between lines"""


@options_class
class Output:
    """What is written besides the text."""

    json: bool = False
    """write one line of JSON for each text: text, tokens, log-probabilities and why it ended"""
    check: bool = False
    """after generating, compare the logits with those computed without a cache; exit code 1 if they differ by more
    than rounding explains"""


@options_class
class Options:
    """Generate text from a trained run."""

    run: tyro.conf.Positional[Path]
    """a run's directory, or one of its checkpoints"""
    input: Input = Input()
    sampling: SamplingParams = SamplingParams()
    cache: CacheParams = CacheParams()
    model: ModelParams = ModelParams()
    output: Output = Output()

    @model_validator(mode="after")
    def _together(self) -> Self:
        given = {"prompt": self.input.prompt, "prompt-file": self.input.prompt_file, "prompts": self.input.prompts}
        sources = [f"--{name}" for name, value in given.items() if value is not None]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} were both given: take one")
        if self.output.check and self.cache.cache == "none":
            raise ValueError("--check compares a cache with none: take --cache rolling or full")
        if self.cache.cache_dtype == "int8" and self.cache.cache == "none":
            raise ValueError("--cache-dtype int8 needs a cache: take --cache rolling or full")
        if self.cache.cache_dtype == "int8" and self.output.check:
            raise ValueError("--check expects logits that a cache does not change: leave out --cache-dtype int8")
        if not self.input.interactive:
            return self
        if self.cache.cache == "none":
            raise ValueError("--interactive keeps a cache from line to line: take --cache rolling or full")
        if str(self.input.prompt_file) == "-":
            raise ValueError("--interactive reads your lines from standard input: give --prompt-file another file")
        others = {
            "prompts": self.input.prompts is not None,
            "num-samples": self.sampling.num_samples != 1,
            "json": self.output.json,
            "check": self.output.check,
        }
        for name, is_given in others.items():
            if is_given:
                raise ValueError(f"--interactive continues one text, line by line: leave out --{name}")
        return self


def generate(options: Options) -> int:
    """Print text, then statistics; return the exit code."""
    n_steps = 0 if options.cache.cache == "none" else options.sampling.max_new_tokens
    loaded = load(options.run, options.model, n_steps=n_steps)
    try:
        return converse(loaded, options) if options.input.interactive else write_texts(loaded, options)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fewer = "--max-length" if options.input.interactive else "--max-new-tokens, --num-samples or prompts"
        raise UserError(
            f"there is not enough memory: take fewer {fewer}, or --window, with which the cache does not grow"
        ) from None


def write_texts(loaded: LoadedModel, options: Options) -> int:
    """Continue every prompt, and every sample of it, in one batch."""
    sampling, output = options.sampling, options.output
    prompts = [[loaded.tokenizer.eot] if text is None else loaded.encode(text) for text in read_prompts(options.input)]
    generation = complete(loaded, prompts, sampling, options.cache, logprobs=output.json)
    texts = ["" if prompt == [loaded.tokenizer.eot] else loaded.tokenizer.decode(prompt) for prompt in prompts]
    with reported(generation.statistics):
        transcript = Transcript(texts, n_samples=sampling.num_samples, records=output.json, keep=output.check)
        stopped = write(generation, transcript)
    if stopped:
        return 128 + stopped
    return check(loaded, prompts, transcript, options.cache) if output.check else 0


def converse(loaded: LoadedModel, options: Options) -> int:
    """Continue the user's lines, one by one, in one text."""
    (first,) = read_prompts(options.input)
    prompt = [] if first is None else loaded.encode(first)
    session = Session(loaded, options.sampling, options.cache, prompt=prompt)
    with reported(session.statistics):
        while (line := ask()) is not None:
            try:
                generation = session.turn(line)
            except UserError as error:
                print(error, file=sys.stderr)
                continue
            if write(generation, Transcript([""])) == signal.SIGTERM:
                return 128 + signal.SIGTERM
            if generation.out_of_room:
                print(f"{session.limited_by}, and they are used: begin again", file=sys.stderr)
    return 0


def ask() -> str | None:
    """A line from the user, None at the end of input; a terminal shows a prompt and lets lines be edited."""
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


def write(generation: Generation, transcript: Transcript) -> int | None:
    """Write texts as they are generated, until all have ended; the signal that stopped them, if one did."""
    with closing(generation):
        first = next(generation)  # until here Ctrl-C interrupts at once
        with stop_signals() as stopped:
            for delta in chain([first], generation):
                if stopped:
                    generation.cancel()
                transcript.add(delta)
    return stopped[0] if stopped else None


@contextmanager
def reported(statistics: GenerationStatistics) -> Iterator[None]:
    """Print statistics to standard error at the end, also where Ctrl-C or a closed pipe is the end."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        print("", *statistics.lines(), sep="\n", file=sys.stderr)
        raise
    print("", *statistics.lines(), sep="\n", file=sys.stderr)


def check(loaded: LoadedModel, prompts: list[list[int]], transcript: Transcript, params: CacheParams) -> int:
    """Compare logits with a cache, computed as in generating, with those of one pass; 1 if they differ too much."""
    texts = [prompts[row.prompt] + row.tokens for row in transcript.rows]
    lengths = [len(prompts[row.prompt]) for row in transcript.rows]
    found = cache_parity(loaded.model, texts, lengths, rolling=params.cache == "rolling", chunk=params.chunk)
    dtype = loaded.runtime.dtype
    allowed = TOLERANCE[dtype] * max(1.0, found.largest)
    verdict = f"{'within' if found.difference <= allowed else 'BEYOND'} the {allowed:.2e}"
    print(
        f"check: logits differ by at most {found.difference:.2e}, {verdict} of {str(dtype).removeprefix('torch.')}; "
        f"the likeliest token is the same at {found.n_same} of {found.n_positions}",
        file=sys.stderr,
    )
    return 0 if found.difference <= allowed else 1


def read_prompts(source: Input) -> list[str | None]:
    """The text of each prompt; None where none is given."""
    if source.prompts is not None:
        lines = _read(source.prompts).removesuffix("\n").split("\n")
        for number, line in enumerate(lines, 1):
            if not line:
                raise UserError(f"{source.prompts}: line {number} is empty: each line is a prompt, take it out")
        return [*lines]
    text = source.prompt if source.prompt_file is None else _read(source.prompt_file)
    if text == "":
        raise UserError("the prompt is empty: give at least a character, or leave --prompt out to begin a new document")
    return [text]


def _read(path: Path) -> str:
    """The text of a file or of standard input, with \\n as line end."""
    content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        name = "standard input" if str(path) == "-" else path
        where = f"{name} is not UTF-8 at byte {error.start}"
        raise UserError(f"{where}: convert it, as with iconv -f latin1 -t utf-8") from None


def main() -> None:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where it cannot write all characters
    raise SystemExit(generate(parse(Options, prog="generate.py", description=__doc__)))


if __name__ == "__main__":
    exit_with_one_line(main)
