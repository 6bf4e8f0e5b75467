"""One side of `parity`: what a backend computed, written down so that another machine can compare it.

A record is a folder: `record.json` (what was trained on what, SHA-256 of everything both sides must share, every loss)
and `adapter.safetensors` (the adapter after the last step, float32, neutral names). The steps are the trainer's own:
the same plan, batches and rates. Only what depends on chance or on fewer bits is switched off first, by `certified`.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.config import BASE_MODEL, INITIAL_ADAPTER, RunConfig, to_plain
from core.errors import NonFiniteLossError, UserError
from core.files import disk_errors, free_name, read_json, sha256_of, to_json, write_atomic
from core.models import ResolvedModel
from core.protocols import IGNORE, Batch, DeviceReport, Learner, RowLosses, Tensors, TrainState
from core.settings import Settings
from core.settings import values as setting_values
from core.tensor_files import read_float32
from core.trainer import StepSource, TrainingData

RECORD = "record.json"
ADAPTER = "adapter.safetensors"
FORMAT = 1
NOT_ASKED = "not asked for"
"""Why there are no 4-bit losses, where nobody wanted them."""
FORCED: dict[str, Any] = {
    "model.bits": 16,
    "model.dtype": "float32",
    "model.low_memory": False,
    "model.stream_layers": False,
    "lora.dropout": 0.0,
    "optim.state_bits": 32,
    "optim.paged": False,
    "log.trackers": [],
}
"""What every record is made with, whatever was asked for."""
CPU_TOKEN_BUDGET = 1500
"""Positions of validation rows that 4-bit weights are tried on where there is no accelerator: MLX is slow there."""
_SHOWN_STEPS = 10

_log = logging.getLogger("twinkeel")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimiser step."""

    step: int
    lr: float
    inputs: str
    """SHA-256 of the row ids and input tokens of its micro-batches."""
    targets: str
    """SHA-256 of their targets."""
    loss: float
    """Nats per target token."""
    grad_norm: float
    """Before clipping."""
    num_targets: int


@dataclass(frozen=True, slots=True)
class RowRecord:
    """Losses of rows before the first step and after the last: four lists of the same length."""

    row_ids: list[int]
    num_targets: list[int]
    base_nll: list[float]
    """Nats, summed over the row's targets; of the initial adapter where there is one."""
    final_nll: list[float]


@dataclass(frozen=True, slots=True)
class FourBits:
    """The same rows on 4-bit weights, before and after; not part of the certificate."""

    description: str
    """What was loaded, for a person."""
    rows: RowRecord | None
    """None where it was left out."""
    skipped: str = ""
    """Why it was left out."""


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that one side says."""

    backend: str
    device: str
    description: str
    packages: dict[str, str]
    created: str
    """Date and time, ISO 8601."""
    model: str
    data: str
    config: dict[str, Any]
    """The resolved settings as plain values."""
    model_fingerprint: str
    inputs: str
    """SHA-256 over the inputs of all steps."""
    targets: str
    validation_inputs: str
    validation_targets: str
    initial_adapter: str
    """SHA-256 of the adapter that the learner held before the first step."""
    steps: list[StepRecord]
    rows: RowRecord
    four_bits: FourBits
    adapter: Mapping[str, npt.NDArray[np.float32]]
    """The adapter after the last step."""

    @property
    def start(self) -> str:
        """What there was before the first step, in words."""
        return BASE_MODEL if self.config["lora"]["init_adapter"] is None else INITIAL_ADAPTER


class RecordedData(TrainingData, Protocol):
    """Rows that know where they come from."""

    @property
    def name(self) -> str: ...
    @property
    def num_val_rows(self) -> int: ...


class RecordedJob(Protocol):
    """What a record says of a prepared job; `core.workflow.job.Job` is one."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def device(self) -> DeviceReport: ...
    @property
    def model(self) -> ResolvedModel: ...
    @property
    def data(self) -> RecordedData: ...
    @property
    def identity(self) -> Mapping[str, str]: ...


# --- settings ---------------------------------------------------------------------------------------------------------


def certified(settings: Settings, *, steps: int) -> tuple[RunConfig, list[str]]:
    """The settings with everything off that can't be equal on two backends, for `steps` optimiser steps.

    Returns:
        The configuration, and `name: old -> new` for each setting that somebody had asked for otherwise.
    """
    forced = _forced(settings.config, steps)
    config = settings.config
    for name, value in forced.items():
        config = _with(config, name, value)
    given = dict(setting_values(settings.config))
    overridden = [
        f"{name}: {given[name]} -> {value}"
        for name, value in forced.items()
        if name in settings.sources and given[name] != value and name != "train.epochs"
    ]
    return config, overridden


def _forced(config: RunConfig, steps: int) -> dict[str, Any]:
    epochs = max(config.train.epochs, float(steps))  # an epoch has a step at least: max_steps decides
    return {**FORCED, "train.max_steps": steps, "train.epochs": epochs}


def _with(config: RunConfig, name: str, value: Any) -> RunConfig:
    section, field = name.split(".")
    changed = getattr(config, section).model_copy(update={field: value})
    return config.model_copy(update={section: changed})


# --- recording --------------------------------------------------------------------------------------------------------


def record_training(job: RecordedJob, learner: Learner) -> Record:
    """Trains as `core.trainer` does and writes down every number; the 4-bit part is left open.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite.
    """
    initial = hash_tensors(learner.export_state().adapter)
    validation = job.data.validation
    _log.info("%s: %s on %d validation rows", job.config.backend, job.config.start, job.data.num_val_rows)
    base = learner.evaluate(validation)
    source = StepSource(job.config, job.data)
    steps = [_record_step(job, learner, source, step) for step in range(1, source.plan.total_steps + 1)]
    final = learner.evaluate(validation)
    _refuse_non_finite(base, final, start=job.config.start)
    return Record(
        backend=job.config.backend,
        device=job.device.device,
        description=learner.description,
        packages=dict(job.device.packages),
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        model=job.model.name,
        data=job.data.name,
        config=to_plain(job.config),
        model_fingerprint=job.identity["model"],
        inputs=_hash_texts(step.inputs for step in steps),
        targets=_hash_texts(step.targets for step in steps),
        validation_inputs=hash_inputs(validation),
        validation_targets=hash_targets(validation),
        initial_adapter=initial,
        steps=steps,
        rows=_rows(base, final),
        four_bits=FourBits("", None, NOT_ASKED),
        adapter={name: np.asarray(array, np.float32) for name, array in learner.export_state().adapter.items()},
    )


def _record_step(job: RecordedJob, learner: Learner, source: StepSource, step: int) -> StepRecord:
    batches, lr = source.microbatches(step), source.lr(step)
    output = learner.train_step(batches, step=step, lr=lr)
    loss, grad_norm = float(output.loss), float(output.grad_norm)  # waits for the device at every step
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        rows = job.data.name_rows(np.concatenate([batch.row_ids for batch in batches]))
        raise NonFiniteLossError(
            f"{job.config.backend}, step {step}: loss {loss}, gradient norm {grad_norm} on rows {rows}",
            hint=f"try a lower rate: --lr {job.config.optim.lr / 3:.1g}",
        )
    total = source.plan.total_steps
    if step == total or step % max(total // _SHOWN_STEPS, 1) == 0:
        _log.info("%s: step %d/%d  loss %.4f  grad norm %.4f", job.config.backend, step, total, loss, grad_norm)
    return StepRecord(
        step=step,
        lr=lr,
        inputs=hash_inputs(batches),
        targets=hash_targets(batches),
        loss=loss,
        grad_norm=grad_norm,
        num_targets=output.num_targets,
    )


def _refuse_non_finite(base: RowLosses, final: RowLosses, *, start: str) -> None:
    for when, losses in ((f"of the {start}", base), ("after the last step", final)):
        if not np.isfinite(losses.nll).all():
            raise NonFiniteLossError(f"a validation loss {when} is not finite", hint="try a lower rate with --lr")


def _rows(base: RowLosses, final: RowLosses) -> RowRecord:
    return RowRecord(
        row_ids=[int(row) for row in base.row_ids],
        num_targets=[int(number) for number in base.num_targets],
        base_nll=[float(nll) for nll in base.nll],
        final_nll=[float(nll) for nll in final.nll],
    )


def record_four_bits(record: Record, learner: Learner, batches: Sequence[Batch], *, budget: int | None) -> Record:
    """Adds the losses on 4-bit weights; `learner` holds those weights and the initial adapter.

    Args:
        batches: the validation split.
        budget: about how many positions to compute; None for every row.
    """
    some = sample_rows(batches, budget=budget)
    _log.info("%s: %s, %d validation rows on %s", record.backend, record.start, len(some), learner.description)
    base = learner.evaluate(some)
    _log.info("%s: trained adapter, the same rows", record.backend)
    learner.import_state(TrainState(adapter=record.adapter, optimizer={}))
    return replace(record, four_bits=FourBits(learner.description, _rows(base, learner.evaluate(some))))


def without_four_bits(record: Record, why: str) -> Record:
    """The record with a line in place of the 4-bit losses."""
    return replace(record, four_bits=FourBits("", None, why))


def sample_rows(batches: Sequence[Batch], *, budget: int | None) -> list[Batch]:
    """Rows evenly from the whole split, one in a batch, of about `budget` positions together; at least one."""
    single = [
        Batch(batch.row_ids[row : row + 1], batch.inputs[row : row + 1], batch.targets[row : row + 1])
        for batch in batches
        for row in range(len(batch.row_ids))
        if (batch.targets[row] != IGNORE).any()
    ]
    if budget is None:
        return single
    return single[:: max(math.ceil(sum(batch.num_tokens for batch in single) / budget), 1)]


# --- hashes -----------------------------------------------------------------------------------------------------------


def hash_inputs(batches: Sequence[Batch]) -> str:
    """SHA-256 of row ids and tokens: which rows, in which order, padded how."""
    return _hash_arrays(array for batch in batches for array in (batch.row_ids, batch.inputs))


def hash_targets(batches: Sequence[Batch]) -> str:
    """SHA-256 of the targets: where the loss is taken, and on which tokens."""
    return _hash_arrays(batch.targets for batch in batches)


def hash_tensors(tensors: Tensors) -> str:
    """SHA-256 of names, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}:{_hash_arrays([tensors[name]])}\n".encode())
    return digest.hexdigest()


def _hash_arrays(arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _hash_texts(texts: Any) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


# --- the folder -------------------------------------------------------------------------------------------------------


def write_record(folder: Path, record: Record) -> None:
    """Writes the folder, `record.json` last: a folder that has it is whole."""
    from safetensors.numpy import save

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / ADAPTER, save({name: np.ascontiguousarray(array) for name, array in record.adapter.items()}))
    plain = asdict(replace(record, adapter={}))
    del plain["adapter"]
    plain = {"format": FORMAT, **plain, "adapter_sha256": sha256_of(folder / ADAPTER)}
    write_atomic(folder / RECORD, to_json(plain))


def read_record(folder: Path) -> Record:
    """Reads a record.

    Raises:
        UserError: there is no such folder, it is not a record, is damaged, or was written by another version.
    """
    path = folder / RECORD
    if not path.is_file():
        raise _no_record(folder)
    plain = read_json(path)
    if not isinstance(plain, dict) or "format" not in plain:
        raise _damaged(path, "not JSON, or not ours")
    if plain["format"] != FORMAT:
        raise UserError(
            f"{path}: format {plain['format']}, but this version reads format {FORMAT}",
            hint="record both sides with the same version of Twinkeel",
        )
    adapter = read_float32(folder / ADAPTER)
    if sha256_of(folder / ADAPTER) != plain.get("adapter_sha256"):
        raise _damaged(folder / ADAPTER, "its SHA-256 is not the one that the record gives")
    try:
        return _from_plain(plain, adapter)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _from_plain(plain: Mapping[str, Any], adapter: Mapping[str, npt.NDArray[np.float32]]) -> Record:
    simple = {
        field.name: plain[field.name]
        for field in fields(Record)
        if field.name not in ("steps", "rows", "four_bits", "adapter")
    }
    four = plain["four_bits"]
    return Record(
        **simple,
        steps=[_step_from(step) for step in plain["steps"]],
        rows=_rows_from(plain["rows"]),
        four_bits=FourBits(
            str(four["description"]), None if four["rows"] is None else _rows_from(four["rows"]), str(four["skipped"])
        ),
        adapter=adapter,
    )


def _step_from(plain: Mapping[str, Any]) -> StepRecord:
    numbers = {name: float(plain[name]) for name in ("lr", "loss", "grad_norm")}
    return StepRecord(
        step=int(plain["step"]),
        inputs=str(plain["inputs"]),
        targets=str(plain["targets"]),
        num_targets=int(plain["num_targets"]),
        **numbers,
    )


def _rows_from(plain: Mapping[str, Any]) -> RowRecord:
    rows = RowRecord(
        row_ids=[int(row) for row in plain["row_ids"]],
        num_targets=[int(number) for number in plain["num_targets"]],
        base_nll=[float(nll) for nll in plain["base_nll"]],
        final_nll=[float(nll) for nll in plain["final_nll"]],
    )
    if len({len(rows.row_ids), len(rows.num_targets), len(rows.base_nll), len(rows.final_nll)}) != 1:
        raise ValueError("lists of different length")
    return rows


def _no_record(folder: Path) -> UserError:
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        return UserError(f"{folder}: {what}", hint="give two folders that parity record made")
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{RECORD}"))
    if inside:
        hint = f"the records are the folders in it: {', '.join(inside)}"
    else:
        hint = f"make one with: python cli.py parity record --output {free_name('parity-record')}"
    return UserError(f"{folder}: not a parity record (no {RECORD})", hint=hint)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: damaged ({why})", hint="copy the folder again, or record this side again")
