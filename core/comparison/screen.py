"""Runs side by side on a terminal: a column for each run, or, where that is too wide, a line for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from core.comparison.compare import NOTHING, PLOT, RESULT, TABLE, ComparedRun, Comparison, shown_setting
from core.overfitting import GRADES
from core.screen import GRADE_STYLES, wrapped

MARK = "*"
"""Behind the best of a line."""
_LONGEST = 24
"""Characters of a name, and of a setting's value, where each run is a line."""
_SHORTEST = 16
"""Characters of a setting's value, where each run is a column."""
_GAP = "  "


@dataclass(frozen=True, slots=True)
class _Line:
    """A setting or a figure of all runs."""

    label: str
    cells: tuple[str, ...]
    best: int | None = None

    def cell(self, place: int) -> str:
        return self.cells[place] + (MARK if place == self.best else " " if self.best is not None else "")


def print_comparison(comparison: Comparison, *, console: Console, written: Path | None) -> None:
    """Runs, what differs in their settings, what came of them, what follows from it, and where it is written."""
    console.print(Text.assemble(("twinkeel compare", "bold"), f" · {len(comparison.runs)} runs"), soft_wrap=True)
    for number, run in enumerate(comparison.runs, start=1):
        console.print(Text.assemble(f"  {number}  {run.folder}", (f"  {_status(run)}", "dim")), soft_wrap=True)
    parts = (("settings", _settings(comparison), True), ("outcome", _outcome(comparison), False))
    for title, lines, may_cut in parts:
        if lines:
            console.print()
            for text in _table(title, lines, comparison.runs, console.width, may_cut=may_cut):
                console.print(text, soft_wrap=True)
    if comparison.best:
        console.print(Text(f"  {MARK} best", "dim"))
    console.print()
    for note in comparison.notes:
        console.print(Text(wrapped(note, console.width) if console.is_terminal else note), soft_wrap=True)
    if written is not None:
        console.print(Text(f"\n  written   {written}   ({TABLE}, {RESULT}, {PLOT})"), soft_wrap=True)


def _status(run: ComparedRun) -> str:
    status = run.status.replace("_", " ")
    return f"{status} at step {run.figures['steps']}" if run.figures.get("steps") and not run.is_complete else status


def _settings(comparison: Comparison) -> list[_Line]:
    return [
        _Line(name, tuple(shown_setting(value) for value in values)) for name, values in comparison.settings.items()
    ]


def _shortened(lines: Sequence[_Line], width: int) -> list[_Line]:
    """With the ends of long values only: of a path, its name."""

    def short(text: str) -> str:
        return text if len(text) <= width else f"…{text[1 - width :]}"

    return [replace(line, cells=tuple(map(short, line.cells))) for line in lines]


def _outcome(comparison: Comparison) -> list[_Line]:
    lines = []
    for figure in comparison.lines:
        values = [run.figures.get(figure.name) for run in comparison.runs]
        if all(value is None for value in values):
            continue
        cells = tuple(NOTHING if value is None else figure.show(value) for value in values)
        lines.append(_Line(figure.label, cells, comparison.best.get(figure.name)))
    return lines


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(title: str, lines: Sequence[_Line], runs: Sequence[ComparedRun], width: int, *, may_cut: bool) -> list[Text]:
    """Args: may_cut: whether the end of a value says enough."""
    heads = [f"{number} {run.name}" for number, run in enumerate(runs, start=1)]
    label = max(len(title), *(len(line.label) for line in lines)) + 2 * len(_GAP)
    room = (width - label) // len(runs) - len(_GAP)  # of a run's column
    if room >= (_SHORTEST if may_cut else max(len(line.cell(place)) for line in lines for place in range(len(runs)))):
        return _upright(title, _shortened(lines, room) if may_cut else lines, [_cut(head, room) for head in heads])
    if may_cut:
        lines = _shortened(lines, _LONGEST)
    return _across(title, lines, [_cut(head, _LONGEST) for head in heads], width)


def _cut(head: str, width: int) -> str:
    return head if len(head) <= width else f"{head[: width - 1]}…"


def _upright(title: str, lines: Sequence[_Line], heads: Sequence[str]) -> list[Text]:
    """A line for each figure, a column for each run."""
    label = max(len(title), *(len(line.label) for line in lines)) + 2
    widths = [max(len(head), *(len(line.cell(place)) for line in lines)) for place, head in enumerate(heads)]
    rows = [_head([title.ljust(label), *(head.rjust(size) for head, size in zip(heads, widths, strict=True))])]
    for line in lines:
        text = Text("  " + line.label.ljust(label))
        for place, size in enumerate(widths):
            text.append(_GAP)
            text.append_text(_cell(line, place, size))
        rows.append(text)
    return rows


def _across(title: str, lines: Sequence[_Line], heads: Sequence[str], width: int) -> list[Text]:
    """A line for each run, the figures in as many tables as the width asks for."""
    first = max(len(head) for head in heads)
    sizes = [max(len(line.label), *(len(line.cell(place)) for place in range(len(heads)))) for line in lines]
    rows: list[Text] = []
    for start, end in _packed(sizes, width - first - 2):
        part = list(zip(lines[start:end], sizes[start:end], strict=True))
        corner = title if not rows else ""
        if rows:
            rows.append(Text())
        rows.append(_head([_cut(corner, first).ljust(first), *(line.label.rjust(size) for line, size in part)]))
        for place, head in enumerate(heads):
            text = Text("  " + head.ljust(first))
            for line, size in part:
                text.append(_GAP)
                text.append_text(_cell(line, place, size))
            rows.append(text)
    return rows


def _packed(sizes: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Ranges of columns that fit side by side; at least one each."""
    ranges: list[tuple[int, int]] = []
    start, used = 0, 0
    for place, size in enumerate(sizes):
        if place > start and used + size + len(_GAP) > width:
            ranges.append((start, place))
            start, used = place, 0
        used += size + len(_GAP)
    return [*ranges, (start, len(sizes))]


def _head(cells: Sequence[Any]) -> Text:
    return Text("  " + _GAP.join(map(str, cells)), "dim")


def _cell(line: _Line, place: int, size: int) -> Text:
    text = line.cell(place)
    style = GRADE_STYLES[text] if text in GRADES else "bold green" if place == line.best else ""
    return Text(" " * (size - len(text))).append(text, style)
