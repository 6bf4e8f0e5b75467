"""`experts.png`: how a mixture used its experts before training and at the best step, layer by layer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.files import write_atomic
from core.journal import ROUTING, read_records
from core.plots import DPI
from core.protocols import FloatArray
from core.records import Record, number, whole
from core.routing import shares_of
from core.run import EXPERTS_PLOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MAX_NUMBERS = 80
"""Cells of a map up to which each shows its share in per cent."""
MAX_TICKS = 32


def write_expert_plot(folder: Path) -> None:
    """Draws the shares of the choices that each expert got; writes nothing for a dense model.

    Layers from the top, experts from the left: before the first step, at the best step, and the second minus the first.
    """
    records = (record for record, _ in read_records(folder) if isinstance(record, dict))
    evaluations = [record for record in records if shares_of(record.get(ROUTING)) is not None]
    if not evaluations:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first, best = evaluations[0], _best(evaluations)
    before, after = shares_of(first[ROUTING]), shares_of(best[ROUTING])
    assert before is not None and after is not None
    num_layers, num_experts = before.shape
    size = (3 * min(max(0.32 * num_experts, 2.6), 9.0) + 1.6, min(max(0.26 * num_layers, 2.2), 12.0) + 1.2)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, 3, sharey=True))
    before, after = 100 * before, 100 * after
    _draw_shares(figure, panels[:2], (before, after), titles=(_title(first), _title(best, is_best=True)))
    _draw_difference(figure, panels[2], after - before)
    panels[0].set_ylabel("layer", fontsize=9)
    figure.suptitle(
        f"{folder.name}: share of each layer's choices, in per cent", x=0.01, ha="left", fontsize=10, fontweight="bold"
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(folder / EXPERTS_PLOT, image.getvalue())


def _best(evaluations: list[dict[str, Any]]) -> Record:
    """The lowest validation loss after the first step; before there is one, what there is."""
    trained = [record for record in evaluations if record.get("step") and number(record.get("val_loss")) is not None]
    return min(trained, key=lambda record: float(record["val_loss"]), default=evaluations[-1])


def _title(record: Record, *, is_best: bool = False) -> str:
    step = whole(record.get("step"))
    return f"best step, {step:,}" if is_best and step else "before training"


def _draw_shares(
    figure: Figure, panels: list[Axes], maps: tuple[FloatArray, FloatArray], *, titles: tuple[str, str]
) -> None:
    """Two maps, in per cent, on one scale, from no choice to the largest share of either."""
    top = max(shares.max() for shares in maps)
    for axes, shares, title in zip(panels, maps, titles, strict=True):
        image = _draw_map(axes, shares, cmap="viridis", low=0.0, high=top)
        _write_numbers(axes, shares, light=lambda share: bool(share < 0.6 * top), form="{:.{}f}")
        axes.set_title(title, fontsize=9)
    even = 100 / maps[0].shape[1]
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02)
    bar.ax.axhline(even, color="white", lw=1.5)
    bar.set_label(f"per cent; white line: all alike, {even:.3g}", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _draw_difference(figure: Figure, axes: Axes, difference: FloatArray) -> None:
    # at least one per cent, so that nothing looks like much
    most = max(float(np.abs(difference).max()), 1.0)
    image = _draw_map(axes, difference, cmap="PuOr_r", low=-most, high=most)
    _write_numbers(axes, difference, light=lambda change: bool(abs(change) > 0.6 * most), form="{:+.{}f}")
    axes.set_title("difference", fontsize=9)
    bar = figure.colorbar(image, ax=axes, fraction=0.1, pad=0.04)
    bar.ax.tick_params(labelsize=7)


def _draw_map(axes: Axes, values: FloatArray, *, cmap: str, low: float, high: float) -> AxesImage:
    image = axes.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    num_layers, num_experts = values.shape
    axes.set_xticks(range(0, num_experts, -(-num_experts // MAX_TICKS)))
    axes.set_yticks(range(0, num_layers, -(-num_layers // MAX_TICKS)))
    axes.tick_params(labelsize=7, length=2)
    axes.set_xlabel("expert", fontsize=9)
    return image


def _write_numbers(axes: Axes, values: FloatArray, *, light: Any, form: str) -> None:
    """The number in each cell, where there are few enough to read."""
    if values.size > MAX_NUMBERS:
        return
    digits = 1 if np.abs(values).max() < 5 else 0
    for (layer, expert), value in np.ndenumerate(values):
        color = "white" if light(value) else "black"
        text = form.format(value, digits) if abs(value) >= 0.5 * 10**-digits else "0"
        axes.text(expert, layer, text, ha="center", va="center", fontsize=6, color=color)
