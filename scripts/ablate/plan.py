"""Estimate a study without running it: time from FLOPs, memory from a training step on tensors without data."""

import statistics
from pathlib import Path

from artifacts.run_dir import RunDir
from configs.schema import RunConfig
from model import cost
from model.device import Runtime, matmul_rate, resolve
from scripts.ablate.runner import last_step
from scripts.ablate.study import Cell
from scripts.memory import with_known_vocabulary
from scripts.report.tables import table
from training.estimate import train_peak

ASSUMED_MFU = 0.25  # model FLOPs utilization of small models on a CPU, relative to the measured matmul rate
BYTES_AND_END = 257  # upper bound of the vocabulary of a char tokenizer, whose size depends on the text


def plan(cells: list[Cell]) -> str:
    """A table of the cells, and their total time."""
    if not cells:
        return "this shard has no cells"
    runtime = resolve(cells[0].config.device, cells[0].config.dtype)
    rate = matmul_rate(runtime)
    known = [mfu for cell in cells for mfu in _measured_mfu(cell.path)]
    mfu = statistics.median(known) if known else ASSUMED_MFU
    rows, seconds_left = [], 0.0
    memory: dict[str, int] = {}  # by variant: equal for all seeds
    for cell in cells:
        config = _with_vocabulary(cell.config)
        seconds = train_and_evaluation_flops(config) / (rate * mfu)
        steps, step = config.train.max_steps, last_step(cell.path)
        seconds_left += seconds * (1 - step / steps)
        done = RunDir(cell.path).summary() is not None
        if cell.variant not in memory:
            memory[cell.variant] = step_memory(config, runtime)
        rows.append(
            {
                "cell": cell.path.name,
                "variant": cell.variant,
                "seed": str(cell.seed),
                "state": "finished" if done else f"{step} of {steps} steps" if step else f"{steps} steps",
                "parameters": f"{cost.n_params(config.model) / 1e6:.2f} M",
                "time": f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min",
                "training memory": f"{memory[cell.variant] / 1e6:,.0f} MB",
            }
        )
    source = "measured in finished cells" if known else "assumed"
    return (
        f"{table(rows)}\n\nremaining: about {seconds_left / 60:.1f} min of training and evaluation, one cell at a "
        "time, plus the measuring commands. "
        f"This is an estimate from FLOPs, at {mfu:.0%} MFU ({source}) of the {rate / 1e9:,.0f} GFLOP/s measured for "
        f"matmuls ({runtime.why}). Memory is estimated for one training step with CPU kernels, without allocating it."
    )


def train_and_evaluation_flops(config: RunConfig) -> float:
    """FLOPs of a whole run. Evaluation is forward only, a third; one over a whole split of unknown size counts as 0."""
    T, train = config.model.block_size, config.train
    per_token = cost.train_flops(config.model, T) / T
    evaluations = -(-train.max_steps // train.eval_every)
    evaluated = evaluations * (train.eval_tokens or 0) / 3
    return per_token * (train.max_steps * train.global_batch_tokens + evaluated)


def step_memory(config: RunConfig, runtime: Runtime) -> int:
    """Peak of live bytes in a training step."""
    parts = train_peak(
        config.model,
        config.micro_rows,
        runtime.dtype,
        optimizer=config.optim.optimizer,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    return sum(parts.values())


def _with_vocabulary(config: RunConfig) -> RunConfig:
    if config.data.tokenizer == "char" and config.model.vocab_size is None:
        return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": BYTES_AND_END})})
    return with_known_vocabulary(config)


def _measured_mfu(run: Path) -> list[float]:
    return [x["mfu"] for x in RunDir(run).metrics() if "mfu" in x] if RunDir(run).summary() is not None else []
