"""`training_curves.png`: the run in one picture, for print and for colour-blind readers.

Colours are those of Okabe and Ito (2008); every curve also differs in line or marker. Only matplotlib's object
interface is used: no global state, no display.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.config import GuardConfig
from core.errors import UserError
from core.files import write_atomic
from core.journal import read_records
from core.overfitting import GRADES
from core.protocols import FloatArray
from core.records import number
from core.run import CONFIG, CURVES, read_state
from core.settings import load_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
MAX_BINS = 800
"""Training losses are drawn as so many means at most, on the band from the lowest to the highest of each bin."""

_BLUE, _VERMILLION, _GREEN, _BLACK, _GREY = "#0072B2", "#D55E00", "#009E73", "#000000", "#999999"
_BAND_SHADES = (0.0, 0.07, 0.16, 0.28)
"""How dark each grade's band is, from EXCELLENT to CRITICAL."""
_MAX_MARKERS = 40
_OUTLIER_PERCENTILE = 99.0

Columns = dict[str, FloatArray]


@dataclass(slots=True)
class _Series:
    """Columns of the journal; evaluations have the same length among themselves."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    lr_steps: list[int] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def column(self, name: str) -> FloatArray:
        """float64 [evaluations], NaN where a record has no number."""
        values = (number(record.get(name)) for record in self.evaluations)
        return np.array([math.nan if value is None else value for value in values])


def write_training_curves(folder: Path) -> None:
    """Draws the run's metrics to `training_curves.png`; writes nothing when there are none yet.

    From the top: training loss (means of neighbouring steps when there are many), validation and probe loss, the base
    model's level and the best step; the gap with its bootstrap interval on the grades' bands, unless nothing is held
    out; the learning rate.
    """
    series = _read(folder)
    if not series.loss and not series.evaluations:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    state = read_state(folder)
    has_gap = not state.get("not_judged")
    heights = [6.0, *([4.0] if has_gap else []), *([1.3] if series.lr else [])]
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    _draw_losses(panels[0], series)
    if has_gap:
        _draw_gap(panels[1], series, _guard(folder))
    if series.lr:
        _draw_rate(panels[-1], series)
    _dress(panels, last_step=_last_step(series))
    _add_epochs(panels[0], state.get("steps_per_epoch"), last_step=_last_step(series))
    panels[0].set_title(_title(folder, state), loc="left", fontsize=10, fontweight="bold")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(folder / CURVES, image.getvalue())


def _read(folder: Path) -> _Series:
    series = _Series()
    for record, _ in read_records(folder):
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(step, int):
            continue
        if (loss := number(record.get("loss"))) is not None:
            series.steps.append(step)
            series.loss.append(loss)
        if (lr := number(record.get("lr"))) is not None:
            series.lr_steps.append(step)
            series.lr.append(lr)
        if number(record.get("val_loss")) is not None:
            series.evaluations.append(record)
    return series


def _guard(folder: Path) -> GuardConfig:
    try:
        return load_config(folder / CONFIG).guard
    except UserError:
        return GuardConfig()


def _last_step(series: _Series) -> int:
    return max([*series.steps[-1:], *(int(record["step"]) for record in series.evaluations[-1:])])


# --- the three panels -------------------------------------------------------------------------------------------------


def _draw_losses(axes: Axes, series: _Series) -> None:
    steps, loss = np.array(series.steps, float), np.array(series.loss)
    if len(loss) > MAX_BINS:
        middles, means = binned(steps, np.mean), binned(loss, np.mean)
        axes.fill_between(middles, binned(loss, np.min), binned(loss, np.max), color=_GREY, alpha=0.25, lw=0)
        axes.plot(middles, means, color="#666666", lw=0.8, label="training loss (with dropout)")
    elif len(loss):
        alone = "." if len(loss) == 1 else None
        axes.plot(steps, loss, color=_GREY, lw=0.8, marker=alone, label="training loss (with dropout)")
    _draw_evaluations(axes, series)
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(*_loss_limits(series))
    axes.legend(loc="best", fontsize=8, framealpha=0.85, edgecolor="none")


def _draw_evaluations(axes: Axes, series: _Series) -> None:
    if not series.evaluations:
        return
    steps, val = series.column("step"), series.column("val_loss")
    marked = len(steps) <= _MAX_MARKERS
    axes.plot(
        steps,
        series.column("probe_loss"),
        color=_VERMILLION,
        ls="--",
        marker="s" if marked else None,
        ms=4,
        label="probe loss (training rows)",
    )
    axes.plot(steps, val, color=_BLUE, marker="o" if marked else None, ms=4, label="validation loss")
    if steps[0] == 0:
        axes.axhline(val[0], color=_BLACK, lw=0.8, ls=":", label=f"base model, {val[0]:.3f}")
    trained = np.flatnonzero(steps > 0)
    if len(trained):
        best = trained[np.argmin(val[trained])]
        axes.axvline(steps[best], color=_GREEN, lw=0.8)
        label = f"best, {val[best]:.3f} at step {int(steps[best]):,}"
        axes.plot(steps[best], val[best], color=_GREEN, marker="*", ms=13, mec="white", ls="", label=label)


def _loss_limits(series: _Series) -> tuple[float, float]:
    """Room for every evaluation and for all but the highest training losses."""
    evaluated = np.concatenate([series.column("val_loss"), series.column("probe_loss")])
    high = [np.nanmax(evaluated)] if len(evaluated) else []
    low = [np.nanmin(evaluated)] if len(evaluated) else []
    if series.loss:
        high.append(np.percentile(series.loss, _OUTLIER_PERCENTILE))
        low.append(np.min(series.loss))
    margin = 0.05 * (max(high) - min(low)) or 0.05
    return float(min(low) - margin), float(max(high) + margin)


def _draw_gap(axes: Axes, series: _Series, guard: GuardConfig) -> None:
    axes.set_ylabel("gap (nats per token)")
    if not series.evaluations:
        axes.set_ylim(0, guard.grades[-1])
        draw_bands(axes, guard.grades)
        return
    steps, gap = series.column("step"), series.column("gap")
    low, high = np.fmin(series.column("gap_low"), gap), np.fmax(series.column("gap_high"), gap)
    if len(steps) <= _MAX_MARKERS:
        errors = [np.nan_to_num(gap - low), np.nan_to_num(high - gap)]
        axes.errorbar(steps, gap, yerr=errors, color=_BLACK, lw=1.0, marker="o", ms=4, capsize=3, elinewidth=0.8)
    else:
        axes.fill_between(steps, low, high, color=_BLUE, alpha=0.35, lw=0)
        axes.plot(steps, gap, color=_BLACK, lw=0.8)
    top, bottom = np.nanmax([*high, guard.grades[1]]), np.nanmin([*low, 0.0])
    margin = 0.06 * (top - bottom)
    axes.set_ylim(bottom - (margin if bottom < 0 else 0), top + margin)
    axes.axhline(0, color=_BLACK, lw=0.5)
    draw_bands(axes, guard.grades)


def draw_bands(axes: Axes, grades: Sequence[float]) -> None:
    """A band for each grade, darker the worse, named at the right where it is high enough for the name."""
    bottom, top = axes.get_ylim()
    edges = [min(bottom, 0.0), *grades, math.inf]
    for grade, shade, low, high in zip(GRADES, _BAND_SHADES, edges, edges[1:], strict=False):
        low, high = max(low, bottom), min(high, top)
        if high <= low:
            continue
        axes.axhspan(low, high, color=_VERMILLION, alpha=shade, lw=0, zorder=0)
        if high - low > 0.07 * (top - bottom):
            where = axes.get_yaxis_transform()
            axes.text(1.01, (low + high) / 2, grade, transform=where, va="center", fontsize=7)
        if high < top:
            axes.axhline(high, color=_GREY, lw=0.5, zorder=0)


def _draw_rate(axes: Axes, series: _Series) -> None:
    alone = "." if len(series.lr) == 1 else None
    axes.plot(thinned(series.lr_steps), thinned(series.lr), color=_BLACK, lw=1.0, marker=alone)
    axes.set_ylabel("lr")
    axes.set_ylim(0, 1.15 * max(series.lr) or 1.0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.yaxis.get_offset_text().set_fontsize(7)


# --- dress ------------------------------------------------------------------------------------------------------------


def _dress(panels: Sequence[Axes], *, last_step: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.yaxis.label.set_fontsize(9)
        axes.margins(x=0.02)
    panels[0].figure.align_ylabels(panels)
    panels[-1].set_xlabel("optimiser step", fontsize=9)
    panels[-1].set_xlim(-0.015 * max(last_step, 1), 1.015 * max(last_step, 1))
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    panels[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _add_epochs(axes: Axes, steps_per_epoch: object, *, last_step: int) -> None:
    """A second scale above, in epochs."""
    if not isinstance(steps_per_epoch, int) or steps_per_epoch < 1 or last_step == 0:
        return
    from matplotlib.ticker import MaxNLocator

    per_epoch = float(steps_per_epoch)
    to_epochs: Callable[[Any], Any] = lambda step: step / per_epoch  # noqa: E731
    to_steps: Callable[[Any], Any] = lambda epoch: epoch * per_epoch  # noqa: E731
    scale = axes.secondary_xaxis("top", functions=(to_epochs, to_steps))
    scale.set_xlabel("epoch", fontsize=8)
    if last_step >= 2 * steps_per_epoch:
        scale.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    scale.tick_params(labelsize=8)
    scale.spines["top"].set_linewidth(0.5)


def _title(folder: Path, state: dict[str, Any]) -> str:
    rank = state.get("rank")
    precision = str(state.get("precision") or "").split(",")[0]
    items = [folder.name, state.get("backend"), state.get("model"), precision, rank and f"r{rank}"]
    return " · ".join(str(item).rstrip("/").rsplit("/", 1)[-1] for item in items if item)


def binned(values: FloatArray, reduce: Callable[[FloatArray], Any]) -> FloatArray:
    """float64 [at most MAX_BINS]: `reduce` of neighbouring values, in bins of equal counts."""
    bins = np.array_split(values, min(MAX_BINS, len(values)))
    return np.array([reduce(values) for values in bins])


def thinned(values: Sequence[float]) -> FloatArray:
    """Every n-th value, the last one included; at most MAX_BINS."""
    count = min(MAX_BINS, len(values))
    kept: FloatArray = np.asarray(values, float)[np.linspace(0, len(values) - 1, count).round().astype(int)]
    return kept
