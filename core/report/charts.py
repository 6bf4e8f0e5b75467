"""Charts as SVG for a page: colours and dashes come from the page's style, so that they follow light, dark and print.

Text that a caller gives is escaped. Every chart has a title and a description for those who can't see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

import numpy as np

from core.protocols import FloatArray

WIDTH, HEIGHT = 440, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 12, 40
_MAX_MARKED = 40
"""Points up to which each has a marker."""
Marker = Literal["circle", "square", "triangle"]


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a legend: `style` is the name of a look in the page's style."""

    text: str
    style: str
    marker: Marker | None = None
    is_band: bool = False


class Chart:
    """Curves over steps; the legend stands beside it in the page, over no curve."""

    def __init__(
        self,
        name: str,
        *,
        title: str,
        description: str,
        x: tuple[float, float],
        y: tuple[float, float],
        y_label: str,
        x_label: str = "optimiser step",
    ) -> None:
        """
        Args:
            name: of the chart, the only one of it in the page.
            x, y: first and last value of the axes.
        """
        assert all(map(math.isfinite, (*x, *y)))
        self._name, self._title, self._description = name, title, description
        self._x = (x[0], x[1] if x[1] > x[0] else x[0] + 1.0)
        self._y = (y[0], y[1] if y[1] > y[0] else y[0] + 1.0)
        self._labels = x_label, y_label
        self._parts: list[str] = []
        self.keys: list[Key] = []

    def line(self, x: FloatArray, y: FloatArray, style: str, *, marker: Marker | None = None, key: str = "") -> None:
        """A curve; it is broken where there is no number."""
        known = np.isfinite(x) & np.isfinite(y)
        for part in _runs(known):
            if len(part) > 1:
                self._parts.append(f'<path class="l {style}" d="{self._path(x[part], y[part])}"/>')
        places = np.flatnonzero(known)
        if marker is not None and len(places) <= _MAX_MARKED:
            self._parts += (self._marker(float(x[place]), float(y[place]), style, marker) for place in places)
        elif len(places) == 1:
            self._parts.append(self._marker(float(x[places[0]]), float(y[places[0]]), style, "circle"))
        if key:
            self.keys.append(Key(key, style, marker))

    def band(self, x: FloatArray, low: FloatArray, high: FloatArray, style: str, *, key: str = "") -> None:
        """The area between two curves."""
        known = np.flatnonzero(np.isfinite(low) & np.isfinite(high) & np.isfinite(x))
        if len(known) > 1:
            there, back = x[known], x[known][::-1]
            outline = f"{self._path(there, high[known])}L{self._path(back, low[known][::-1])[1:]}Z"
            self._parts.append(f'<path class="a {style}" d="{outline}"/>')
        elif len(known):
            at = self._at(float(x[known[0]]), 0.0)[0]
            ends = self._at(0.0, float(low[known[0]]))[1], self._at(0.0, float(high[known[0]]))[1]
            self._parts.append(f'<path class="l {style}" d="M{at:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>')
        if key:
            self.keys.append(Key(key, style, is_band=True))

    def zone(self, low: float, high: float, style: str, *, name: str) -> None:
        """A part of the height with a name, behind everything that comes later."""
        low, high = max(low, self._y[0]), min(high, self._y[1])
        if high <= low:
            return
        top, bottom = self._at(0, high)[1], self._at(0, low)[1]
        width = WIDTH - _LEFT - _RIGHT
        self._parts.append(
            f'<rect class="z {style}" x="{_LEFT}" y="{top:.1f}" width="{width}" height="{bottom - top:.1f}"/>'
        )
        if bottom - top >= 15:
            where = f'x="{WIDTH - _RIGHT - 4}" y="{top + 12:.1f}"'
            self._parts.append(f'<text class="zn" {where} text-anchor="end">{escape(name)}</text>')

    def level(self, y: float, style: str, *, key: str = "") -> None:
        """A line across."""
        if self._y[0] <= y <= self._y[1]:
            at = self._at(0, y)[1]
            self._parts.append(f'<path class="l {style}" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
        if key:
            self.keys.append(Key(key, style))

    def point(self, x: float, y: float, style: str, *, marker: Marker, key: str = "") -> None:
        """A single large mark."""
        self._parts.append(self._marker(x, y, style, marker, size=6.5))
        if key:
            self.keys.append(Key(key, style, marker))

    def svg(self) -> str:
        """The chart, as wide as its place."""
        x_label, y_label = self._labels
        middle = (_TOP + HEIGHT - _BOTTOM) / 2
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{self._name}-t {self._name}-d">'
            f'<title id="{self._name}-t">{escape(self._title)}</title>'
            f'<desc id="{self._name}-d">{escape(self._description)}</desc>'
            f"{self._grid()}{''.join(self._parts)}"
            f'<path class="axis" d="M{_LEFT} {_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>'
            f'<text class="al" x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
            f'<text class="al" transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text></svg>"
        )

    def _grid(self) -> str:
        lines = []
        ticks = nice_ticks(*self._y, most=5)
        for value, text in zip(ticks, tick_texts(ticks), strict=True):
            at = self._at(0, value)[1]
            lines.append(
                f'<path class="g" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>'
                f'<text x="{_LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
            )
        ticks = [tick for tick in nice_ticks(*self._x, most=6) if tick == int(tick)]
        for value, text in zip(ticks, tick_texts(ticks), strict=True):
            at = self._at(value, 0)[0]
            lines.append(f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{text}</text>')
        return "".join(lines)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        """Place of a value; what is above or below the axis is put on its end."""
        share_x = (x - self._x[0]) / (self._x[1] - self._x[0])
        share_y = min(max((y - self._y[0]) / (self._y[1] - self._y[0]), 0.0), 1.0)
        return _LEFT + share_x * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - share_y * (HEIGHT - _TOP - _BOTTOM)

    def _path(self, x: FloatArray, y: FloatArray) -> str:
        places = (self._at(float(one), float(other)) for one, other in zip(x, y, strict=True))
        return "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in places)

    def _marker(self, x: float, y: float, style: str, marker: Marker, *, size: float = 3.2) -> str:
        return mark(*self._at(x, y), style, marker, size=size)


def mark(x: float, y: float, style: str, marker: Marker, *, size: float = 3.2) -> str:
    """A marker at a place of an SVG."""
    if marker == "circle":
        return f'<circle class="m {style}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    if marker == "square":
        side = 1.8 * size
        return (
            f'<rect class="m {style}" x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" '
            f'height="{side:.1f}"/>'
        )
    return f'<path class="m {style}" d="M{x:.1f} {y - size:.1f}l{size:.1f} {2 * size:.1f}h{-2 * size:.1f}Z"/>'


def swatch(key: Key) -> str:
    """What a legend shows of a curve; the text beside it says the rest."""
    inner = f'<path class="l {key.style}" d="M1 7H27"/>'
    if key.is_band:
        inner = f'<rect class="a {key.style}" x="1" y="2" width="26" height="10"/>'
    if key.marker is not None:
        inner += mark(14, 7, key.style, key.marker)
    return f'<svg class="sw" viewBox="0 0 28 14" aria-hidden="true">{inner}</svg>'


def heat_map(name: str, shares: FloatArray, *, title: str, description: str) -> str:
    """Which experts a mixture's layers choose: a cell for each, darker where an expert gets more than its even share.

    Args:
        shares: float64 [layers, experts]; each row sums to 1.
    """
    layers, experts = shares.shape
    cell = min(max((WIDTH - _LEFT) / experts, 2.0), 22.0)
    row = min(max(260 / layers, 3.0), 16.0)
    width, height = _LEFT + cell * experts + 4, row * layers + 26
    level = np.searchsorted(np.array(HEAT_BOUNDS), shares * experts, side="right")
    paths = []
    for shade in range(len(HEAT_BOUNDS) + 1):
        cells = "".join(
            f"M{_LEFT + cell * expert:.1f} {row * layer + 2:.1f}h{cell * 0.94:.1f}v{row * 0.9:.1f}h{-cell * 0.94:.1f}z"
            for layer, expert in zip(*np.nonzero(level == shade), strict=True)
        )
        if cells:
            paths.append(f'<path class="h{shade}" d="{cells}"/>')
    every = max(layers // 8, 1)
    labels = "".join(
        f'<text x="{_LEFT - 6}" y="{row * layer + 2 + row * 0.8:.1f}" text-anchor="end">{layer}</text>'
        for layer in range(0, layers, every)
    )
    foot = (
        f'<text x="{_LEFT + cell * experts / 2:.0f}" y="{height - 6:.0f}" text-anchor="middle">'
        f"experts 0 to {experts - 1}</text>"
    )
    return (
        f'<svg viewBox="0 0 {max(width, WIDTH * 0.75):.0f} {height:.0f}" role="img" '
        f'aria-labelledby="{name}-t {name}-d"><title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(description)}</desc>{"".join(paths)}{labels}{foot}</svg>'
    )


HEAT_BOUNDS = (0.25, 0.75, 1.25, 2.0)
"""Times its even share from which an expert is drawn a shade darker."""


# --- axes -------------------------------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, *, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most so many and one more: steps of 1, 2, 2.5 or 5 times a power of 10."""
    span = high - low
    assert span > 0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if span / (factor * power) <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The ticks with as many decimals as tell them apart."""
    if len(ticks) < 2:
        return [f"{tick:,.4g}" for tick in ticks]
    step = min(after - before for before, after in pairwise(ticks))
    decimals = next((number for number in range(7) if abs(round(step, number) - step) < 1e-9 * max(step, 1e-9)), 7)
    return [f"{tick:z,.{decimals}f}" for tick in ticks]


def limits(*parts: FloatArray, include: Sequence[float] = ()) -> tuple[float, float]:
    """Lowest and highest number of all, with a margin; from 0 to 1 where there is none."""
    known = np.concatenate([*(part[np.isfinite(part)] for part in parts), np.array(include, float)])
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    margin = 0.05 * (high - low) or 0.05 * max(abs(high), 1.0)
    return low - margin, high + margin


def _runs(known: np.ndarray) -> list[np.ndarray]:
    """Places of neighbouring true values."""
    places = np.flatnonzero(known)
    return np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []
