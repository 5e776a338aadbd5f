"""Run the cells of a study, several at a time, each job in its own process, with one progress bar over all steps."""

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

Job = dict[str, Any]  # {"config": {...}} trains, {"command": [...]} measures; sent with {"run": directory}
Failure = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Task:
    """A running job of a cell, and the cell's remaining jobs."""

    cell: Cell
    job: Job
    rest: deque[Job]
    place: int  # slot among the jobs that run at the same time: selects the device
    child: subprocess.Popen[bytes]
    log_start: int  # offset in bytes of this job's output in the cell's log


class Runner:
    """Runs all jobs that are not done yet; a failing cell does not stop the others."""

    def __init__(self, cells: list[Cell], commands: list[list[str]], out: Path, *, at_a_time: int):
        self.cells, self.commands, self.out, self.at_a_time = cells, commands, out, at_a_time
        self.tasks: list[Task] = []
        self.failures: list[Failure] = []

    def run(self) -> int | None:
        """Run all cells. On a signal, let running jobs save and exit, and return the signal's number."""
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
                        task.child.stdin.close()  # the child then saves and exits
                    if task.child.poll() is not None:
                        self.tasks.remove(task)
                        self.ended(task, stopping=bool(stopped))
                bar.n = self.steps_done()
                ended = len(self.cells) - len(waiting) - len(self.tasks)
                bar.set_postfix_str(f"{ended}/{len(self.cells)} cells")
        return stopped[0] if stopped else None

    def jobs_of(self, cell: Cell) -> deque[Job]:
        """The remaining jobs of a cell: training, and each measuring command that has not finished."""
        trained = RunDir(cell.path).summary() is not None
        done = measured(cell.path) if trained else []
        training = [] if trained else [{"config": cell.config.model_dump(mode="json")}]
        return deque([*training, *({"command": command} for command in self.commands if command not in done)])

    def start(self, cell: Cell, jobs: deque[Job], *, place: int) -> None:
        """Start the first of a cell's remaining jobs."""
        job = jobs.popleft()
        log = self.log(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            log_start = output.tell()
            child = cell_process(output, share_of_machine(cell, place, self.at_a_time))
        assert child.stdin is not None, "stdin must be a pipe"
        child.stdin.write((json.dumps({"run": str(cell.path)} | job) + "\n").encode())
        child.stdin.flush()
        self.tasks.append(Task(cell=cell, job=job, rest=jobs, place=place, child=child, log_start=log_start))

    def ended(self, task: Task, *, stopping: bool) -> None:
        """Record a failure, then start the cell's next job; an untrained cell is not measured."""
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
        """Record a failure, with the last line of the log."""
        code, log = task.child.returncode, self.log(task.cell)
        lines = log.read_bytes()[task.log_start :].decode(errors="replace").split("\n")
        failure = {
            "cell": task.cell.path.name,
            "job": " ".join(task.job.get("command", ["training"])),
            "exit_code": code,
            "error": f"killed by signal {-code}" if code < 0 else next((x for x in reversed(lines) if x.strip()), ""),
            "log": str(log),
        }
        self.failures.append(failure)
        with open(self.out / FAILURES, "a", encoding="utf-8") as file:
            file.write(json.dumps(failure) + "\n")
        tqdm.write(f"{task.cell}: {failure['job']} failed: {failure['error']}", file=sys.stderr)

    def steps_done(self) -> int:
        """Optimizer steps of all cells, according to their metrics."""
        return sum(min(last_step(cell.path), cell.config.train.max_steps) for cell in self.cells)

    def log(self, cell: Cell) -> Path:
        return self.out / "logs" / f"{cell.path.name}.log"


def cell_process(output: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker process, which reads its job from standard input and exits when that is closed."""
    return subprocess.Popen(
        (sys.executable, "-m", "scripts.ablate.cell"),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        start_new_session=True,  # Ctrl-C reaches only the runner, which then stops the children
    )


def last_step(run: Path) -> int:
    """The step in the last complete line of a run's metrics, 0 if there is none; the file may be growing."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def share_of_machine(cell: Cell, place: int, at_a_time: int) -> dict[str, str]:
    """Environment variables that assign one of the visible GPUs, or a share of the CPU threads, to a job slot."""
    if at_a_time == 1:
        return {}
    device = resolve(cell.config.device).device
    if device.type == "cuda" and device.index is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        return {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // at_a_time))}
