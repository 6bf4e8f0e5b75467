"""What `train --folds` shows beside the runs' own output: headings, the table over the folds, the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from core.errors import UserError
from core.folds import FINAL, FOLDS_PLOT, FoldResult, FoldsVerdict, PooledLoss, Spread, damaged, luck
from core.overfitting import grade_of
from core.run import ADAPTERS, COMPLETE, SUMMARY
from core.screen import GRADE_STYLES, wrapped

_HEAD = ["", "rows", "base", "val", "step", "gap", "grade"]
_NUMBERS = range(1, 5)
"""Columns that stand at the right."""


def heading(title: str, folder: Path) -> Text:
    """Stands above a run's own output."""
    return Text.assemble("\n", (title, "bold"), (f" · {folder}", "dim"))


def show_error(console: Console, error: UserError) -> None:
    _say(console, [f"error: {error}", "  this run failed, which is written down"])


def show_interrupted(console: Console, folder: Path) -> None:
    _say(console, ["", f"  all folds  python cli.py train --resume {folder}"])


def show_verdict(
    console: Console,
    folder: Path,
    verdict: FoldsVerdict | None,
    *,
    failed: Sequence[str],
    has_final: bool,
    start: str,
) -> None:
    """The table over the folds and what follows from it; `failed`: names of runs; `start`: what training began from."""
    console.print()
    if verdict is not None:
        for line in table_lines(verdict.results, verdict):
            console.print(line, soft_wrap=True)
    _say(console, ["", *verdict_lines(folder, verdict, failed=failed, has_final=has_final, start=start)])


def _say(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        text = wrapped(line, console.width) if console.is_terminal else line
        console.print(Text(text), soft_wrap=True)


# --- the table --------------------------------------------------------------------------------------------------------


def table_lines(results: Sequence[FoldResult], verdict: FoldsVerdict | None) -> list[Text]:
    """A line for each fold, each gap with its own bootstrap interval; below, the mean with its t-interval."""
    rows = [_HEAD, *map(_fold_cells, results)]
    styles = ["dim", *("" for _ in results)]
    if verdict is not None and len(verdict.done) > 1:
        rows += [_mean_cells(verdict), _sd_cells(verdict)]
        styles += ["bold", ""]
        if verdict.pooled is not None:
            rows.append(_pooled_cells(verdict, verdict.pooled))
            styles.append("")
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return [_line(row, widths, style) for row, style in zip(rows, styles, strict=True)]


def _line(row: Sequence[str], widths: Sequence[int], style: str) -> Text:
    cells = [
        cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row[:-1], widths, strict=False))
    ]
    return Text("  " + "  ".join(cells) + "  ", style).append(row[-1], GRADE_STYLES.get(row[-1], ""))


def _fold_cells(result: FoldResult) -> list[str]:
    name = f"fold {result.fold}"
    rows = "" if result.num_train_rows is None else f"{result.num_train_rows} + {result.num_val_rows}"
    if not result.is_done:
        where = f", step {result.step}" if result.step else ""
        where = f", {SUMMARY} damaged" if result.status in COMPLETE else where
        return [name, rows, "", "", "", f"{result.status.replace('_', ' ')}{where}", ""]
    grade = str(result.grade)
    return [
        name,
        rows,
        _three(result.base_val_loss),
        _three(result.best_val_loss),
        str(result.best_step),
        f"{_three(result.gap)} [{_three(result.gap_low)}, {_three(result.gap_high)}]",
        grade,
    ]


def _mean_cells(verdict: FoldsVerdict) -> list[str]:
    return [
        "fold mean",
        "",
        _three(verdict.base_val_loss.mean),
        _three(verdict.best_val_loss.mean),
        f"{verdict.best_step.mean:.0f}",
        f"{_three(verdict.gap.mean)}{interval(verdict.gap)}",
        verdict.grade,
    ]


def _sd_cells(verdict: FoldsVerdict) -> list[str]:
    step = verdict.best_step.sd
    return [
        "± sd",
        "",
        _three(verdict.base_val_loss.sd),
        _three(verdict.best_val_loss.sd),
        "" if step is None else f"{step:.0f}",
        f"{_three(verdict.gap.sd)} (own {verdict.own_sd:.3f})",
        "",
    ]


def _pooled_cells(verdict: FoldsVerdict, pooled: PooledLoss) -> list[str]:
    """Losses only: the gap's spread, which the verdict is about, is one between folds."""
    rows = [result.num_val_rows for result in verdict.done]
    num = "" if None in rows else f"{sum(count for count in rows if count is not None)} rows"
    return ["pooled", num, _three(pooled.base), _three(pooled.best), "", "", ""]


def interval(spread: Spread) -> str:
    """` [0.041, 0.115]`, the mean's; nothing of a single fold."""
    return "" if spread.low is None else f" [{_three(spread.low)}, {_three(spread.high)}]"


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:z.3f}"


# --- the verdict ------------------------------------------------------------------------------------------------------


def verdict_lines(
    folder: Path, verdict: FoldsVerdict | None, *, failed: Sequence[str], has_final: bool, start: str
) -> list[str]:
    """The answer first, then how far it can be trusted, then what to type."""
    lines = ["No fold was trained to its end."] if verdict is None else _findings(verdict, start)
    if verdict is not None:
        lines += ["", f"  plot      {folder / FOLDS_PLOT}"]
    if has_final:
        lines.append(f"  adapter   {folder / FINAL / ADAPTERS}   (of all rows; PEFT and mlx-lm)")
    if verdict is not None and (names := damaged(verdict.results)):
        lines.append(f"  damaged   {', '.join(f'{name}/{SUMMARY}' for name in names)}")
        where = " and ".join(str(folder / name) for name in names)
        return [*lines, f"  next      to train again, remove {where}, then: python cli.py train --resume {folder}"]
    if failed:
        lines.append(f"  failed    {', '.join(failed)}")
        return [*lines, f"  next      try again: python cli.py train --resume {folder}"]
    if has_final:
        return [*lines, f'  next      python cli.py generate {folder / FINAL} --prompt "…"']
    if verdict is None:
        return lines
    return [
        *lines,
        f"  next      a run on all rows, {final_steps(verdict)}: python cli.py train --resume {folder} --final",
    ]


def final_steps(verdict: FoldsVerdict) -> str:
    """How long the run on all rows is, and at which learning rates, in words."""
    steps, schedule = verdict.median_best_step, verdict.schedule_steps
    if schedule is None:
        return f"of {steps} step{'s' * (steps != 1)} (the folds' median best step)"
    return f"to step {steps} of the folds' {schedule} (their median best step, at their learning rates)"


def _findings(verdict: FoldsVerdict, start: str) -> list[str]:
    level = f"{100 * verdict.guard.confidence:g} %"
    lines = [_headline(verdict, start)]
    if verdict.gap.sd is not None:
        lines.append(f"  mean gap  {_three(verdict.gap.mean)}{interval(verdict.gap)} at {level}   {verdict.grade}")
        lines += _doubt(verdict)
    if (pooled := verdict.pooled) is not None and verdict.gap.sd is not None:
        lines.append(
            f"  pooled    validation loss {pooled.base:.3f} → {pooled.best:.3f}, each of {pooled.num_targets:,} target "
            "tokens counted once; the fold mean counts each fold once"
        )
    if others := verdict.disagreeing:
        named = ", ".join(f"fold {other.fold} {other.grade} ({_three(other.gap)})" for other in others)
        lines.append(f"  disagree  {named}")
    if (text := luck(verdict)) is not None:
        lines.append(f"  luck      {text}")
    if problem := mixed_rows(verdict.results):
        lines.append(f"  warning   {problem}")
    return lines


def _headline(verdict: FoldsVerdict, start: str) -> str:
    num = len(verdict.done)
    folds = f"{num} fold{'s' * (num != 1)}" + ("" if num == len(verdict.results) else f" of {len(verdict.results)}")
    if not verdict.is_better:
        before, after = verdict.base_val_loss.mean, verdict.best_val_loss.mean
        return f"No better than the {start}, over {folds}: mean validation loss {before:.3f} → {after:.3f}."
    gap = f"{verdict.gap.mean:z.2f}" + ("" if verdict.gap.sd is None else f" ± {verdict.gap.sd:.2f}")
    if verdict.grade in ("EXCELLENT", "GOOD"):
        return f"Good generalization, over {folds}. Train/val loss difference: {gap}"
    return (
        f"Potential overfitting detected, over {folds}! Train/val loss difference: {gap} "
        f"({verdict.grade}; GOOD is below {verdict.guard.grades[1]:.2f})"
    )


def _doubt(verdict: FoldsVerdict) -> list[str]:
    """Says so when the mean's interval reaches into another grade."""
    if verdict.gap.low is None or verdict.gap.high is None:
        return []
    best, worst = (grade_of(end, verdict.guard.grades) for end in (verdict.gap.low, verdict.gap.high))
    if best == worst:
        return []
    return [f"            the interval reaches from {best} to {worst}: these folds can't tell the grades apart"]


def mixed_rows(results: Sequence[FoldResult]) -> str | None:
    """Of folds that are not of one data set: their rows don't add up."""
    known = [(one.num_train_rows, one.num_val_rows) for one in results if one.is_done]
    counts = [(train, val) for train, val in known if train is not None and val is not None]
    totals = {train + val for train, val in counts}
    if len(totals) > 1:
        return "the folds have not the same rows: the data changed between them"
    if len(counts) == len(results) and totals and sum(val for _, val in counts) != totals.pop():
        return "not every row validates in one fold: the data changed between them"
    return None
