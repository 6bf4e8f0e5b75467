"""Is the model learning or memorising? The gap between validation and training loss, with its uncertainty.

Both sides are measured alike: whole rows, no dropout, the same weights. The gap is the difference of two token-weighted
means, in nats per target token. Its interval is a percentile bootstrap over rows (Efron and Tibshirani 1993, chapter
13): rows, not tokens, are what was drawn at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from core.config import GuardConfig
from core.protocols import FloatArray, RowLosses
from core.seeding import generator

NUM_RESAMPLES = 1000
Grade = Literal["EXCELLENT", "GOOD", "MODERATE", "CRITICAL"]
GRADES: tuple[Grade, ...] = ("EXCELLENT", "GOOD", "MODERATE", "CRITICAL")


@dataclass(frozen=True, slots=True)
class Gap:
    """Validation loss against the probe's, in nats per target token."""

    val_loss: float
    probe_loss: float
    low: float
    """Lower end of the bootstrap interval of the gap."""
    high: float
    grade: Grade

    @property
    def value(self) -> float:
        return self.val_loss - self.probe_loss

    @property
    def relative(self) -> float:
        """The gap as a share of the probe's loss."""
        return self.value / self.probe_loss if self.probe_loss > 0 else math.inf


def grade_of(gap: float, grades: tuple[float, float, float]) -> Grade:
    """The first grade whose bound lies above `gap`; CRITICAL for a gap that is not a number."""
    for bound, grade in zip(grades, GRADES, strict=False):
        if gap < bound:
            return grade
    return "CRITICAL"


def measure_gap(validation: RowLosses, probe: RowLosses, *, guard: GuardConfig, seed: int) -> Gap:
    """The gap with its interval and grade; the same numbers for the same losses and seed."""
    rng = generator(seed, "bootstrap")
    draws = _resampled_means(validation, rng) - _resampled_means(probe, rng)
    tail = 100 * (1 - guard.confidence) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    gap = validation.mean - probe.mean
    return Gap(
        val_loss=validation.mean,
        probe_loss=probe.mean,
        low=float(low),
        high=float(high),
        grade=grade_of(gap, guard.grades),
    )


def _resampled_means(losses: RowLosses, rng: np.random.Generator) -> FloatArray:
    """float64 [NUM_RESAMPLES]: token-weighted mean loss of as many rows, drawn with replacement."""
    num_rows = len(losses.nll)
    means = np.empty(NUM_RESAMPLES)
    for draw in range(NUM_RESAMPLES):  # one at a time: memory stays at one resample
        rows = rng.integers(num_rows, size=num_rows)
        means[draw] = losses.nll[rows].sum() / losses.num_targets[rows].sum()
    return means


def advice(gap: Gap, guard: GuardConfig, *, base_gap: float | None = None) -> str:
    """One sentence in the words users know, for the log and the verdict.

    Args:
        base_gap: the gap before the first step, in nats. Where training added less to it than EXCELLENT allows, the
            held-out rows are harder, and nothing is overfitted.
    """
    if gap.grade in ("EXCELLENT", "GOOD"):
        return f"Good generalization. Train/val loss difference: {gap.value:z.2f}"
    if base_gap is not None and gap.value - base_gap < guard.grades[0]:
        return (
            f"The held-out rows are harder: their loss was {base_gap:.2f} above the training rows' before training, "
            f"and is {gap.value:.2f} above now. Training did not overfit."
        )
    return (
        f"Potential overfitting detected! Train/val loss difference: {gap.value:.2f} "
        f"({gap.grade}; GOOD is below {guard.grades[1]:.2f})"
    )


def relative_warning(gap: Gap, guard: GuardConfig) -> str | None:
    """A warning when the gap is large for a loss of this size."""
    if gap.relative <= guard.relative_gap:
        return None
    return (
        f"validation loss is {gap.relative:.0%} above the training rows' "
        f"(guard.relative_gap is {guard.relative_gap:.0%})"
    )
