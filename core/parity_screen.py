"""What `parity` shows: where two sides agree, how closely, and where they part first. The verdict is last, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from core.parity import (
    ADAPTER_TOLERANCE,
    LOSS_TOLERANCE,
    NORM_TOLERANCE,
    REPORT,
    FourBitComparison,
    Report,
    RowComparison,
    StepComparison,
    side_names,
    worst_row,
)
from core.parity_commands import train_words, typed_again, wrapped
from core.parity_plot import PLOT
from core.parity_record import Record

MAX_STEPS = 12
"""Steps that the table shows."""
WIDEST = 100
_NEXT = "next    "


@dataclass(frozen=True, slots=True)
class Page:
    """A rich renderable. Colours add nothing that is not written."""

    report: Report
    folder: Path
    """Where the files that it names are."""
    typed: Sequence[str] | None = None
    """The settings as they were typed; None: as the first record gives them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.update(width=min(options.max_width, WIDEST))
        for part in self._parts(narrow.max_width):
            for line in console.render_lines(part, narrow, pad=False):
                yield Segments([*_stripped(line), Segment.line()])

    def _parts(self, width: int) -> Iterator[RenderableType]:
        report = self.report
        yield Text()
        yield from _header(report)
        yield Text()
        if report.steps:
            yield _indented(_steps(report))
            yield Text()
            yield _indented(_largest(report))
            yield Text()
            yield from _four_bits(report)
            yield Text()
        yield from _verdict(report)
        yield from _files(report, self.folder)
        if report.verdict == "same" and not report.caveat:
            typed = typed_again(report.a) if self.typed is None else self.typed
            lines = wrapped(train_words(typed, backend=report.a.backend), width - len(_NEXT) - 2)
            for head, line in zip_longest((_NEXT,), lines, fillvalue=" " * len(_NEXT)):
                yield _indented(Text(f"{head}{line}", overflow="fold"))


# --- what was compared ------------------------------------------------------------------------------------------------


def _header(report: Report) -> Iterator[RenderableType]:
    a, b = report.a, report.b
    yield Text.assemble(("twinkeel", "bold"), f" parity  {Path(a.model).name}, {a.data}")
    table = _grid("left", "left")
    for name, record in zip(side_names(a, b), (a, b), strict=True):
        versions = ", ".join(f"{name} {version}" for name, version in record.packages.items())
        table.add_row(Text(name, "bold"), Text(record.description))
        table.add_row("", Text(versions, "dim"))
    if not report.mismatches:
        batches = f"batches and targets of {len(a.steps)} steps, {len(a.rows.row_ids)} validation rows"
        table.add_row(Text("identical", "green"), Text(f"settings, model, {batches}, initial adapter, learning rates"))
    yield _indented(table)


def _steps(report: Report) -> RenderableType:
    a, b = side_names(report.a, report.b)
    table = _grid("right", "right", "right", "right", "right", "right", "left")
    heads = ("step", f"{a} loss", f"{b} loss", "apart", "grad norm", "apart", "")
    table.add_row(*(Text(head, "dim") for head in heads))
    for step in shown_steps(report.steps):
        table.add_row(
            str(step.step),
            f"{step.losses[0]:.6f}",
            f"{step.losses[1]:.6f}",
            _difference(step.loss_difference, LOSS_TOLERANCE),
            f"{step.grad_norms[0]:.4f}",
            _difference(step.norm_difference, NORM_TOLERANCE),
            Text("" if step.is_within else "beyond", "red"),
        )
    return table


def shown_steps(steps: list[StepComparison]) -> list[StepComparison]:
    """At most `MAX_STEPS`: first and last, the first beyond tolerance, the worst of each kind, and evenly between."""
    if len(steps) <= MAX_STEPS:
        return steps
    every = range(len(steps))
    chosen = {
        0,
        len(steps) - 1,
        max(every, key=lambda index: steps[index].loss_difference),
        max(every, key=lambda index: steps[index].norm_difference),
        next((index for index in every if not steps[index].is_within), 0),
    }
    for index in np.linspace(0, len(steps) - 1, MAX_STEPS - len(chosen) + 2).round().astype(int):
        if len(chosen) < MAX_STEPS:
            chosen.add(int(index))
    return [steps[index] for index in sorted(chosen)]


def _largest(report: Report) -> RenderableType:
    """The largest difference of each kind, beside its tolerance."""
    loss = max(report.steps, key=lambda step: step.loss_difference)
    norm = max(report.steps, key=lambda step: step.norm_difference)
    tensor = max(report.tensors, key=lambda tensor: tensor.difference)
    rows = (
        ("loss", loss.loss_difference, LOSS_TOLERANCE, f"step {loss.step}"),
        ("gradient norm", norm.norm_difference, NORM_TOLERANCE, f"step {norm.step}"),
        ("rows before", *_worst_row(report.base_rows)),
        ("rows after", *_worst_row(report.final_rows)),
        ("adapter", tensor.difference, ADAPTER_TOLERANCE, tensor.name.removeprefix("model.")),
    )
    table = _grid("left", "right", "right", "left", "left")
    table.add_row(Text("largest", "dim"), Text("apart", "dim"), Text("tolerance", "dim"), "", "")
    for name, difference, tolerance, where in rows:
        mark = Text("" if difference <= tolerance else "beyond", "red")
        place = Text(where if difference else "", "dim")
        table.add_row(name, _difference(difference, tolerance), f"{tolerance:.0e}", place, mark)
    return table


def _worst_row(rows: list[RowComparison]) -> tuple[float, float, str]:
    worst = worst_row(rows)
    return worst.difference, LOSS_TOLERANCE, f"row {worst.row} of {len(rows)}"


def _four_bits(report: Report) -> Iterator[RenderableType]:
    found = report.four_bits
    if found is None:
        yield _indented(Text(f"4 bits left out: {report.four_bits_skipped}", "dim"))
        return
    yield _indented(_four_bit_table(found, report.a, report.b))
    note = f"on {found.num_rows} validation rows with {found.num_targets} target tokens; no part of the verdict"
    yield _indented(Text(note, "dim"))


def _four_bit_table(found: FourBitComparison, a: Record, b: Record) -> RenderableType:
    table = _grid("left", "right", "right", "right", "right", "right")
    one, other = side_names(a, b)
    heads = ("val loss", "16 bits", f"{one} 4 bits", "", f"{other} 4 bits", "")
    table.add_row(*(Text(head, "dim") for head in heads))
    for name, wide, narrow in ((a.start, found.base_16, found.base_4), ("adapter", found.final_16, found.final_4)):
        cells = [cell for side in (0, 1) for cell in (f"{narrow[side]:.4f}", f"{narrow[side] - wide[side]:+.4f}")]
        table.add_row(name, f"{wide[0]:.4f}", *cells)
    return table


# --- the verdict ------------------------------------------------------------------------------------------------------


def _verdict(report: Report) -> Iterator[RenderableType]:
    first = report.first
    if report.mismatches:
        yield Text(report.headline, "bold red")
        for mismatch in report.mismatches:
            yield _indented(Text.assemble((mismatch.where, "bold"), f": {mismatch.detail}"))
            yield _indented(Text(mismatch.hint, "dim"), by=4)
    elif first is not None:
        yield Text(report.headline, "bold red")
        yield _indented(Text(first.detail))
        yield _indented(Text(first.hint))
    else:
        yield Text(report.headline, "bold yellow" if report.caveat else "bold green")
        if report.caveat:
            yield _indented(Text(report.caveat, "yellow"))
        for line in report.unproven:
            yield _indented(Text.assemble(("not proven  ", "yellow"), line))


def _files(report: Report, folder: Path) -> Iterator[RenderableType]:
    plot = f" and {PLOT}" if report.steps else ""
    yield _indented(Text(f"report  {folder / REPORT}{plot}", overflow="fold"))


def _grid(*justify: str) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for side in justify:
        table.add_column(justify="right" if side == "right" else "left", overflow="fold")
    return table


def _indented(part: RenderableType, *, by: int = 2) -> RenderableType:
    return Padding(part, (0, 0, 0, by))


def _difference(value: float, tolerance: float) -> Text:
    return Text("0" if value == 0 else f"{value:.1e}", "" if value <= tolerance else "red")


def _stripped(line: list[Segment]) -> list[Segment]:
    """Without the spaces at the end that fill a table up."""
    while line and not line[-1].text.rstrip(" "):
        line = line[:-1]
    return [*line[:-1], Segment(line[-1].text.rstrip(" "), line[-1].style)] if line else []
