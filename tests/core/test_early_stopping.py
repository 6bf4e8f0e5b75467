"""Patience, the minimum delta, and state that survives a resume."""

from __future__ import annotations

import json
import math

import pytest

from core.early_stopping import Decision, EarlyStopping


def feed(stopping: EarlyStopping, losses: list[float], *, first: int = 1) -> list[Decision]:
    return [stopping.update(loss, step=step) for step, loss in enumerate(losses, start=first)]


def test_stops_after_so_many_evaluations_without_improvement() -> None:
    stopping = EarlyStopping(patience=2)
    decisions = feed(stopping, [1.0, 0.9, 0.95, 0.91])
    assert [decision.is_best for decision in decisions] == [True, True, False, False]
    assert [decision.should_stop for decision in decisions] == [False, False, False, True]
    assert (stopping.best_step, stopping.best_loss) == (2, 0.9)


def test_an_improvement_renews_the_patience() -> None:
    stopping = EarlyStopping(patience=2)
    feed(stopping, [1.0, 1.1, 0.9])
    assert stopping.patience_left == 2
    assert [decision.should_stop for decision in feed(stopping, [1.0, 1.0], first=4)] == [False, True]
    assert stopping.patience_left == 0


def test_an_equal_loss_is_no_improvement() -> None:
    assert [d.is_best for d in feed(EarlyStopping(patience=9), [1.0, 1.0])] == [True, False]


def test_a_fall_below_min_delta_is_the_best_but_uses_up_patience() -> None:
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    decisions = feed(stopping, [1.0, 0.95, 0.92])
    assert decisions[-1] == Decision(is_best=True, should_stop=True)
    assert (stopping.best_step, stopping.best_loss) == (3, 0.92)


def test_small_falls_that_add_up_to_min_delta_renew_the_patience() -> None:
    stopping = EarlyStopping(patience=3, min_delta=0.1)
    losses = [1.0 - 0.04 * k for k in range(20)]  # each third fall is 0.12 below the reference
    assert not any(decision.should_stop for decision in feed(stopping, losses))
    # a drift of 0.03 each passes 0.1 only at the fourth: too slow
    drift = EarlyStopping(patience=3, min_delta=0.1)
    assert [d.should_stop for d in feed(drift, [1.0, 0.97, 0.94, 0.91])] == [False, False, False, True]


def test_no_patience_never_stops() -> None:
    stopping = EarlyStopping(patience=None)
    assert not any(decision.should_stop for decision in feed(stopping, [1.0] + [2.0] * 100))
    assert stopping.patience_left is None
    assert stopping.best_step == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(loss: float) -> None:
    stopping = EarlyStopping(patience=3)
    decisions = feed(stopping, [loss, 1.0, loss, loss, loss])
    assert [decision.is_best for decision in decisions] == [False, True, False, False, False]
    assert [decision.should_stop for decision in decisions] == [False, False, False, False, True]
    assert (stopping.best_step, stopping.best_loss) == (2, 1.0)


@pytest.mark.parametrize("split", range(8))
def test_state_survives_json_at_any_point(split: int) -> None:
    losses = [1.0, 0.9, 0.95, 0.89, 0.885, 0.9, 0.91]
    whole = EarlyStopping(patience=3, min_delta=0.02)
    expected = feed(whole, losses)

    before = EarlyStopping(patience=3, min_delta=0.02)
    decisions = feed(before, losses[:split])
    text = json.dumps(before.state_dict(), allow_nan=False)
    after = EarlyStopping(patience=3, min_delta=0.02)
    after.load_state_dict(json.loads(text))
    assert decisions + feed(after, losses[split:], first=split + 1) == expected
    assert after == whole


def test_the_state_does_not_hold_the_settings() -> None:
    """A resumed run has the patience of its configuration."""
    stopping = EarlyStopping(patience=1)
    stopping.load_state_dict(EarlyStopping(patience=7, min_delta=0.5).state_dict())
    assert (stopping.patience, stopping.min_delta) == (1, 0.0)
