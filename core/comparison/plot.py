"""`compare.png`: the validation and probe losses of several runs on one scale, and their gaps below.

A run is told by its colour (Okabe and Ito 2008) and, in grey, by its marker. The legend stands under the axes, over no
curve.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.comparison.compare import ComparedRun, Comparison
from core.files import write_atomic
from core.folds import fold_name, is_folds, read_folds
from core.journal import read_records
from core.plots import DPI, draw_bands
from core.protocols import FloatArray
from core.records import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MAX_MARKERS = 40
_MAX_POINTS = 800
_FEW = 3
"""Runs up to which the gaps have their intervals."""
_NAMES = ("step", "epoch", "val_loss", "probe_loss", "gap", "gap_low", "gap_high")


@dataclass(frozen=True, slots=True)
class Evaluations:
    """float64 [evaluations] each; NaN where a record has no number."""

    step: FloatArray
    epoch: FloatArray
    val_loss: FloatArray
    probe_loss: FloatArray
    gap: FloatArray
    gap_low: FloatArray
    gap_high: FloatArray

    def thinned(self, most: int) -> Evaluations:
        """At most so many of them, evenly; the first and the last are kept."""
        if len(self.step) <= most:
            return self
        kept = np.linspace(0, len(self.step) - 1, most).round().astype(int)
        return Evaluations(*(getattr(self, name)[kept] for name in _NAMES))


def read_evaluations(folder: Path) -> Evaluations:
    """Of a run's journal; of folds, the means at the steps at which every fold was evaluated, without intervals."""
    if is_folds(folder):
        return _mean_of([read_evaluations(folder / fold_name(result.fold)) for result in read_folds(folder)])
    rows = []
    for record, _ in read_records(folder):
        if isinstance(record, dict) and number(record.get("val_loss")) is not None:
            found = (number(record.get(name)) for name in _NAMES)
            rows.append([math.nan if value is None else value for value in found])
    return Evaluations(*np.array(rows, float).reshape(-1, len(_NAMES)).T)


def _mean_of(folds: Sequence[Evaluations]) -> Evaluations:
    known = [fold for fold in folds if len(fold.step)]
    if not known:
        return Evaluations(*np.empty((len(_NAMES), 0)))
    steps = sorted(set.intersection(*(set(fold.step.tolist()) for fold in known)))
    columns = {}
    for name in _NAMES:
        tables = [dict(zip(fold.step.tolist(), getattr(fold, name).tolist(), strict=True)) for fold in known]
        columns[name] = np.array([np.mean([table[step] for table in tables]) for step in steps])
    nothing = np.full(len(steps), math.nan)
    return Evaluations(**columns | {"gap_low": nothing, "gap_high": nothing})


def write_plot(path: Path, comparison: Comparison) -> None:
    """Draws all runs; a plot without curves says so."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=(6, 4))
    series = [read_evaluations(run.folder).thinned(_MAX_POINTS) for run in comparison.runs]
    by_epoch = len({run.steps_per_epoch for run in comparison.runs}) > 1
    for place, (run, found) in enumerate(zip(comparison.runs, series, strict=True)):
        if len(found.step):
            _draw(losses, gaps, run, found, place, by_epoch=by_epoch, with_intervals=len(series) <= _FEW)
    _dress(losses, gaps, by_epoch=by_epoch)
    grades = comparison.runs[0].config.guard.grades
    if all(run.config.guard.grades == grades for run in comparison.runs):
        gaps.set_ylim(*gaps.get_ylim())  # the bands end where the curves' room does
        draw_bands(gaps, grades)
    if losses.lines:
        handles = [line for line in losses.lines if not str(line.get_label()).startswith("_")]
        columns = min(len(handles), 3)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(path, image.getvalue())


def _draw(
    losses: Axes,
    gaps: Axes,
    run: ComparedRun,
    found: Evaluations,
    place: int,
    *,
    by_epoch: bool,
    with_intervals: bool,
) -> None:
    colour = _COLOURS[place % len(_COLOURS)]
    marker = _MARKERS[(place + place // len(_COLOURS)) % len(_MARKERS)]
    across = found.epoch if by_epoch else found.step
    every = max(len(across) // _MAX_MARKERS, 1)
    look: dict[str, Any] = {"color": colour, "marker": marker, "ms": 5, "markevery": every}
    name = f"{place + 1} {run.name}"
    losses.plot(across, found.val_loss, lw=1.6, label=name, **look)
    losses.plot(across, found.probe_loss, lw=1.0, ls="--", mfc="white", label="_probe", **look)
    best = run.figures.get("best_step")
    if best in found.step.tolist():
        at = found.step.tolist().index(best)
        losses.plot(
            across[at], found.val_loss[at], color=colour, marker=marker, ms=11, mec="black", ls="", label="_best"
        )
    if with_intervals and np.isfinite(found.gap_low).any():
        _draw_intervals(gaps, across, found, place, colour)
    gaps.plot(across, found.gap, lw=1.4, **look)


def _draw_intervals(gaps: Axes, across: FloatArray, found: Evaluations, place: int, colour: str) -> None:
    """A bar at each evaluation, the runs' a little beside each other; of many evaluations, both ends as dots."""
    low, high = np.fmin(found.gap_low, found.gap), np.fmax(found.gap_high, found.gap)
    if len(across) <= _MAX_MARKERS:
        beside = across + 0.006 * place * (across[-1] - across[0])
        gaps.vlines(beside, low, high, color=colour, lw=1.6, alpha=0.6)
        return
    for end in (low, high):
        gaps.plot(across, end, color=colour, lw=0.7, ls=":", label="_interval")


def _dress(losses: Axes, gaps: Axes, *, by_epoch: bool) -> None:
    for axes in (losses, gaps):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.yaxis.label.set_fontsize(9)
        axes.margins(x=0.02)
        if not axes.lines:
            axes.text(0.5, 0.5, "no evaluations yet", transform=axes.transAxes, ha="center", fontsize=9)
    losses.set_ylabel("loss (nats per token)")
    losses.set_title("validation (line), training rows (dashes, hollow), best step (large)", loc="left", fontsize=9)
    gaps.set_ylabel("gap (nats per token)")
    gaps.axhline(0, color="black", lw=0.5)
    gaps.set_xlabel("epoch (the runs' epochs differ in steps)" if by_epoch else "optimiser step", fontsize=9)
    gaps.figure.align_ylabels([losses, gaps])
