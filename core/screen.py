"""What `train` shows: a progress bar on a terminal, plain lines elsewhere, and the same lines in `training.log`.

Everything worth keeping goes through the `twinkeel` logger, so the file and a pipe hold all that the terminal held.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from core.config import BASE_MODEL, GuardConfig
from core.overfitting import Gap, advice, relative_warning
from core.routing import RoutingReport, describe, routing_parts

LOGGER = logging.getLogger("twinkeel")
GRADE_STYLES = {"EXCELLENT": "green", "GOOD": "green", "MODERATE": "yellow", "CRITICAL": "red"}


REMEDY = "try a lower optim.lr or, if the router is trained, a higher moe.aux_loss_weight"
"""What holds against a collapse of the routing."""


def duration(seconds: float) -> str:
    """`0:42`, `12:03` or `1:12:08`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def count(number: float) -> str:
    """`980`, `12.3 k`, `3.1 M`, `7.2 B`."""
    for bound, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= bound:
            return f"{number / (1e3 if unit == 'k' else bound):.1f} {unit}"
    return f"{number:,.0f}"


def record_line(record: Mapping[str, Any], *, total_steps: int) -> str:
    """One line for a journal record."""
    parts = [f"step {record['step']}/{total_steps}", f"epoch {record['epoch']:.2f}"]
    if record["loss"] is not None:
        parts.append(f"loss {record['loss']:.3f}")
        if "aux_loss" in record:
            parts.append(f"aux loss {record['aux_loss']:.3f}")
        parts += [
            f"lr {record['lr']:.2e}",
            f"grad norm {record['grad_norm']:.2f}",
        ]
    if "general_loss" in record:
        parts.append(f"general {record['general_loss']:.3f} ({100 * record['general_flipped']:.1f} % flipped)")
    if record["tokens_per_second"]:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    parts.append(f"{record['memory_gb']:.1f} GB")
    return "  ".join(parts)


def evaluation_line(gap: Gap, *, step: int, is_best: bool, patience_left: int | None, start: str = BASE_MODEL) -> str:
    """One line for an evaluation; `start` is what there is before the first step."""
    name = start if step == 0 else f"step {step}"
    mark = "  best so far" if is_best else ""
    if step and not is_best and patience_left is not None:
        mark = f"  no improvement, patience {patience_left} left"
    return (
        f"{name}: validation {gap.val_loss:.3f}  probe {gap.probe_loss:.3f}  "
        f"gap {gap.value:.3f} [{gap.low:.3f}, {gap.high:.3f}]  {gap.grade}{mark}"
    )


class _Numbers(ProgressColumn):
    """The newest numbers, as many as the width allows."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        room = self._console.width - 46
        text = Text()
        for name, style in (("grade", ""), ("gap", ""), ("val", ""), ("loss", ""), ("speed", "dim"), ("memory", "dim")):
            value = task.fields.get(name)
            if value and len(text) + len(value) + 2 <= room:
                grade_style = GRADE_STYLES.get(value, style)
                text.append(value, grade_style).append("  ")
        return text


class TrainScreen:
    """The screen of one run; use as a context."""

    def __init__(
        self,
        *,
        total_steps: int,
        console: Console | None = None,
        guard: GuardConfig | None = None,
        start: str = BASE_MODEL,
        base_gap: float | None = None,
    ) -> None:
        """`base_gap`: the gap before the first step, of a run that is resumed; else it is seen."""
        self._base_gap = base_gap
        self._guard = guard or GuardConfig()
        self._start = start
        self._total_steps = total_steps
        self._console = console or Console(stderr=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._fields: dict[str, str] = {}

    @contextmanager
    def live(self, *, first_step: int = 0) -> Iterator[TrainScreen]:
        """Shows the bar on a terminal; log lines go above it."""
        if not self._console.is_terminal:
            yield self
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=14),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(compact=True),
            _Numbers(self._console),
        )
        with Progress(*columns, console=self._console, transient=True, refresh_per_second=4) as bar:
            self._bar = bar
            self._task = bar.add_task("training", total=self._total_steps, completed=first_step)
            try:
                yield self
            finally:
                self._bar = None

    def show_step(self, *, step: int, epoch: float) -> None:
        self._update(completed=step)

    def show_phase(self, phase: str) -> None:
        self._update(description=f"{phase:<10}")

    def show_record(self, record: Mapping[str, Any]) -> None:
        LOGGER.info(record_line(record, total_steps=self._total_steps))
        if record["loss"] is not None:
            self._fields["loss"] = f"loss {record['loss']:.3f}"
        if record["tokens_per_second"]:
            self._fields["speed"] = f"{record['tokens_per_second']:,.0f} tok/s"
        self._fields["memory"] = f"{record['memory_gb']:.1f} GB"
        self._update(**self._fields)

    def show_evaluation(self, gap: Gap, *, step: int, is_best: bool, patience_left: int | None) -> None:
        line = evaluation_line(gap, step=step, is_best=is_best, patience_left=patience_left, start=self._start)
        LOGGER.info(line)
        if not step:
            self._base_gap = gap.value
        else:
            LOGGER.info("  %s", advice(gap, self._guard, base_gap=self._base_gap))
            if (warning := relative_warning(gap, self._guard)) is not None:
                LOGGER.warning(warning)
        self._fields |= {
            "val": f"val {gap.val_loss:.3f}",
            "gap": f"gap {gap.value:.3f}",
            "grade": gap.grade,
        }
        self._update(**self._fields)

    def show_unjudged(self, loss: float, *, step: int) -> None:
        """Of a run that holds nothing out: the loss on training rows is all there is."""
        name = self._start if step == 0 else f"step {step}"
        LOGGER.info("%s: training rows %.3f  (not judged)", name, loss)

    def show_routing(self, report: RoutingReport, *, step: int) -> None:
        LOGGER.info("  %s", ", ".join(routing_parts(report.scalars, start=self._start if step else None)))
        if step == 0 and (before := report.base.collapsed()):
            LOGGER.info("  experts: unbalanced before training already: %s", describe(before))
        if report.collapses:
            LOGGER.warning("experts: the routing collapsed in training: %s; %s", describe(report.collapses), REMEDY)

    def _update(self, **values: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, **values)


class _ConsoleHandler(logging.Handler):
    """Log lines on the terminal, above the bar; warnings stand out by a word and a colour."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        text = ("warning: " if is_warning else "") + record.getMessage()
        if self._console.is_terminal:  # a file, or a program, gets whole lines
            text = wrapped(text, self._console.width)
        line = Text(text)
        if is_warning:
            line.stylize("yellow", 0, len("warning:"))
        self._console.print(line, soft_wrap=True)


def wrapped(text: str, width: int) -> str:
    """The text in lines of `width`, broken between words; what follows stands under the second column, if there is one.

    `  model    name · backend` has its second column at 11, `  most likely   56.7 %` at 16.
    """
    lines = []
    for line in text.split("\n"):
        start = re.match(r"\s{2}\S+(?: \S+)*?\s{2,}|\s*\S+\s{2,}|warning: |\s*", line)
        indent = min(len(start[0]) if start else 0, width // 3)
        lines += (
            textwrap.wrap(
                line,
                width,
                subsequent_indent=" " * indent,
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=True,
                replace_whitespace=False,
            )
            if len(line) > width
            else [line]
        )
    return "\n".join(lines)


@contextmanager
def logging_to(console: Console) -> Iterator[None]:
    """Sends the product's log lines to the terminal while the context lasts."""
    handler = _ConsoleHandler(console)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)


class _LogFile(logging.FileHandler):
    """A log file that never stops a run: when the disk is full, the lines that don't fit are lost, not the error."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        # closing flushes, which fails again on a full disk
        with suppress(OSError):
            super().close()


@contextmanager
def logging_to_file(path: Path) -> Iterator[None]:
    """Appends the same lines, with their time, to `training.log`."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()


def make_console() -> Console:
    """The console of a command; wide enough for whole lines when the output is a file or a pipe, or as COLUMNS says."""
    columns = os.environ.get("COLUMNS", "")
    is_given = columns.isdecimal() and int(columns) > 0
    return Console(width=int(columns) if is_given else None if sys.stdout.isatty() else 200, highlight=False)
