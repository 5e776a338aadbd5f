"""RunConfig: all that a run is, with every default; TOML files and the command line say only what differs."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from artifacts.safetensors_io import CheckpointKind
from model.config import ModelConfig, Section
from model.device import DType, Switch
from model.errors import UserError
from training.distributed import Parallel
from training.optim import OptimizerName, Schedule

KEPT_AND_SHOWN: dict[str, Any] = {
    "name": True,
    "out_dir": True,
    "log": True,
    "data": {"dir"},
    "train": {"keep_checkpoints"},
}


class DataConfig(Section):
    """Which text, cut into which tokens."""

    text: str = Field(
        "pydocs",
        min_length=1,
        description="a named text (pydocs, shakespeare, recall, wikitext103, tinystories, fineweb-edu) or a path",
    )
    tokenizer: str = Field(
        "bpe-4096",
        description="byte, char, gpt2, cl100k_base, o200k_base, bpe-N learned from the text, or a run's by its path: "
        "runs/imported",
    )
    dir: Path = Field(Path("data/prepared"), description="where prepared tokens are kept")


class OptimConfig(Section):
    """Muon or AdamW, and the learning rate over time."""

    optimizer: OptimizerName = Field("muon", description="of the matrices in the layers; AdamW has the rest")
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of Muon")
    adamw_lr: float | None = Field(
        None, gt=0, description="peak learning rate of AdamW; none: 5e-3 beside Muon, 1e-3 alone"
    )
    base_width: int | None = Field(
        None,
        ge=1,
        description="AdamW alone: the n_embd that adamw_lr is for, the layers' matrices get adamw_lr * base_width / "
        "n_embd; none: all get adamw_lr",
    )
    schedule: Schedule = Field(
        "trapezoid", description="after warm-up: cosine, trapezoid (flat, then linear decay), constant"
    )
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")
    decay_fraction: float = Field(
        0.4, gt=0, le=1, description="of all steps, the last ones in which a trapezoid decays"
    )
    final_lr: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a fraction of the peak")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's two averages")
    weight_decay: float = Field(0.1, ge=0, description="on matrices; beside Muon not on embeddings")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.base_width is not None and self.optimizer == "muon":
            raise ValueError(
                f"base_width ({self.base_width}) is for AdamW alone, Muon's rate serves every width: leave it out"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas ({self.betas}) must each be at least 0 and below 1")
        return self

    @property
    def numbers(self) -> dict[str, Any]:
        """What `training.optim.make_optimizers` takes."""
        adamw_lr = self.adamw_lr or (5e-3 if self.optimizer == "muon" else 1e-3)
        shared = self.model_dump(include={"optimizer", "muon_lr", "base_width", "betas", "weight_decay"})
        return shared | {"adamw_lr": adamw_lr}

    @property
    def schedule_numbers(self) -> dict[str, Any]:
        """What `training.optim.lr_factor` takes beside the step."""
        return self.model_dump(include={"schedule", "warmup_steps", "decay_fraction", "final_lr"})


class TrainConfig(Section):
    """How long, in what batches, and how often to look."""

    max_steps: int = Field(1000, ge=1, description="optimizer steps")
    global_batch_tokens: int = Field(8192, ge=1, description="tokens of one optimizer step, whatever the hardware")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="rows of one forward pass; none: chosen, on cuda by its memory, elsewhere at most 16384 tokens",
    )
    parallel: Parallel = Field(
        "auto",
        description="with several processes (torchrun): ddp, a copy in each; fsdp, a shard; auto: fsdp where copies "
        "would fill the device",
    )
    checkpoint: CheckpointKind = Field(
        "whole", description="whole: one file; sharded: each process writes its part; any number of them reads both"
    )
    recompute: bool = Field(False, description="keep each layer's input alone and compute the rest again: less memory")
    eval_every: int = Field(250, ge=1, description="steps between evaluations; there is always one at the end")
    eval_tokens: int | None = Field(
        131_072, ge=1, description="tokens of the fixed evaluation stream; none: the whole split"
    )
    log_every: int = Field(10, ge=1, description="steps between lines of metrics")
    checkpoint_every: int = Field(250, ge=1, description="steps between checkpoints; there is always one at the end")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that stay, beside the best")
    patience: int | None = Field(
        None, ge=1, description="evaluations in a row without a better one after which the run ends; none: never"
    )
    spike_sigma: float | None = Field(
        10.0,
        gt=0,
        description="skip a step whose loss or gradient norm is this many standard deviations above its running mean; "
        "none: only what is not finite",
    )
    max_skipped: int = Field(5, ge=0, description="skipped steps in a row that are borne; one more stops the run")


class LogConfig(Section):
    """Where metrics go beside metrics.jsonl."""

    wandb: bool = Field(False, description="mirror the metrics to wandb; offline unless a key is configured")
    wandb_project: str = Field("sash", description="wandb's project")
    progress: bool = Field(True, description="progress bar")


class RunConfig(Section):
    """A run: what `train.run` takes and `config.json` keeps."""

    name: str = Field("run", pattern=r"^\w[\w.+-]*(/\w[\w.+-]*)*$", description="directory of the run below out_dir")
    out_dir: Path = Field(Path("runs"), description="where runs are kept")
    seed: int = Field(1337, ge=0, lt=2**63, description="of the initial weights, the order of the data and dropout")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: DType = Field(
        "auto", description="of matrix products; auto: bfloat16 where the hardware multiplies it natively"
    )
    compile: Switch = Field("auto", description="torch.compile; auto: where it pays for itself")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    init_from: Path | None = Field(
        None, description="a run's directory, or one of its checkpoints, with whose weights to begin"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        tokens, block = self.train.global_batch_tokens, self.model.block_size
        if tokens % block:
            raise ValueError(f"train.global_batch_tokens ({tokens}) must be a multiple of model.block_size ({block})")
        if self.train.micro_batch is not None and self.global_rows % self.train.micro_batch:
            raise ValueError(
                f"train.micro_batch ({self.train.micro_batch}) must divide the {self.global_rows} rows of a step "
                f"(global_batch_tokens / block_size)"
            )
        return self

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.out_dir / self.name

    def experiment(self) -> dict[str, Any]:
        """All of it as JSON, but where it is kept and shown: runs of equal ones are the same experiment."""
        return self.model_dump(mode="json", exclude=KEPT_AND_SHOWN)

    @property
    def global_rows(self) -> int:
        """Sequences of one optimizer step."""
        return self.train.global_batch_tokens // self.model.block_size

    @property
    def micro_rows(self) -> int:
        """Sequences of one forward pass of one process by itself: a divisor of global_rows."""
        return self.rows_at_once()

    def rows_at_once(self, *, n_processes: int = 1, at_most: int | None = None) -> int:
        """Sequences of one forward pass: of each process's share a divisor, `at_most` or what a CPU does well with."""
        rows, unshared = divmod(self.global_rows, n_processes)
        if unshared or rows == 0:
            raise UserError(
                f"train.global_batch_tokens ({self.train.global_batch_tokens}) are {self.global_rows} rows of "
                f"block_size, which {n_processes} processes cannot share: give a multiple of "
                f"{n_processes * self.model.block_size}"
            )
        if self.train.micro_batch is not None:
            if rows % self.train.micro_batch:
                raise UserError(
                    f"train.micro_batch ({self.train.micro_batch}) must divide the {rows} rows of a step that each of "
                    f"{n_processes} processes has"
                )
            return self.train.micro_batch
        limit = at_most or max(1, 16_384 // self.model.block_size)
        return max(n for n in range(1, min(rows, limit) + 1) if rows % n == 0)
