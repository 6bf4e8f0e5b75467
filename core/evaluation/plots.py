"""The pictures of an evaluation: how each row's loss changed, who answered what, and F1 label by label.

Colours are those of Okabe and Ito (2008), as in `core.plots`; better and worse differ in shade and place as well.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.evaluation.classification import Classification
from core.evaluation.losses import PairedLosses
from core.evaluation.report import PLOTS, Evaluation
from core.files import disk_errors, write_atomic
from core.plots import DPI, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_DIFFERENCES = "loss_differences.png"
CONFUSION = "confusion.png"
F1 = "f1.png"

_BLUE, _VERMILLION, _BLACK, _GREY = "#0072B2", "#D55E00", "#000000", "#999999"
_MAX_BARS = 400
"""Rows that get a bar each; of more the outline is drawn."""
_NAME_LENGTH = 18
_MAX_NUMBERS = 12
"""Labels up to which a cell of a confusion matrix shows its number."""


def write_plots(folder: Path, evaluation: Evaluation) -> None:
    """Draws into `plots/`; a picture of an earlier evaluation for which there is nothing now goes away."""
    target = folder / PLOTS
    with disk_errors(target):
        target.mkdir(exist_ok=True)
    title = f"{Path(evaluation.run).name} · {evaluation.backend} · {len(evaluation.rows)} {evaluation.split} rows"
    _write(target / LOSS_DIFFERENCES, _loss_figure(evaluation.losses, title))
    for name, draw in ((CONFUSION, _confusion_figure), (F1, _f1_figure)):
        if evaluation.classification is None:
            (target / name).unlink(missing_ok=True)
        else:
            _write(target / name, draw(evaluation.classification, title))


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def _write(path: Path, figure: Figure) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(path, image.getvalue())


def _loss_figure(losses: PairedLosses, title: str) -> Figure:
    """Left: every row's difference, sorted. Right: how many rows have which."""
    figure = _figure(9, 4, title)
    rows, histogram = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    differences = np.sort(losses.row_differences)
    places = np.arange(len(differences)) + 1
    _draw_rows(rows, places.astype(float), differences)
    rows.set_xlabel("rows, from the one that gained most", fontsize=9)
    rows.set_ylabel("adapter's loss − base model's (nats per token)", fontsize=9)
    counts, edges = np.histogram(differences, bins=_bins(differences))
    middles, heights = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    colours = [_VERMILLION if middle > 0 else _BLUE for middle in middles]
    histogram.barh(middles, counts, height=heights, color=colours, alpha=0.8, edgecolor="white", linewidth=0.3)
    histogram.set_xlabel("rows", fontsize=9)
    for axes in (rows, histogram):
        axes.axhline(0, color=_BLACK, lw=0.8)
        axes.axhline(-losses.gain, color=_BLACK, lw=0.8, ls="--")
        _dress(axes)
    rows.legend(loc="best", fontsize=8, framealpha=0.85, edgecolor="none")
    return figure


def _bins(differences: Any) -> Any:
    """Edges of which one is 0, so that no bin holds rows that gained and rows that lost."""
    low, high = min(float(differences.min()), 0.0), max(float(differences.max()), 0.0)
    step = max((high - low) / 24, 1e-6)
    return np.arange(np.floor(low / step), np.ceil(high / step) + 1.5) * step


def _draw_rows(axes: Axes, places: Any, differences: Any) -> None:
    worse = differences > 0
    for which, colour, name in ((~worse, _BLUE, "better or equal"), (worse, _VERMILLION, "worse")):
        if not which.any():
            continue
        label = f"{name}: {int(which.sum())} rows"
        if len(places) <= _MAX_BARS:
            axes.bar(places[which], differences[which], width=1.0, color=colour, alpha=0.8, label=label)
        else:
            some = thinned(places), thinned(differences)
            axes.fill_between(*some, where=some[1] > 0 if name == "worse" else some[1] <= 0, color=colour, label=label)
    axes.plot([], [], color=_BLACK, lw=0.8, ls="--", label="mean over target tokens")


def _confusion_figure(scores: Classification, title: str) -> Figure:
    """Base model and adapter side by side: rows by label, columns by answer; the last column is unreadable."""
    names = [_short(label) for label in scores.scheme.labels]
    size = max(0.55 * len(names), 2.2)
    figure = _figure(2 * size + 3.2, size + 1.6, title)
    panels = figure.subplots(1, 2, sharey=True)
    sides = (("base model", scores.base), ("adapter", scores.adapter))
    top = max(int(side.confusion.max()) for _, side in sides)
    for axes, (name, side) in zip(panels, sides, strict=True):
        axes.imshow(side.confusion, cmap="Blues", vmin=0, vmax=max(top, 1), aspect="auto")
        axes.set_title(f"{name}: accuracy {side.accuracy:.2f}", fontsize=9)
        axes.set_xticks(range(len(names) + 1), [*names, "unreadable"], rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=8, length=0)
        axes.axvline(len(names) - 0.5, color=_GREY, lw=1.0)
        axes.set_xlabel("answered", fontsize=9)
        if len(names) <= _MAX_NUMBERS:
            for (at, answered), number in np.ndenumerate(side.confusion):
                colour = "white" if number > 0.6 * top else _BLACK
                axes.text(answered, at, f"{number}", ha="center", va="center", fontsize=8, color=colour)
    panels[0].set_ylabel("label of the row", fontsize=9)
    return figure


def _f1_figure(scores: Classification, title: str) -> Figure:
    """F1 of every label, and the macro average with its interval; base model and adapter beside each other."""
    labels = list(scores.base.per_class)
    places = np.arange(len(labels) + 1, dtype=float)
    figure = _figure(max(1.1 * len(places) + 1.5, 4.5), 3.8, title)
    axes = figure.subplots()
    for offset, name, side, colour, hatch in (
        (-0.2, "base model", scores.base, _GREY, "//"),
        (0.2, "adapter", scores.adapter, _BLUE, None),
    ):
        values = [*(side.per_class[label]["f1"] for label in labels), side.f1.value]
        axes.bar(places + offset, values, width=0.38, color=colour, hatch=hatch, edgecolor="white", label=name)
        spread = [[side.f1.value - side.f1.low], [side.f1.high - side.f1.value]]
        axes.errorbar(places[-1:] + offset, values[-1:], yerr=np.maximum(spread, 0.0), color=_BLACK, capsize=3, lw=1.0)
    axes.axvline(places[-1] - 0.5, color=_GREY, lw=0.8)
    counts = [f"{_short(label)}\n{scores.base.per_class[label]['support']:.0f} rows" for label in labels]
    axes.set_xticks(places, [*counts, "macro\naverage"])
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("F1", fontsize=9)
    axes.legend(loc="best", fontsize=8, framealpha=0.85, edgecolor="none")
    _dress(axes)
    return figure


def _short(label: str) -> str:
    return label if len(label) <= _NAME_LENGTH else f"{label[: _NAME_LENGTH - 1]}…"


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
