"""Train a GPT from one config:  python train.py configs/shakespeare.toml --model.pattern 5:1 --model.window 128

The same command on an unfinished run goes on where it stopped, and ends as if it had never stopped.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.load import from_command_line
from configs.program import exit_with_one_line, stop_signals
from configs.run_dir import Metrics, RunDir, environment
from configs.schema import RunConfig
from data.loader import TrainLoader, eval_batches, stream_hash
from data.prepare import Prepared, prepare
from model import checkpoint, cost
from model.config import describe_layers
from model.device import Runtime, compile_blocks, matmul_rate, resolve
from model.errors import UserError
from model.evaluate import evaluate
from model.gpt import GPT
from model.memory import PeakMemory, measure_peak, training_tensors
from model.optim import Optimizers, lr_factor, make_optimizers

CACHE_LENGTHS = (32_768,)  # beside block_size, where summary.json states the bytes of the KV cache


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What came of a run: `summary` is None, and `stopped_by` its signal, where it was stopped early."""

    path: Path
    step: int
    summary: dict[str, Any] | None = None
    stopped_by: int | None = None


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number; the weights are those of the step before."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run has come: saved with every checkpoint."""

    step: int = 0
    elapsed_s: float = 0.0
    best_val_loss: float | None = None
    loss_sum: float = 0.0  # of the steps since the last line of metrics
    loss_count: int = 0


def run(config: RunConfig) -> RunResult:
    """Train as the config says, or go on with the run that was begun. UserError for what cannot work."""
    prepared = prepare(config.data.text, config.data.tokenizer, root=config.data.dir, progress=config.log.progress)
    config = with_vocabulary(config, prepared)
    T = config.model.block_size
    loader = TrainLoader(prepared.split("train"), block_size=T, global_rows=config.global_rows, seed=config.seed)
    flops = cost.train_flops(config.model, T) * config.global_rows
    runtime = resolve(config.device, config.dtype, config.compile, flops=flops * config.train.max_steps)

    run_dir = RunDir(config.path)
    resumed = None
    if run_dir.exists():
        run_dir.check_same(config, data_hash=prepared.digest)
        resumed = run_dir.latest()
        if resumed and resumed.step >= config.train.max_steps and (summary := run_dir.summary()):
            print(
                f"{run_dir.path} is finished at step {resumed.step}: --train.max_steps extends it, --name begins anew"
            )
            return RunResult(path=run_dir.path, step=resumed.step, summary=summary)

    torch.manual_seed(config.seed)
    model = GPT(config.model).to(runtime.device)
    optim = config.optim
    optimizers = make_optimizers(
        model,
        optimizer=optim.optimizer,
        muon_lr=optim.muon_lr,
        adamw_lr=optim.peak_adamw_lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
    )
    progress = Progress()
    if resumed:
        checkpoint.load_training(model, optimizers, resumed)
        progress = Progress(**resumed.state["progress"])
    rate = matmul_rate(runtime)
    announce(config, prepared, runtime, resumed_at=progress.step)
    run_dir.begin(config, environment(runtime) | {"data": prepared.digest, "matmul_flops_per_s": rate})
    run_dir.cut_metrics(progress.step)
    prepared.tokenizer.save(run_dir.path / "tokenizer.json")
    model.recompute = config.train.recompute
    if runtime.compile:
        compile_blocks(model)

    kernel = model.kernel_names(T, runtime.dtype)
    trainer = Trainer(config, model, optimizers, loader, runtime, kernel=kernel, peak_flops=rate)
    metrics = Metrics(run_dir, config)
    val = prepared.split("val")
    eval_rows, eval_tokens = config.micro_rows, config.train.eval_tokens
    token_bytes = prepared.tokenizer.token_bytes()
    found: dict[str, float] = {}
    with stop_signals() as stopped, progress_bar(config, progress.step) as bar:
        while progress.step < config.train.max_steps and not stopped:
            trainer.step(progress)
            final, improved = progress.step == config.train.max_steps, False
            evaluated = final or progress.step % config.train.eval_every == 0
            if evaluated:
                with trainer.measuring_evaluation(progress):
                    batches = eval_batches(val, block_size=T, batch_size=eval_rows, max_tokens=eval_tokens)
                    result = evaluate(model, batches, token_bytes, runtime)
                found = {f"val_{key}": getattr(result, key) for key in ("loss", "perplexity", "bits_per_byte")}
                improved = progress.best_val_loss is None or result.loss < progress.best_val_loss
                progress.best_val_loss = result.loss if improved else progress.best_val_loss
            if evaluated or progress.step % config.train.log_every == 0:
                line = trainer.report(progress) | (found if evaluated else {})
                metrics.write(line)
                shown = {"loss": line["train_loss"]} | ({"val": found["val_loss"]} if found else {})
                bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items()})
            bar.update()
            if final or improved or stopped or progress.step % config.train.checkpoint_every == 0:
                run_dir.save(model, optimizers, asdict(progress), best=improved)
    metrics.close()
    if stopped:
        print(f"stopped at step {progress.step}; the same command goes on from there", file=sys.stderr)
        return RunResult(path=run_dir.path, step=progress.step, stopped_by=stopped[0])
    if trainer.n_steps == 0:  # it had come to its last step, and was cut short before its summary
        line = run_dir.metrics()[-1]
        if "val_loss" not in line:
            batches = eval_batches(val, block_size=T, batch_size=eval_rows, max_tokens=eval_tokens)
            result = evaluate(model, batches, token_bytes, runtime)
            line |= {f"val_{key}": getattr(result, key) for key in ("loss", "perplexity", "bits_per_byte")}
    summary = line | summarize(config, progress) | {"stream_hash": stream_hash(val, T, eval_tokens)}
    run_dir.finish(summary)
    return RunResult(path=run_dir.path, step=progress.step, summary=summary)


class Trainer:
    """Optimizer steps, and what they cost."""

    def __init__(
        self,
        config: RunConfig,
        model: GPT,
        optimizers: Optimizers,
        loader: TrainLoader,
        runtime: Runtime,
        *,
        kernel: str,
        peak_flops: float,
    ):
        self.config, self.model, self.optimizers, self.loader, self.runtime = config, model, optimizers, loader, runtime
        self.kernel, self.peak_flops = kernel, peak_flops
        self.flops_per_token = cost.train_flops(config.model, config.model.block_size) / config.model.block_size
        self.n_steps = 0  # of this process
        self.seconds = self.tokens = 0.0  # since the last report
        self.grad_norm = 0.0
        self.train_peak: PeakMemory | None = None
        self.eval_peak: PeakMemory | None = None

    def step(self, progress: Progress) -> None:
        """One optimizer step. The second of a process is measured for memory: the first warms up."""
        start = time.perf_counter()
        if self.n_steps == 1:
            with measure_peak(self.runtime.device, training_tensors(self.model, self.optimizers)) as self.train_peak:
                loss = self._update(progress.step)
        else:
            loss = self._update(progress.step)
        self.runtime.synchronize()
        seconds = time.perf_counter() - start
        if self.n_steps > 1:  # steady ones
            self.seconds += seconds
            self.tokens += self.config.train.global_batch_tokens
        self.n_steps += 1
        progress.step += 1
        progress.elapsed_s += seconds
        progress.loss_sum += loss
        progress.loss_count += 1

    def _update(self, step: int) -> float:
        optim, rows, micro = self.config.optim, self.config.global_rows, self.config.micro_rows
        factor = lr_factor(
            step,
            max_steps=self.config.train.max_steps,
            warmup_steps=optim.warmup_steps,
            schedule=optim.schedule,
            decay_fraction=optim.decay_fraction,
            final=optim.final_lr,
        )
        self.optimizers.set_lr(factor)
        total = 0.0
        for first in range(0, rows, micro):
            idx, targets = (x.to(self.runtime.device) for x in self.loader.rows(step, range(first, first + micro)))
            with self.runtime.autocast():
                loss = self.model(idx, targets) * (micro / rows)
            loss.backward()
            total += loss.item()
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.grad_clip).item()
        if not math.isfinite(total) or not math.isfinite(self.grad_norm):
            raise NonFiniteError(
                f"step {step + 1}: the loss is {total}, the norm of its gradient {self.grad_norm}; stopped before the "
                "optimizer step, the last checkpoint stands: begin again with lower learning rates under another --name"
            )
        self.optimizers.step()
        return total

    @contextmanager
    def measuring_evaluation(self, progress: Progress) -> Iterator[None]:
        """Around an evaluation: its time, and the first time its memory."""
        start = time.perf_counter()
        if self.eval_peak is None:
            with measure_peak(self.runtime.device, training_tensors(self.model, self.optimizers)) as self.eval_peak:
                yield
        else:
            yield
        progress.elapsed_s += time.perf_counter() - start

    def report(self, progress: Progress) -> dict[str, Any]:
        """A line of metrics over the steps since the last one; what was not measured is None."""
        speed = self.tokens / self.seconds if self.seconds else None
        train_peak, eval_peak = self.train_peak, self.eval_peak
        line = {
            "step": progress.step,
            "tokens": progress.step * self.config.train.global_batch_tokens,
            "elapsed_s": round(progress.elapsed_s, 3),
            "train_loss": progress.loss_sum / progress.loss_count,
            "lr": self.optimizers.lr,
            "grad_norm": self.grad_norm,
            "tokens_per_s": speed and round(speed, 1),
            "mfu": speed and round(speed * self.flops_per_token / self.peak_flops, 4),
            "peak_memory_train_bytes": train_peak and train_peak.bytes,
            "peak_memory_eval_bytes": eval_peak and eval_peak.bytes,
            "peak_memory_reserved_bytes": train_peak and train_peak.reserved_bytes,
            "peak_memory_process_bytes": train_peak and train_peak.process_bytes,
            "peak_memory_method": train_peak and train_peak.method,
            "kernel": self.kernel,
        }
        progress.loss_sum, progress.loss_count = 0.0, 0
        self.seconds = self.tokens = 0.0
        return {key: value for key, value in line.items() if value is not None}


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
    except NonFiniteError as error:
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
