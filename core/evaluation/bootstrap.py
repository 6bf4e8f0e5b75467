"""Is the adapter better than the base model, or were the rows kind to it? A paired bootstrap over rows.

Both sides answer the same rows, so each resample draws rows and takes both sides' figures of them (Koehn 2004, for
translations; Efron and Tibshirani 1993, chapter 13). Rows, not tokens, are what was drawn at random. The interval is
the percentile interval, as of the gap in `core.overfitting`; the p-value is the level at which it would just touch 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from core.protocols import FloatArray
from core.seeding import generator

NUM_RESAMPLES = 2000
_CHUNK_VALUES = 2_000_000
"""Weights in memory at once, about."""

Verdict = Literal["better than the base model", "no difference that these rows could show", "worse than the base model"]
BETTER: Verdict = "better than the base model"
NO_DIFFERENCE: Verdict = "no difference that these rows could show"
WORSE: Verdict = "worse than the base model"


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the percentile interval of its resamples."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: FloatArray, confidence: float) -> Interval:
        """
        Args:
            draws: float64 [NUM_RESAMPLES]
            confidence: of the interval, such as 0.95.
        """
        tail = 100 * (1 - confidence) / 2
        low, high = np.percentile(draws, [tail, 100 - tail])
        return cls(float(value), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Difference(Interval):
    """Adapter against base model; above 0 is better."""

    p_value: float
    """Two-sided."""
    confidence: float

    @classmethod
    def between(cls, value: float, draws: FloatArray, *, num_unlike: int, confidence: float) -> Difference:
        """
        Args:
            draws: float64 [NUM_RESAMPLES]
            num_unlike: rows of which the two sides say something different; the others show nothing.
        """
        interval = Interval.of(value, draws, confidence)
        p_value = p_value_of(draws, num_unlike=num_unlike)
        return cls(interval.value, interval.low, interval.high, p_value, confidence)

    @property
    def verdict(self) -> Verdict:
        """A difference counts when its interval leaves out 0 and its p-value is as small."""
        if self.p_value > 1 - self.confidence:
            return NO_DIFFERENCE
        return BETTER if self.low > 0 else WORSE if self.high < 0 else NO_DIFFERENCE


def p_value_of(draws: FloatArray, *, num_unlike: int) -> float:
    """Two-sided p-value of a difference: twice the share of resamples on the other side of 0.

    Never below what a sign test could reach: of n rows that differ, all may differ the same way by chance with
    probability 2^(1 - n), which a bootstrap of a few rows does not see.
    """
    beyond = min(int(np.count_nonzero(draws <= 0)), int(np.count_nonzero(draws >= 0)))
    share = 2 * (beyond + 1) / (len(draws) + 1)
    return float(min(1.0, max(share, 2.0 ** (1 - num_unlike))))


def resamples(num_rows: int, *, seed: int) -> Iterator[FloatArray]:
    """How often each row is in each of NUM_RESAMPLES draws of `num_rows` rows with replacement.

    Yields float64 [draws, num_rows], some draws at a time; the same for the same seed and number of rows, so that every
    figure of an evaluation sees the same draws.
    """
    random = generator(seed, "evaluation")
    step = max(_CHUNK_VALUES // num_rows, 1)
    for start in range(0, NUM_RESAMPLES, step):
        draws = min(step, NUM_RESAMPLES - start)
        rows = random.integers(num_rows, size=(draws, num_rows))
        rows += np.arange(draws)[:, None] * num_rows
        counts = np.bincount(rows.ravel(), minlength=draws * num_rows)
        yield counts.reshape(draws, num_rows).astype(np.float64)
