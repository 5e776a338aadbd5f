"""Train a GPT from one config:  python train.py configs/shakespeare.toml --model.pattern 5:1 --model.window 128

The same command on an unfinished run goes on where it stopped, and ends as if it had never stopped.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from configs.load import from_command_line
from configs.program import exit_with_one_line, stop_signals
from configs.run_dir import Metrics, RunDir, environment
from configs.schema import RunConfig
from data.loader import TrainLoader, ahead, eval_batches, stream_hash
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
    elapsed_s: float = 0.0  # of training, evaluating and saving
    best_val_loss: float | None = None
    loss_sum: float = 0.0  # of the steps since the last line of metrics
    loss_count: int = 0


def run(config: RunConfig) -> RunResult:
    """Train as the config says, or go on with the run that was begun. UserError for what cannot work."""
    prepared = prepare(config.data.text, config.data.tokenizer, root=config.data.dir, progress=config.log.progress)
    config = with_vocabulary(config, prepared)
    T, train, max_steps = config.model.block_size, config.train, config.train.max_steps
    loader = TrainLoader(prepared.split("train"), block_size=T, global_rows=config.global_rows, seed=config.seed)
    flops = cost.train_flops(config.model, T) * config.global_rows * max_steps
    runtime = resolve(config.device, config.dtype, config.compile, flops=flops)

    run_dir = RunDir(config.path)
    resumed = None
    if run_dir.exists():
        run_dir.check_same(config, data_hash=prepared.digest)
        resumed = run_dir.latest()
        if resumed and resumed.step >= max_steps and (summary := run_dir.summary()):
            print(
                f"{run_dir.path} is finished at step {resumed.step}: --train.max_steps extends it, --name begins anew"
            )
            return RunResult(path=run_dir.path, step=resumed.step, summary=summary)

    torch.manual_seed(config.seed)
    model = GPT(config.model).to(runtime.device)
    optimizers = make_optimizers(model, **config.optim.numbers)
    progress = Progress()
    if resumed:
        checkpoint.load_training(model, optimizers, resumed)
        progress = Progress(**resumed.state["progress"])
    rate = matmul_rate(runtime)
    announce(config, prepared, runtime, resumed_at=progress.step)
    run_dir.begin(config, environment(runtime) | {"data": prepared.digest, "matmul_flops_per_s": rate})
    run_dir.cut_metrics(progress.step)
    prepared.tokenizer.save(run_dir.path / "tokenizer.json")
    model.recompute = train.recompute
    if runtime.compile:
        compile_blocks(model)

    trainer = Trainer(config, model, optimizers, prepared, runtime, progress, peak_flops=rate)
    saved_at, line = progress.step, None
    rows = loader.batches(progress.step, max_steps, config.micro_rows)
    with (
        stop_signals() as stopped,
        closing(Metrics(run_dir, config)) as metrics,
        closing(ahead(rows, runtime.place, in_thread=runtime.device.type == "cuda")) as batches,
        progress_bar(config, progress.step) as bar,
    ):
        while progress.step < max_steps and not stopped:
            trainer.step(batches)
            due = lambda every: progress.step == max_steps or progress.step % every == 0
            found = trainer.evaluate() if due(train.eval_every) else {}
            if found or due(train.log_every):
                line = trainer.report() | found
                metrics.write(line)
                shown = {"loss": line["train_loss"]} | ({"val": found["val_loss"]} if found else {})
                bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items()})
            bar.update()
            if trainer.improved or due(train.checkpoint_every):
                trainer.save(run_dir)
                saved_at = progress.step
        if saved_at != progress.step:
            trainer.save(run_dir)
    if stopped:
        print(f"stopped at step {progress.step}; the same command goes on from there", file=sys.stderr)
        return RunResult(path=run_dir.path, step=progress.step, stopped_by=stopped[0])
    if line is None:  # it had come to its last step, and was cut short before its summary
        line = run_dir.metrics()[-1]
        line |= {} if "val_loss" in line else trainer.evaluate()
    summary = line | summarize(config, progress) | {"stream_hash": trainer.stream_hash}
    run_dir.finish(summary)
    return RunResult(path=run_dir.path, step=progress.step, summary=summary)


class Trainer:
    """Optimizer steps and evaluations, and what they cost.

    Nothing is read back from the device between two lines of metrics, except on a CPU, where that costs nothing.
    """

    def __init__(
        self,
        config: RunConfig,
        model: GPT,
        optimizers: Optimizers,
        prepared: Prepared,
        runtime: Runtime,
        progress: Progress,
        *,
        peak_flops: float,
    ):
        self.config, self.model, self.optimizers, self.runtime = config, model, optimizers, runtime
        self.progress, self.peak_flops = progress, peak_flops
        T = config.model.block_size
        self.kernel = model.kernel_names(T, runtime.dtype)
        self.flops_per_token = cost.train_flops(config.model, T) / T
        self.val, self.token_bytes = prepared.split("val"), prepared.tokenizer.token_bytes()
        self.stream_hash = stream_hash(self.val, T, config.train.eval_tokens)
        self.improved = False  # the last evaluation was the best so far, and has not been saved
        self.train_peak: PeakMemory | None = None
        self.eval_peak: PeakMemory | None = None
        self.n_steps = 0  # of this process
        self.seconds = self.tokens = 0.0  # of steady steps since the last line
        self._lap_start = time.perf_counter()
        self.loss_sum = torch.tensor(progress.loss_sum, device=runtime.device)  # float32
        self.loss, self.grad_norm = torch.zeros_like(self.loss_sum), torch.zeros_like(self.loss_sum)  # of the last step
        self.first_bad = torch.full((), -1, device=runtime.device)  # the first step that was not finite

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step. The first of a process warms up, the second is measured for memory, neither for speed."""
        if self.n_steps == 1:
            with measure_peak(self.runtime.device, training_tensors(self.model, self.optimizers)) as self.train_peak:
                self._update(batches)
        else:
            self._update(batches)
        self.n_steps += 1
        self.progress.step += 1
        self.progress.loss_count += 1
        self.tokens += self.config.train.global_batch_tokens
        if self.n_steps <= 2:
            self._lap()
            self.seconds = self.tokens = 0.0

    def _update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        config, step = self.config, self.progress.step
        n = config.global_rows // config.micro_rows
        self.optimizers.set_lr(lr_factor(step, max_steps=config.train.max_steps, **config.optim.schedule_numbers))
        self.loss.zero_()
        for _ in range(n):
            idx, targets = next(batches)
            with self.runtime.autocast():
                loss = self.model(idx, targets) / n
            loss.backward()
            self.loss += loss.detach()
        self.grad_norm.copy_(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.grad_clip))
        self.loss_sum += self.loss
        bad = ~(self.loss.isfinite() & self.grad_norm.isfinite()) & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, step + 1)
        if self.runtime.device.type == "cpu":
            self._refuse_non_finite()
        self.optimizers.step()

    def _refuse_non_finite(self) -> None:
        if (step := int(self.first_bad)) >= 0:
            raise NonFiniteError(
                f"step {step}: the loss is {self.loss.item()}, the norm of its gradient {self.grad_norm.item()}; "
                "nothing of it was saved, the last checkpoint stands: "
                "begin again with lower learning rates under another --name"
            )

    def _lap(self) -> float:
        """Seconds since the last call, when the device has done all."""
        self.runtime.synchronize()
        self._refuse_non_finite()
        start, self._lap_start = self._lap_start, time.perf_counter()
        self.progress.elapsed_s += self._lap_start - start
        return self._lap_start - start

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Around what takes time that is none of the training's."""
        self.seconds += self._lap()
        yield
        self._lap()

    def evaluate(self) -> dict[str, float]:
        """Loss, perplexity and bits per byte over the fixed stream; a process's first time is measured for memory."""
        train, progress = self.config.train, self.progress
        batches = eval_batches(
            self.val,
            block_size=self.config.model.block_size,
            batch_size=self.config.micro_rows,
            max_tokens=train.eval_tokens,
        )
        with self._not_training():
            if self.eval_peak is None:
                held = training_tensors(self.model, self.optimizers)
                with measure_peak(self.runtime.device, held) as self.eval_peak:
                    result = evaluate(self.model, batches, self.token_bytes, self.runtime)
            else:
                result = evaluate(self.model, batches, self.token_bytes, self.runtime)
        if progress.best_val_loss is None or result.loss < progress.best_val_loss:
            progress.best_val_loss, self.improved = result.loss, True
        return {f"val_{key}": getattr(result, key) for key in ("loss", "perplexity", "bits_per_byte")}

    def save(self, run_dir: RunDir) -> None:
        """A checkpoint, which is the best one if the last evaluation said so."""
        with self._not_training():
            self.progress.loss_sum = self.loss_sum.item()
            run_dir.save(self.model, self.optimizers, asdict(self.progress), best=self.improved)
        self.improved = False

    def report(self) -> dict[str, Any]:
        """A line of metrics over the steps since the last one; what was not measured is None."""
        self.seconds += self._lap()
        progress, train_peak, eval_peak = self.progress, self.train_peak, self.eval_peak
        speed = self.tokens / self.seconds if self.tokens else None
        line = {
            "step": progress.step,
            "tokens": progress.step * self.config.train.global_batch_tokens,
            "elapsed_s": round(progress.elapsed_s, 3),
            "train_loss": self.loss_sum.item() / progress.loss_count,
            "lr": self.optimizers.lr,
            "grad_norm": self.grad_norm.item(),
            "tokens_per_s": speed and round(speed, 1),
            "mfu": speed and round(speed * self.flops_per_token / self.peak_flops, 4),
            "peak_memory_train_bytes": train_peak and train_peak.bytes,
            "peak_memory_eval_bytes": eval_peak and eval_peak.bytes,
            "peak_memory_reserved_bytes": train_peak and train_peak.reserved_bytes,
            "peak_memory_process_bytes": train_peak and train_peak.process_bytes,
            "peak_memory_method": train_peak and train_peak.method,
            "kernel": self.kernel,
        }
        self.loss_sum.zero_()
        progress.loss_count = 0
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
