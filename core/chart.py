"""Losses over steps, in a terminal: a history that stays small however long the run, and its drawing with plotext."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

MAX_POINTS = 512
VAL_MARK, PROBE_MARK, LOSS_MARK = "●", "○", "⠒"
STYLES = {VAL_MARK: "bold blue", PROBE_MARK: "magenta", LOSS_MARK: "bright_black"}

_BRAILLE = r"[⠁-⣿]+"
_OUTLIERS = 0.02
"""Share of the highest training losses that may leave the chart at the top, so that one spike does not flatten it."""

Point = tuple[float, float]


@dataclass(slots=True)
class Curve:
    """A value over steps as at most `MAX_POINTS` means of neighbours; adding costs the same at any length."""

    _width: int = 1
    _buckets: list[tuple[int, float, float, int]] = field(default_factory=list)
    """Bucket number, sum of steps, sum of values, count: in rising order of step."""

    def add(self, step: int, value: float) -> None:
        """Adds the value at `step`, which must not be below the last."""
        number = step // self._width
        if self._buckets and self._buckets[-1][0] == number:
            _, steps, values, count = self._buckets[-1]
            self._buckets[-1] = (number, steps + step, values + value, count + 1)
            return
        self._buckets.append((number, float(step), value, 1))
        if len(self._buckets) > MAX_POINTS:
            self._width *= 2
            halved = Curve(self._width)
            for number, steps, values, count in self._buckets:
                halved._merge(number // 2, steps, values, count)
            self._buckets = halved._buckets

    def _merge(self, number: int, steps: float, values: float, count: int) -> None:
        if self._buckets and self._buckets[-1][0] == number:
            _, old_steps, old_values, old_count = self._buckets.pop()
            steps, values, count = steps + old_steps, values + old_values, count + old_count
        self._buckets.append((number, steps, values, count))

    @property
    def points(self) -> tuple[Point, ...]:
        """(step, value), oldest first; exact up to `MAX_POINTS` values."""
        return tuple((steps / count, values / count) for _, steps, values, count in self._buckets)


def draw(
    loss: Sequence[Point],
    val: Sequence[Point],
    probe: Sequence[Point],
    *,
    width: int,
    height: int,
) -> list[Text] | None:
    """The chart as `height` lines of exactly `width` cells; None when there is nothing to draw or no plotext."""
    from rich.text import Text

    if not (loss or val) or width < 20 or height < 5:
        return None
    try:
        import plotext
    except ImportError:  # a compiled package: an exotic platform may lack it, and the facts are enough
        return None
    low, high = _value_range(loss, val, probe)
    last = max(step for step, _ in [*loss, *val, *probe])
    plotext.terminal.limit(False, False)
    figure = plotext.figure.clear()
    figure.plot_size(width, height)
    figure.axes(False, axis="x", side="upper")
    figure.axes(False, axis="y", side="right")
    for axis, ticks in (("y", _ticks(low, high, height // 3)), ("x", _ticks(0, last, width // 11))):
        figure.ruler(axis).ticks(ticks, _labels(ticks))
    figure.ruler("x").lim(0, max(last, 1))
    figure.ruler("y").lim(low, high)
    for points, marker in ((loss, "braille"), (probe, PROBE_MARK), (val, VAL_MARK)):
        shown = [(x, min(max(y, low), high)) for x, y in thin(points, width)]
        if shown:
            signal = figure.signal(*map(list, zip(*shown, strict=True)), marker=marker)
            figure.draw(signal.lines(marker == "braille"))
    lines = figure.build().string(colorless=True).split("\n")
    return [_coloured(Text(line)) for line in lines[:height]]


def _coloured(line: Text) -> Text:
    for mark in (VAL_MARK, PROBE_MARK):
        line.highlight_regex(mark, STYLES[mark])
    line.highlight_regex(_BRAILLE, STYLES[LOSS_MARK])
    return line


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points: means of equal groups of neighbours, the last one kept as it is."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil((len(points) - 1) / (limit - 1))
    groups = [points[i : min(i + size, len(points) - 1)] for i in range(0, len(points) - 1, size)]
    return [*map(_mean, groups), points[-1]]


def _mean(group: Sequence[Point]) -> Point:
    steps, values = zip(*group, strict=True)
    return sum(steps) / len(group), sum(values) / len(group)


def _value_range(*curves: Iterable[Point]) -> tuple[float, float]:
    loss, *evaluated = [sorted(value for _, value in curve) for curve in curves]
    usual = loss[: max(1, math.ceil(len(loss) * (1 - _OUTLIERS)))]
    values = [*usual, *(value for curve in evaluated for value in curve)]
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within `low` and `high`: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    span = (high - low) / max(count, 2)
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span))
    size = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= span * 0.75)
    first = math.ceil(low / size - 1e-9)
    return [number * size for number in range(first, math.floor(high / size + 1e-9) + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """As few decimals as tell the ticks apart; thousands as k."""
    if ticks and max(map(abs, ticks)) >= 10_000:
        return [f"{tick / 1000:g}k" if tick else "0" for tick in ticks]
    gap = min((after - before for before, after in pairwise(ticks)), default=1.0)
    decimals = next((n for n in range(6) if abs(round(gap, n) - gap) < gap * 1e-6), 6)
    return [f"{tick:.{decimals}f}" for tick in ticks]
