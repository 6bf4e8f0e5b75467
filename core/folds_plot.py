"""`plots/folds.png`: the losses of all folds over their steps, and each fold's gap beside the mean of all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from core.files import disk_errors, write_atomic
from core.folds import FOLDS_PLOT, FoldsVerdict, fold_name
from core.journal import read_records
from core.plots import DPI, draw_bands
from core.records import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's (2008); from the ninth fold on the markers differ."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_BLACK = "#000000"


def write_folds_plot(parent: Path, verdict: FoldsVerdict) -> None:
    """Left: validation loss (lines) and probe loss (dashes) of every fold that was evaluated, its best step filled.
    Right: each gap with its bootstrap interval on the grades' bands; the mean with its t-interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    losses, gaps = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_losses(losses, parent, verdict)
    _draw_gaps(gaps, verdict)
    for axes in (losses, gaps):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.suptitle(f"{parent.name} · {len(verdict.done)} folds", x=0.01, ha="left", fontsize=10, fontweight="bold")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    path = parent / FOLDS_PLOT
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    write_atomic(path, image.getvalue())


def curves(folder: Path) -> tuple[list[int], list[float], list[float]]:
    """Steps, validation and probe losses of a run's evaluations."""
    steps, val, probe = [], [], []
    for record, _ in read_records(folder):
        losses = number(record.get("val_loss")), number(record.get("probe_loss"))
        if losses[0] is not None and losses[1] is not None:
            steps.append(int(record["step"]))
            val.append(losses[0])
            probe.append(losses[1])
    return steps, val, probe


def _draw_losses(axes: Axes, parent: Path, verdict: FoldsVerdict) -> None:
    for result in verdict.results:
        steps, val, probe = curves(parent / fold_name(result.fold))
        if not steps:
            continue
        colour, marker = _look(result.fold)
        axes.plot(steps, val, color=colour, lw=1.2, marker=marker, ms=4, mfc="white", label=f"fold {result.fold}")
        axes.plot(steps, probe, color=colour, lw=0.8, ls="--")
        if result.is_done and result.best_step in steps:
            axes.plot(result.best_step, val[steps.index(result.best_step)], color=colour, marker=marker, ms=8, ls="")
    axes.set_xlabel("optimiser step", fontsize=9)
    axes.set_ylabel("loss (nats per token)", fontsize=9)
    axes.set_title("validation (line), training rows (dashes), best step (filled)", loc="left", fontsize=8)
    if axes.lines:
        axes.legend(loc="best", fontsize=8, framealpha=0.85, edgecolor="none", ncols=2 if len(verdict.done) > 5 else 1)


def _draw_gaps(axes: Axes, verdict: FoldsVerdict) -> None:
    ends = [0.0, verdict.guard.grades[1]]
    for place, result in enumerate(verdict.done):
        assert result.gap is not None and result.gap_low is not None and result.gap_high is not None
        colour, marker = _look(result.fold)
        _draw_interval(axes, place, result.gap, result.gap_low, result.gap_high, colour=colour, marker=marker)
        ends += [result.gap_low, result.gap_high, result.gap]
    names, gap = [f"fold {result.fold}" for result in verdict.done], verdict.gap
    if gap.low is not None and gap.high is not None:
        _draw_interval(axes, len(names), gap.mean, gap.low, gap.high, colour=_BLACK, marker="_")
        axes.axhline(gap.mean, color=_BLACK, lw=0.8, ls=":")
        ends += [gap.low, gap.high]
        names.append("mean")
    margin = 0.06 * (max(ends) - min(ends))
    axes.set_ylim(min(ends) - (margin if min(ends) < 0 else 0.0), max(ends) + margin)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 7 else 0)
    axes.set_ylabel("gap (nats per token)", fontsize=9)
    level = f"{100 * verdict.guard.confidence:g} %"
    axes.set_title(f"each split's bootstrap interval, the mean's t-interval ({level})", loc="left", fontsize=8)
    draw_bands(axes, verdict.guard.grades)


def _draw_interval(axes: Axes, place: int, value: float, low: float, high: float, *, colour: str, marker: str) -> None:
    errors: list[list[float]] = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
    axes.errorbar([place], [value], yerr=errors, color=colour, marker=marker, ms=6, capsize=4, elinewidth=1.2)


def _look(fold: int) -> tuple[str, str]:
    """Colour and marker: different for as many folds as there are pairs."""
    index = fold - 1
    return _COLOURS[index % len(_COLOURS)], _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)]
