"""Trainer: optimizer steps and evaluations, with their cost in time and memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from artifacts.background import Background
from artifacts.run_dir import RunDir
from configs.schema import RunConfig
from data.loader import TrainLoader, eval_batches, stream_hash
from data.prepare import Prepared
from model import cost
from model.context import AuxiliaryLosses
from model.device import Runtime
from model.memory import PeakMemory, measure_peak
from training.distributed import ParallelModel
from training.evaluate import Evaluation, evaluate
from training.loss_spikes import SpikeGuard
from training.memory import training_tensors
from training.optim import Optimizers, lr_factor
from training.progress import Progress


class DivergedError(RuntimeError):
    """Too many bad steps in a row; the weights are those before the first of them."""


class Trainer:
    """Optimizer steps and evaluations of one run.

    Between two lines of metrics nothing is read back from the device, except on a CPU, where that costs nothing.
    """

    def __init__(
        self,
        config: RunConfig,
        parallel_model: ParallelModel,
        optimizers: Optimizers,
        prepared: Prepared,
        loader: TrainLoader,
        runtime: Runtime,
        progress: Progress,
        *,
        peak_flops: float,
    ):
        self.config, self.optimizers, self.runtime = config, optimizers, runtime
        self.parallel_model, self.model = parallel_model, parallel_model.model
        self.distributed = parallel_model.distributed
        self.loader, self.progress, self.peak_flops = loader, progress, peak_flops
        T, train, device = config.model.block_size, config.train, runtime.device
        self.kernel = self.model.kernel_names(T, runtime.dtype)
        self.flops_per_token = cost.train_flops(config.model, T) / T
        self.val, self.token_bytes = prepared.split("val"), prepared.tokenizer.token_bytes()
        self.stream_hash = stream_hash(self.val, T, train.eval_tokens)
        self.improved = False  # the last evaluation was the best so far and has not been saved yet
        self.train_peak: PeakMemory | None = None
        self.eval_peak: PeakMemory | None = None
        self.n_steps = 0  # of this process
        self.n_micro = config.global_rows // self.distributed.size // config.micro_rows  # micro-batches of a step
        self.seconds = self.tokens = 0.0  # of timed steps since the last line
        self._lap_start = time.perf_counter()
        self.guard = SpikeGuard(device, sigma=train.spike_sigma, limit=train.max_skipped, state=progress.guard)
        # Sums over the good steps since the last line, in float32: of the loss, of ones, of each auxiliary loss.
        self.sums = torch.tensor([progress.loss_sum, progress.loss_count], device=device)
        self.auxiliary_sums = {name: torch.tensor(x, device=device) for name, x in progress.auxiliary_sums.items()}
        self.grad_norm = torch.zeros((), device=device)  # of the last good step

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step. A process's first ones warm up, the next is measured for memory; none is timed."""
        warm_up = self.parallel_model.warm_up_steps
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
        config, step, n = self.config, self.progress.step, self.n_micro
        self.optimizers.set_lr(lr_factor(step, max_steps=config.train.max_steps, **config.optim.schedule_numbers))
        losses: list[Tensor] = []
        auxiliary: dict[str, Tensor] = {}
        for micro in range(n):
            idx, targets = next(batches)
            self._seed(step, row=(self.distributed.rank * n + micro) * config.micro_rows)
            found = AuxiliaryLosses()
            with self.parallel_model.backward(last=micro == n - 1):
                with self.runtime.autocast():
                    loss = self.parallel_model(idx, targets, found)
                (loss / n).backward()
            losses.append(loss.detach())
            for name, value in found.values.items():
                auxiliary[name] = auxiliary.get(name, 0.0) + value / n
        norm = self.parallel_model.clip(config.optim.grad_clip)
        names = sorted(auxiliary)  # the same in every process
        own = torch.stack([x.float() for x in (*losses, norm, *(auxiliary[name] for name in names))])
        measured = self.distributed.all_gather_rows(own)  # (processes, n + 1 + number of auxiliary losses)
        all_losses, grad_norm = measured[:, :n].flatten(), measured[:, n].max()
        bad = self.guard.should_skip(step + 1, all_losses, grad_norm)
        if self.runtime.device.type == "cpu":
            self._refuse_divergence()
        self.optimizers.step(skip=bad)
        mean_loss = all_losses.mean()
        self.sums += torch.where(bad, 0.0, torch.stack([mean_loss, torch.ones_like(mean_loss)]))
        for name, values in zip(names, measured[:, n + 1 :].unbind(1), strict=True):
            so_far = self.auxiliary_sums.setdefault(name, torch.zeros_like(mean_loss))
            so_far += torch.where(bad, 0.0, values.mean())
        self.grad_norm.copy_(torch.where(bad, self.grad_norm, grad_norm))

    def _seed(self, step: int, *, row: int) -> None:
        """Make dropout a function of seed, step and the first row of the micro-batch, in whichever process it runs."""
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
            f"step {step}: {what}, and train.max_skipped = {self.guard.limit} allows no further skipped step; the "
            f"loss is highest in rows {rows[0]} to {rows[-1]} of the batch, which begin at tokens {where} of "
            f"{self.loader.tokens.path}; the last checkpoint is kept: start a new run with lower learning rates under "
            f"another --name"
        )

    def _lap(self) -> float:
        """Seconds since the last call, after waiting for the device."""
        self.runtime.synchronize()
        self._refuse_divergence()
        start, self._lap_start = self._lap_start, time.perf_counter()
        self.progress.elapsed_s += self._lap_start - start
        return self._lap_start - start

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Exclude the time of the block from the training speed."""
        self.seconds += self._lap()
        yield
        self._lap()

    def evaluate(self) -> dict[str, float]:
        """Loss, perplexity and bits per byte over the fixed stream; the first in a process also measures memory."""
        with self._not_training():
            if self.eval_peak is None:
                with measure_peak(self.runtime.device, training_tensors(self.model, self.optimizers)) as self.eval_peak:
                    self._evaluate(at_most=2)  # batches have equal shapes, and profiling is slow
            result = self._evaluate()
        return {f"val_{key}": getattr(result, key) for key in ("loss", "perplexity", "bits_per_byte")}

    def _evaluate(self, at_most: int | None = None) -> Evaluation:
        """Evaluate on the whole stream, or on `at_most` batches per process."""
        batches = eval_batches(
            self.val,
            block_size=self.config.model.block_size,
            batch_size=self.config.micro_rows,
            max_tokens=self.config.train.eval_tokens,
        )
        first = islice(batches, at_most and at_most * self.distributed.size)
        return evaluate(self.model, first, self.token_bytes, self.runtime, self.distributed)

    def compare(self, line: dict[str, Any]) -> str | None:
        """Note whether this line's evaluation is the best so far; returns a message if the model starts to overfit."""
        val_loss, train_loss = line["val_loss"], line.get("train_loss")
        if self.progress.note_evaluation(val_loss, train_loss):
            self.improved = True
            return None
        return self.progress.overfitting_note(val_loss, train_loss)

    def save(self, run_dir: RunDir, background: Background) -> None:
        """Save a checkpoint, marked as the best if the last evaluation was."""
        with self._not_training():
            self.progress.loss_sum, count = self.sums.tolist()
            self.progress.loss_count, self.progress.guard = int(count), self.guard.state()
            self.progress.auxiliary_sums = {name: x.item() for name, x in self.auxiliary_sums.items()}
            run_dir.save(
                self.model,
                self.optimizers,
                asdict(self.progress),
                best=self.improved,
                keep=self.config.train.keep_checkpoints,
                kind=self.config.train.checkpoint,
                processes=self.distributed,
                background=background,
            )
        self.improved = False

    def report(self) -> dict[str, Any]:
        """A line of metrics over the steps since the last one, without the values that were not measured."""
        self.seconds += self._lap()
        progress, train_peak, eval_peak = self.progress, self.train_peak, self.eval_peak
        speed = self.tokens / self.seconds if self.tokens else None
        loss_sum, n_good = self.sums.tolist()
        line = {
            "step": progress.step,
            "tokens": progress.step * self.config.train.global_batch_tokens,
            "elapsed_s": round(progress.elapsed_s, 3),
            "train_loss": loss_sum / n_good if n_good else None,
            **{f"aux_{name}": x.item() / n_good if n_good else None for name, x in self.auxiliary_sums.items()},
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
        for total in (self.sums, *self.auxiliary_sums.values()):
            total.zero_()
        self.seconds = self.tokens = 0.0
        return {key: value for key, value in line.items() if value is not None}
