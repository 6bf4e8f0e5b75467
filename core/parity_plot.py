"""`parity.png`: the losses of both sides over each other, and how far they are apart.

In the manner of `core.plots`: colours that colour-blind readers tell apart, another line for each curve.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.files import write_atomic
from core.parity import LOSS_TOLERANCE, NORM_TOLERANCE, Report
from core.plots import DPI
from core.protocols import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "parity.png"
SMALLEST = 1e-8
"""Smaller differences, 0 among them, are drawn here; float32 resolves 6e-8."""
_BLUE, _VERMILLION, _GREEN, _BLACK, _GREY = "#0072B2", "#D55E00", "#009E73", "#000000", "#999999"


def write_parity_plot(folder: Path, report: Report) -> None:
    """Draws the report; writes nothing when the records could not be compared.

    From the top: loss of each step on both sides; relative differences of loss and gradient norm with their
    tolerances; relative differences of the validation rows before and after, sorted.
    """
    if not report.steps:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences, rows = figure.subplots(3, 1, height_ratios=(5, 5, 4))
    differences.sharex(losses)
    _draw_losses(losses, report)
    _draw_differences(differences, report)
    _draw_rows(rows, report)
    for axes in (losses, differences, rows):
        axes.grid(color=_GREY, alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="upper right", ncols=2)
    title = f"parity: {report.a.backend} and {report.b.backend}, {Path(report.a.model).name}"
    losses.set_title(title, loc="left", fontsize=10, fontweight="bold")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(folder / PLOT, image.getvalue())


def _draw_losses(axes: Axes, report: Report) -> None:
    steps = [step.step for step in report.steps]
    sides = ((report.a, _BLUE, "-", 2.6, 0), (report.b, _VERMILLION, "--", 1.2, 1))
    for record, colour, line, width, side in sides:
        values = [step.losses[side] for step in report.steps]
        axes.plot(steps, values, color=colour, ls=line, lw=width, label=f"{record.backend}, {record.device}")
    axes.set_ylabel("loss (nats per token)")
    axes.tick_params(labelbottom=False)


def _draw_differences(axes: Axes, report: Report) -> None:
    steps = [step.step for step in report.steps]
    loss = [step.loss_difference for step in report.steps]
    norm = [step.norm_difference for step in report.steps]
    axes.semilogy(steps, _raised(loss), color=_BLUE, marker="o", ms=3.5, lw=0.6, label="loss")
    axes.semilogy(steps, _raised(norm), color=_GREEN, marker="x", ms=4.5, lw=0.6, ls=":", label="gradient norm")
    _draw_tolerance(axes, LOSS_TOLERANCE, "loss", _BLUE)
    _draw_tolerance(axes, NORM_TOLERANCE, "gradient norm", _GREEN)
    axes.set_xlabel("optimiser step")
    _dress(axes, [*loss, *norm])


def _draw_rows(axes: Axes, report: Report) -> None:
    sides = ((report.base_rows, _BLACK, "o", "before the first step"), (report.final_rows, _VERMILLION, "x", "after"))
    for rows, colour, marker, label in sides:
        values = _raised(sorted((row.difference for row in rows), reverse=True))
        places = np.arange(1, len(values) + 1)
        axes.semilogy(places, values, color=colour, marker=marker, ms=3.5, lw=0.6, label=label)
    _draw_tolerance(axes, LOSS_TOLERANCE, "a row's loss", _BLUE)
    axes.set_xlabel("validation rows, the one that differs most first")
    _dress(axes, [row.difference for rows in (report.base_rows, report.final_rows) for row in rows])


def _raised(values: Sequence[float]) -> FloatArray:
    """A logarithmic axis has no place for 0."""
    return np.maximum(np.array(values, np.float64), SMALLEST)


def _draw_tolerance(axes: Axes, tolerance: float, what: str, colour: str) -> None:
    axes.axhline(tolerance, color=colour, lw=0.8, ls="--")
    text = f"tolerance of {what}: {tolerance:g}"
    axes.annotate(
        text,
        (0.0, tolerance),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color=colour,
        fontsize=7,
    )


def _dress(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(SMALLEST / 2, max(*values, NORM_TOLERANCE) * 20)
    axes.set_ylabel("relative difference")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
