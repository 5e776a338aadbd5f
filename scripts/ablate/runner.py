"""Runs cells, some at a time, each job of a cell in a process of its own, under one bar for the steps of all."""

import json
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from artifacts.run_dir import RunDir
from cli.program import stop_signals
from model.device import resolve
from scripts.ablate.cell import measured
from scripts.ablate.study import Cell

FAILURES = "failures.jsonl"
POLL_S = 0.2

Job = dict[str, Any]  # {"config": of the run} trains, {"command": [...]} measures; with {"run": its directory}
Failure = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Task:
    """A job of a cell under way, and the cell's jobs that come after it."""

    cell: Cell
    job: Job
    rest: deque[Job]
    place: int  # which of those that run at a time: says which device
    child: subprocess.Popen[bytes]
    log_start: int  # where the job's words begin in the cell's log


class Runner:
    """Works through cells; what is done is not done again, and a cell that fails does not keep others from running."""

    def __init__(self, cells: list[Cell], commands: list[list[str]], out: Path, *, at_a_time: int):
        self.cells, self.commands, self.out, self.at_a_time = cells, commands, out, at_a_time
        self.tasks: list[Task] = []
        self.failures: list[Failure] = []

    def run(self) -> int | None:
        """All cells; or until a signal, which is returned: what runs is told to save, and waited for."""
        waiting = deque((cell, jobs) for cell in self.cells if (jobs := self.jobs_of(cell)))
        total = sum(cell.config.train.max_steps for cell in self.cells)
        bar = tqdm(total=total, initial=self.steps_done(), unit="step", desc=self.out.name, disable=None, smoothing=0)
        with stop_signals() as stopped, bar:
            while self.tasks or (waiting and not stopped):
                while waiting and len(self.tasks) < self.at_a_time and not stopped:
                    cell, jobs = waiting.popleft()
                    free = set(range(self.at_a_time)) - {task.place for task in self.tasks}
                    self.start(cell, jobs, place=min(free))
                time.sleep(POLL_S)
                for task in list(self.tasks):
                    if stopped and task.child.stdin is not None:
                        task.child.stdin.close()  # at which it saves and ends
                    if task.child.poll() is not None:
                        self.tasks.remove(task)
                        self.ended(task, stopping=bool(stopped))
                bar.n = self.steps_done()
                ended = len(self.cells) - len(waiting) - len(self.tasks)
                bar.set_postfix_str(f"{ended}/{len(self.cells)} cells")
        return stopped[0] if stopped else None

    def jobs_of(self, cell: Cell) -> deque[Job]:
        """What is left to do for a cell: its training, and each command that has not measured it yet."""
        trained = RunDir(cell.path).summary() is not None
        done = measured(cell.path) if trained else []
        training = [] if trained else [{"config": cell.config.model_dump(mode="json")}]
        return deque([*training, *({"command": command} for command in self.commands if command not in done)])

    def start(self, cell: Cell, jobs: deque[Job], *, place: int) -> None:
        """Begin the first of a cell's jobs."""
        job = jobs.popleft()
        log = self.log(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as words:
            log_start = words.tell()
            child = cell_process(words, share_of_machine(cell, place, self.at_a_time))
        assert child.stdin is not None, "it is a pipe"
        child.stdin.write((json.dumps({"run": str(cell.path)} | job) + "\n").encode())
        child.stdin.flush()
        self.tasks.append(Task(cell=cell, job=job, rest=jobs, place=place, child=child, log_start=log_start))

    def ended(self, task: Task, *, stopping: bool) -> None:
        """Note what failed, and go on with the cell's next job; without weights there is nothing to measure."""
        if stopping:
            return
        if task.child.returncode:
            self.fail(task)
        summary = RunDir(task.cell.path).summary()
        if summary is not None and "config" in task.job:
            tqdm.write(f"{task.cell}: perplexity {summary['val_perplexity']:.2f} after {summary['elapsed_s']:.0f} s")
        if summary is not None and task.rest:
            self.start(task.cell, task.rest, place=task.place)

    def fail(self, task: Task) -> None:
        """Record a failure, with the last words of the log."""
        code, log = task.child.returncode, self.log(task.cell)
        words = log.read_bytes()[task.log_start :].decode(errors="replace").split("\n")
        failure = {
            "cell": task.cell.path.name,
            "job": " ".join(task.job.get("command", ["training"])),
            "exit_code": code,
            "error": f"killed by signal {-code}" if code < 0 else next((x for x in reversed(words) if x.strip()), ""),
            "log": str(log),
        }
        self.failures.append(failure)
        with open(self.out / FAILURES, "a", encoding="utf-8") as file:
            file.write(json.dumps(failure) + "\n")
        tqdm.write(f"{task.cell}: {failure['job']} failed: {failure['error']}", file=sys.stderr)

    def steps_done(self) -> int:
        """Of all cells, as far as their metrics say."""
        return sum(min(last_step(cell.path), cell.config.train.max_steps) for cell in self.cells)

    def log(self, cell: Cell) -> Path:
        return self.out / "logs" / f"{cell.path.name}.log"


def cell_process(words: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process that does the job which it reads, and ends when its standard input does."""
    return subprocess.Popen(
        (sys.executable, "-m", "scripts.ablate.cell"),
        stdin=subprocess.PIPE,
        stdout=words,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        start_new_session=True,  # Ctrl-C is for the runner, which passes it on once
    )


def last_step(run: Path) -> int:
    """The step of the last whole line of a run's metrics, which may be being written; 0 before the first."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def share_of_machine(cell: Cell, place: int, at_a_time: int) -> dict[str, str]:
    """The environment that gives a place its own device: one of the visible GPUs, or its part of the CPU's threads."""
    if at_a_time == 1:
        return {}
    device = resolve(cell.config.device).device
    if device.type == "cuda" and device.index is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        return {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // at_a_time))}
