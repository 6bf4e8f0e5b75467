"""Do two backends train the same adapter? Two records, compared in the order in which a difference would arise.

First what both must share to the bit: settings, model, batches, targets, initial adapter, learning rates. Records of
different things are not compared any further. Then what may differ by rounding only: the base model's losses, loss and
gradient norm of each step, the final adapter, its losses. The first place beyond tolerance is where the cause is near.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.config import BASE_MODEL
from core.files import to_json, write_atomic
from core.parity_hints import HINTS, hint_of_losses_before, hint_of_step
from core.parity_record import Record, RowRecord, StepRecord
from core.protocols import FloatArray

REPORT = "parity_report.json"
LOSS_TOLERANCE = 1e-4
"""Largest relative difference of a step's loss, and of a row's."""
NORM_TOLERANCE = 1e-3
"""Likewise of a gradient norm."""
ADAPTER_TOLERANCE = 1e-3
"""Likewise of a tensor of the final adapter: the norm of the difference over the norm."""
LOSS_FLOOR = 0.01
"""Nats per target: a smaller loss is compared as if it were this, because float32 logits don't resolve it better."""
DECAY_MARGIN = 2.0
"""Weight decay counts as proven where what it takes off the adapter is so many times the tolerance."""

_FREE_SETTINGS = (
    *("backend", "device", "output", "model.path", "model.revision", "model.trust_remote_code", "data.path"),
    "lora.init_adapter",  # the adapter itself is compared
    *("train.gradient_checkpointing", "eval.every", "eval.probe_rows", "guard", "checkpoint", "log"),
)
"""Settings, or sections of them, that don't change what is computed."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A place where the two sides part."""

    place: str
    """`settings`, `model`, `inputs`, `targets`, `validation`, `initial adapter`, `learning rate`, `base losses` (with
    an initial adapter `initial losses`), `loss`, `gradient norm`, `final adapter` or `final losses`."""
    step: int | None
    """Optimiser step, from 1; 0 before the first; None where steps have no meaning."""
    detail: str
    """The two values, in words."""
    hint: str
    """What such a place usually means, or what to change."""

    @property
    def where(self) -> str:
        if self.step is None or self.step == 0:
            return self.place
        return f"{self.place} of step {self.step}"


@dataclass(frozen=True, slots=True)
class StepComparison:
    """One step; differences are relative to the larger of the two."""

    step: int
    lr: float
    losses: tuple[float, float]
    loss_difference: float
    grad_norms: tuple[float, float]
    norm_difference: float

    @property
    def is_within(self) -> bool:
        return self.loss_difference <= LOSS_TOLERANCE and self.norm_difference <= NORM_TOLERANCE


@dataclass(frozen=True, slots=True)
class RowComparison:
    """One validation row."""

    row: int
    """Its place in the validation split, from 1."""
    losses: tuple[float, float]
    """Nats per target."""
    difference: float


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """One tensor of the final adapter."""

    name: str
    difference: float
    is_length: bool
    """Whether one side's tensor is little else than the other's, longer or shorter."""


@dataclass(frozen=True, slots=True)
class FourBitComparison:
    """Validation loss in nats per target, on the same rows for all of them: (side a, side b)."""

    num_rows: int
    num_targets: int
    descriptions: tuple[str, str]
    base_16: tuple[float, float]
    base_4: tuple[float, float]
    final_16: tuple[float, float]
    final_4: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Report:
    """What comparing two records showed. Empty lists where the comparison did not get so far."""

    a: Record
    b: Record
    mismatches: list[Difference]
    """What must be identical and is not."""
    steps: list[StepComparison]
    base_rows: list[RowComparison]
    final_rows: list[RowComparison]
    tensors: list[TensorComparison]
    first: Difference | None
    """The first place beyond tolerance."""
    four_bits: FourBitComparison | None
    four_bits_skipped: str

    @property
    def verdict(self) -> str:
        """`same`, `different`, or `not comparable`."""
        if self.mismatches:
            return "not comparable"
        return "same" if self.first is None else "different"

    @property
    def headline(self) -> str:
        """The verdict as a sentence."""
        one, other = side_names(self.a, self.b)
        if self.mismatches:
            return f"Not comparable. {one} and {other} did not train the same thing."
        if self.first is not None:
            return f"No parity. {one} and {other} part first at: {self.first.where}."
        if self.caveat:
            return f"{self.a.backend} twice: the same adapter, within tolerance."
        return f"Parity. {one} and {other} train the same adapter, within tolerance."

    @property
    def caveat(self) -> str:
        """What records of one backend can't prove; empty where there are two backends."""
        if self.a.backend != self.b.backend:
            return ""
        if self.a.device == self.b.device:
            return "this proves that one backend repeats itself, not that two agree"
        return "this proves that one backend agrees with itself on another device, not that two agree"

    @property
    def unproven(self) -> list[str]:
        """Settings whose effect over these steps is too weak for a fault in them to be seen, a line each."""
        return [] if self.mismatches else list(_unproven(self.a))

    @property
    def exit_code(self) -> int:
        return 0 if self.verdict == "same" else 1

    def to_dict(self) -> dict[str, Any]:
        """What `parity_report.json` holds."""
        return {
            "format": 1,
            "verdict": self.verdict,
            "caveat": self.caveat or None,
            "first_difference": None if self.first is None else _difference_dict(self.first),
            "mismatches": [_difference_dict(difference) for difference in self.mismatches],
            "not_proven": self.unproven,
            "start": self.a.start,
            "tolerances": {
                "loss": LOSS_TOLERANCE,
                "grad_norm": NORM_TOLERANCE,
                "adapter": ADAPTER_TOLERANCE,
                "loss_floor": LOSS_FLOOR,
            },
            "sides": [_side_dict(self.a), _side_dict(self.b)],
            "steps": [asdict(step) for step in self.steps],
            "rows": {
                "base": [asdict(row) for row in self.base_rows],
                "final": [asdict(row) for row in self.final_rows],
            },
            "adapter": [asdict(tensor) for tensor in self.tensors],
            "four_bits": None if self.four_bits is None else asdict(self.four_bits),
            "four_bits_skipped": self.four_bits_skipped or None,
        }


def compare(a: Record, b: Record) -> Report:
    """Compares two records; in every pair of the report, `a` comes first."""
    mismatches = list(_mismatches(a, b))
    if mismatches:
        return Report(a, b, mismatches, [], [], [], [], mismatches[0], None, "the records can't be compared")
    steps = [_compare_step(one, other) for one, other in zip(a.steps, b.steps, strict=True)]
    base_rows = _compare_rows(a.rows, b.rows, lambda rows: rows.base_nll)
    final_rows = _compare_rows(a.rows, b.rows, lambda rows: rows.final_nll)
    tensors = [_compare_tensor(name, a.adapter[name], b.adapter[name]) for name in a.adapter]
    found = _differences(a, b, steps, base_rows, final_rows, tensors)
    four_bits = _compare_four_bits(a, b)
    skipped = "" if four_bits else _why_skipped(a, b)
    return Report(a, b, [], steps, base_rows, final_rows, tensors, next(found, None), four_bits, skipped)


def side_names(a: Record, b: Record) -> tuple[str, str]:
    """What the sides are called: by backend, and by number where that is the same."""
    return (a.backend, b.backend) if a.backend != b.backend else (f"{a.backend} (1)", f"{b.backend} (2)")


def write_report(folder: Path, report: Report) -> None:
    """Writes `parity_report.json`."""
    write_atomic(folder / REPORT, to_json(report.to_dict()))


def worst_row(rows: list[RowComparison]) -> RowComparison:
    """The row that differs most."""
    return max(rows, key=lambda row: row.difference)


# --- what must be identical -------------------------------------------------------------------------------------------


def _mismatches(a: Record, b: Record) -> Iterator[Difference]:
    different = _different_settings(a, b)
    if different:
        shown = ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
        yield Difference("settings", None, shown, "record both sides with the same presets, files and flags")
    if a.model_fingerprint != b.model_fingerprint:
        detail = f"{_of_each(a, b, a.model, b.model)} are not the same files"
        yield Difference("model", None, detail, "use one model folder, or one hub id with one model.revision")
    if different:
        return  # batches, adapter and rates follow from the settings
    yield from _different_batches(a, b)
    if a.initial_adapter != b.initial_adapter or _shapes(a) != _shapes(b):
        detail = "the learners did not start from the same tensors"
        hint = "set the same lora settings and the same train.seed; if they are, the code of the two sides differs"
        yield Difference("initial adapter", None, detail, hint)
    for one, other in zip(a.steps, b.steps, strict=False):
        if one.lr != other.lr:
            detail = _of_each(a, b, f"{one.lr:.9g}", f"{other.lr:.9g}")
            yield Difference("learning rate", one.step, detail, "record both sides with the same version of Twinkeel")
            return


def _different_batches(a: Record, b: Record) -> Iterator[Difference]:
    hint = "use the same data file on both sides, and the same version of Twinkeel"
    if len(a.steps) != len(b.steps):
        detail = f"steps: {_of_each(a, b, len(a.steps), len(b.steps))}"
        yield Difference("inputs", None, detail, "record both sides with the same --steps")
    for name in ("inputs", "targets"):
        for one, other in zip(a.steps, b.steps, strict=False):
            if getattr(one, name) != getattr(other, name):
                yield Difference(name, one.step, f"the batches hold other {name}", hint)
                break
    validation = (a.validation_inputs, a.validation_targets) != (b.validation_inputs, b.validation_targets)
    if validation or a.rows.row_ids != b.rows.row_ids:
        yield Difference("validation", None, "the validation rows are not the same", hint)


def _shapes(record: Record) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in record.adapter.items()}


def _different_settings(a: Record, b: Record) -> list[str]:
    """`lora.rank 8 (mlx) and 16 (cuda)`, for every setting that matters."""
    one, other = dict(_flat(a.config)), dict(_flat(b.config))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name) and not _is_free(name)]
    return [f"{name} {_of_each(a, b, one.get(name), other.get(name))}" for name in names]


def _of_each(a: Record, b: Record, one: object, other: object) -> str:
    """Two values, and whose each is."""
    return f"{one} ({side_names(a, b)[0]}) and {other} ({side_names(a, b)[1]})"


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in _FREE_SETTINGS)


# --- what may differ by rounding --------------------------------------------------------------------------------------


def relative(one: float, other: float, *, floor: float = 0.0) -> float:
    """The difference over the larger of the two (at least `floor`); 0 where both are 0."""
    scale = max(abs(one), abs(other), floor)
    return abs(one - other) / scale if scale else 0.0


def _compare_step(one: StepRecord, other: StepRecord) -> StepComparison:
    return StepComparison(
        step=one.step,
        lr=one.lr,
        losses=(one.loss, other.loss),
        loss_difference=relative(one.loss, other.loss, floor=LOSS_FLOOR),
        grad_norms=(one.grad_norm, other.grad_norm),
        norm_difference=relative(one.grad_norm, other.grad_norm),
    )


def _compare_rows(a: RowRecord, b: RowRecord, nll: Callable[[RowRecord], list[float]]) -> list[RowComparison]:
    ours, theirs = _means(nll(a), a.num_targets), _means(nll(b), b.num_targets)
    return [
        RowComparison(row + 1, (one, other), relative(one, other, floor=LOSS_FLOOR))
        for row, one, other in zip(a.row_ids, ours, theirs, strict=True)
    ]


def _means(nll: list[float], num_targets: list[int]) -> list[float]:
    return [value / max(number, 1) for value, number in zip(nll, num_targets, strict=True)]


def _compare_tensor(name: str, one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> TensorComparison:
    a, b = one.astype(np.float64), other.astype(np.float64)
    scale, apart = max(np.linalg.norm(a), np.linalg.norm(b)), np.linalg.norm(a - b)
    if not apart:
        return TensorComparison(name, 0.0, False)
    # the cosine between the difference and the tensor itself
    along = abs(np.vdot(a + b, a - b)) / max(np.linalg.norm(a + b) * apart, np.finfo(np.float64).tiny)
    return TensorComparison(name, float(apart / scale), bool(along > 0.9))


def _differences(
    a: Record,
    b: Record,
    steps: list[StepComparison],
    base_rows: list[RowComparison],
    final_rows: list[RowComparison],
    tensors: list[TensorComparison],
) -> Iterator[Difference]:
    """Every place beyond tolerance, in causal order."""
    before = "base losses" if a.start == BASE_MODEL else "initial losses"
    yield from _count_differences(before, a.rows, b.rows)
    yield from _row_differences(before, 0, base_rows, hint_of_losses_before(a.start))
    for index, (one, other) in enumerate(zip(a.steps, b.steps, strict=True)):
        yield from _step_differences(steps[: index + 1], one, other)
    tensor = max(tensors, key=lambda tensor: tensor.difference)
    if tensor.difference > ADAPTER_TOLERANCE:
        detail = f"{tensor.name} differs by {tensor.difference:.2g} of its norm"
        hint = HINTS["shorter adapter" if tensor.is_length else "final adapter"]
        yield Difference("final adapter", steps[-1].step, detail, hint)
    yield from _row_differences("final losses", steps[-1].step, final_rows, HINTS["final losses"])


def _count_differences(place: str, a: RowRecord, b: RowRecord) -> Iterator[Difference]:
    """The targets are the same to the bit: a side that counts them otherwise leaves some out, or adds some."""
    for row, one, other in zip(a.row_ids, a.num_targets, b.num_targets, strict=True):
        if one != other:
            detail = f"validation row {row + 1} is summed over {one} and {other} targets"
            yield Difference(place, 0, detail, HINTS["targets counted"])
            return


def _row_differences(place: str, step: int, rows: list[RowComparison], hint: str) -> Iterator[Difference]:
    beyond = [row for row in rows if row.difference > LOSS_TOLERANCE]
    if beyond:
        worst = worst_row(beyond)
        detail = (
            f"{len(beyond)} of {len(rows)} validation rows, the worst is row {worst.row}: "
            f"{worst.losses[0]:.6f} and {worst.losses[1]:.6f} nats, {worst.difference:.2g} apart"
        )
        yield Difference(place, step, detail, hint)


def _step_differences(steps: list[StepComparison], one: StepRecord, other: StepRecord) -> Iterator[Difference]:
    """Of the last of `steps`."""
    step = steps[-1]
    if one.num_targets != other.num_targets:
        detail = f"summed over {one.num_targets} and {other.num_targets} targets"
        yield Difference("loss", step.step, detail, HINTS["targets counted"])
    if step.loss_difference > LOSS_TOLERANCE:
        detail = f"{step.losses[0]:.7f} and {step.losses[1]:.7f}, {step.loss_difference:.2g} apart"
        hint = hint_of_step("loss", [step.loss_difference for step in steps])
        yield Difference("loss", step.step, detail, hint)
    if step.norm_difference > NORM_TOLERANCE:
        detail = f"{step.grad_norms[0]:.7g} and {step.grad_norms[1]:.7g}, {step.norm_difference:.2g} apart"
        hint = hint_of_step("gradient norm", [step.norm_difference for step in steps])
        yield Difference("gradient norm", step.step, detail, hint)


# --- what is too weak to be proven ------------------------------------------------------------------------------------


def _unproven(record: Record) -> Iterator[str]:
    optim, steps = record.config["optim"], record.steps
    decay, rates = optim["weight_decay"], sum(step.lr for step in steps)
    if decay and 0 < rates * decay < DECAY_MARGIN * ADAPTER_TOLERANCE:
        enough = math.ceil(100 * DECAY_MARGIN * ADAPTER_TOLERANCE / rates) / 100
        yield (
            f"weight decay is too small here to be proven: {decay:g} shortens the adapter by {rates * decay:.1g} of "
            f"its length in {len(steps)} steps, the tolerance is {ADAPTER_TOLERANCE:g}; "
            f"prove it with --set optim.weight_decay={enough:g}"
        )
    limit, largest = optim["max_grad_norm"], max(step.grad_norm for step in steps)
    if limit is not None and largest <= limit:
        yield (
            f"clipping never acted: every gradient norm was at most {largest:.2g}, the limit is {limit:g}; "
            f"prove it with --set optim.max_grad_norm={largest / 2:.1g}"
        )
    if len(steps) == 1:
        yield "what the optimiser remembers from one step to the next: prove it with more --steps"


# --- four bits --------------------------------------------------------------------------------------------------------


def _why_skipped(a: Record, b: Record) -> str:
    """Why there are no 4-bit losses to compare, and on which side if it is one."""
    one, other = a.four_bits.skipped, b.four_bits.skipped
    if one == other:
        return one or "no common rows"
    named = zip(side_names(a, b), (one, other), strict=True)
    return "; ".join(why if why.startswith(name) else f"{name}: {why}" for name, why in named if why)


def _compare_four_bits(a: Record, b: Record) -> FourBitComparison | None:
    """On the rows that both sides tried; None where one did not."""
    if a.four_bits.rows is None or b.four_bits.rows is None:
        return None
    shared = set(a.four_bits.rows.row_ids) & set(b.four_bits.rows.row_ids)
    if not shared:
        return None
    pairs = [(a.rows, b.rows), (a.four_bits.rows, b.four_bits.rows)]
    means = [[_mean(rows, shared, final=final) for rows in pair] for final in (False, True) for pair in pairs]
    base_16, base_4, final_16, final_4 = ((one, other) for one, other in means)
    return FourBitComparison(
        num_rows=len(shared),
        num_targets=int(_chosen(a.rows, a.rows.num_targets, shared).sum()),
        descriptions=(a.four_bits.description, b.four_bits.description),
        base_16=base_16,
        base_4=base_4,
        final_16=final_16,
        final_4=final_4,
    )


def _mean(rows: RowRecord, shared: set[int], *, final: bool) -> float:
    nll = rows.final_nll if final else rows.base_nll
    return float(_chosen(rows, nll, shared).sum() / _chosen(rows, rows.num_targets, shared).sum())


def _chosen(rows: RowRecord, column: list[float] | list[int], shared: set[int]) -> FloatArray:
    return np.array([value for row, value in zip(rows.row_ids, column, strict=True) if row in shared], np.float64)


def _difference_dict(difference: Difference) -> dict[str, Any]:
    return {**asdict(difference), "where": difference.where}


def _side_dict(record: Record) -> dict[str, Any]:
    names = (
        *("backend", "device", "description", "packages", "created", "model", "data", "model_fingerprint"),
        *("inputs", "targets", "validation_inputs", "validation_targets", "initial_adapter", "config"),
    )
    return {name: getattr(record, name) for name in names}
