"""Train a GPT from one config:  python train.py configs/shakespeare.toml --model.pattern 5:1 --model.window 128

The same command resumes an unfinished run. On a CPU the result is bit for bit that of an uninterrupted run.
"""

import sys
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from artifacts import checkpoint
from artifacts.background import Background
from artifacts.environment import environment
from artifacts.metrics import Metrics
from artifacts.run_dir import RunDir
from cli.program import exit_with_one_line, stop_signals
from configs.load import from_command_line
from configs.schema import RunConfig
from data.loader import TrainLoader, prefetch
from data.prepare import Prepared, prepare
from data.tokenizer import Tokenizer
from model import cost
from model.device import Runtime, compile_blocks, matmul_rate, memory_at_hand, resolve
from model.errors import UserError
from model.gpt import GPT
from training.distributed import DistributedContext, ParallelModel, init_distributed, rank
from training.estimate import rows_that_fit
from training.optim import make_optimizers
from training.progress import Progress
from training.trainer import DivergedError, Trainer

MEMORY_TO_FILL = 0.8  # fraction of a CUDA device's memory: the estimate omits kernels' work space and fragmentation
CACHE_LENGTHS = (32_768,)  # lengths beside block_size for which summary.json reports the bytes of the KV cache


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Result of a run. If a signal stopped it early, `stopped_by` is its number and `summary` is None."""

    path: Path
    step: int
    summary: dict[str, Any] | None = None
    stopped_by: int | None = None


def run(config: RunConfig) -> RunResult:
    """Train as the config says, resuming the run if it exists. UserError if the config cannot work."""
    with init_distributed(config.device) as distributed, RunDir(config.path).locked(distributed):
        result = run_in(distributed, config)
        distributed.barrier()  # no process exits before the main one has written
        return result


def run_in(distributed: DistributedContext, config: RunConfig) -> RunResult:
    """One process's part of the run. The main process writes and prints."""
    show = config.log.progress and distributed.is_main
    prepared = prepare(config.data.text, config.data.tokenizer, root=config.data.dir, progress=show)
    config = with_vocabulary(config, prepared)
    T, train, max_steps = config.model.block_size, config.train, config.train.max_steps
    loader = TrainLoader(prepared.split("train"), block_size=T, global_rows=config.global_rows, seed=config.seed)
    flops = cost.train_flops(config.model, T) * config.global_rows * max_steps
    runtime = resolve(distributed.device, config.dtype, config.compile, flops=flops)

    run_dir = RunDir(config.path)
    resumed, progress = None, Progress()
    if run_dir.exists():
        run_dir.check_same(config, data_hash=prepared.digest)
        resumed = run_dir.resume_from(lambda text: distributed.print0(text, sys.stderr))
        progress = Progress.from_state(resumed.state["progress"]) if resumed else progress
        if progress.is_over(train) and (summary := run_dir.summary()):
            longer = "max_steps" if progress.step >= max_steps else "patience"
            finished = f"{run_dir.path} is finished at step {progress.step}"
            distributed.print0(f"{finished}: --train.{longer} extends it, --name starts a new run")
            return RunResult(path=run_dir.path, step=progress.step, summary=summary)

    torch.manual_seed(config.seed)
    model = GPT(config.model).to(runtime.device)
    model.activation_checkpointing = train.activation_checkpointing
    if runtime.compile:
        compile_blocks(model)
    parallel_model = ParallelModel(model, distributed, train.parallel, runtime.device)
    config = with_micro_batch(config, parallel_model, runtime)
    optimizers = make_optimizers(model, **config.optim.numbers)
    if resumed:
        checkpoint.load_training(model, optimizers, resumed)
    elif config.init_from:
        start_from(config.init_from, model, prepared.tokenizer)
    rate = matmul_rate(runtime) * distributed.size
    distributed.barrier()  # every process has read the run directory before it changes
    if distributed.is_main:
        announce(config, prepared, runtime, parallel_model, resumed_at=progress.step)
        run_dir.begin(config, environment(runtime) | {"data": prepared.digest, "matmul_flops_per_s": rate})
        run_dir.truncate_metrics(progress.step)
        if resumed:
            run_dir.discard_checkpoints_after(resumed)
        prepared.tokenizer.save(run_dir.path / "tokenizer.json")

    trainer = Trainer(config, parallel_model, optimizers, prepared, loader, runtime, progress, peak_flops=rate)
    saved_at, line, signal = progress.step, None, 0
    own_rows = distributed.rows_of_rank(config.global_rows)
    own_batches = loader.batches(progress.step, max_steps, config.micro_rows, own_rows)
    with (
        stop_signals() as stopped,
        closing(Metrics(run_dir.path, config)) if distributed.is_main else nullcontext() as metrics,
        closing(prefetch(own_batches, runtime.place, in_thread=runtime.device.type == "cuda")) as batches,
        closing(Background()) as background,
        progress_bar(config, progress.step, show=show) as bar,
    ):
        while not progress.is_over(train) and not (signal := distributed.all_reduce_max(*stopped[:1])):
            trainer.step(batches)
            due = lambda every: progress.step == max_steps or progress.step % every == 0
            found = trainer.evaluate() if due(train.eval_every) else {}
            if found or due(train.log_every):
                line = trainer.report() | found
                if metrics:
                    metrics.write(line)
                bar.set_postfix({key: f"{line[key]:.3f}" for key in ("train_loss", "val_loss") if key in line})
                if found and (note := trainer.compare(line)):
                    with tqdm.external_write_mode(sys.stderr):
                        distributed.print0(f"note: {note}", sys.stderr)
            bar.update()
            background.check()
            if trainer.improved or due(train.checkpoint_every):
                trainer.save(run_dir, background)
                saved_at = progress.step
        if saved_at != progress.step:
            trainer.save(run_dir, background)
    if signal:
        distributed.print0(f"stopped at step {progress.step}; the same command resumes from there", sys.stderr)
        return RunResult(path=run_dir.path, step=progress.step, stopped_by=signal)
    if line is None:  # a run interrupted between its last step and its summary
        line = run_dir.metrics()[-1]
        line |= {} if "val_loss" in line else trainer.evaluate()
    if progress.step < max_steps:
        no_better = f"{progress.evaluations_since_best} evaluations in a row were no better than"
        distributed.print0(f"ended at step {progress.step}: {no_better} {progress.best_val_loss:.4f} (train.patience)")
    summary = line | summarize(config, progress) | {"stream_hash": trainer.stream_hash}
    if distributed.is_main:
        run_dir.finish(summary)
    return RunResult(path=run_dir.path, step=progress.step, summary=summary)


def start_from(path: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Load the weights of another run's best or given checkpoint. UserError where vocabulary or shapes differ."""
    run_dir = RunDir.of(path)
    theirs = Tokenizer.load(run_dir.path / "tokenizer.json")
    if theirs.digest != tokenizer.digest:
        raise UserError(
            f"init_from ({path}) was trained on the {theirs.n_vocab} tokens of {theirs.name}, but this text uses the "
            f"{tokenizer.n_vocab} of {tokenizer.name}: take its tokenizer, --data.tokenizer {run_dir.path}"
        )
    chosen = run_dir.checkpoint() if path == run_dir.path else checkpoint.read(path)
    try:
        checkpoint.load_model(model, chosen)
    except UserError as error:
        raise UserError(f"init_from: {error}; take the keys of model from {run_dir.path}/config.json") from None


def with_vocabulary(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The config with vocab_size filled in. UserError if the given one is too small for the tokenizer."""
    n = prepared.tokenizer.n_vocab
    if config.model.vocab_size is not None and config.model.vocab_size < n:
        raise UserError(
            f"model.vocab_size ({config.model.vocab_size}) is below the {n} of {prepared.tokenizer.name}: leave it out"
        )
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or n})
    return config.model_copy(update={"model": model})


def with_micro_batch(config: RunConfig, parallel_model: ParallelModel, runtime: Runtime) -> RunConfig:
    """The config with micro_batch filled in: on CUDA as many rows as fit into the memory of every process."""
    model, train, at_most = config.model, config.train, None
    if train.micro_batch is None and (n_bytes := memory_at_hand(runtime.device)):
        at_most = rows_that_fit(
            model,
            int(n_bytes * MEMORY_TO_FILL),
            runtime.dtype,
            optimizer=config.optim.optimizer,
            activation_checkpointing=train.activation_checkpointing,
            shards=parallel_model.n_shards,
        )
        at_most = -parallel_model.distributed.all_reduce_max(-at_most)  # the smallest of all processes
    rows = config.rows_at_once(n_processes=parallel_model.distributed.size, at_most=at_most)
    return config.model_copy(update={"train": train.model_copy(update={"micro_batch": rows})})


def announce(
    config: RunConfig, prepared: Prepared, runtime: Runtime, parallel_model: ParallelModel, *, resumed_at: int
) -> None:
    """Print the layers, the data and the choices made, before training starts."""
    model, train = config.model, prepared.split("train")
    epochs = config.train.max_steps * config.train.global_batch_tokens / train.n_tokens
    print(f"{config.path}: {model.describe()}, {cost.n_params(model) / 1e6:.2f} M parameters")
    print(f"{prepared.directory}: {train.n_tokens / 1e6:.2f} M training tokens, {epochs:.2g} times through")
    print(runtime.why)
    if (n := parallel_model.distributed.size) > 1:
        rows = f"{config.micro_rows} of {config.global_rows // n} rows at a time each"
        print(f"{n} processes, {parallel_model.method}, {rows}")
    for note in model.notes():
        print(f"note: {note}")
    if resumed_at:
        print(f"resuming from step {resumed_at}")


def summarize(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Contents of summary.json beside the last line of metrics."""
    lengths = (config.model.block_size, *CACHE_LENGTHS)
    return {
        "variant": config.name.rsplit("/", 1)[-1],
        "layers": config.model.describe(),
        "n_params": cost.n_params(config.model),
        "best_val_loss": progress.best_val_loss,
        "kv_cache_bytes": {str(n): cost.cache_bytes(config.model, n, dtype=torch.bfloat16) for n in lengths},
        "kv_cache_dtype": "bfloat16",
    }


def progress_bar(config: RunConfig, step: int, *, show: bool) -> tqdm:
    """Steps done and the time left."""
    disable = None if show else True  # None: shown only on a terminal
    return tqdm(total=config.train.max_steps, initial=step, unit="step", desc=config.name, disable=disable)


def main() -> None:
    config = from_command_line(None, prog="train.py", description=__doc__ or "")
    try:
        result = run(config)
    except DivergedError as error:
        sys.exit(f"train.py: {error}" if rank() == 0 else 1)
    if result.stopped_by is not None:
        sys.exit(128 + result.stopped_by)
    if result.summary and rank() == 0:
        numbers = (
            "validation loss {val_loss:.4f}, perplexity {val_perplexity:.2f}, {val_bits_per_byte:.4f} bits per byte"
        )
        print(f"{result.path}: {numbers.format(**result.summary)}")


if __name__ == "__main__":
    exit_with_one_line(main)
