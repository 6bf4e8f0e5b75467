"""What watching a run looks like."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from core import chart, monitor
from core.monitor_screen import clock
from tests.core.monitored import FakeRun, text


@pytest.mark.parametrize(("width", "height"), [(50, 20), (60, 24), (80, 24), (120, 40), (200, 60)])
def test_fits_the_terminal_and_keeps_the_facts(run: FakeRun, width: int, height: int) -> None:
    run.until_60()
    shown = text(monitor.snapshot(run.folder), width, height)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= height
    for fact in ("step 60/120", "1.900  ▼ 0.700", "0.100  [0.070, 0.150]", "GOOD", "1.900 at step 50", "3 of 3 left"):
        assert fact in shown
    for fact in ("2.600 before training", "1,234 tok/s", "21.4 GB of 24.0", "1.00e-04", "40 steps"):
        assert fact in shown
    assert re.search(r"2:(20|1\d) left", shown)
    assert "running" in shown
    assert (chart.VAL_MARK in shown) == (width >= 60)


def test_grade_bounds_are_the_runs_own(run: FakeRun) -> None:
    run.until_60()
    assert "GOOD  (EXCELLENT < 0.04)" in text(monitor.snapshot(run.folder), 80)


def test_wide_and_high_terminals_get_the_evaluations(run: FakeRun) -> None:
    run.until_60()
    found = monitor.snapshot(run.folder)
    (row,) = [line for line in text(found, 120, 40).splitlines() if line.rstrip().endswith("best")]
    assert row.split()[:4] == ["50", "1.900", "1.800", "0.100"]
    assert "base model" not in text(found, 80, 24)


def routing(num_layers: int = 4, *, collapsed: list[int] | None = None) -> dict[str, Any]:
    """Of 8 experts, even in every layer but the second: 0.4 there for the first expert, nothing for the last."""
    even, second = [0.125] * 8, [0.4, 0.3, 0.125, 0.1, 0.025, 0.025, 0.025, 0.0]
    scalars = {"entropy": 0.94, "entropy_min": 0.77, "entropy_min_layer": 1, "moved_max": 0.31, "moved_max_layer": 1}
    return {**scalars, "collapsed": collapsed or [], "shares": [even, second, *([even] * (num_layers - 2))]}


def with_routing(run: FakeRun, **values: Any) -> monitor.Snapshot:
    run.until_60()
    run.record(100, val_loss=1.8, probe_loss=1.7, gap=0.1, gap_low=0.05, gap_high=0.2, grade="GOOD", **values)
    return monitor.snapshot(run.folder)


def test_a_mixture_shows_its_routing_and_a_map_where_there_is_room(run: FakeRun) -> None:
    snapshot = with_routing(run, routing=routing())
    small, large = text(snapshot, 80, 24), text(snapshot, 100, 50)
    for shown in (small, large):
        assert "experts: entropy 0.94 (lowest 0.77, layer 1)" in shown
        assert "moved 0.31 from the base model (layer 1)" in shown
    assert "▒▒" not in small
    assert re.search(r"^ +0  (▒▒){8}$", large, re.M)
    assert re.search(r"^ +1  ████▒▒▒▒$", large, re.M)
    assert re.search(r"^ +3  (▒▒){8}$", large, re.M)


def test_a_map_of_many_layers_shows_means_of_neighbours(run: FakeRun) -> None:
    shown = text(with_routing(run, routing=routing(32)), 100)
    rows = re.findall(r"^ +(\d+-\d+)  \S", shown, re.M)
    assert rows[:2] == ["0-1", "2-3"]
    assert len(rows) == 16
    # the mean of even and 0.4, 0.3, 0.125, 0.1, 0.025 ..: 2.1, 1.7, 1, 0.9, 0.6, 0.6, 0.6, 0.5 times even
    assert re.search(r"^ +0-1  ██▓▓▒▒▒▒░░░░░░░░$", shown, re.M)


def test_a_collapse_is_a_warning(run: FakeRun) -> None:
    snapshot = with_routing(run, routing=routing(collapsed=[1, 3]))
    assert "experts: the routing collapsed in training, in layers 1, 3" in snapshot.warnings


@pytest.mark.parametrize("damaged", [None, 3, {"shares": "x"}, {"entropy": "?", "shares": [[]], "collapsed": 1}])
def test_a_damaged_routing_is_left_out(run: FakeRun, damaged: Any) -> None:
    shown = text(with_routing(run, routing=damaged), 100, 50)
    assert "experts" not in shown
    assert "1.800" in shown


def test_without_utf8_a_map_keeps_its_shades(run: FakeRun) -> None:
    shown = text(with_routing(run, routing=routing()), 100, 50, encoding="ascii")
    assert re.search(r"^ +1  ####::::$", shown, re.M)


def test_without_utf8_all_is_ascii_and_nothing_is_lost(run: FakeRun) -> None:
    run.until_60()
    shown = text(monitor.snapshot(run.folder), 80, 24, encoding="ascii")
    assert "1.900  v 0.700" in shown
    assert "o val" in shown
    assert "x probe" in shown


def test_colour_says_nothing_that_the_text_does_not(run: FakeRun) -> None:
    run.until_60()
    found = monitor.snapshot(run.folder)
    coloured = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    with coloured.capture() as capture:
        coloured.print(monitor.render(found, 80))
    assert "\x1b[32m" in capture.get()
    plain = [line.rstrip() for line in Text.from_ansi(capture.get()).plain.rstrip().splitlines()]
    assert plain == [line.rstrip() for line in text(found, 80).rstrip().splitlines()]


def test_an_empty_run_shows_that_it_starts(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path / "new")
    fake.state.update(status="starting", phase="loading")
    shown = text(monitor.snapshot(fake.folder), 80, 24)
    assert "loading" in shown
    assert "note" not in shown
    fake.state.update(status="running", step=5)
    assert "metrics.jsonl: no record yet" in text(monitor.snapshot(fake.folder), 80, 24)
    fake.die()


def test_clock() -> None:
    assert [clock(value) for value in (0, 59.9, 61, 5981, 93784, None)] == [
        "0:00", "0:59", "1:01", "1:39:41", "1 d 2:03:04", "?",
    ]  # fmt: skip
