"""The gap of rows worked out by hand, its grade, and whether the interval covers what it says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from core.config import GuardConfig
from core.overfitting import Gap, advice, grade_of, measure_gap, relative_warning
from core.protocols import RowLosses

GUARD = GuardConfig()
BOUNDS = (0.05, 0.15, 0.30)


def rows(nll: list[float] | np.ndarray[Any, Any], num_targets: list[int] | np.ndarray[Any, Any]) -> RowLosses:
    return RowLosses(np.arange(len(nll)), np.array(nll, np.float64), np.array(num_targets, np.int64))


def gap_of(value: float, *, probe: float = 1.0) -> Gap:
    return Gap(probe + value, probe, low=0.0, high=0.0, grade=grade_of(value, BOUNDS))


def test_the_gap_is_weighted_by_tokens() -> None:
    # validation: (3 + 17) / (1 + 9) = 2; the mean of the rows' means would be 2.44
    # probe: (2 + 1) / (2 + 2) = 0.75
    gap = measure_gap(rows([3.0, 17.0], [1, 9]), rows([2.0, 1.0], [2, 2]), guard=GUARD, seed=0)
    assert (gap.val_loss, gap.probe_loss, gap.value) == (2.0, 0.75, 1.25)
    assert gap.relative == pytest.approx(1.25 / 0.75)
    assert gap.grade == "CRITICAL"
    # resampling two rows: only (1, 1), (1, 2), (2, 2) can be drawn: 3, 2, 17 / 9; minus 1, 0.75, 0.5
    assert gap.low == pytest.approx(17 / 9 - 1)
    assert gap.high == pytest.approx(3 - 0.5)


def test_resampled_rows_are_weighted_by_tokens_too() -> None:
    # 17 / 9 in a quarter of the draws, (3 + 17) / 10 = 2 in half of them, 3 in a quarter: the middle is 2
    middle = GuardConfig(confidence=0.2)
    gap = measure_gap(rows([3.0, 17.0], [1, 9]), rows([1.0], [2]), guard=middle, seed=0)
    assert (gap.low, gap.high) == (1.5, 1.5)


@pytest.mark.parametrize(
    ("value", "grade"),
    [
        (-1.0, "EXCELLENT"),
        (0.0499, "EXCELLENT"),
        (0.05, "GOOD"),
        (0.1499, "GOOD"),
        (0.15, "MODERATE"),
        (0.2999, "MODERATE"),
        (0.30, "CRITICAL"),
        (2.27, "CRITICAL"),
        (math.inf, "CRITICAL"),
        (math.nan, "CRITICAL"),
    ],
)
def test_grades_at_their_bounds(value: float, grade: str) -> None:
    assert grade_of(value, BOUNDS) == grade


def test_grades_follow_the_configuration() -> None:
    guard = GuardConfig(grades=(1.0, 2.0, 3.0))
    assert measure_gap(rows([2.5], [1]), rows([1.0], [1]), guard=guard, seed=0).grade == "GOOD"


def test_constant_rows_have_an_interval_of_no_width() -> None:
    gap = measure_gap(rows([4.0] * 7, [2] * 7), rows([3.0] * 5, [2] * 5), guard=GUARD, seed=0)
    assert (gap.low, gap.value, gap.high) == (0.5, 0.5, 0.5)


def test_the_interval_depends_on_the_seed_alone() -> None:
    rng = np.random.default_rng(0)
    validation, probe = rows(rng.gamma(9, 1, 40), np.full(40, 5)), rows(rng.gamma(8, 1, 30), np.full(30, 5))
    first, again = (measure_gap(validation, probe, guard=GUARD, seed=3) for _ in range(2))
    assert first == again
    other = measure_gap(validation, probe, guard=GUARD, seed=4)
    assert other.value == first.value
    assert (other.low, other.high) != (first.low, first.high)
    assert first.low < first.value < first.high


def test_a_lower_confidence_is_a_narrower_interval() -> None:
    rng = np.random.default_rng(0)
    validation, probe = rows(rng.gamma(9, 1, 40), np.full(40, 5)), rows(rng.gamma(8, 1, 30), np.full(30, 5))
    wide, narrow = (
        measure_gap(validation, probe, guard=GuardConfig(confidence=level), seed=0) for level in (0.95, 0.5)
    )
    assert wide.low < narrow.low < narrow.high < wide.high
    # a normal distribution's 50 % interval is 0.674 / 1.960 of its 95 % interval
    assert (narrow.high - narrow.low) / (wide.high - wide.low) == pytest.approx(0.344, abs=0.05)


def test_the_interval_is_as_wide_as_theory_says() -> None:
    """Rows of one token: the gap's standard error is sqrt(var / n + var / m)."""
    rng = np.random.default_rng(1)
    validation, probe = rng.normal(3, 0.5, 400), rng.normal(2, 0.3, 300)
    gap = measure_gap(rows(validation, np.ones(400)), rows(probe, np.ones(300)), guard=GUARD, seed=0)
    error = math.sqrt(validation.var() / 400 + probe.var() / 300)
    assert (gap.high - gap.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_the_interval_covers_the_true_gap_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    trials, covered = 80, 0
    for trial in range(trials):
        sides = []
        for mean in (2.0, 1.8):
            counts = rng.integers(5, 40, 60)
            row_means = rng.gamma(16, mean / 16, 60)  # independent of the length: the weighted mean's truth is `mean`
            sides.append(rows(row_means * counts, counts))
        gap = measure_gap(*sides, guard=GUARD, seed=trial)
        covered += gap.low <= 0.2 <= gap.high
    # 95 % of 80 is 76, with a standard deviation of 2
    assert 70 <= covered <= 79


def test_losses_that_are_not_numbers_are_critical() -> None:
    gap = measure_gap(rows([math.nan, 1.0], [1, 1]), rows([1.0], [1]), guard=GUARD, seed=0)
    assert math.isnan(gap.value)
    assert gap.grade == "CRITICAL"


def test_advice_has_the_words_that_users_know() -> None:
    assert advice(gap_of(0.05), GUARD) == "Good generalization. Train/val loss difference: 0.05"
    assert advice(gap_of(-0.001), GUARD) == "Good generalization. Train/val loss difference: 0.00"
    assert advice(gap_of(0.15), GUARD).startswith("Potential overfitting detected!")
    bad = advice(gap_of(2.27), GUARD)
    assert bad.startswith("Potential overfitting detected! Train/val loss difference: 2.27")
    assert "CRITICAL" in bad


@pytest.mark.parametrize(("value", "warns"), [(-0.5, False), (0.0, False), (0.099, False), (0.25, True)])
def test_relative_warning(value: float, warns: bool) -> None:
    warning = relative_warning(gap_of(2 * value, probe=2.0), GUARD)
    assert (warning is not None) == warns
    if warning:
        assert "25%" in warning
        assert "10%" in warning


def test_relative_warning_follows_the_configuration() -> None:
    assert relative_warning(gap_of(0.25), GuardConfig(relative_gap=0.5)) is None


def test_a_small_loss_makes_a_small_gap_a_relative_one() -> None:
    """EXCELLENT in nats, and yet a third worse than on the training rows."""
    gap = gap_of(0.04, probe=0.12)
    assert gap.grade == "EXCELLENT"
    assert "33%" in (relative_warning(gap, GUARD) or "")
