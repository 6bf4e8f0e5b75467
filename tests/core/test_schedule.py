"""The learning rate against values worked out by hand and against transformers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import ScheduleConfig
from core.schedule import lr_at, num_warmup_steps

PEAK = 2.0
HALF_ROOT = math.sqrt(0.5)


def rates(total: int, *, peak: float = PEAK, **settings: Any) -> list[float]:
    schedule = ScheduleConfig.model_validate({"warmup_steps": 0, **settings})
    return [lr_at(step, peak=peak, schedule=schedule, total_steps=total) for step in range(1, total + 1)]


def test_constant() -> None:
    assert rates(4, name="constant") == [2.0, 2.0, 2.0, 2.0]
    assert rates(4, name="constant", warmup_steps=3, peak=4.0) == [1.0, 2.0, 3.0, 4.0]


def test_linear_falls_in_equal_steps() -> None:
    assert rates(4, name="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5])
    # with a minimum of 1 only half of the way is gone
    assert rates(4, name="linear", min_lr=1.0) == pytest.approx([2.0, 1.75, 1.5, 1.25])


def test_cosine() -> None:
    # (1 + cos(0, 45, 90, 135 degrees)) / 2, times the peak of 2
    assert rates(4, name="cosine") == pytest.approx([2.0, 1 + HALF_ROOT, 1.0, 1 - HALF_ROOT])
    # between 2 and 1: 1 + half of the above
    assert rates(4, name="cosine", min_lr=1.0) == pytest.approx([2.0, 1.5 + HALF_ROOT / 2, 1.5, 1.5 - HALF_ROOT / 2])


def test_cosine_restarts_goes_back_to_the_peak() -> None:
    period = [2.0, 1 + HALF_ROOT, 1.0, 1 - HALF_ROOT]
    assert rates(8, name="cosine_restarts", restarts=1) == pytest.approx(period * 2)
    assert rates(12, name="cosine_restarts", restarts=2) == pytest.approx(period * 3)


@pytest.mark.parametrize("periods", [2, 3, 4, 5])
def test_every_restart_is_exactly_at_the_peak(periods: int) -> None:
    for length in range(1, 100):
        all_rates = rates(periods * length, name="cosine_restarts", restarts=periods - 1)
        assert all_rates[::length] == [PEAK] * periods


def test_warmup_rises_to_the_peak_and_never_is_zero() -> None:
    assert rates(7, name="linear", warmup_steps=3, peak=4.0) == pytest.approx([1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0])


def test_warmup_longer_than_the_run_only_rises() -> None:
    assert rates(3, name="cosine", warmup_steps=9, peak=10.0) == pytest.approx([1.0, 2.0, 3.0])


def test_warmup_as_long_as_the_run() -> None:
    assert rates(3, name="cosine", warmup_steps=3, peak=4.0) == pytest.approx([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("ratio", "total", "expected"),
    # 0.07 * 100 is 7.000000000000001 in binary; the number of steps is still 7
    [(0.0, 100, 0), (0.03, 100, 3), (0.03, 10, 1), (0.03, 101, 4), (0.5, 5, 3), (0.07, 100, 7), (0.14, 50, 7)],
)
def test_warmup_ratio_is_rounded_up(ratio: float, total: int, expected: int) -> None:
    schedule = ScheduleConfig(warmup_ratio=ratio)
    assert num_warmup_steps(schedule, total_steps=total) == expected


def test_warmup_steps_replace_the_ratio() -> None:
    assert num_warmup_steps(ScheduleConfig(warmup_ratio=0.5, warmup_steps=2), total_steps=100) == 2
    assert num_warmup_steps(ScheduleConfig(warmup_ratio=0.5, warmup_steps=0), total_steps=100) == 0


def _transformers_rates(name: str, *, warmup: int, total: int, **arguments: Any) -> list[float]:
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = getattr(optimization, name)(optimizer, num_warmup_steps=warmup, num_training_steps=total, **arguments)
    result = []
    for _ in range(total):
        result.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return result


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        ({"name": "cosine"}, "get_cosine_schedule_with_warmup", {}),
        ({"name": "linear"}, "get_linear_schedule_with_warmup", {}),
        (
            {"name": "cosine_restarts", "restarts": 2},
            "get_cosine_with_hard_restarts_schedule_with_warmup",
            {"num_cycles": 3},
        ),
        ({"name": "cosine", "min_lr": 0.5}, "get_cosine_with_min_lr_schedule_with_warmup", {"min_lr": 0.5}),
    ],
)
def test_equals_transformers_after_the_warmup(
    ours: dict[str, Any], theirs: str, arguments: dict[str, Any], warmup: int
) -> None:
    total = 25
    expected = _transformers_rates(theirs, warmup=warmup, total=total, **arguments)
    # their warm-up spends its first step at rate 0; ours does not
    assert rates(total, warmup_steps=warmup, **ours)[warmup:] == pytest.approx(expected[warmup:], abs=1e-12)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    total=st.integers(1, 200),
    warmup=st.integers(0, 250),
    share=st.floats(0, 1),
    name=st.sampled_from(["cosine", "linear", "constant", "cosine_restarts"]),
)
def test_shape(total: int, warmup: int, share: float, name: str) -> None:
    """Rises strictly while warming up, never falls below the minimum after it, and only falls without restarts."""
    minimum = PEAK * share
    all_rates = rates(total, name=name, warmup_steps=warmup, min_lr=minimum)
    rising, falling = all_rates[:warmup], all_rates[warmup:]
    assert all(0 < one < other for one, other in itertools.pairwise(rising))
    assert all(0 < rate < PEAK for rate in rising)
    assert all(minimum * (1 - 1e-12) <= rate <= PEAK for rate in falling)
    if falling:
        assert falling[0] == pytest.approx(PEAK)
    if name != "cosine_restarts":
        assert all(one >= other - 1e-12 for one, other in itertools.pairwise(falling))
