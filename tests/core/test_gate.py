"""Keep it or don't: each threshold from both sides, and what could not be measured."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from core.config import GuardConfig
from core.gate import Decision, Gate, decide

GATE = Gate(max_gap=0.15, min_gain=0.0, max_forgotten=0.1)
SUMMARY = {"gap": 0.08, "base_gap": 0.02, "grade": "GOOD", "not_judged": None}


def losses(gain: float, low: float, high: float) -> Any:
    return SimpleNamespace(gain=gain, gain_low=low, gain_high=high)


GOOD = losses(0.5, 0.4, 0.6)


def asked(gate: Gate = GATE, *, found: Any = GOOD, rise: float | None = 0.02, **summary: Any) -> Decision:
    general: Any = None if rise is None else SimpleNamespace(rise=rise)
    return decide(gate, summary=SUMMARY | summary, losses=found, general=general)


def test_all_three_pass() -> None:
    decision = asked()
    assert decision.keep and decision.exit_code == 0 and decision.reasons == []
    assert decision.line == (
        "Keep it: held-out rows gained 0.500 [0.400, 0.600] nats per token, gap 0.080 (GOOD), "
        "the loss on general texts rose by 0.020"
    )
    assert json.loads(json.dumps(decision.to_dict())) == {"keep": True, "line": decision.line, "reasons": []}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"found": losses(-0.2, -0.3, -0.1)}, "rose by 0.200"),
        ({"found": losses(-0.01, -0.1, 0.08)}, "rose by 0.010, though its interval [-0.080, 0.100] holds 0"),
        ({"found": losses(0.0, -0.1, 0.1)}, "more than 0 is asked for"),
        ({"found": losses(0.05, -0.01, 0.11)}, "can't tell"),
        ({"found": losses(0.05, 0.0, 0.11)}, "can't tell"),
        ({"found": losses(math.nan, 0.0, 0.1)}, "not a number"),
        ({"found": None}, "gain was not measured"),
        ({"gap": 0.15, "grade": "MODERATE"}, "the gap is 0.150 (MODERATE), and below 0.15"),
        ({"gap": None, "not_judged": "every row was trained on"}, "no gap: every row was trained on"),
        ({"gap": None}, "no gap: the run has no evaluation"),
        ({"rise": 0.11}, "rose by 0.110, more than 0.1"),
        ({"rise": math.inf}, "not a number"),
        ({"rise": None}, "forgot was not measured"),
    ],
)
def test_each_can_stand_against_it(given: dict[str, Any], words: str) -> None:
    decision = asked(**given)
    assert not decision.keep and decision.exit_code == 3 and len(decision.reasons) == 1
    assert decision.line.startswith("Don't keep it: ") and words in decision.line


def test_rows_that_were_trained_on_are_no_proof() -> None:
    general: Any = SimpleNamespace(rise=3.0)
    decision = decide(GATE, summary=SUMMARY, losses=GOOD, general=general, num_trained_on=3)
    assert not decision.keep and len(decision.reasons) == 2
    assert decision.reasons[0] == "3 rows were trained on, so the gain is not that of held-out rows"
    assert decide(GATE, summary=SUMMARY, losses=GOOD, general=SimpleNamespace(rise=0.0), num_trained_on=0).keep


def test_bounds() -> None:
    assert "the loss on general texts fell by 2.000" in asked(rise=-2.0).line
    assert asked(rise=0.1).keep and asked(rise=-2.0).keep and asked(gap=0.1499).keep and asked(gap=-0.3).keep
    assert asked(found=losses(0.01, 0.001, 0.02)).keep
    wanting = Gate(max_gap=0.15, min_gain=0.3)
    assert asked(wanting, found=GOOD).keep
    assert "more than 0.3 is asked for" in asked(wanting, found=losses(0.2, 0.1, 0.29)).line
    assert "can't tell" in asked(wanting, found=losses(0.5, 0.2, 0.8)).line
    # a loss that rose is never called a gain that is too small
    assert "rose by 0.100" in asked(wanting, found=losses(-0.1, -0.2, -0.05)).line


def test_all_reasons_are_in_the_line() -> None:
    decision = asked(found=losses(-1, -2, -0.5), gap=0.9, rise=3.0, grade="CRITICAL")
    assert len(decision.reasons) == 3 and all(reason in decision.line for reason in decision.reasons)
    assert "\n" not in decision.line


def test_held_out_rows_that_were_harder_before() -> None:
    """As the verdict of `train` has it, unless a bound is given: then that is what counts."""
    guard = GuardConfig()
    harder = {"gap": 0.42, "base_gap": 0.40, "grade": "CRITICAL"}
    assert asked(Gate.of(guard), **harder).keep
    assert "0.400 before training" in asked(Gate.of(guard), **harder).line
    assert not asked(Gate.of(guard, max_gap=0.15), **harder).keep
    assert not asked(Gate.of(guard), gap=0.42, base_gap=0.30).keep
    assert not asked(Gate.of(guard), gap=0.42, base_gap=None).keep
    assert Gate.of(guard, max_gap=0.5, min_gain=0.1, max_forgotten=0.2) == Gate(0.5, 0.1, 0.2)
    assert Gate.of(guard).max_gap == 0.15
