"""What is held against each other: the lines of a comparison, and those of them that an evaluation brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from core.records import number, whole
from core.screen import count, duration

Value = float | int | str | None
Kind = Literal["loss", "effort", "evaluation", "model"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the comparison."""

    name: str
    """Key in CSV and JSON."""
    label: str
    show: Callable[[Any], str]
    better: Literal["low", "high"] | None = None
    kind: Kind = "effort"
    """What has to be the same before one can be called better: validation rows, nothing, evaluated rows, the
    base model."""


def _three(value: float) -> str:
    return f"{value:z.3f}"


OF_TRAINING: tuple[Figure, ...] = (
    Figure("base_val_loss", "base validation loss", _three),
    Figure("best_val_loss", "best validation loss", _three, "low", "loss"),
    Figure("gap", "gap", _three, "low", "loss"),
    Figure("gap_interval", "gap, interval", str),
    Figure("grade", "grade", str),
    Figure("base_gap", "gap before training", _three),
    Figure("best_step", "best step", lambda value: f"{value:,}"),
    Figure("best_epoch", "best in epoch", lambda value: f"{value:g}"),
    Figure("steps", "steps", lambda value: f"{value:,}"),
    Figure("num_target_tokens", "target tokens", count),
    Figure("wall_seconds", "time", duration, "low"),
    Figure("tokens_per_second", "tokens a second", lambda value: f"{value:,.0f}", "high"),
    Figure("peak_memory_gb", "memory, GB", lambda value: f"{value:.1f}", "low"),
)
"""Losses and gaps in nats per target token."""
_OF_EVALUATION: tuple[Figure, ...] = (
    Figure("loss_on_{}_rows", "loss on {} rows", _three, "low", "evaluation"),
    Figure("gain_on_{}_rows", "gain on {} rows", _three, "high", "evaluation"),
    Figure("gain_on_{}_rows_interval", "gain on {} rows, interval", str),
    Figure("f1_on_{}_rows", "F1 on {} rows", _three, "high", "evaluation"),
    Figure("f1_on_{}_rows_interval", "F1 on {} rows, interval", str),
)
"""For each split; the gain is over the base model, in nats per target token."""
_FORGOTTEN = Figure("forgotten", "loss rise elsewhere", _three, "low", "model")


@dataclass(frozen=True, slots=True)
class EvaluatedRows:
    """What an evaluation was on."""

    data: str
    split: str
    num_rows: int | None
    num_targets: int | None

    def __str__(self) -> str:
        amount = "" if self.num_rows is None else f"{self.num_rows:,} "
        return f"{amount}rows of {self.data} ({self.split})"


def figures_of(splits: Iterable[str]) -> tuple[Figure, ...]:
    """All lines; those of evaluations once for each split, for what is measured on other rows is another figure."""
    evaluated = [
        replace(figure, name=figure.name.format(split), label=figure.label.format(split))
        for split in dict.fromkeys(splits)
        for figure in _OF_EVALUATION
    ]
    return (*OF_TRAINING, *evaluated, _FORGOTTEN)


def evaluated_figures(report: Mapping[str, Any] | None) -> tuple[dict[str, Value], EvaluatedRows | None]:
    """Figures that `evaluate` wrote, and what they were measured on."""
    if report is None:
        return {}, None
    losses, labels, general = (_part(report, name) for name in ("losses", "classification", "general"))
    adapter, answers = _part(losses, "adapter"), _part(labels, "adapter")
    rows = EvaluatedRows(
        str(report.get("data")),
        str(report.get("split")),
        whole(losses.get("num_rows")),
        whole(losses.get("num_targets")),
    )
    on = f"on_{rows.split}_rows"
    return {
        f"loss_{on}": number(adapter.get("loss")),
        **_with_interval(f"gain_{on}", losses, "gain"),
        **_with_interval(f"f1_{on}", answers, "f1"),
        "forgotten": number(general.get("rise")),
    }, rows


def _with_interval(name: str, values: Mapping[str, Any], key: str) -> dict[str, Value]:
    value, low, high = (number(values.get(end)) for end in (key, f"{key}_low", f"{key}_high"))
    return {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_interval": interval(low, high)}


def interval(low: float | None, high: float | None) -> str | None:
    """`[0.041, 0.115]`"""
    return None if low is None or high is None else f"[{low:z.3f}, {high:z.3f}]"


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    return part if isinstance(part, dict) else {}
