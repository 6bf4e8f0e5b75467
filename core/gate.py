"""Keep it, or don't: thresholds on the gap, the gain on held-out rows and what was forgotten, in one answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from core.config import GuardConfig
from core.records import number

KEEP, DONT_KEEP = 0, 3
"""Exit codes."""


class Losses(Protocol):
    """What the base model and the adapter lose on the same held-out rows: `gain` is base minus adapter, in nats per
    target token, with its interval."""

    @property
    def gain(self) -> float: ...
    @property
    def gain_low(self) -> float: ...
    @property
    def gain_high(self) -> float: ...


class General(Protocol):
    """What is needed of `core.general.GeneralReport`."""

    @property
    def rise(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Gate:
    """The thresholds, in nats per target token."""

    max_gap: float
    """The gap between validation and training rows must be below this."""
    min_gain: float = 0.0
    """The loss on held-out rows must fall by more than this, with the whole interval."""
    max_forgotten: float = 0.1
    """The loss on the general texts may rise by this much at most."""
    harmless_growth: float = 0.0
    """A gap that training widened by less than this passes: the held-out rows are harder, nothing is overfitted."""

    @classmethod
    def of(
        cls, guard: GuardConfig, *, max_gap: float | None = None, min_gain: float = 0.0, max_forgotten: float = 0.1
    ) -> Gate:
        """The thresholds that were given; without `max_gap` the verdict of `train` counts: GOOD's bound, and a gap
        that was there before training is none of training's. A `max_gap` that is given is taken literally."""
        if max_gap is not None:
            return cls(max_gap, min_gain, max_forgotten)
        return cls(guard.grades[1], min_gain, max_forgotten, harmless_growth=guard.grades[0])


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer, in one line and one exit code."""

    keep: bool
    line: str
    reasons: list[str] = field(default_factory=list)
    """What stands against it, the weightiest first; empty when it is kept."""

    @property
    def exit_code(self) -> int:
        return KEEP if self.keep else DONT_KEEP

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(
    gate: Gate,
    *,
    summary: Mapping[str, Any],
    losses: Losses | None,
    general: General | None,
    num_trained_on: int = 0,
) -> Decision:
    """Keeps an adapter that passes all three; what could not be measured does not pass.

    Args:
        summary: `training_summary.json` of the run.
        losses: None where no row was there to measure them.
        general: None where the general texts were not measured.
        num_trained_on: rows among those of `losses` that are no held-out rows; any stands against it.
    """
    found = [_gain(gate, losses), _gap(gate, summary), _forgotten(gate, general)]
    if num_trained_on:
        were = "row was" if num_trained_on == 1 else "rows were"
        found.insert(0, (f"{num_trained_on:,} {were} trained on, so the gain is not that of held-out rows", ""))
    reasons = [reason for reason, _ in found if reason is not None]
    if reasons:
        return Decision(False, f"Don't keep it: {'; '.join(reasons)}", reasons)
    return Decision(True, f"Keep it: {', '.join(said for _, said in found)}")


def _gain(gate: Gate, losses: Losses | None) -> tuple[str | None, str]:
    """Why it does not pass, and what is said if it does."""
    if losses is None:
        return "the gain was not measured: there are no held-out rows", ""
    gain, low, high = losses.gain, losses.gain_low, losses.gain_high
    if not all(map(math.isfinite, (gain, low, high))):
        return "the loss on held-out rows is not a number", ""
    interval = f"{gain:.3f} [{low:.3f}, {high:.3f}]"
    if gain < 0 and gain <= gate.min_gain:
        sure = "" if high < 0 else f", though its interval [{-high:.3f}, {-low:.3f}] holds 0"
        return f"the loss on held-out rows rose by {-gain:.3f}{sure}", ""
    needed = f"more than {gate.min_gain:g} is asked for"
    if gain <= gate.min_gain:
        return f"the loss on held-out rows fell by {interval}, and {needed}", ""
    if low <= gate.min_gain:
        return f"can't tell: the loss on held-out rows fell by {interval}, and {needed}; give it more rows", ""
    return None, f"held-out rows gained {interval} nats per token"


def _gap(gate: Gate, summary: Mapping[str, Any]) -> tuple[str | None, str]:
    gap, before = number(summary.get("gap")), number(summary.get("base_gap"))
    if gap is None:
        why = summary.get("not_judged") or "the run has no evaluation of a trained adapter"
        return f"there is no gap: {why}", ""
    grade = f" ({summary['grade']})" if summary.get("grade") else ""
    if gap < gate.max_gap:
        return None, f"gap {gap:.3f}{grade}"
    if before is not None and gap - before < gate.harmless_growth:
        return None, f"gap {gap:.3f}, of which {before:.3f} before training"
    return f"the gap is {gap:.3f}{grade}, and below {gate.max_gap:g} is asked for", ""


def _forgotten(gate: Gate, general: General | None) -> tuple[str | None, str]:
    if general is None:
        return "what it forgot was not measured", ""
    if not math.isfinite(general.rise):
        return "the loss on general texts is not a number", ""
    if general.rise > gate.max_forgotten:
        return f"the loss on general texts rose by {general.rise:.3f}, more than {gate.max_forgotten:g}", ""
    moved = f"rose by {general.rise:.3f}" if general.rise > 0 else f"fell by {-general.rise:.3f}"
    return None, f"the loss on general texts {moved}"
