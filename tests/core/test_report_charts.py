"""Charts as SVG: places worked out by hand, axes, and gaps where there is no number."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from core.report.charts import HEIGHT, WIDTH, Chart, heat_map, limits, nice_ticks, tick_texts
from core.report.curves import NamedLine, rows_chart, thinned

LEFT, RIGHT, TOP, BOTTOM = 54, WIDTH - 10, 12, HEIGHT - 40


def chart() -> Chart:
    return Chart("c", title="T <b>", description="D & d", x=(0.0, 10.0), y=(0.0, 2.0), y_label="loss")


def paths(svg: str, style: str) -> list[str]:
    return re.findall(rf'<path class="{style}" d="([^"]*)"', svg)


def test_a_curve_lies_where_its_numbers_are() -> None:
    drawn = chart()
    drawn.line(np.array([0.0, 5.0, 10.0]), np.array([0.0, 1.0, 2.0]), "val")
    middle = f"{(LEFT + RIGHT) / 2:.1f} {(TOP + BOTTOM) / 2:.1f}"
    assert paths(drawn.svg(), "l val") == [f"M{LEFT}.0 {BOTTOM}.0L{middle}L{RIGHT}.0 {TOP}.0"]


def test_a_curve_is_broken_where_there_is_no_number() -> None:
    drawn = chart()
    drawn.line(np.arange(5.0), np.array([1.0, 1.0, math.nan, 1.0, 1.0]), "val")
    assert [path.count("L") for path in paths(drawn.svg(), "l val")] == [1, 1]


def test_a_lone_point_is_seen() -> None:
    drawn = chart()
    drawn.line(np.array([0.0]), np.array([1.0]), "val")
    assert drawn.svg().count("<circle") == 1


def test_a_value_beyond_the_axis_stays_in_the_picture() -> None:
    drawn = chart()
    drawn.line(np.array([0.0, 10.0]), np.array([1.0, 99.0]), "train")
    assert paths(drawn.svg(), "l train")[0].endswith(f"L{RIGHT}.0 {TOP}.0")


def test_zones_end_at_the_axes_and_high_ones_have_names() -> None:
    drawn = chart()
    drawn.zone(-5.0, 1.0, "z0", name="GOOD")
    drawn.zone(1.99, 2.0, "z1", name="FLAT")
    drawn.zone(2.5, 9.0, "z2", name="ABOVE")
    svg = drawn.svg()
    half = (BOTTOM - TOP) / 2
    assert f'<rect class="z z0" x="{LEFT}" y="{TOP + half:.1f}" width="{RIGHT - LEFT}" height="{half:.1f}"/>' in svg
    assert "GOOD" in svg and "FLAT" not in svg and "ABOVE" not in svg


def test_words_are_escaped() -> None:
    assert "T &lt;b&gt;" in chart().svg() and "D &amp; d" in chart().svg()


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.0, 10.0, 5, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
        (0.0, 1.0, 4, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (-0.13, 0.37, 5, [-0.1, 0.0, 0.1, 0.2, 0.3]),
        (1234.0, 1235.0, 2, [1234.0, 1234.5, 1235.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, most: int, expected: list[float]) -> None:
    assert nice_ticks(low, high, most=most) == pytest.approx(expected)


def test_ticks_have_as_many_decimals_as_they_need() -> None:
    assert tick_texts([0.0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_texts([-0.1, 0.0, 0.1]) == ["-0.1", "0.0", "0.1"]
    assert tick_texts([0.0, 20_000.0]) == ["0", "20,000"]


def test_limits_hold_every_number() -> None:
    assert limits(np.array([1.0, math.nan]), include=[3.0]) == pytest.approx((0.9, 3.1))
    assert limits(np.array([math.nan])) == (0.0, 1.0)
    low, high = limits(np.array([2.0, 2.0]))
    assert low < 2.0 < high


def test_thinning_keeps_both_ends() -> None:
    records = [{"step": step} for step in range(1000)]
    kept = thinned(records, 10)
    assert len(kept) == 10 and (kept[0]["step"], kept[-1]["step"]) == (0, 999)


def test_few_rows_have_a_line_each_and_many_have_quantiles() -> None:
    steps = np.array([0.0, 10.0])
    few = rows_chart("r", "Rows", steps, np.ones((2, 3)), style="val", named=[], named_as="")
    losses = np.stack([np.linspace(0.0, 100.0, 101)] * 2)
    named = [NamedLine("d:1", losses[:, 0])]
    many = rows_chart("r", "Rows", steps, losses, style="val", named=named, named_as="memorised")
    assert few is not None and many is not None
    assert len(paths(few.svg, "l val thin")) == 3 and not paths(few.svg, "a val wide")
    assert len(paths(many.svg, "a val wide")) == len(paths(many.svg, "a val inner")) == 1
    assert [key.text for key in many.keys] == ["nine tenths of the rows", "half of the rows", "median", "memorised"]
    assert "nine tenths lie between 5.000 and 95.000" in many.svg


def test_a_heat_map_has_every_expert_in_its_shade() -> None:
    shares = np.array([[0.5, 0.3, 0.15, 0.05]])  # 2, 1.2, 0.6, 0.2 times an even share
    svg = heat_map("h", shares, title="t", description="d")
    assert re.findall(r'class="(h\d)"', svg) == ["h0", "h1", "h2", "h4"]
