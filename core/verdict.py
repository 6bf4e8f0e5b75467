"""The end of a run: `training_summary.json` and what it says in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.config import GuardConfig, RunConfig
from core.folds import judged_by
from core.overfitting import Gap, advice, grade_of, relative_warning
from core.run import ADAPTERS
from core.screen import count, duration
from core.trainer import Trainer

NOT_JUDGED = "not_judged"
"""In the state and the summary of a run that holds nothing out: why there is no gap."""


def summarize(
    trainer: Trainer,
    *,
    config: RunConfig,
    model: str,
    status: str,
    num_train_rows: int,
    num_val_rows: int,
    error: str | None = None,
) -> dict[str, Any]:
    """The content of `training_summary.json`.

    Losses and gap are those of the best adapter, the one in `adapters/`, in nats per target token; memory in GB (10^9
    bytes); `num_target_tokens` counts every target that was trained on, once per pass; `routing` has a mixture's
    `core.routing.SCALARS` at the best step; `general_loss` and `general_flipped` are `core.general.GeneralLoss` of that
    step, where `eval.general` asks for them. `not_judged` says why there is no gap; null where there can be one. The
    caller adds `base_gap`, the gap before the first step.
    """
    progress, gap = trainer.progress, trainer.progress.best_gap
    best_step = trainer.best_step or None
    seconds = progress.train_seconds
    return {
        "backend": config.backend,
        "model": model,
        "status": status,
        "error": error,
        "steps": progress.step,
        "total_steps": trainer.plan.total_steps,
        "epochs": round(progress.step / trainer.plan.steps_per_epoch, 4),
        "start": config.start,
        "base_val_loss": progress.base_val_loss,
        "best_val_loss": gap.val_loss if gap else None,
        "best_step": best_step,
        "best_epoch": trainer.plan.epoch_of(best_step) if best_step else None,
        "probe_loss": gap.probe_loss if gap else None,
        "gap": gap.value if gap else None,
        "gap_low": gap.low if gap else None,
        "gap_high": gap.high if gap else None,
        "grade": gap.grade if gap else None,
        NOT_JUDGED: None if trainer.is_judged else not_judged(config),
        "routing": progress.best_routing,
        "base_general_loss": progress.general_start.loss if progress.general_start else None,
        "general_loss": progress.best_general.loss if progress.best_general else None,
        "general_flipped": progress.best_general.flipped if progress.best_general else None,
        "final_val_loss": progress.last_gap.val_loss if progress.last_gap else None,
        "final_gap": progress.last_gap.value if progress.last_gap else None,
        "num_train_rows": num_train_rows,
        "num_val_rows": num_val_rows,
        "num_target_tokens": progress.num_target_tokens,
        "tokens_per_second": progress.num_tokens / seconds if seconds else None,
        "peak_memory_gb": progress.peak_memory_bytes / 1e9,
        "wall_seconds": trainer.elapsed_seconds,
    }


def not_judged(config: RunConfig) -> str:
    """Why a run has no gap: nothing is held out to judge by."""
    return f"every row {'but those for testing ' if config.data.test else ''}was trained on"


def verdict_lines(
    summary: Mapping[str, Any],
    *,
    gap: Gap | None,
    guard: GuardConfig,
    folder: Path,
    next_command: str,
    rows: Sequence[str] = (),
) -> list[str]:
    """The verdict for a person: the answer first, then the numbers, then where the files are and what to type.

    Args:
        rows: what is to be said of single rows (`core.row_history.describe_rows`).
    """
    if summary.get(NOT_JUDGED):
        return _unjudged_lines(summary, folder=folder, next_command=next_command)
    if gap is None:
        return [
            "Stopped before the first evaluation of a trained adapter.",
            _continue(folder),
        ]
    lines = [_headline(summary, gap, guard)]
    if (warning := relative_warning(gap, guard)) is not None:
        lines.append(f"  note              {warning}")
    if (collapsed := (summary.get("routing") or {}).get("collapse")) is not None:
        lines.append(f"  experts           the router collapsed: {collapsed}")
    lines += [
        f"  validation loss   {summary['base_val_loss']:.3f} → {gap.val_loss:.3f}   ({_best(summary)})",
        f"  gap               {gap.value:.3f} [{gap.low:.3f}, {gap.high:.3f}]   {gap.grade}{_before(summary)}",
        *_doubt(summary, gap, guard),
        *_general(summary),
        *rows,
        f"  {_size(summary)}",
        "",
        f"  adapter   {folder / ADAPTERS}   (PEFT and mlx-lm)",
    ]
    if summary["status"] == "interrupted":
        return [*lines, _continue(folder)]
    return [*lines, f"  next      {next_command}"]


def _unjudged_lines(summary: Mapping[str, Any], *, folder: Path, next_command: str) -> list[str]:
    folds = judged_by(folder)
    headline = f"Not judged: {summary[NOT_JUDGED]}{'' if folds is None else f'; judged by the folds: {folds}'}"
    if summary["status"] == "interrupted":
        stopped = f"  stopped at step {summary['steps']} of {summary['total_steps']}"
        return [headline, stopped, _continue(folder)]
    return [
        headline,
        *_general(summary),
        f"  {_size(summary)}",
        "",
        f"  adapter   {folder / ADAPTERS}   (PEFT and mlx-lm)",
        f"  next      {next_command}",
    ]


def _headline(summary: Mapping[str, Any], gap: Gap, guard: GuardConfig) -> str:
    if gap.val_loss >= summary["base_val_loss"]:
        return (
            f"No better than the {summary['start']}: validation loss {summary['base_val_loss']:.3f} → "
            f"{gap.val_loss:.3f}. Don't use this adapter; try a lower rate or other data."
        )
    return advice(gap, guard, base_gap=summary.get("base_gap"))


def _before(summary: Mapping[str, Any]) -> str:
    base_gap = summary.get("base_gap")
    return "" if base_gap is None else f"   ({base_gap:.3f} before training)"


def _general(summary: Mapping[str, Any]) -> list[str]:
    """What became of everything else, where it was measured."""
    if (loss := summary.get("general_loss")) is None:
        return []
    base, flipped = summary["base_general_loss"], 100 * summary["general_flipped"]
    return [f"  general texts     {base:.3f} → {loss:.3f}   ({flipped:.1f} % of the most likely tokens are others now)"]


def _doubt(summary: Mapping[str, Any], gap: Gap, guard: GuardConfig) -> list[str]:
    """Says so when the interval reaches into other grades: then the rows are too few to tell."""
    worst = grade_of(gap.high, guard.grades)
    # of a good grade only doubt that it is worse matters; of a bad one also hope that it is not
    best = gap.grade if gap.value < guard.grades[1] else grade_of(gap.low, guard.grades)
    if best == worst:
        return []
    reaches = (
        f"from {best} to {worst}" if gap.grade not in (best, worst) else f"into {worst if best == gap.grade else best}"
    )
    return [
        f"                    the interval reaches {reaches}: {summary['num_val_rows']} validation rows "
        "can't tell these grades apart"
    ]


def _best(summary: Mapping[str, Any]) -> str:
    text = f"best at epoch {summary['best_epoch']}, step {summary['best_step']}"
    if summary["status"] == "early_stopped":
        return f"{text}; stopped early at {summary['steps']}"
    if summary["status"] == "interrupted":
        return f"{text}; interrupted at {summary['steps']} of {summary['total_steps']}"
    return text


def _size(summary: Mapping[str, Any]) -> str:
    rows = summary["num_train_rows"], summary["num_val_rows"]
    return (
        f"{sum(rows)} rows ({rows[0]} + {rows[1]}), {count(summary['num_target_tokens'])} target tokens, "
        f"{duration(summary['wall_seconds'])}, {summary['tokens_per_second']:,.0f} tok/s, "
        f"{summary['peak_memory_gb']:.1f} GB"
    )


def next_command(folder: Path, *, is_judged: bool) -> str:
    """What to type after a run: rows that were held out are evaluated, and without them answers are looked at."""
    run = shlex.quote(str(folder))
    return f"python cli.py evaluate {run}" if is_judged else f'python cli.py generate {run} --prompt "…"'


def _continue(folder: Path) -> str:
    return f"  continue  python cli.py train --resume {shlex.quote(str(folder))}"
