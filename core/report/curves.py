"""The charts of a report and the tables behind them: losses, gap, rows, experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.overfitting import GRADES
from core.plots import MAX_BINS, binned
from core.protocols import FloatArray
from core.records import Record, number
from core.report.charts import Chart, Key, heat_map, limits
from core.report.report import RunReport, start_of
from core.routing import Routing, shares_of

MAX_EVALUATIONS = 240
"""Evaluations that are drawn and listed; of more, so many of them, evenly."""
_OUTLIER_PERCENTILE = 99.0
_MAX_LINES = 40
"""Rows up to which each has its own line; of more, quantiles are drawn."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A chart in the page."""

    title: str
    svg: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """What a chart shows, as text."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The first cell names the row."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class NamedLine:
    """A row that is drawn by itself."""

    name: str
    losses: FloatArray
    """float64 [evaluations], in nats per target token."""


def thinned(records: Sequence[Record], most: int = MAX_EVALUATIONS) -> list[Record]:
    """At most so many, evenly; the first and the last are kept."""
    if len(records) <= most:
        return list(records)
    return [records[place] for place in np.linspace(0, len(records) - 1, most).round().astype(int)]


def column(records: Sequence[Record], name: str) -> FloatArray:
    """float64 [records], NaN where there is no number."""
    found = (number(record.get(name)) for record in records)
    return np.array([math.nan if value is None else value for value in found], float)


def loss_chart(report: RunReport) -> Drawn | None:
    """Training loss, validation and probe loss, the level before training and the best step; None without records."""
    records = thinned(report.evaluations)
    train = np.array(report.training, float).reshape(-1, 2)
    if not len(train) and not records:
        return None
    steps, val, probe = (column(records, name) for name in ("step", "val_loss", "probe_loss"))
    high = [float(np.percentile(train[:, 1], _OUTLIER_PERCENTILE))] if len(train) else []
    low = [float(train[:, 1].min())] if len(train) else []
    last = max([*steps.tolist(), *train[-1:, 0].tolist()])
    chart = Chart(
        "losses",
        title="Losses over the optimiser steps",
        description=_loss_words(steps, val, probe),
        x=(0.0, last),
        y=limits(val, probe, include=[*high, *low]),
        y_label="loss (nats per token)",
    )
    if len(train) > MAX_BINS:
        middle, mean = binned(train[:, 0], np.mean), binned(train[:, 1], np.mean)
        chart.band(middle, binned(train[:, 1], np.min), binned(train[:, 1], np.max), "train")
        chart.line(middle, mean, "train", key="training loss, with dropout: means in their range")
    elif len(train):
        chart.line(train[:, 0], train[:, 1], "train", key="training loss, with dropout")
    if len(val) and steps[0] == 0 and np.isfinite(val[0]):
        chart.level(float(val[0]), "base", key=f"{start_of(report)}, {val[0]:.3f}")
    chart.line(steps, probe, "probe", marker="square", key="training rows, as validation is measured")
    if np.isfinite(val).any():
        chart.line(steps, val, "val", marker="circle", key="validation rows")
    best = number(report.snapshot.state.get("best_step"))
    at = next((record for record in report.evaluations if record.get("step") == best and best), None)
    if at is not None and (loss := number(at.get("val_loss"))) is not None and best is not None:
        chart.point(best, loss, "best", marker="triangle", key=f"best, {loss:.3f} at step {best:,.0f}")
    return Drawn("Losses", chart.svg(), tuple(chart.keys))


def _loss_words(steps: FloatArray, val: FloatArray, probe: FloatArray) -> str:
    known = np.flatnonzero(np.isfinite(val))
    if not len(known):
        return "There are no validation losses." if not len(probe) else f"Training rows end at {probe[-1]:.3f}."
    first, last, lowest = known[0], known[-1], known[np.argmin(val[known])]
    return (
        f"The validation loss goes from {val[first]:.3f} at step {steps[first]:,.0f} to {val[last]:.3f} at step "
        f"{steps[last]:,.0f}; its lowest is {val[lowest]:.3f} at step {steps[lowest]:,.0f}. The same training "
        f"rows end at {probe[last]:.3f}. All numbers are in the table below."
    )


def gap_chart(report: RunReport) -> Drawn | None:
    """The gap with its interval on the grades' zones; None where nothing is held out."""
    records = [record for record in thinned(report.evaluations) if number(record.get("gap")) is not None]
    if not records or not report.is_judged:
        return None
    steps, gap = column(records, "step"), column(records, "gap")
    low, high = np.fmin(column(records, "gap_low"), gap), np.fmax(column(records, "gap_high"), gap)
    grades = report.snapshot.guard.grades
    bottom, top = limits(low, high, include=(0.0, grades[1]))
    chart = Chart(
        "gap",
        title="Gap between validation and training rows",
        description=(
            f"The gap ends at {gap[-1]:z.3f}, between {low[-1]:z.3f} and {high[-1]:z.3f}: {records[-1].get('grade')}. "
            "All numbers are in the table below."
        ),
        x=(0.0, float(max(steps[-1], 1.0))),
        y=(bottom, top),
        y_label="gap (nats per token)",
    )
    edges = (-math.inf, *grades, math.inf)
    for place, grade in enumerate(GRADES):
        chart.zone(max(edges[place], bottom), min(edges[place + 1], top), f"z{place}", name=grade)
    confidence = f"{100 * report.snapshot.guard.confidence:g} %"
    chart.band(steps, low, high, "gapband", key=f"{confidence} interval, by resampling rows")
    chart.level(0.0, "zero")
    chart.line(steps, gap, "gapline", marker="circle", key="gap: validation less training rows")
    return Drawn("Gap", chart.svg(), tuple(chart.keys))


def evaluations_table(report: RunReport) -> Table | None:
    """Every evaluation that is drawn."""
    records = thinned(report.evaluations)
    if not records:
        return None
    rows = tuple(
        (
            f"{record.get('step'):,}",
            *(
                _text(record.get(name), ".2f" if name == "epoch" else "z.3f")
                for name in ("epoch", "val_loss", "probe_loss", "gap")
            ),
            _interval(record),
            str(record.get("grade") or "–"),
        )
        for record in records
    )
    of = f"{len(records)} of {len(report.evaluations):,} evaluations" if len(records) < len(report.evaluations) else ""
    return Table(
        "Evaluations: losses and gap in nats per target token",
        ("step", "epoch", "validation", "training rows", "gap", "interval", "grade"),
        rows,
        of,
    )


def _interval(record: Record) -> str:
    low, high = number(record.get("gap_low")), number(record.get("gap_high"))
    return "–" if low is None or high is None else f"[{low:z.3f}, {high:z.3f}]"


def _text(value: object, form: str) -> str:
    known = number(value)
    return "–" if known is None else format(known, form)


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_chart(
    name: str,
    title: str,
    steps: FloatArray,
    losses: FloatArray,
    *,
    style: str,
    named: Sequence[NamedLine],
    named_as: str,
) -> Drawn | None:
    """How the losses of single rows moved: a line for each of few, else the ranges that half and nine tenths lie in.

    Args:
        steps: float64 [evaluations]
        losses: float64 [evaluations, rows], in nats per target token.
        named: rows that are drawn by themselves, at most a handful.
        named_as: what they are, in the legend.
    """
    if losses.size == 0 or not np.isfinite(losses).any():
        return None
    keep = np.linspace(0, len(steps) - 1, min(len(steps), MAX_EVALUATIONS)).round().astype(int)
    steps, losses = steps[keep], losses[keep]
    few = losses.shape[1] <= _MAX_LINES
    quantiles = np.nanpercentile(losses, [5, 25, 50, 75, 95], axis=1)
    shown = [line.losses[keep] for line in named]
    chart = Chart(
        name,
        title=title,
        description=(
            f"Of {losses.shape[1]:,} rows, the median loss goes from {quantiles[2][0]:.3f} to {quantiles[2][-1]:.3f}; "
            f"at the end nine tenths lie between {quantiles[0][-1]:.3f} and {quantiles[4][-1]:.3f}."
        ),
        x=(0.0, float(max(steps[-1], 1.0))),
        y=limits(losses if few else quantiles, *shown),
        y_label="loss of a row (nats per token)",
    )
    if few:
        for row in range(losses.shape[1]):
            chart.line(steps, losses[:, row], f"{style} thin", key="a row each" if row == 0 else "")
    else:
        chart.band(steps, quantiles[0], quantiles[4], f"{style} wide", key="nine tenths of the rows")
        chart.band(steps, quantiles[1], quantiles[3], f"{style} inner", key="half of the rows")
    chart.line(steps, quantiles[2], style, key="median")
    for place, line in enumerate(shown):
        chart.line(steps, line, "named", marker="triangle", key=named_as if place == 0 else "")
    return Drawn(title, chart.svg(), tuple(chart.keys))


# --- experts ----------------------------------------------------------------------------------------------------------


def expert_charts(report: RunReport) -> list[Drawn]:
    """A heat map before training and one at the best step; none of a model that is no mixture."""
    charts = []
    for place, record in enumerate(report.routing):
        shares = shares_of(record.get("routing"))
        if shares is None:
            continue
        step = number(record.get("step")) or 0
        title = "Before training" if not step else f"At step {step:,.0f}"
        layers, experts = shares.shape
        words = f"{layers} layers, {experts} experts; the most chosen one of all gets {shares.max():.1%} of its layer."
        charts.append(
            Drawn(title, heat_map(f"experts{place}", shares, title=f"Experts: {title}", description=words), ())
        )
    return charts


def experts_table(report: RunReport) -> Table | None:
    """A line for each layer: how evenly it uses its experts, and which it uses most."""
    known = [shares for record in report.routing if (shares := shares_of(record.get("routing"))) is not None]
    if not known:
        return None
    before, after = known[0], known[-1]
    entropy = [_entropy(shares) for shares in (before, after)]
    moved = 0.5 * np.abs(after - before).sum(axis=1)
    rows = tuple(
        (
            str(layer),
            f"{entropy[0][layer]:.3f}",
            f"{entropy[1][layer]:.3f}",
            f"{int(after[layer].argmax())} ({after[layer].max():.1%})",
            f"{moved[layer]:.3f}",
        )
        for layer in range(len(after))
    )
    return Table(
        "Experts by layer: entropy is 1 where all are used alike; moved is the part of the choices that went elsewhere",
        ("layer", "entropy before", "entropy", "most chosen", "moved"),
        rows,
    )


def _entropy(shares: FloatArray) -> FloatArray:
    """float64 [layers], as `Routing.entropy`."""
    counts = tuple(tuple(int(value) for value in layer) for layer in np.round(1e9 * shares))
    return Routing(tokens=counts, experts_per_token=1).entropy


HEAT_WORDS = ("below a quarter", "up to three quarters", "about its even share", "up to twice", "twice or more")
"""Of its even share, that each shade stands for (`HEAT_BOUNDS`), from the lightest."""
