"""K folds of one data set: what each run's summary says, the spread between them, and the verdict on their mean.

Pure but for reading the folder. A parent folder holds `folds.json` (the plan and how far it is), the folds as ordinary
run folders `fold-1` to `fold-K`, perhaps `final`, and at the end `folds_summary.json`.

A loss is given in two ways, which differ as the folds differ in size: the mean of the folds' losses, each fold counted
once, which has a spread and an interval; and the pooled loss of all validation rows, each target token counted once.

The interval of a mean over folds is Student's t (K - 1 degrees of freedom). The folds share most of their training
rows, so it is somewhat too narrow, and no estimate from one round of folds can mend that (Bengio and Grandvalet 2004,
"No unbiased estimator of the variance of k-fold cross-validation", JMLR 5).
"""

from __future__ import annotations

import math
import socket
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.config import GuardConfig
from core.errors import UserError
from core.files import read_json
from core.overfitting import GRADES, Grade, grade_of
from core.records import number, whole
from core.row_losses import read_row_losses
from core.run import COMPLETE, FOLDS, SUMMARY, is_locked, read_state

FOLDS_SUMMARY = "folds_summary.json"
FINAL = "final"
FOLDS_PLOT = "plots/folds.png"
PENDING = "pending"

_WIDER, _NARROWER = 1.5, 1 / 1.5
"""From where the spread between folds counts as another one than a fold's own interval says: with five folds, a
standard deviation is itself known to a third of its size only."""


def is_folds(folder: Path) -> bool:
    """Whether the folder is the parent of folds."""
    return (folder / FOLDS).is_file()


def fold_name(fold: int) -> str:
    """Folder of a fold, counted from 1."""
    return f"fold-{fold}"


def read_plan(folder: Path) -> dict[str, Any]:
    """The content of `folds.json`; empty when it is missing or damaged."""
    plan = read_json(folder / FOLDS)
    return plan if isinstance(plan, dict) else {}


def run_with_adapter(folder: Path) -> Path:
    """The run whose adapter a folder stands for: itself, or of folds the run on all rows.

    Raises:
        UserError: folds without such a run: each has an adapter of its own.
    """
    if not is_folds(folder):
        return folder
    final = folder / FINAL
    if read_state(final).get("status") in COMPLETE:
        return final
    raise UserError(
        f"{folder}: these are folds, each with an adapter of its own",
        hint=f"name one, such as {folder / fold_name(1)}, or train on all rows: "
        f"python cli.py train --resume {folder} --final",
    )


# --- one fold ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FoldResult:
    """One fold as its run's files show it. Losses and gap in nats per target token, at the best step; None: unknown."""

    fold: int
    status: str
    """Of the run; `pending` when it has not begun."""
    step: int | None = None
    gap: float | None = None
    gap_low: float | None = None
    """Lower end of the bootstrap interval over this fold's rows."""
    gap_high: float | None = None
    grade: Grade | None = None
    base_val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    num_train_rows: int | None = None
    num_val_rows: int | None = None
    error: str | None = None
    num_val_targets: int | None = None
    """Target tokens of the validation rows."""
    total_steps: int | None = None
    """Steps that its learning rate is laid out for, with those that an early stop spared."""

    @property
    def is_done(self) -> bool:
        """Whether the run ended and its summary has all that the verdict needs."""
        return self.status in COMPLETE and None not in (
            self.gap,
            self.gap_low,
            self.gap_high,
            self.grade,
            self.base_val_loss,
            self.best_val_loss,
            self.best_step,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_fold(parent: Path, fold: int, *, error: str | None = None) -> FoldResult:
    """Args: error: why the run did not even begin, if so."""
    folder = parent / fold_name(fold)
    state, summary = read_state(folder), read_json(folder / SUMMARY)
    status = str(state.get("status") or (PENDING if error is None else "failed"))
    is_here = state.get("host") in (None, socket.gethostname())
    if status in ("starting", "running") and is_here and not is_locked(folder):
        status = "interrupted"  # killed
    summary = summary if isinstance(summary, dict) and status in COMPLETE else {}
    grade = next((known for known in GRADES if known == summary.get("grade")), None)
    best_step = whole(summary.get("best_step"))
    return FoldResult(
        fold=fold,
        status=status,
        step=whole(state.get("step")),
        gap=number(summary.get("gap")),
        gap_low=number(summary.get("gap_low")),
        gap_high=number(summary.get("gap_high")),
        grade=grade,
        base_val_loss=number(summary.get("base_val_loss")),
        best_val_loss=number(summary.get("best_val_loss")),
        best_step=best_step,
        num_train_rows=whole(state.get("num_train_rows")),
        num_val_rows=whole(state.get("num_val_rows")),
        error=state.get("error") or error if status == "failed" else None,
        num_val_targets=None if best_step is None else _num_val_targets(folder, best_step),
        total_steps=whole(state.get("total_steps")),
    )


def _num_val_targets(folder: Path, step: int) -> int | None:
    """Of the rows evaluated at `step`; None where that can't be read."""
    from safetensors import SafetensorError

    try:
        losses = read_row_losses(folder, step)
    except (SafetensorError, KeyError, OSError):
        return None
    return None if losses is None else int(losses[0].num_targets.sum())


def read_folds(parent: Path) -> list[FoldResult]:
    """All folds of the plan, as they stand."""
    plan = read_plan(parent)
    errors = plan.get("errors")
    errors = errors if isinstance(errors, dict) else {}
    return [
        read_fold(parent, fold, error=errors.get(fold_name(fold)))
        for fold in range(1, (whole(plan.get("folds")) or 0) + 1)
    ]


def damaged(results: Sequence[FoldResult]) -> list[str]:
    """Folds that ended, but whose summary does not say how."""
    return [fold_name(result.fold) for result in results if result.status in COMPLETE and not result.is_done]


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the folds."""

    mean: float
    sd: float | None
    """Standard deviation between folds (n - 1); None of a single fold, as the interval's ends."""
    min: float
    max: float
    low: float | None
    """Lower end of the mean's t-interval."""
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float], *, confidence: float) -> Spread:
        """Args: values: one for each fold, at least one."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, None, min(values), max(values), None, None)
        sd = statistics.stdev(values)
        half = t_quantile((1 + confidence) / 2, len(values) - 1) * sd / math.sqrt(len(values))
        return cls(mean, sd, min(values), max(values), mean - half, mean + half)


def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with `degrees` degrees of freedom stays below with `probability`, from 0.5 to 1.

    Found by bisection on the angle in `t_probability`; right to 12 digits.
    """
    assert 0.5 <= probability < 1 and degrees >= 1
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(degrees)


def _central(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) * tan(angle)): Abramowitz and Stegun 1964, 26.7.3 and 26.7.4, exact for whole degrees."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2 == 1
    term = cosine if is_odd else 1.0
    total = 0.0
    for power in range(1 if is_odd else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


@dataclass(frozen=True, slots=True)
class PooledLoss:
    """Over the validation rows of all folds that are done, in nats per target token: sum of losses over sum of tokens.

    Each row is judged once, by the fold that did not train on it.
    """

    base: float
    """Before the first step."""
    best: float
    """Each row at its fold's best step."""
    num_targets: int

    @classmethod
    def of(cls, done: Sequence[FoldResult]) -> PooledLoss | None:
        """None where a fold does not say how many tokens it was judged on."""
        base = best = 0.0
        total = 0
        for fold in done:
            if not fold.num_val_targets or fold.base_val_loss is None or fold.best_val_loss is None:
                return None
            base += fold.base_val_loss * fold.num_val_targets
            best += fold.best_val_loss * fold.num_val_targets
            total += fold.num_val_targets
        return cls(base / total, best / total, total) if total else None


@dataclass(frozen=True, slots=True)
class FoldsVerdict:
    """What the folds say together."""

    results: tuple[FoldResult, ...]
    """Of every fold, done or not."""
    guard: GuardConfig
    gap: Spread
    best_val_loss: Spread
    base_val_loss: Spread
    best_step: Spread
    grade: Grade
    """Of the mean gap."""
    median_best_step: int
    schedule_steps: int | None
    """Median of the folds' `total_steps`: the schedule that their best steps belong to. None where a fold's is not
    known."""
    pooled: PooledLoss | None
    own_sd: float
    """What one split says of its gap's uncertainty: the folds' bootstrap intervals as a standard deviation, averaged
    as variances."""

    @property
    def done(self) -> list[FoldResult]:
        return [result for result in self.results if result.is_done]

    @property
    def disagreeing(self) -> list[FoldResult]:
        """Folds whose own grade is another than the mean's."""
        return [result for result in self.done if result.grade != self.grade]

    @property
    def num_covering(self) -> int:
        """Folds whose own interval holds the mean of all."""
        ends = ((result.gap_low, result.gap_high) for result in self.done)
        return sum(low is not None and high is not None and low <= self.gap.mean <= high for low, high in ends)

    @property
    def is_better(self) -> bool:
        """Whether training beat what it started from, on average."""
        return self.best_val_loss.mean < self.base_val_loss.mean

    def to_dict(self) -> dict[str, Any]:
        return {
            "grade": self.grade,
            "gap": asdict(self.gap),
            "base_val_loss": asdict(self.base_val_loss),
            "best_val_loss": asdict(self.best_val_loss),
            "pooled_val_loss": None if self.pooled is None else asdict(self.pooled),
            "best_step": {**asdict(self.best_step), "median": self.median_best_step},
            "schedule_steps": self.schedule_steps,
            "confidence": self.guard.confidence,
            "own_sd": self.own_sd,
            "intervals_with_the_mean": self.num_covering,
            "disagreeing": {fold_name(result.fold): result.grade for result in self.disagreeing},
            "luck": luck(self),
            "results": [result.to_dict() for result in self.results],
        }


def judge(results: Sequence[FoldResult], guard: GuardConfig) -> FoldsVerdict | None:
    """The verdict on the folds that are done; None when none is."""
    done = [result for result in results if result.is_done]
    if not done:
        return None

    def spread(value: Callable[[FoldResult], float | None]) -> Spread:
        return Spread.of(
            [known for result in done if (known := value(result)) is not None], confidence=guard.confidence
        )

    gap = spread(lambda result: result.gap)
    totals = [result.total_steps for result in done if result.total_steps]
    return FoldsVerdict(
        results=tuple(results),
        guard=guard,
        gap=gap,
        best_val_loss=spread(lambda result: result.best_val_loss),
        base_val_loss=spread(lambda result: result.base_val_loss),
        best_step=spread(lambda result: result.best_step),
        grade=grade_of(gap.mean, guard.grades),
        median_best_step=_median_step(result.best_step or 1 for result in done),
        schedule_steps=_median_step(totals) if len(totals) == len(done) else None,
        pooled=PooledLoss.of(done),
        own_sd=math.sqrt(statistics.fmean(_own_variance(result, guard.confidence) for result in done)),
    )


def _median_step(steps: Iterable[int]) -> int:
    return max(math.floor(statistics.median(steps) + 0.5), 1)


def _own_variance(result: FoldResult, confidence: float) -> float:
    """Of a fold's gap, from the width of its bootstrap interval, as if that were a normal distribution's."""
    assert result.gap_low is not None and result.gap_high is not None
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    return ((result.gap_high - result.gap_low) / (2 * z)) ** 2


# --- words ------------------------------------------------------------------------------------------------------------


def luck(verdict: FoldsVerdict) -> str | None:
    """How much of one split's gap would have been luck; None when there are no two folds to tell it from."""
    done = sorted((result for result in verdict.done), key=lambda result: result.gap or 0.0)
    sd = verdict.gap.sd
    if sd is None:
        return None
    first, last = done[0], done[-1]
    if first.grade == last.grade:
        ends = f"{first.grade} in each, from {first.gap:z.3f} (fold {first.fold}) to {last.gap:z.3f} (fold {last.fold})"
    else:
        ends = (
            f"anything from {first.grade} ({first.gap:z.3f}, fold {first.fold}) to {last.grade} ({last.gap:z.3f}, "
            f"fold {last.fold})"
        )
    return (
        f"One split alone would have said {ends}: the gap moves by {sd:.3f} (standard deviation) with the rows that "
        f"are held out. A split's own interval {_allows(sd, verdict.own_sd)}; {verdict.num_covering} of {len(done)} "
        "intervals hold the mean of all folds."
    )


def _allows(sd: float, own: float) -> str:
    if sd > _WIDER * own:
        return f"allows for {own:.3f} only, so it promises too much here"
    if sd < _NARROWER * own:
        return f"allows for {own:.3f}, more than the folds differ by"
    return f"allows for {own:.3f}, about as much"


def judged_by(run: Path) -> str | None:
    """Of a final run, the folds' verdict in a line: `gap 0.081 ± 0.024, GOOD (5 folds)`; None where there is none."""
    summary = read_json(run.parent / FOLDS_SUMMARY)
    if not isinstance(summary, dict) or not isinstance(gap := summary.get("gap"), Mapping):
        return None
    mean, sd, num = number(gap.get("mean")), number(gap.get("sd")), whole(summary.get("num_done"))
    if mean is None:
        return None
    return f"gap {mean:z.3f}{'' if sd is None else f' ± {sd:.3f}'}, {summary.get('grade')} ({num} folds)"
