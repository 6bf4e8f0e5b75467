"""`parity.png`: the losses of both sides over each other, and how far they are apart.

In the manner of `core.plots`: colours that colour-blind readers tell apart, another line for each curve.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import ceil, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.files import write_atomic
from core.parity import ADAPTER_TOLERANCE, LOSS_TOLERANCE, NORM_TOLERANCE, Report, side_names
from core.plots import DPI

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "parity.png"
SMALLEST = 1e-8
"""The axis is logarithmic above, and linear down to 0 below; float32 resolves 6e-8."""
_BLUE, _VERMILLION, _GREEN, _BLACK, _GREY = "#0072B2", "#D55E00", "#009E73", "#000000", "#999999"


def write_parity_plot(folder: Path, report: Report) -> None:
    """Draws the report; writes nothing when the records could not be compared.

    From the top: loss of each step on both sides; relative differences of loss and gradient norm with their
    tolerances; likewise of the validation rows before and after, and of the final adapter's tensors, sorted.
    """
    if not report.steps:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    places = [["losses", "losses"], ["differences", "differences"], ["rows", "tensors"]]
    axes: dict[str, Axes] = figure.subplot_mosaic(places, height_ratios=(5, 5, 4))
    axes["differences"].sharex(axes["losses"])
    _draw_losses(axes["losses"], report)
    _draw_differences(axes["differences"], report)
    _draw_rows(axes["rows"], report)
    _draw_tensors(axes["tensors"], report)
    axes["tensors"].set_ylabel("")
    for each in axes.values():
        each.grid(color=_GREY, alpha=0.25, lw=0.5)
        each.spines[["top", "right"]].set_visible(False)
        if each.get_legend_handles_labels()[0]:
            each.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="best", ncols=2)
    figure.suptitle(_title(report), x=0.01, ha="left", fontsize=10, fontweight="bold")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(folder / PLOT, image.getvalue())


def _title(report: Report) -> str:
    """Model and verdict, a line each."""
    caveat = f"\n{report.caveat}" if report.caveat and report.first is None else ""
    return f"{Path(report.a.model).name}, {report.a.data}\n{report.headline}{caveat}"


def _draw_losses(axes: Axes, report: Report) -> None:
    steps = [step.step for step in report.steps]
    sides = ((report.a, _BLUE, "-", 2.6, 0), (report.b, _VERMILLION, "--", 1.2, 1))
    names = side_names(report.a, report.b)
    for record, colour, line, width, side in sides:
        values = [step.losses[side] for step in report.steps]
        axes.plot(steps, values, color=colour, ls=line, lw=width, label=f"{names[side]}, {record.device}")
    axes.set_ylabel("loss (nats per token)")
    axes.tick_params(labelbottom=False)


def _draw_differences(axes: Axes, report: Report) -> None:
    steps = [step.step for step in report.steps]
    loss = [step.loss_difference for step in report.steps]
    norm = [step.norm_difference for step in report.steps]
    _draw_curve(axes, steps, loss, color=_BLUE, marker="o", ms=3.5, lw=0.6, label="loss")
    _draw_curve(axes, steps, norm, color=_GREEN, marker="x", ms=4.5, lw=0.6, ls=":", label="gradient norm")
    _draw_tolerance(axes, LOSS_TOLERANCE, "loss", _BLUE)
    _draw_tolerance(axes, NORM_TOLERANCE, "gradient norm", _GREEN)
    axes.set_xlabel("optimiser step")
    _dress(axes, [*loss, *norm])


def _draw_rows(axes: Axes, report: Report) -> None:
    sides = ((report.base_rows, _BLACK, "o", "before training"), (report.final_rows, _VERMILLION, "x", "after"))
    for rows, colour, marker, label in sides:
        values = sorted((row.difference for row in rows), reverse=True)
        places = range(1, len(values) + 1)
        _draw_curve(axes, places, values, color=colour, marker=marker, ms=3.5, lw=0.6, label=label)
    _draw_tolerance(axes, LOSS_TOLERANCE, "a row's loss", _BLUE)
    axes.set_xlabel("validation rows, largest first")
    _dress(axes, [row.difference for rows in (report.base_rows, report.final_rows) for row in rows])


def _draw_tensors(axes: Axes, report: Report) -> None:
    values = sorted((tensor.difference for tensor in report.tensors), reverse=True)
    _draw_curve(axes, range(1, len(values) + 1), values, color=_BLACK, marker="o", ms=3.5, lw=0.6)
    _draw_tolerance(axes, ADAPTER_TOLERANCE, "a tensor", _BLUE)
    axes.set_xlim(0.5, len(values) + 0.5)
    axes.set_xlabel("tensors of the adapter, largest first")
    _dress(axes, values)


def _draw_curve(axes: Axes, places: Sequence[int], values: Sequence[float], **look: Any) -> None:
    """Differences of 0 are marks on the axis' lower edge, where no line leads."""
    drawn = np.array(values, np.float64)
    axes.plot(places, np.where(drawn == 0, np.nan, drawn), **look)
    equal = [place for place, value in zip(places, values, strict=True) if value == 0]
    if equal:  # a line without points that is not clipped confuses the layout
        marks = {name: look[name] for name in ("color", "marker", "ms")}
        axes.plot(equal, np.zeros(len(equal)), **marks, ls="none", clip_on=False, zorder=3)


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

    # linear from 0 to the smallest, at the height of a decade, so that 0 has a place
    axes.set_yscale("symlog", linthresh=SMALLEST, linscale=1)
    axes.set_ylim(0, max(*values, NORM_TOLERANCE) * 20)
    axes.set_yticks([0, *(10.0**power for power in range(-8, ceil(log10(axes.get_ylim()[1])), 2))])
    axes.set_ylabel("relative difference")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
