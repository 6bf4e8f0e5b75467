"""Base model and adapter on the same rows, kept row by row so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from core.errors import OutOfMemoryError
from core.evaluation.journal import RowJournal
from core.protocols import FILLER_ROW, Batch, FloatArray, IntArray
from core.workflow.after import OpenedRun, Side
from core.workflow.talking import answer_prompts
from data.answers import AskedRow

_log = logging.getLogger("twinkeel")
POSITIONS = {True: 16_384, False: 4_096}
"""Tokens of a batch of prompts with their answers at their longest, on an accelerator and on a CPU."""
NAMES: dict[Side, str] = {"base": "base model", "adapter": "adapter"}
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    ended: bool


# --- losses -----------------------------------------------------------------------------------------------------------


def losses_there(journal: RowJournal, side: Side, num_rows: int) -> tuple[FloatArray, IntArray] | None:
    """Each row's loss in nats, summed over its targets, float64 [N], and targets, int64 [N]; None while some lack."""
    found = {record["row"]: record for record in journal.records if record["side"] == side}
    if len(found) < num_rows:
        return None
    rows = [found[row] for row in range(num_rows)]
    return np.array([row["nll"] for row in rows], np.float64), np.array([row["targets"] for row in rows], np.int64)


def measure_losses(
    opened: OpenedRun, side: Side, batches: Sequence[Batch], journal: RowJournal, *, console: Console
) -> None:
    """Measures the batches that are not in the journal yet."""
    done = {record["row"] for record in journal.records if record["side"] == side}
    due = [batch for batch in batches if not done.issuperset(_row_ids(batch))]
    if not due:
        return
    learner = opened.use(side)
    with progress(f"{NAMES[side]}: losses", sum(len(_row_ids(batch)) for batch in due), console) as advance:
        for batch in due:
            losses = learner.evaluate([batch])
            rows = zip(losses.row_ids.tolist(), losses.nll.tolist(), losses.num_targets.tolist(), strict=True)
            journal.append(
                {"side": side, "row": row, "nll": nll, "targets": targets}
                for row, nll, targets in rows
                if row != FILLER_ROW
            )
            advance(len(_row_ids(batch)))


def _row_ids(batch: Batch) -> list[int]:
    ids: list[int] = batch.row_ids[batch.row_ids != FILLER_ROW].tolist()
    return ids


# --- answers ----------------------------------------------------------------------------------------------------------


def answers_there(journal: RowJournal, side: Side, num_rows: int) -> list[Answer] | None:
    """By row; None while some are missing."""
    found = {record["row"]: record for record in journal.records if record["side"] == side}
    if len(found) < num_rows:
        return None
    return [Answer(found[row]["text"], found[row]["ended"]) for row in range(num_rows)]


def answer_rows(
    opened: OpenedRun,
    side: Side,
    rows: Sequence[AskedRow],
    journal: RowJournal,
    *,
    max_tokens: int,
    batch_size: int | None,
    console: Console,
) -> None:
    """Answers the rows that are not in the journal yet, greedily.

    Raises:
        OutOfMemoryError: a prompt does not fit by itself.
    """
    done = {record["row"] for record in journal.records if record["side"] == side}
    positions = POSITIONS[opened.run.device.accelerator]
    plan = plan_batches(rows, max_tokens=max_tokens, batch_size=batch_size, positions=positions)
    due = [batch for batch in plan if not done.issuperset(batch)]
    if not due:
        return
    with progress(f"{NAMES[side]}: answers", sum(map(len, due)), console) as advance:
        for batch in due:
            found = _answer(opened, side, [rows[row] for row in batch], max_tokens=max_tokens)
            journal.append(
                {"side": side, "row": row, "text": answer.text, "ended": answer.ended}
                for row, answer in zip(batch, found, strict=True)
            )
            advance(len(batch))


def plan_batches(
    rows: Sequence[AskedRow], *, max_tokens: int, batch_size: int | None, positions: int
) -> list[list[int]]:
    """Places of the rows in each batch: neighbours in length, the longest first, so that memory runs out at once.

    Args:
        batch_size: rows of a batch; None: as many as fit in `positions` with their answers.
    """
    order = sorted(range(len(rows)), key=lambda row: (-len(_prompt(rows[row])), row))
    batches: list[list[int]] = []
    while order:
        longest = len(_prompt(rows[order[0]])) + max_tokens
        size = batch_size or max(positions // longest, 1)
        batches.append(order[:size])
        order = order[size:]
    return batches


def _prompt(row: AskedRow) -> list[int]:
    assert row.prompt_ids is not None, "a row of plain text"
    ids: list[int] = row.prompt_ids.tolist()
    return ids


def _answer(opened: OpenedRun, side: Side, rows: Sequence[AskedRow], *, max_tokens: int) -> list[Answer]:
    """One batch, or where that does not fit its halves."""
    try:
        found = answer_prompts(
            opened, side, [_prompt(row) for row in rows], stops=[row.stops for row in rows], max_tokens=max_tokens
        )
    except OutOfMemoryError as error:
        if len(rows) == 1:
            raise OutOfMemoryError(error.what, hint="lower --max-tokens, or use --no-generate") from None
        _log.info("%d prompts at once don't fit: half of them", len(rows))
    else:
        return [Answer(answer.text, answer.ended) for answer in found]
    half = len(rows) // 2
    return [
        *_answer(opened, side, rows[:half], max_tokens=max_tokens),
        *_answer(opened, side, rows[half:], max_tokens=max_tokens),
    ]


# --- progress ---------------------------------------------------------------------------------------------------------


@contextmanager
def progress(what: str, total: int, console: Console) -> Iterator[Advance]:
    """A bar on a terminal; elsewhere a line at the beginning and at each quarter."""
    if not console.is_terminal:
        yield _quarters(what, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} rows"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda rows: bar.advance(task, rows)


def _quarters(what: str, total: int) -> Advance:
    _log.info("%s of %d rows", what, total)
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        before, done = done, done + rows
        if 4 * before // total < 4 * done // total < 4:
            _log.info("%s %d/%d", what, done, total)

    return advance
