"""From our records to what trackers hold: the same flat names in all of them. Pure.

| name | what |
|---|---|
| `train/…` | the record's own numbers: loss, lr, grad_norm, tokens_per_second, memory_gb, epoch, seconds |
| `eval/…` | val_loss, probe_loss, gap, gap_low, gap_high, grade (0 EXCELLENT to 3 CRITICAL), best_step, best_val_loss |
| `general/…` | loss and flipped: what training did to everything else |
| `routing/…` | of a mixture: the plain numbers of its routing |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from core.overfitting import GRADES
from core.records import number, whole
from core.trackers.base import Point, Value

EPOCH = "train/epoch"
"""The one number that every record has."""

_EVALUATION = frozenset(
    {"val_loss", "probe_loss", "gap", "gap_low", "gap_high", "grade", "best_step", "best_val_loss"},
)
_RENAMED = {"time": "seconds"}
_PREFIXES = ("general",)


def point_of(record: Mapping[str, Any], *, started: float) -> Point | None:
    """The record as a point; None where it has no step."""
    step = whole(record.get("step"))
    if step is None:
        return None
    return Point(step, started + (number(record.get("time")) or 0.0), dict(_numbers(record)))


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", one) for key, one in _plain(value))
        elif name == "grade" and value in GRADES:
            yield "eval/grade", float(GRADES.index(value))
        elif name != "step" and (one := number(value)) is not None:
            yield _named(name), one


def _plain(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if (one := number(value)) is not None:
            yield name, one


def _named(name: str) -> str:
    if name in _EVALUATION:
        return f"eval/{name}"
    prefix, _, rest = name.partition("_")
    return f"{prefix}/{rest}" if prefix in _PREFIXES and rest else f"train/{_RENAMED.get(name, name)}"


def flat(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Value]:
    """Nested settings or a summary by dotted names. A list of plain values becomes text; other lists are left out.

    Of absolute paths only the last part stays.
    """
    found: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, prefix=f"{prefix}{name}.")
        elif value is None or isinstance(value, str | int | float | bool):
            found[prefix + name] = _public(value)
        elif isinstance(value, list) and not any(isinstance(one, list | dict) for one in value):
            found[prefix + name] = ", ".join(str(_public(one)) for one in value)
    return found


def _public(value: Value) -> Value:
    """Of an absolute path the last part: the rest is about whose machine it is."""
    if isinstance(value, str) and value.startswith(("/", "~")):
        return PurePath(value).name or value
    return value
