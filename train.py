"""Train a GPT from one config:  python train.py configs/shakespeare.toml --model.pattern 5:1 --model.window 128

The same command on an unfinished run goes on where it stopped, and ends as if it had never stopped.
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.load import from_command_line
from configs.program import exit_with_one_line, stop_signals
from configs.run_dir import Metrics, RunDir, environment
from configs.schema import RunConfig
from data.loader import TrainLoader, ahead
from data.prepare import Prepared, prepare
from model import checkpoint, cost
from model.config import describe_layers
from model.device import Runtime, compile_blocks, matmul_rate, resolve
from model.errors import UserError
from model.gpt import GPT
from model.optim import make_optimizers
from trainer import DivergedError, Progress, Trainer

CACHE_LENGTHS = (32_768,)  # beside block_size, where summary.json states the bytes of the KV cache


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What came of a run: `summary` is None, and `stopped_by` its signal, where it was stopped early."""

    path: Path
    step: int
    summary: dict[str, Any] | None = None
    stopped_by: int | None = None


def run(config: RunConfig) -> RunResult:
    """Train as the config says, or go on with the run that was begun. UserError for what cannot work."""
    prepared = prepare(config.data.text, config.data.tokenizer, root=config.data.dir, progress=config.log.progress)
    config = with_vocabulary(config, prepared)
    T, train, max_steps = config.model.block_size, config.train, config.train.max_steps
    loader = TrainLoader(prepared.split("train"), block_size=T, global_rows=config.global_rows, seed=config.seed)
    flops = cost.train_flops(config.model, T) * config.global_rows * max_steps
    runtime = resolve(config.device, config.dtype, config.compile, flops=flops)

    run_dir = RunDir(config.path)
    resumed, progress = None, Progress()
    if run_dir.exists():
        run_dir.check_same(config, data_hash=prepared.digest)
        resumed = run_dir.latest()
        progress = Progress(**resumed.state["progress"]) if resumed else progress
        if progress.is_over(train) and (summary := run_dir.summary()):
            longer = "max_steps" if progress.step >= max_steps else "patience"
            print(
                f"{run_dir.path} is finished at step {progress.step}: --train.{longer} extends it, --name begins anew"
            )
            return RunResult(path=run_dir.path, step=progress.step, summary=summary)

    torch.manual_seed(config.seed)
    model = GPT(config.model).to(runtime.device)
    optimizers = make_optimizers(model, **config.optim.numbers)
    if resumed:
        checkpoint.load_training(model, optimizers, resumed)
    rate = matmul_rate(runtime)
    announce(config, prepared, runtime, resumed_at=progress.step)
    run_dir.begin(config, environment(runtime) | {"data": prepared.digest, "matmul_flops_per_s": rate})
    run_dir.cut_metrics(progress.step)
    prepared.tokenizer.save(run_dir.path / "tokenizer.json")
    model.recompute = train.recompute
    if runtime.compile:
        compile_blocks(model)

    trainer = Trainer(config, model, optimizers, prepared, loader, runtime, progress, peak_flops=rate)
    saved_at, line = progress.step, None
    rows = loader.batches(progress.step, max_steps, config.micro_rows)
    with (
        stop_signals() as stopped,
        closing(Metrics(run_dir, config)) as metrics,
        closing(ahead(rows, runtime.place, in_thread=runtime.device.type == "cuda")) as batches,
        progress_bar(config, progress.step) as bar,
    ):
        while not progress.is_over(train) and not stopped:
            trainer.step(batches)
            due = lambda every: progress.step == max_steps or progress.step % every == 0
            found = trainer.evaluate() if due(train.eval_every) else {}
            if found or due(train.log_every):
                line = trainer.report() | found
                metrics.write(line)
                bar.set_postfix({key: f"{line[key]:.3f}" for key in ("train_loss", "val_loss") if key in line})
                if found and (note := trainer.compare(line)):
                    tqdm.write(f"note: {note}", file=sys.stderr)
            bar.update()
            if trainer.improved or due(train.checkpoint_every):
                trainer.save(run_dir)
                saved_at = progress.step
        if saved_at != progress.step:
            trainer.save(run_dir)
    if stopped and not progress.is_over(train):
        print(f"stopped at step {progress.step}; the same command goes on from there", file=sys.stderr)
        return RunResult(path=run_dir.path, step=progress.step, stopped_by=stopped[0])
    if line is None:  # it had come to its last step, and was cut short before its summary
        line = run_dir.metrics()[-1]
        line |= {} if "val_loss" in line else trainer.evaluate()
    if progress.step < max_steps:
        n, best = progress.evaluations_since_best, progress.best_val_loss
        print(
            f"ended at step {progress.step}: {n} evaluations in a row were no better than {best:.4f} (train.patience)"
        )
    summary = line | summarize(config, progress) | {"stream_hash": trainer.stream_hash}
    run_dir.finish(summary)
    return RunResult(path=run_dir.path, step=progress.step, summary=summary)


def with_vocabulary(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The config with its vocab_size known. UserError if the one given is too small for the tokenizer."""
    n = prepared.tokenizer.n_vocab
    if config.model.vocab_size is not None and config.model.vocab_size < n:
        raise UserError(
            f"model.vocab_size ({config.model.vocab_size}) is below the {n} of {prepared.tokenizer.name}: leave it out"
        )
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or n})
    return config.model_copy(update={"model": model})


def announce(config: RunConfig, prepared: Prepared, runtime: Runtime, *, resumed_at: int) -> None:
    """Say what was chosen before it starts."""
    model, train = config.model, prepared.split("train")
    epochs = config.train.max_steps * config.train.global_batch_tokens / train.n_tokens
    print(f"{config.path}: {describe_layers(model.layers)}, {cost.n_params(model) / 1e6:.2f} M parameters")
    print(f"{prepared.directory}: {train.n_tokens / 1e6:.2f} M training tokens, {epochs:.2g} times through")
    print(runtime.why)
    for note in model.notes():
        print(f"note: {note}")
    if resumed_at:
        print(f"going on from step {resumed_at}")


def summarize(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """What summary.json says beside the last line of metrics."""
    lengths = (config.model.block_size, *CACHE_LENGTHS)
    return {
        "variant": config.name.rsplit("/", 1)[-1],
        "layers": describe_layers(config.model.layers),
        "n_params": cost.n_params(config.model),
        "best_val_loss": progress.best_val_loss,
        "kv_cache_bytes": {str(n): cost.cache_bytes(config.model, n, dtype=torch.bfloat16) for n in lengths},
        "kv_cache_dtype": "bfloat16",
    }


def progress_bar(config: RunConfig, step: int) -> tqdm:
    """Steps done, with the time left."""
    disable = None if config.log.progress else True  # None: where there is a terminal
    return tqdm(total=config.train.max_steps, initial=step, unit="step", desc=config.name, disable=disable)


def main() -> None:
    config = from_command_line(None, prog="train.py", description=__doc__ or "")
    try:
        result = run(config)
    except DivergedError as error:
        sys.exit(f"train.py: {error}")
    if result.stopped_by is not None:
        sys.exit(128 + result.stopped_by)
    if result.summary:
        numbers = (
            "validation loss {val_loss:.4f}, perplexity {val_perplexity:.2f}, {val_bits_per_byte:.4f} bits per byte"
        )
        print(f"{result.path}: {numbers.format(**result.summary)}")


if __name__ == "__main__":
    exit_with_one_line(main)
