"""RunConfig: every setting of a run, with its default; TOML files and the command line give only what differs."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from configs.experiment import experiment
from model.config import ModelConfig
from model.device import DType, Switch
from model.errors import UserError
from model.section import Section

OptimizerName = Literal["muon", "adamw"]
Schedule = Literal["cosine", "trapezoid", "constant"]
Parallel = Literal["auto", "ddp", "fsdp"]
CheckpointKind = Literal["whole", "sharded"]


class DataConfig(Section):
    """The text and its tokenizer."""

    text: str = Field(
        "pydocs",
        min_length=1,
        description="training text: pydocs, shakespeare, recall, wikitext103, tinystories, fineweb-edu, or the path of "
        "a file or folder",
    )
    tokenizer: str = Field(
        "bpe-4096",
        description="byte, char, gpt2, cl100k_base, o200k_base, bpe-N (N tokens, learned from the text), or the path "
        "of a run whose tokenizer to use",
    )
    dir: Path = Field(Path("data/prepared"), description="folder of the prepared token files")


class OptimConfig(Section):
    """The optimizers and the learning rate schedule."""

    optimizer: OptimizerName = Field(
        "muon", description="muon: Muon for the matrices inside layers, AdamW for the rest; adamw: AdamW for everything"
    )
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of Muon")
    adamw_lr: float | None = Field(
        None, gt=0, description="peak learning rate of AdamW; none: 5e-3 with Muon, 1e-3 without"
    )
    base_width: int | None = Field(
        None,
        ge=1,
        description="width (n_embd) that adamw_lr was tuned for: matrices inside layers then use "
        "adamw_lr * base_width / n_embd; only with optimizer adamw; none: no scaling",
    )
    schedule: Schedule = Field(
        "trapezoid", description="learning rate after warm-up: cosine, trapezoid (flat, then linear decay) or constant"
    )
    warmup_steps: int = Field(50, ge=0, description="steps of linear learning rate warm-up")
    decay_fraction: float = Field(
        0.4,
        gt=0,
        le=1,
        description="last fraction of max_steps, over which the trapezoid schedule decays",
    )
    final_lr: float = Field(
        0.0, ge=0, le=1, description="learning rate that cosine and trapezoid decay to, as a fraction of the peak"
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.95),
        description="AdamW's beta1 and beta2: decay rates of the running means of the gradient and of its square",
    )
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay of matrices; with Muon, only of those inside layers"
    )
    grad_clip: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.base_width is not None and self.optimizer == "muon":
            raise ValueError(
                f"base_width ({self.base_width}) is for optimizer adamw; Muon's rate needs no scaling: leave it out"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas ({self.betas}) must each be at least 0 and below 1")
        return self

    @property
    def numbers(self) -> dict[str, Any]:
        """Arguments of `training.optim.make_optimizers`."""
        adamw_lr = self.adamw_lr or (5e-3 if self.optimizer == "muon" else 1e-3)
        shared = self.model_dump(include={"optimizer", "muon_lr", "base_width", "betas", "weight_decay"})
        return shared | {"adamw_lr": adamw_lr}

    @property
    def schedule_numbers(self) -> dict[str, Any]:
        """Arguments of `training.optim.lr_factor` other than the step."""
        return self.model_dump(include={"schedule", "warmup_steps", "decay_fraction", "final_lr"})


class TrainConfig(Section):
    """Length, batches, evaluation and checkpoints."""

    renamed: ClassVar[dict[str, str]] = {"recompute": "activation_checkpointing"}

    max_steps: int = Field(1000, ge=1, description="number of optimizer steps")
    global_batch_tokens: int = Field(
        8192, ge=1, description="tokens per optimizer step, over all micro-batches and processes"
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="sequences per forward pass; none: on cuda as many as fit into memory, elsewhere at most 16384 "
        "tokens",
    )
    parallel: Parallel = Field(
        "auto",
        description="with several processes (torchrun): ddp, a full replica in each; fsdp, a shard in each; auto: ddp "
        "unless replicas would fill the device",
    )
    checkpoint: CheckpointKind = Field(
        "whole",
        description="whole: gathered into single files; sharded: a file per process; any number of processes can "
        "resume from either",
    )
    activation_checkpointing: bool = Field(
        False,
        description="store only each layer's input, recompute the rest in the backward pass: less memory, slower",
    )
    eval_every: int = Field(250, ge=1, description="steps between evaluations; the last step is always evaluated")
    eval_tokens: int | None = Field(
        131_072, ge=1, description="tokens of the validation split to evaluate, always the same; none: all of them"
    )
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: int = Field(250, ge=1, description="steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = Field(2, ge=1, description="number of newest checkpoints to keep, besides the best one")
    patience: int | None = Field(
        None, ge=1, description="end the run after this many evaluations without improvement; none: never"
    )
    spike_sigma: float | None = Field(
        10.0,
        gt=0,
        description="skip steps whose loss or gradient norm is this many standard deviations above its running mean; "
        "none: skip only values that are not finite",
    )
    max_skipped: int = Field(5, ge=0, description="consecutive skipped steps allowed; one more aborts the run")


class LogConfig(Section):
    """Progress bar and wandb; metrics.jsonl is always written."""

    wandb: bool = Field(False, description="mirror the metrics to wandb; offline unless an API key is configured")
    wandb_project: str = Field("sash", description="name of the wandb project")
    progress: bool = Field(True, description="show a progress bar on a terminal")


class RunConfig(Section):
    """A run: the argument of `train.run`, and the content of config.json."""

    name: str = Field(
        "run", pattern=r"^\w[\w.+-]*(/\w[\w.+-]*)*$", description="name of the run, and of its directory in out_dir"
    )
    out_dir: Path = Field(Path("runs"), description="directory in which runs are created")
    seed: int = Field(1337, ge=0, lt=2**63, description="random seed of initial weights, data order and dropout")
    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:1 or mps; auto: the first of cuda, mps, cpu that is available"
    )
    dtype: DType = Field(
        "auto",
        description="dtype of matmuls (weights stay float32); auto: bfloat16 where the hardware multiplies it "
        "natively, else float32; float16 is refused in training",
    )
    compile: Switch = Field("auto", description="use torch.compile; auto: only if it saves more time than it takes")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    init_from: Path | None = Field(
        None, description="run directory or checkpoint whose weights to start from; none: random weights"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dtype == "float16":
            raise ValueError(
                "dtype (float16) is not for training: gradients below its smallest number vanish without loss scaling, "
                "which Sash does not have; take bfloat16 or float32"
            )
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
        """The identity of the run as JSON values, without paths and display: the same for the same experiment."""
        return experiment(self)

    @property
    def global_rows(self) -> int:
        """Sequences per optimizer step."""
        return self.train.global_batch_tokens // self.model.block_size

    @property
    def micro_rows(self) -> int:
        """Sequences per forward pass of a single process; divides global_rows."""
        return self.rows_at_once()

    def rows_at_once(self, *, n_processes: int = 1, at_most: int | None = None) -> int:
        """Sequences per forward pass: a divisor of a process's rows, `at_most` so many or what suits a CPU."""
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
