"""Memorised or learned, row by row: what became of every row that was evaluated again and again.

`row_losses/` has the loss of every validation row and every probe row (a fixed selection of the training rows) at every
evaluation. Three questions are answered from it.

*Which training rows were memorised?* Rows that were never trained on show how far a row falls when a model learns: the
further, the higher it began. So the validation rows' falls are fitted as a straight line over their loss at the start
(weighted least squares), with a scatter of variance `a + b / tokens`: rows differ, and short rows are noisier. A
training row is memorised when its fall lies above that line

- by at least GOOD's bound (`guard.grades`): its own gap would be graded MODERATE or worse;
- by more than chance, among as many rows as are looked at. Chance is Student's t, its degrees of freedom and scale
  fitted to the distances from the line of the validation rows, on both sides, and of the training rows that fell less;
  of the tails that these allow the heaviest. 5 % false ones (Benjamini and Hochberg 1995) are aimed at;
- by more than 95 % of the validation rows do, whatever their distribution.

A row that was easy before training has not fallen, and is not memorised.

Where training and validation rows are alike, 1 to 6 runs in 100 name a row: simulated with 200 training rows, 10 to
200 validation rows, and falls that scatter normally or as Student's t with 3 degrees of freedom.

*Which validation rows got worse while their mean fell?* Those whose loss is above that of the start by EXCELLENT's
bound and by three times their own noise: how they jump from evaluation to evaluation, the mean's movement taken out.

*Is a validation loss that rises after the best step a matter of a few rows or of all?* A sign test over rows, and
whether a few rows make up all of the rise, each of which rose by three times its own noise and stands out of the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.config import GuardConfig
from core.errors import UserError
from core.files import read_json
from core.journal import read_records
from core.protocols import BoolArray, FloatArray, IntArray, RowLosses
from core.records import whole
from core.row_losses import evaluated_steps, read_origins, read_splits
from core.row_statistics import FallLine, Tail, false_discoveries, row_noise, sign_test, stands_out
from core.run import CONFIG, ENDED, SUMMARY, read_state
from core.settings import load_config

Kind = Literal["memorised", "worse"]
RiseKind = Literal["all", "few", "unclear"]

_log = logging.getLogger(__name__)

FALSE_SHARE = 0.05
"""Share of false ones that is aimed at among the rows called memorised; also the level of the sign test."""
FEWEST_ROWS = 10
"""Validation rows below which their scatter can't be told."""
NOISES = 3.0
"""A rise of so many times a row's noise is not chance."""
FEW = 0.1
"""Share of the rows that counts as a few."""
_NAMED = 3


# --- what was written -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SplitHistory:
    """The rows of a split over E evaluations."""

    row_ids: IntArray
    """int64 [N]"""
    num_targets: IntArray
    """int64 [N]"""
    nll: FloatArray
    """float64 [E, N]: summed over a row's targets, in nats."""
    origins: tuple[str, ...]
    """Where each row was read: `train.jsonl:17`."""

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def means(self) -> FloatArray:
        """float64 [E, N]: each row's loss in nats per target token."""
        return self.nll / self.num_targets

    @property
    def mean(self) -> FloatArray:
        """float64 [E]: the split's loss at each evaluation, token-weighted."""
        total: FloatArray = self.nll.sum(axis=1) / self.num_targets.sum()
        return total


@dataclass(frozen=True, slots=True)
class RowHistory:
    """All evaluations of a run, as far as they are in its journal."""

    steps: tuple[int, ...]
    """E steps, rising; the first is 0 unless files were removed."""
    best: int
    """Index of the evaluation whose adapter is kept; 0 before there is one."""
    probe: SplitHistory
    validation: SplitHistory | None
    """None where nothing is held out."""
    backends: tuple[str, ...] = ()
    """Of a run that moved, in order."""
    damaged: tuple[int, ...] = ()
    """Steps whose losses can't be read; they are left out."""


def read_history(run_folder: Path) -> RowHistory | None:
    """The rows' losses of a run, finished or not; None when there is no evaluation yet.

    Files of a process that was killed, whose steps were not done again, are left out: the journal does not have them.
    """
    steps = _journal_steps(run_folder)
    read = {step: read_splits(run_folder, step) for step in evaluated_steps(run_folder) if not steps or step in steps}
    found = {step: splits for step, splits in read.items() if "probe" in splits}
    if not found:
        return None
    origins = read_origins(run_folder)
    probe = _collect([splits["probe"] for splits in found.values()], origins.get("train", {}))
    validation = None
    if all("val" in splits for splits in found.values()):
        validation = _collect([splits["val"] for splits in found.values()], origins.get("validation", {}))
    summary = read_json(run_folder / SUMMARY)
    summary = summary if isinstance(summary, dict) else {}
    # a run that goes on still has the summary of its interruption
    is_over = read_state(run_folder).get("status") in (None, *ENDED)
    moves = summary.get("moves") or []
    return RowHistory(
        steps=tuple(found),
        best=_best(tuple(found), validation, whole(summary.get("best_step")) if is_over else None),
        probe=probe,
        validation=validation,
        backends=tuple(str(move.get("backend")) for move in moves) if len(moves) > 1 else (),
        damaged=tuple(step for step in read if step not in found),
    )


def _journal_steps(run_folder: Path) -> set[int]:
    return {record["step"] for record, _ in read_records(run_folder) if "probe_loss" in record}


def _collect(evaluations: Sequence[RowLosses], origins: Mapping[int, str]) -> SplitHistory:
    """The rows that every evaluation has, in the order of the last one; rows without a target are left out."""
    last = evaluations[-1]
    if all(np.array_equal(losses.row_ids, last.row_ids) for losses in evaluations) and last.num_targets.all():
        nll = np.stack([losses.nll for losses in evaluations])
        return SplitHistory(last.row_ids, last.num_targets, nll, _named(last.row_ids, origins))
    in_each = [np.isin(last.row_ids, losses.row_ids) for losses in evaluations]
    chosen = (last.num_targets > 0) & np.all(in_each, axis=0)
    rows = last.row_ids[chosen]
    nll = np.stack([losses.nll[_places(losses.row_ids, rows)] for losses in evaluations])
    return SplitHistory(rows, last.num_targets[chosen], nll, _named(rows, origins))


def _places(row_ids: IntArray, rows: IntArray) -> IntArray:
    """int64 [len(rows)]: where each of the rows is in `row_ids`."""
    order = np.argsort(row_ids)
    places: IntArray = order[np.searchsorted(row_ids, rows, sorter=order)]
    return places


def _named(rows: IntArray, origins: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(origins.get(row) or f"row {row}" for row in rows.tolist())


def _best(steps: tuple[int, ...], validation: SplitHistory | None, best_step: int | None) -> int:
    """As the summary says; of a run that goes on, the lowest so far; of one without validation, the last."""
    if best_step in steps and best_step:
        return steps.index(best_step)
    if validation is None or len(steps) < 2:
        return len(steps) - 1
    return 1 + int(validation.mean[1:].argmin())


# --- what it says -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowFate:
    """A row that is named. Losses in nats per target token."""

    kind: Kind
    split: str
    """`train` or `validation`."""
    row: int
    """Its number in the split, as in `split.csv`."""
    origin: str
    num_targets: int
    start: float
    best: float
    """At the step whose adapter is kept."""
    last: float
    amount: float
    """Memorised: how much further it fell than validation rows that began alike. Worse: how much it rose."""
    score: float | None
    """Memorised: `amount` over the scatter that is expected of such a row. Worse: over the row's own noise; None where
    there are too few evaluations to tell it."""


@dataclass(frozen=True, slots=True)
class Rise:
    """A validation loss that is higher at the last evaluation than at the best."""

    amount: float
    """Nats per target token."""
    from_step: int
    to_step: int
    num_up: int
    """Rows whose loss rose."""
    num_down: int
    p_value: float
    """Of the sign test: how likely so uneven a split is, if rows rise and fall by chance alike."""
    num_needed: int
    """Fewest rows whose rises together make up all of the rise."""
    kind: RiseKind
    """`all`: most rows rose, more than chance. `few`: a tenth at most, each by more than chance, make up the rise."""
    top: tuple[str, ...]
    """The rows that rose most, by `file:line`."""


@dataclass(frozen=True, slots=True)
class RowVerdict:
    """Memorised or learned."""

    start_step: int
    best_step: int
    last_step: int
    num_probe: int
    num_validation: int
    memorised: tuple[RowFate, ...]
    """At the best step, those that fell furthest below what was to be expected first."""
    num_memorised_last: int
    """As many there are at the last evaluation."""
    excess: float | None
    """How much further than validation rows the training rows fell on the whole, at the best step; None if unknown."""
    least: float
    """Smallest difference that is worth saying: EXCELLENT's bound."""
    worse: tuple[RowFate, ...]
    """Validation rows that rose while the mean fell, the worst first."""
    val_fall: float | None
    """Fall of the validation loss from start to best."""
    rise: Rise | None
    """None where the validation loss did not rise after the best step."""
    problem: str | None = None
    """Why rows can't be judged."""
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def lines(self) -> list[str]:
        """For people, a line for each question."""
        if self.problem is not None:
            return [f"  rows              not judged: {self.problem}", *self._notes()]
        lines = [f"  memorised         {self._memorised()}", f"  got worse         {self._worse()}"]
        if self.rise is not None:
            lines.append(f"  rising            {_rise_text(self.rise, self.num_validation)}")
        elif self.last_step > self.best_step:
            lines.append(f"  rising            no: after step {self.best_step} the validation loss did not rise")
        return [*lines, *self._notes()]

    @property
    def brief(self) -> list[str]:
        """The two lines that matter most, for the end of a training."""
        if self.problem is not None:
            return []
        lines = [f"  memorised         {self._memorised()}"]
        if self.rise is not None:
            lines.append(f"  rising            {_rise_text(self.rise, self.num_validation)}")
        elif self.worse:
            lines.append(f"  got worse         {self._worse()}")
        return lines

    def _notes(self) -> list[str]:
        return [f"  note              {self.note}"] if self.note else []

    def _memorised(self) -> str:
        of, rows = f"of {self.num_probe} training rows looked at", self.memorised
        if rows:
            furthest = ", ".join(f"{fate.origin} by {fate.amount:.2f}" for fate in rows[:_NAMED])
            text = f"{len(rows)} {of} fell further than held-out rows that began alike: {furthest}{_more(rows)}"
        else:
            text = f"none {of}"
            if self.excess is not None and self.excess >= self.least:
                text += f" stands out; on the whole they fell {self.excess:.2f} further than held-out rows"
        if self.num_memorised_last > len(rows):
            text += f"; {self.num_memorised_last} by step {self.last_step}"
        return text

    def _worse(self) -> str:
        if self.val_fall is None or self.val_fall <= 0:
            return "the validation loss did not fall"
        if not self.worse:
            return f"none of {self.num_validation} validation rows"
        named = ", ".join(f"{fate.origin} {_rise_of(fate)}" for fate in self.worse[:_NAMED])
        return (
            f"{len(self.worse)} of {self.num_validation} validation rows, while the mean fell by {self.val_fall:.2f}: "
            f"{named}{_more(self.worse)}"
        )


def judge_rows(history: RowHistory, guard: GuardConfig | None = None) -> RowVerdict:
    """Answers the three questions of the module's docstring.

    Args:
        guard: the run's, for the size of differences that matter.
    """
    guard = guard or GuardConfig()
    verdict = RowVerdict(
        start_step=history.steps[0],
        best_step=history.steps[history.best],
        last_step=history.steps[-1],
        num_probe=len(history.probe),
        num_validation=0 if history.validation is None else len(history.validation),
        memorised=(),
        num_memorised_last=0,
        excess=None,
        least=guard.grades[0],
        worse=(),
        val_fall=None,
        rise=None,
        problem=_problem(history),
        note="; ".join(_notes(history)) or None,
    )
    if verdict.problem is not None or history.validation is None:
        return verdict
    validation = history.validation
    falls = _Falls(validation, history.probe, at=history.best)
    at_end = falls if history.best == len(history.steps) - 1 else _Falls(validation, history.probe, at=-1)
    return replace(
        verdict,
        memorised=tuple(_memorised_rows(history, falls, guard)),
        num_memorised_last=int(at_end.memorised(guard.grades[1]).sum()),
        excess=float(np.average(falls.excess, weights=history.probe.num_targets)),
        worse=tuple(_worse_rows(history, validation, guard)),
        val_fall=float(validation.mean[0] - validation.mean[history.best]),
        rise=_rise(history, validation),
    )


def describe_rows(run_folder: Path) -> list[str]:
    """At most two lines for the verdict at the end of `train`; none where rows can't be judged, for whatever reason."""
    try:
        history = read_history(run_folder)
        return [] if history is None else judge_rows(history, _guard(run_folder)).brief
    except Exception as error:  # a remark must not make a finished run a failed one
        _log.warning("single rows were not judged: %s: %s", type(error).__name__, error)
        return []


def _guard(run_folder: Path) -> GuardConfig:
    try:
        return load_config(run_folder / CONFIG).guard
    except (OSError, UserError):
        return GuardConfig()


def _notes(history: RowHistory) -> Iterator[str]:
    if history.backends:
        yield f"its losses are of {' and '.join(dict.fromkeys(history.backends))}"
    if history.damaged:
        yield f"the losses at step {', '.join(map(str, history.damaged))} can't be read"


def _problem(history: RowHistory) -> str | None:
    if history.validation is None:
        return "nothing was held out to compare with"
    if len(history.steps) < 2:
        return "there is one evaluation only"
    if history.steps[0] != 0:
        return "the losses before the first step are not there"
    if len(history.validation) < FEWEST_ROWS:
        return f"{len(history.validation)} validation rows are too few to tell chance from memory"
    return None


# --- memorised --------------------------------------------------------------------------------------------------------


class _Falls:
    """How far the rows fell from the first evaluation to another, held against what validation rows do."""

    def __init__(self, validation: SplitHistory, probe: SplitHistory, *, at: int) -> None:
        line = FallLine.fit(validation.means[0], validation.means[0] - validation.means[at], validation.num_targets)
        fall = probe.means[0] - probe.means[at]
        self.excess: FloatArray = fall - line.at(probe.means[0])
        self.score: FloatArray = self.excess / line.scatter(probe.means[0], probe.num_targets)
        beyond = validation.means[0] - validation.means[at] - line.at(validation.means[0])
        self._held_out: FloatArray = beyond / line.scatter(validation.means[0], validation.num_targets)
        # training rows that fell less were not memorised: they show how far chance reaches as well
        self._chance = Tail.fit(np.concatenate([np.abs(self._held_out), -self.score[self.score < 0]]))

    def memorised(self, least: float) -> BoolArray:
        """bool [N] of the probe rows; `least`: the smallest excess that matters, in nats per token."""
        num_held_out = len(self._held_out)
        beyond_chance = false_discoveries(self._chance.beyond(self.score), share=FALSE_SHARE)
        # rank among the held-out rows: with fewer than 19 of them, above every one
        num_as_far = num_held_out - np.searchsorted(np.sort(self._held_out), self.score, side="left")
        is_far = (1 + num_as_far) / (num_held_out + 1) <= max(FALSE_SHARE, 1 / (num_held_out + 1))
        found: BoolArray = (self.excess >= least) & beyond_chance & is_far
        return found


def _memorised_rows(history: RowHistory, falls: _Falls, guard: GuardConfig) -> Iterator[RowFate]:
    chosen = np.flatnonzero(falls.memorised(guard.grades[1]))
    for index in sorted(chosen, key=lambda index: -falls.excess[index]):
        yield _fate("memorised", history, history.probe, int(index), falls.excess[index], float(falls.score[index]))


# --- worse ------------------------------------------------------------------------------------------------------------


def _worse_rows(history: RowHistory, validation: SplitHistory, guard: GuardConfig) -> Iterator[RowFate]:
    if validation.mean[history.best] >= validation.mean[0]:
        return
    rises = validation.means[history.best] - validation.means[0]
    noise = row_noise(validation.nll, validation.num_targets)
    least = np.full(len(rises), guard.grades[0]) if noise is None else np.maximum(guard.grades[0], NOISES * noise)
    for index in np.argsort(-rises, kind="stable"):
        if rises[index] >= least[index]:
            score = None if noise is None or not noise[index] else float(rises[index] / noise[index])
            yield _fate("worse", history, validation, int(index), rises[index], score)


def _fate(
    kind: Kind, history: RowHistory, split: SplitHistory, index: int, amount: float, score: float | None
) -> RowFate:
    means = split.means[:, index]
    return RowFate(
        kind=kind,
        split="train" if split is history.probe else "validation",
        row=int(split.row_ids[index]),
        origin=split.origins[index],
        num_targets=int(split.num_targets[index]),
        start=float(means[0]),
        best=float(means[history.best]),
        last=float(means[-1]),
        amount=float(amount),
        score=score,
    )


# --- rising -----------------------------------------------------------------------------------------------------------


def _rise(history: RowHistory, validation: SplitHistory) -> Rise | None:
    changes = validation.nll[-1] - validation.nll[history.best]
    total = float(changes.sum())
    if history.best == len(history.steps) - 1 or total <= 0:
        return None
    num_up, num_down = int((changes > 0).sum()), int((changes < 0).sum())
    p_value = sign_test(num_up, num_down)
    order = np.argsort(-changes, kind="stable")
    num_needed = 1 + int(np.searchsorted(np.cumsum(changes[order]), total * (1 - 1e-12)))
    kind: RiseKind = "unclear"
    if p_value < FALSE_SHARE and num_up > num_down:
        kind = "all"
    elif num_needed <= max(1, int(FEW * len(changes))):
        noise = row_noise(validation.nll, validation.num_targets)
        stand_out = stands_out(changes / validation.num_targets, validation.num_targets, noise, times=NOISES)
        if stand_out[order[:num_needed]].all():
            kind = "few"
    return Rise(
        amount=total / float(validation.num_targets.sum()),
        from_step=history.steps[history.best],
        to_step=history.steps[-1],
        num_up=num_up,
        num_down=num_down,
        p_value=p_value,
        num_needed=num_needed,
        kind=kind,
        top=tuple(validation.origins[index] for index in order[:_NAMED] if changes[index] > 0),
    )


def _rise_text(rise: Rise, num_rows: int) -> str:
    moved = f"by {rise.amount:.3f} from step {rise.from_step} to {rise.to_step}"
    if rise.kind == "all":
        return f"{moved}: in {rise.num_up} of {num_rows} validation rows, not a few"
    named = ", ".join(rise.top[: rise.num_needed])
    if rise.kind == "few":
        rows = "one row makes" if rise.num_needed == 1 else f"{rise.num_needed} rows make"
        return f"{moved}: {rows} up all of it ({named}); {rise.num_down} of {num_rows} fell"
    return f"{moved}: {rise.num_up} of {num_rows} validation rows rose, {rise.num_down} fell; no clear direction"


def _rise_of(fate: RowFate) -> str:
    return f"+{fate.amount:.2f}" if fate.score is None else f"+{fate.amount:.2f} ({fate.score:.0f} times its noise)"


def _more(rows: Sequence[RowFate]) -> str:
    return f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
