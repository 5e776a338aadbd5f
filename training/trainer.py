"""Trainer: optimizer steps and evaluations, and what they cost."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from artifacts.background import Background
from artifacts.run_dir import RunDir
from configs.schema import RunConfig, TrainConfig
from data.loader import TrainLoader, eval_batches, stream_hash
from data.prepare import Prepared
from model import cost
from model.device import Runtime
from model.memory import PeakMemory, measure_peak
from training.distributed import Replica
from training.evaluate import Evaluation, evaluate
from training.loss_spikes import StepGuard
from training.memory import training_tensors
from training.optim import Optimizers, lr_factor

PARTED = 0.02  # both by this fraction: validation loss rose over its best, and training loss fell since


class DivergedError(RuntimeError):
    """More steps in a row were bad than may be skipped; the weights are those before the first of them."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run has come: saved with every checkpoint."""

    step: int = 0
    elapsed_s: float = 0.0  # of training, evaluating and waiting for checkpoints
    best_val_loss: float | None = None
    best_train_loss: float | None = None  # of the steps before that evaluation
    evaluations_since_best: int = 0
    parted: bool = False  # it was said that training and validation part
    loss_sum: float = 0.0  # of the good steps since the last line of metrics
    loss_count: int = 0
    guard: dict[str, Any] | None = None

    def is_over(self, train: TrainConfig) -> bool:
        """All steps are done, or the evaluations have stopped getting better."""
        return self.step >= train.max_steps or self.evaluations_since_best >= (train.patience or math.inf)


class Trainer:
    """Optimizer steps and evaluations, and what they cost.

    Nothing is read back from the device between two lines of metrics, except on a CPU, where that costs nothing.
    """

    def __init__(
        self,
        config: RunConfig,
        replica: Replica,
        optimizers: Optimizers,
        prepared: Prepared,
        loader: TrainLoader,
        runtime: Runtime,
        progress: Progress,
        *,
        peak_flops: float,
    ):
        self.config, self.optimizers, self.runtime = config, optimizers, runtime
        self.replica, self.model, self.world = replica, replica.model, replica.world
        self.loader, self.progress, self.peak_flops = loader, progress, peak_flops
        T, train, device = config.model.block_size, config.train, runtime.device
        self.kernel = self.model.kernel_names(T, runtime.dtype)
        self.flops_per_token = cost.train_flops(config.model, T) / T
        self.val, self.token_bytes = prepared.split("val"), prepared.tokenizer.token_bytes()
        self.stream_hash = stream_hash(self.val, T, train.eval_tokens)
        self.improved = False  # the last evaluation was the best so far, and has not been saved
        self.train_peak: PeakMemory | None = None
        self.eval_peak: PeakMemory | None = None
        self.n_steps = 0  # of this process
        self.seconds = self.tokens = 0.0  # of steady steps since the last line
        self._lap_start = time.perf_counter()
        self.guard = StepGuard(device, sigma=train.spike_sigma, limit=train.max_skipped, state=progress.guard)
        n_micro = config.global_rows // self.world.size // config.micro_rows
        self.measured = torch.zeros(n_micro + 1, device=device)  # of a step: the loss of each micro-batch, and the norm
        self.sums = torch.tensor([progress.loss_sum, progress.loss_count], device=device)  # float32; of good steps
        self.grad_norm = torch.zeros((), device=device)  # of the last good step

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step. A process's first warms up, the next is measured for memory, neither for speed."""
        warm_up = self.replica.warm_up_steps
        if self.n_steps == warm_up:
            with measure_peak(self.runtime.device, training_tensors(self.model, self.optimizers)) as self.train_peak:
                self._update(batches)
        else:
            self._update(batches)
        self.n_steps += 1
        self.progress.step += 1
        self.tokens += self.config.train.global_batch_tokens
        if self.n_steps <= warm_up + 1:
            self._lap()
            self.seconds = self.tokens = 0.0

    def _update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        config, step, n = self.config, self.progress.step, len(self.measured) - 1
        self.optimizers.set_lr(lr_factor(step, max_steps=config.train.max_steps, **config.optim.schedule_numbers))
        for micro in range(n):
            idx, targets = next(batches)
            self._seed(step, row=(self.world.rank * n + micro) * config.micro_rows)
            with self.replica.backward(last=micro == n - 1):
                with self.runtime.autocast():
                    loss = self.replica(idx, targets)
                (loss / n).backward()
            self.measured[micro] = loss.detach()
        self.measured[n] = self.replica.clip(config.optim.grad_clip)
        measured = self.world.rows(self.measured)  # (processes, n + 1)
        losses, grad_norm = measured[:, :n].flatten(), measured[:, n].max()
        bad = self.guard.judge(step + 1, losses, grad_norm)
        if self.runtime.device.type == "cpu":
            self._refuse_divergence()
        self.optimizers.step(skip=bad)
        loss = losses.mean()
        self.sums += torch.where(bad, 0.0, torch.stack([loss, torch.ones_like(loss)]))
        self.grad_norm.copy_(torch.where(bad, self.grad_norm, grad_norm))

    def _seed(self, step: int, *, row: int) -> None:
        """Dropout too is a pure function of seed, step and row, the first of its micro-batch, whoever computes it."""
        if self.config.model.dropout:
            state = np.random.SeedSequence([self.config.seed, step, row]).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))

    def _refuse_divergence(self) -> None:
        if not self.guard.lost:
            return
        step, micro, what = self.guard.culprit()
        rows = range(micro * self.config.micro_rows, (micro + 1) * self.config.micro_rows)
        starts = self.loader.starts(step - 1, rows)
        where = ", ".join(map(str, starts[:4])) + (", ..." if len(starts) > 4 else "")
        raise DivergedError(
            f"step {step}: {what}, and with train.max_skipped = {self.guard.limit} no further step is skipped; highest "
            f"is the loss of rows {rows[0]} to {rows[-1]} of its batch, which begin at tokens {where} of "
            f"{self.loader.tokens.path}; the last checkpoint stands: begin again with lower learning rates under "
            f"another --name"
        )

    def _lap(self) -> float:
        """Seconds since the last call, when the device has done all."""
        self.runtime.synchronize()
        self._refuse_divergence()
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
        with self._not_training():
            if self.eval_peak is None:
                with measure_peak(self.runtime.device, training_tensors(self.model, self.optimizers)) as self.eval_peak:
                    self._evaluate(at_most=2)  # of batches that are all alike: to measure them takes time
            result = self._evaluate()
        return {f"val_{key}": getattr(result, key) for key in ("loss", "perplexity", "bits_per_byte")}

    def _evaluate(self, at_most: int | None = None) -> Evaluation:
        """Over the whole stream, or over so many batches of each process."""
        batches = eval_batches(
            self.val,
            block_size=self.config.model.block_size,
            batch_size=self.config.micro_rows,
            max_tokens=self.config.train.eval_tokens,
        )
        first = islice(batches, at_most and at_most * self.world.size)
        return evaluate(self.model, first, self.token_bytes, self.runtime, self.world)

    def compare(self, line: dict[str, Any]) -> str | None:
        """Note whether this line's evaluation is the best so far; what there is to say about it, once in a run."""
        progress, val_loss, train_loss = self.progress, line["val_loss"], line.get("train_loss")
        if progress.best_val_loss is None or val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_train_loss, self.improved = val_loss, train_loss, True
            progress.evaluations_since_best = 0
            return None
        progress.evaluations_since_best += 1
        if progress.parted or train_loss is None or progress.best_train_loss is None:
            return None
        rose = val_loss > progress.best_val_loss * (1 + PARTED)
        if not rose or train_loss > progress.best_train_loss * (1 - PARTED):
            return None
        progress.parted = True
        return (
            f"step {progress.step}: validation loss rose from {progress.best_val_loss:.4f} to {val_loss:.4f} while "
            f"training loss fell from {progress.best_train_loss:.4f} to {train_loss:.4f}: the model learns its text by "
            f"heart; the best checkpoint is kept, --train.patience N ends such a run, more text or dropout prevents it"
        )

    def save(self, run_dir: RunDir, background: Background) -> None:
        """A checkpoint, which is the best one if the last evaluation said so."""
        with self._not_training():
            self.progress.loss_sum, count = self.sums.tolist()
            self.progress.loss_count, self.progress.guard = int(count), self.guard.state()
            run_dir.save(
                self.model,
                self.optimizers,
                asdict(self.progress),
                best=self.improved,
                keep=self.config.train.keep_checkpoints,
                kind=self.config.train.checkpoint,
                world=self.world,
                background=background,
            )
        self.improved = False

    def report(self) -> dict[str, Any]:
        """A line of metrics over the steps since the last one; what was not measured is None."""
        self.seconds += self._lap()
        progress, train_peak, eval_peak = self.progress, self.train_peak, self.eval_peak
        speed = self.tokens / self.seconds if self.tokens else None
        loss_sum, n_good = self.sums.tolist()
        line = {
            "step": progress.step,
            "tokens": progress.step * self.config.train.global_batch_tokens,
            "elapsed_s": round(progress.elapsed_s, 3),
            "train_loss": loss_sum / n_good if n_good else None,
            "lr": self.optimizers.lr,
            "grad_norm": self.grad_norm.item(),
            "skipped_steps": int(self.guard.skipped),
            "tokens_per_s": speed and round(speed, 1),
            "mfu": speed and round(speed * self.flops_per_token / self.peak_flops, 4),
            "peak_memory_train_bytes": train_peak and train_peak.bytes,
            "peak_memory_eval_bytes": eval_peak and eval_peak.bytes,
            "peak_memory_reserved_bytes": train_peak and train_peak.reserved_bytes,
            "peak_memory_process_bytes": train_peak and train_peak.process_bytes,
            "peak_memory_method": train_peak and train_peak.method,
            "kernel": self.kernel,
        }
        self.sums.zero_()
        self.seconds = self.tokens = 0.0
        return {key: value for key, value in line.items() if value is not None}
