"""A report's section on single rows: how their losses moved, and which were memorised or got worse.

The rows are judged by `core.row_history`; here they are drawn and listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.protocols import FloatArray
from core.report.curves import Drawn, NamedLine, rows_chart
from core.report.report import RunReport
from core.row_history import RowFate, RowHistory, RowVerdict, SplitHistory, judge_rows, read_history

MAX_LISTED = 12
"""Rows of a kind that are listed."""
_MAX_DRAWN = 5
"""Of these, drawn by themselves."""
Texts = Mapping[tuple[str, int], str]
"""Split and number of a row -> an excerpt of it."""


@dataclass(frozen=True, slots=True)
class ListedRow:
    """Losses in nats per target token, as text."""

    name: str
    start: str
    best: str
    last: str
    amount: str
    text: str


@dataclass(frozen=True, slots=True)
class RowGroup:
    title: str
    words: str
    amount: str
    """Head of the column with each row's amount."""
    rows: tuple[ListedRow, ...]
    more: int
    """Rows that are not listed."""
    has_texts: bool


@dataclass(frozen=True, slots=True)
class RowsSection:
    facts: tuple[tuple[str, str], ...]
    """What `core.row_history` says, label and text."""
    charts: tuple[Drawn, ...]
    groups: tuple[RowGroup, ...]
    note: str = ""
    """Why there are no texts."""

    @property
    def headline(self) -> str | None:
        """The sentence for the verdict."""
        return next((text for label, text in self.facts if label == "memorised"), None)


@dataclass(frozen=True, slots=True)
class JudgedHistory:
    history: RowHistory
    verdict: RowVerdict

    @property
    def named(self) -> list[RowFate]:
        """The rows that are listed."""
        return [*self.verdict.memorised[:MAX_LISTED], *self.verdict.worse[:MAX_LISTED]]


def read_rows(report: RunReport) -> JudgedHistory | str:
    """The rows' losses, judged by the run's bounds; or why there are none."""
    from safetensors import SafetensorError

    try:
        history = read_history(report.folder)
    except (SafetensorError, OSError):
        return "The losses of single rows (row_losses/) can't be read."
    if history is None:
        return "The losses of single rows were not recorded: there was no evaluation yet."
    return JudgedHistory(history, judge_rows(history, report.config.guard))


def rows_section(judged: JudgedHistory, *, texts: Texts, without_texts: str) -> RowsSection:
    """
    Args:
        texts: of the rows in `JudgedHistory.named`, where the data are there.
        without_texts: why there are none.
    """
    groups = tuple(_groups(judged.verdict, texts))
    return RowsSection(
        facts=tuple(_facts(judged.verdict)),
        charts=tuple(_charts(judged)),
        groups=groups,
        note=f"Rows are named, not shown. {without_texts}" if groups and without_texts else "",
    )


def _facts(verdict: RowVerdict) -> Iterator[tuple[str, str]]:
    for line in verdict.lines:
        label, _, text = line.strip().partition("  ")
        yield label, text.strip()


def _groups(verdict: RowVerdict, texts: Texts) -> Iterator[RowGroup]:
    if verdict.memorised:
        words = (
            f"Training rows whose loss fell much further, by step {verdict.best_step}, than that of held-out rows that "
            "began alike."
        )
        yield _group("Memorised rows", words, "too far by", verdict.memorised, texts)
    if verdict.worse:
        words = f"Validation rows whose loss rose, by step {verdict.best_step}, while the mean fell."
        yield _group("Rows that got worse", words, "rose by", verdict.worse, texts)


def _group(title: str, words: str, amount: str, fates: Sequence[RowFate], texts: Texts) -> RowGroup:
    listed = tuple(
        ListedRow(
            name=fate.origin,
            start=f"{fate.start:.3f}",
            best=f"{fate.best:.3f}",
            last=f"{fate.last:.3f}",
            amount=f"{fate.amount:.3f}",
            text=texts.get((fate.split, fate.row), ""),
        )
        for fate in fates[:MAX_LISTED]
    )
    has_texts = any(row.text for row in listed)
    return RowGroup(title, words, amount, listed, max(len(fates) - MAX_LISTED, 0), has_texts)


# --- charts -----------------------------------------------------------------------------------------------------------


def _charts(judged: JudgedHistory) -> Iterator[Drawn]:
    history, verdict = judged.history, judged.verdict
    steps = np.array(history.steps, float)
    splits = (
        ("rows-train", "Training rows", "probe", history.probe, verdict.memorised, "memorised"),
        ("rows-val", "Validation rows", "val", history.validation, verdict.worse, "got worse"),
    )
    for name, title, style, split, fates, named_as in splits:
        if split is None or not len(split):
            continue
        named = list(_lines(split, fates[:_MAX_DRAWN]))
        words = f"{named_as}: the {len(named)} that stand out most" if len(fates) > len(named) else named_as
        chart = rows_chart(name, title, steps, split.means, style=style, named=named, named_as=words)
        if chart is not None:
            yield chart


def _lines(split: SplitHistory, fates: Sequence[RowFate]) -> Iterator[NamedLine]:
    places = {int(row): place for place, row in enumerate(split.row_ids)}
    for fate in fates:
        losses: FloatArray = split.means[:, places[fate.row]]
        yield NamedLine(fate.origin, losses)
