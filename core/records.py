"""What journal records say, for those who read them: numbers that may be missing or damaged, the gap, the pace."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.overfitting import GRADES, Gap

RECENT = 32
"""Records that the pace looks back on."""

Record = Mapping[str, Any]


@dataclass(slots=True)
class Pace:
    """How long a step and an evaluation take, from the time between records."""

    recent: deque[tuple[float, int, bool]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Seconds, steps and whether there was an evaluation, between a record and the one before."""
    last: tuple[float, int] | None = None
    first_evaluation: float | None = None
    """Seconds of the base model's evaluation."""

    def add(self, record: Record) -> None:
        at, step = number(record.get("time")), whole(record.get("step"))
        if at is None or step is None:
            return
        evaluates = "val_loss" in record
        if self.last and step > self.last[1] and at > self.last[0]:
            self.recent.append((at - self.last[0], step - self.last[1], evaluates))
        elif step == 0 and evaluates:
            self.first_evaluation = at
        self.last = (at, step)

    def seconds_for(self, steps: int, evaluations: int) -> float | None:
        """Expected seconds of that much work, at the recent speed; None before there is one."""
        plain = [(seconds, count) for seconds, count, evaluates in self.recent if not evaluates]
        if not plain:  # every record has an evaluation in it: its time is in the step's
            seconds = sum(pace[0] for pace in self.recent)
            count = sum(pace[1] for pace in self.recent)
            return seconds / count * steps if count else None
        per_step = sum(seconds for seconds, _ in plain) / sum(count for _, count in plain)
        measured = [seconds - count * per_step for seconds, count, evaluates in self.recent if evaluates]
        per_evaluation = sum(measured) / len(measured) if measured else self.first_evaluation or 0.0
        return per_step * steps + max(per_evaluation, 0.0) * evaluations


def gap_of(record: Record) -> Gap | None:
    """The gap of an evaluation's record; None when it is not whole."""
    val, probe, low, high = (number(record.get(name)) for name in ("val_loss", "probe_loss", "gap_low", "gap_high"))
    grade = next((known for known in GRADES if known == record.get("grade")), None)
    if val is None or probe is None or low is None or high is None or grade is None:
        return None
    return Gap(val_loss=val, probe_loss=probe, low=low, high=high, grade=grade)


def number(value: object) -> float | None:
    """`value` as a finite float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def clean(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without NaN and infinity, which JSON can't hold."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
