"""The configuration of a run: declared once, here.

A field's docstring is its help, its documentation and the text of `config show --help`; its constraints are its
validation. Every step count is in optimiser steps. A test proves for each field that changing it changes something.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

BackendName = Literal["auto", "mlx", "cuda"]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

BASE_MODEL = "base model"
INITIAL_ADAPTER = "initial adapter"


class Section(BaseModel):
    """A group of settings: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class ModelConfig(Section):
    path: Annotated[str, Field(min_length=1)] = "auto"
    """Hub id, local folder in Hugging Face layout, or `auto`: the largest reference model this machine can hold."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    bits: Literal[4, 16] = 4
    """Precision of the frozen base: 4 (MLX affine group 64, NF4 with double quantisation on CUDA) or 16."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type. `auto`: bfloat16 on an accelerator, float32 on a CPU."""
    cache_packed: bool = True
    """Keep 4-bit weights that were packed here (CUDA: a mixture's, or with layers left out) for the next start."""
    low_memory: bool = False
    """Keep only the layers with adapters on the device: the frozen ones below are read one by one to fill the prefix
    store, and not again. Needs `lora.frozen_fraction`."""
    stream_layers: bool = False
    """Keep not even these: each layer's weights come to the device when it is their turn, forward and backward."""
    trust_remote_code: bool = False
    """Let code from the model folder run (tokenizers and models with code of their own)."""


class DataConfig(Section):
    path: Annotated[str, Field(min_length=1)] = "data/samples/expert.jsonl"
    """File (JSONL, JSON, CSV, Parquet), folder with train/valid/test files, or hub id of a data set."""
    fields: dict[str, str] = {}
    """Other names for the columns, as `role: column`, such as `{prompt: question, completion: answer}`."""
    max_tokens: Annotated[int, Field(ge=8)] = 2048
    """Longer rows are cut off at the end."""
    train_on: Literal["completions", "all"] = "completions"
    """Where the loss is taken: on the answers, or on every token."""
    validation: Fraction = 0.2
    """Share of the rows held out for validation, when the data brings no validation split of its own."""
    test: Fraction = 0.0
    """Share of the rows held out for testing, when the data brings no test split of its own."""
    stratify: str | None = None
    """Column whose values should be as frequent in validation and test as in training, such as a label."""
    group: str | None = None
    """Column whose equal values stay on one side of the split: a document's chunks, a patient's rows."""
    near_duplicates: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.7
    """Rows that are at least this similar (Jaccard similarity of their 5-character pieces, estimated by MinHash) stay
    on one side of the split; null keeps only equal rows together."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Cut the rows into so many folds, of which one validates; `train --folds` trains one run for each."""
    fold: Count = 1
    """The fold that validates, counted from 1, when `data.folds` is set."""
    skip_bad: bool = False
    """Leave out rows that can't be read (and say how many) instead of stopping at the first."""
    strict: bool = False
    """Don't start when the check of the data has found something; `train --strict` sets it."""

    @model_validator(mode="after")
    def _leave_rows_to_train_on(self) -> DataConfig:
        if self.validation + self.test >= 1.0:
            raise ValueError(
                f"data.validation {self.validation:g} and data.test {self.test:g} leave no rows to train on"
            )
        if self.folds is not None and self.fold > self.folds:
            raise ValueError(f"data.fold {self.fold}: there are only {self.folds} folds (data.folds)")
        return self


class LoraConfig(Section):
    rank: Count = 16
    """Rank of the adapter matrices."""
    alpha: Positive = 32.0
    """Scale of the adapter: alpha / rank (with rslora: alpha / sqrt(rank))."""
    dropout: Fraction = 0.05
    """Dropout on the adapter's input, in training only."""
    targets: Literal["attention", "all-linear"] | list[str] = "attention"
    """`attention` (q k v o), `all-linear` (and gate up down), or a list of module names."""
    frozen_fraction: Fraction = 0.0
    """First fraction of the layers that gets no adapter."""
    rslora: bool = False
    """Rank-stabilised LoRA: scale by alpha / sqrt(rank)."""
    init_adapter: str | None = None
    """Adapter folder (PEFT's, mlx-lm's or a run) to go on from; it decides rank, alpha, rslora, targets and layers."""

    @field_validator("targets", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        """`--set lora.targets=q_proj,v_proj` is a list too; a misspelt word must not become a module name."""
        if isinstance(value, str) and ("," in value or value.endswith(("_proj", "gate"))):
            return [name.strip() for name in value.split(",") if name.strip()]
        return value


class OptimConfig(Section):
    name: Literal["adamw", "adafactor", "sgd", "lion"] = "adamw"
    """Optimiser."""
    lr: Positive = 2e-4
    """Peak learning rate."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay on the adapter."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the moments (adamw, lion)."""
    eps: Positive = 1e-8
    """Added to the denominator (adamw)."""
    momentum: Fraction = 0.0
    """Momentum (sgd)."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are clipped to this global norm; null for no clipping."""
    label_smoothing: Fraction = 0.0
    """Share of the target's probability spread over the vocabulary, in training only; reported losses are without."""
    state_bits: Literal[8, 32] = 32
    """Precision of the optimiser's state; 8 is for adamw on a CUDA device."""
    paged: bool = False
    """Keep the 8-bit state in paged memory (CUDA)."""

    @model_validator(mode="after")
    def _combinations(self) -> OptimConfig:
        if self.state_bits == 8 and self.name != "adamw":
            raise ValueError(f"optim.state_bits 8 is for optim.name adamw, not {self.name}; set optim.state_bits=32")
        if self.paged and self.state_bits != 8:
            raise ValueError("optim.paged is for 8-bit state; set optim.state_bits=8 or optim.paged=false")
        return self


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "constant", "cosine_restarts"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    min_lr: NonNegative = 0.0
    """Rate at the end of a decay."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps for the linear warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of warm-up; when given, warmup_ratio is not used."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """How often cosine_restarts goes back to the peak rate."""


class TrainConfig(Section):
    epochs: Positive = 3
    """Passes over the training rows; may be a fraction."""
    max_steps: Count | None = None
    """Train for so many optimiser steps, fewer or more than `epochs` says."""
    batch_size: Count = 2
    """Rows in a micro-batch."""
    batch_tokens: Count | None = None
    """Positions in a micro-batch, padding included, in place of `batch_size`: short rows go many at a time."""
    accumulation: Count = 4
    """Micro-batches in an optimiser step."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, a third slower. `auto`: from 1 billion parameters."""
    prefix_store: Literal["auto"] | bool = "auto"
    """Compute what the frozen layers below the first adapter make of each row once, and keep it on disk for this run
    and the next. `auto`: when it spares a tenth of their work."""
    prefix_store_gb: Positive = 20.0
    """Largest size on disk of all that is kept so; what was used longest ago goes first."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides the split, the order of the rows, the initial adapter and the dropout."""


class EvalConfig(Section):
    every: Count = 50
    """Optimiser steps between evaluations; there is also one before the first step and one after the last."""
    probe_rows: Count = 200
    """Training rows that are evaluated the same way as the validation split, for the gap."""
    batch_size: Count | None = None
    """Rows in an evaluation batch; null: train.batch_size, or train.batch_tokens."""
    general: bool = False
    """At every evaluation, also measure the loss on 200 shipped general texts and how many of their tokens the model
    would now say otherwise: what training does to everything else."""


class GuardConfig(Section):
    patience: Annotated[int, Field(ge=1)] | None = 3
    """Evaluations without improvement before training stops; null: never stop early."""
    min_delta: NonNegative = 0.0
    """Smallest fall of the validation loss that counts as an improvement, in nats."""
    grades: tuple[Finite, Finite, Finite] = (0.05, 0.15, 0.30)
    """Gaps, in nats, below which the grade is EXCELLENT, GOOD, MODERATE; CRITICAL from the last."""
    relative_gap: Positive = 0.10
    """Gap as a share of the probe's loss above which there is a warning."""
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    """Level of the gap's bootstrap interval."""

    @model_validator(mode="after")
    def _grades_rise(self) -> GuardConfig:
        if not 0 < self.grades[0] < self.grades[1] < self.grades[2]:
            raise ValueError(f"guard.grades must rise from above 0, not {list(self.grades)}")
        return self


class CheckpointConfig(Section):
    every: Count = 50
    """Optimiser steps between checkpoints; the best one is always saved."""
    keep: Count = 3
    """How many of the newest checkpoints stay; the best one always stays."""


class MoeConfig(Section):
    aux_loss_weight: NonNegative = 0.001
    """Weight of the load-balancing loss in what is optimised, when there is an adapter on a mixture's router."""
    train_router: bool = False
    """Put an adapter on a mixture's router, whatever `lora.targets` names."""


class LogConfig(Section):
    every: Count = 10
    """Optimiser steps between records in metrics.jsonl."""
    trackers: list[Literal["wandb", "tensorboard", "trackio", "mlflow"]] = []
    """Experiment trackers to write to as well. One that fails never stops a run."""
    project: Annotated[str, Field(min_length=1)] = "twinkeel"
    """The trackers' project (MLflow: experiment)."""


class RunConfig(Section):
    """Everything that decides a run."""

    backend: BackendName = "auto"
    """`mlx`, `cuda` (PyTorch, on a CPU too), or `auto`: MLX on a Mac, else CUDA."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute. `auto`: the accelerator if there is one."""
    output: str | None = None
    """Run folder; null: a new one under runs/."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    moe: MoeConfig = MoeConfig()
    log: LogConfig = LogConfig()

    @property
    def start(self) -> str:
        """What the first step starts from, in words."""
        return BASE_MODEL if self.lora.init_adapter is None else INITIAL_ADAPTER

    @model_validator(mode="after")
    def _across_sections(self) -> RunConfig:
        if self.schedule.min_lr > self.optim.lr:
            raise ValueError(f"schedule.min_lr {self.schedule.min_lr:g} is above optim.lr {self.optim.lr:g}")
        return self


FREE_ON_RESUME = (
    "log.project",
    "log.trackers",
    "model.cache_packed",
    "model.low_memory",
    "model.stream_layers",
    "train.prefix_store",
    "train.prefix_store_gb",
)
"""Settings that change where things are kept and no result: a run may go on with others."""


def residence(config: RunConfig) -> list[str]:
    """Which layers are not on the device throughout, in words; nothing when all are."""
    if config.model.stream_layers:
        return ["a layer at a time"]
    return ["frozen layers left out"] if config.model.low_memory else []


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as YAML and JSON can hold it (tuples become lists)."""
    plain: dict[str, Any] = config.model_dump(mode="json")
    return plain
