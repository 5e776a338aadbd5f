"""Train a GPT from one config:  python train.py configs/shakespeare.toml --model.pattern 5:1 --model.window 128

The same command on an unfinished run goes on where it stopped, and ends as if it had never stopped.
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
from artifacts.run_dir import Metrics, RunDir, environment
from cli.program import exit_with_one_line, stop_signals
from configs.load import from_command_line
from configs.schema import RunConfig
from data.loader import TrainLoader, ahead
from data.prepare import Prepared, prepare
from data.tokenizer import Tokenizer
from model import cost
from model.device import Runtime, compile_blocks, matmul_rate, memory_at_hand, resolve
from model.errors import UserError
from model.gpt import GPT
from training import distributed as parallel
from training.distributed import Replica, World
from training.estimate import rows_that_fit
from training.optim import make_optimizers
from training.trainer import DivergedError, Progress, Trainer

MEMORY_TO_FILL = 0.8  # of what a CUDA device has: the estimate knows neither its kernels' work space nor fragments
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
    with parallel.together(config.device) as world, RunDir(config.path).alone(world):
        result = run_in(world, config)
        world.wait()  # nobody leaves before the first has written
        return result


def run_in(world: World, config: RunConfig) -> RunResult:
    """The run, as each of its processes does it. The first writes and prints."""
    show = config.log.progress and world.is_first
    prepared = prepare(config.data.text, config.data.tokenizer, root=config.data.dir, progress=show)
    config = with_vocabulary(config, prepared)
    T, train, max_steps = config.model.block_size, config.train, config.train.max_steps
    loader = TrainLoader(prepared.split("train"), block_size=T, global_rows=config.global_rows, seed=config.seed)
    flops = cost.train_flops(config.model, T) * config.global_rows * max_steps
    runtime = resolve(world.device, config.dtype, config.compile, flops=flops)

    run_dir = RunDir(config.path)
    resumed, progress = None, Progress()
    if run_dir.exists():
        run_dir.check_same(config, data_hash=prepared.digest)
        resumed = run_dir.to_go_on_from(lambda text: world.say(text, sys.stderr))
        progress = Progress(**resumed.state["progress"]) if resumed else progress
        if progress.is_over(train) and (summary := run_dir.summary()):
            longer = "max_steps" if progress.step >= max_steps else "patience"
            finished = f"{run_dir.path} is finished at step {progress.step}"
            world.say(f"{finished}: --train.{longer} extends it, --name begins anew")
            return RunResult(path=run_dir.path, step=progress.step, summary=summary)

    torch.manual_seed(config.seed)
    model = GPT(config.model).to(runtime.device)
    model.activation_checkpointing = train.recompute
    if runtime.compile:
        compile_blocks(model)
    replica = Replica(model, world, train.parallel, runtime.device)
    config = with_micro_batch(config, replica, runtime)
    optimizers = make_optimizers(model, **config.optim.numbers)
    if resumed:
        checkpoint.load_training(model, optimizers, resumed)
    elif config.init_from:
        start_from(config.init_from, model, prepared.tokenizer)
    rate = matmul_rate(runtime) * world.size
    world.wait()  # until all have read what is there
    if world.is_first:
        announce(config, prepared, runtime, replica, resumed_at=progress.step)
        run_dir.begin(config, environment(runtime) | {"data": prepared.digest, "matmul_flops_per_s": rate})
        run_dir.cut_metrics(progress.step)
        if resumed:
            run_dir.cut_checkpoints(resumed)
        prepared.tokenizer.save(run_dir.path / "tokenizer.json")

    trainer = Trainer(config, replica, optimizers, prepared, loader, runtime, progress, peak_flops=rate)
    saved_at, line, signal = progress.step, None, 0
    batches_of_all = loader.batches(progress.step, max_steps, config.micro_rows, world.part_of(config.global_rows))
    with (
        stop_signals() as stopped,
        closing(Metrics(run_dir, config)) if world.is_first else nullcontext() as metrics,
        closing(ahead(batches_of_all, runtime.place, in_thread=runtime.device.type == "cuda")) as batches,
        closing(Background()) as background,
        progress_bar(config, progress.step, show=show) as bar,
    ):
        while not progress.is_over(train) and not (signal := world.largest(*stopped[:1])):
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
                        world.say(f"note: {note}", sys.stderr)
            bar.update()
            background.check()
            if trainer.improved or due(train.checkpoint_every):
                trainer.save(run_dir, background)
                saved_at = progress.step
        if saved_at != progress.step:
            trainer.save(run_dir, background)
    if signal:
        world.say(f"stopped at step {progress.step}; the same command goes on from there", sys.stderr)
        return RunResult(path=run_dir.path, step=progress.step, stopped_by=signal)
    if line is None:  # it had come to its last step, and was cut short before its summary
        line = run_dir.metrics()[-1]
        line |= {} if "val_loss" in line else trainer.evaluate()
    if progress.step < max_steps:
        found_none = f"{progress.evaluations_since_best} evaluations in a row were no better than"
        world.say(f"ended at step {progress.step}: {found_none} {progress.best_val_loss:.4f} (train.patience)")
    summary = line | summarize(config, progress) | {"stream_hash": trainer.stream_hash}
    if world.is_first:
        run_dir.finish(summary)
    return RunResult(path=run_dir.path, step=progress.step, summary=summary)


def start_from(path: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """The weights of the best or the given checkpoint of another run. UserError where vocabulary or shapes differ."""
    run_dir = RunDir.of(path)
    theirs = Tokenizer.load(run_dir.path / "tokenizer.json")
    if theirs.digest != tokenizer.digest:
        raise UserError(
            f"init_from ({path}) knows the {theirs.n_vocab} tokens of {theirs.name}, and this text is cut into others, "
            f"the {tokenizer.n_vocab} of {tokenizer.name}: take its own, --data.tokenizer {run_dir.path}"
        )
    chosen = run_dir.checkpoint() if path == run_dir.path else checkpoint.read(path)
    try:
        checkpoint.load_model(model, chosen)
    except UserError as error:
        raise UserError(f"init_from: {error}; take the keys of model from {run_dir.path}/config.json") from None


def with_vocabulary(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The config with its vocab_size known. UserError if the one given is too small for the tokenizer."""
    n = prepared.tokenizer.n_vocab
    if config.model.vocab_size is not None and config.model.vocab_size < n:
        raise UserError(
            f"model.vocab_size ({config.model.vocab_size}) is below the {n} of {prepared.tokenizer.name}: leave it out"
        )
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or n})
    return config.model_copy(update={"model": model})


def with_micro_batch(config: RunConfig, replica: Replica, runtime: Runtime) -> RunConfig:
    """The config with its micro_batch known: on CUDA as many rows as fit into the memory of every process."""
    model, train, at_most = config.model, config.train, None
    if train.micro_batch is None and (n_bytes := memory_at_hand(runtime.device)):
        at_most = rows_that_fit(
            model,
            int(n_bytes * MEMORY_TO_FILL),
            runtime.dtype,
            optimizer=config.optim.optimizer,
            recompute=train.recompute,
            shards=replica.n_shards,
        )
        at_most = -replica.world.largest(-at_most)
    rows = config.rows_at_once(n_processes=replica.world.size, at_most=at_most)
    return config.model_copy(update={"train": train.model_copy(update={"micro_batch": rows})})


def announce(config: RunConfig, prepared: Prepared, runtime: Runtime, replica: Replica, *, resumed_at: int) -> None:
    """Say what was chosen before it starts."""
    model, train = config.model, prepared.split("train")
    epochs = config.train.max_steps * config.train.global_batch_tokens / train.n_tokens
    print(f"{config.path}: {model.describe()}, {cost.n_params(model) / 1e6:.2f} M parameters")
    print(f"{prepared.directory}: {train.n_tokens / 1e6:.2f} M training tokens, {epochs:.2g} times through")
    print(runtime.why)
    if (n := replica.world.size) > 1:
        rows = f"{config.micro_rows} of {config.global_rows // n} rows at a time each"
        print(f"{n} processes, {replica.method}, {rows}")
    for note in model.notes():
        print(f"note: {note}")
    if resumed_at:
        print(f"going on from step {resumed_at}")


def summarize(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """What summary.json says beside the last line of metrics."""
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
    """Steps done, with the time left."""
    disable = None if show else True  # None: where there is a terminal
    return tqdm(total=config.train.max_steps, initial=step, unit="step", desc=config.name, disable=disable)


def main() -> None:
    config = from_command_line(None, prog="train.py", description=__doc__ or "")
    try:
        result = run(config)
    except DivergedError as error:
        sys.exit(f"train.py: {error}" if parallel.rank() == 0 else 1)
    if result.stopped_by is not None:
        sys.exit(128 + result.stopped_by)
    if result.summary and parallel.rank() == 0:
        numbers = (
            "validation loss {val_loss:.4f}, perplexity {val_perplexity:.2f}, {val_bits_per_byte:.4f} bits per byte"
        )
        print(f"{result.path}: {numbers.format(**result.summary)}")


if __name__ == "__main__":
    exit_with_one_line(main)
