"""What is said of a mixture's routing: worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from core.routing import Collapse, Routing, RoutingReport, describe, routing_parts, shares_of


def routing(*layers: list[int], k: int = 2) -> Routing:
    """The same number of choices in every layer."""
    return Routing.measure(np.array(layers), num_tokens=sum(layers[0]) // k)


def test_measure_finds_k_and_the_shares() -> None:
    found = routing([400, 300, 200, 100], [1, 499, 499, 1])
    assert found.experts_per_token == 2
    np.testing.assert_allclose(found.shares, [[0.4, 0.3, 0.2, 0.1], [0.001, 0.499, 0.499, 0.001]])


def test_counts_that_are_no_choices_are_our_bug() -> None:
    with pytest.raises(AssertionError):
        Routing.measure(np.array([[10, 10], [10, 9]]), num_tokens=10)


def test_entropy() -> None:
    found = routing([100, 100, 100, 100], [200, 200, 0, 0], [400, 0, 0, 0], k=1).entropy
    np.testing.assert_allclose(found, [1.0, 0.5, 0.0], atol=1e-12)
    by_hand = -(0.4 * math.log(0.4) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(4)
    assert routing([400, 300, 200, 100]).entropy[0] == pytest.approx(by_hand)


def test_distance_is_the_part_of_the_choices_that_moved() -> None:
    before, after = routing([250] * 4, [500, 500, 0, 0]), routing([350, 250, 250, 150], [0, 0, 500, 500])
    np.testing.assert_allclose(after.distance(before), [0.1, 1.0])
    np.testing.assert_array_equal(after.distance(after), [0.0, 0.0])


@pytest.mark.parametrize(
    ("counts", "k", "why"),
    [
        ([1000, 143, 143, 143, 143, 143, 143, 142], 2, "expert 0 gets 100 % of its tokens"),
        ([100, 100, 910, 178, 178, 178, 178, 178], 2, "expert 2 gets 91 % of its tokens"),
        ([100, 100, 900, 180, 180, 180, 180, 180], 2, None),  # 90 % is not above 90 %
        ([640, 640, 620, 20, 20, 20, 20, 20], 2, "3 of 8 experts get 95 % of its choices"),
        ([639, 640, 620, 21, 20, 20, 20, 20], 2, None),
        ([640, 640, 620, 50, 50], 2, None),  # 3 of 5 is no collapse
        ([10, 0, 6, 1, 2, 1, 0, 1980], 1, "expert 7 gets 99 % of its tokens"),
        ([950, 10, 900, 40, 20, 20, 20, 40], 2, "expert 0 gets 95 % of its tokens"),
        ([800, 150, 10, 40], 1, "2 of 4 experts get 95 % of its choices"),
        ([1000, 1000, 0, 0], 2, "expert 0 gets 100 % of its tokens"),
        ([1000, 500, 500], 2, None),  # with fewer than 2k experts a healthy one comes near
        ([1000, 1000], 2, None),  # there is no choice
    ],
)
def test_collapse_of_one_layer(counts: list[int], k: int, why: str | None) -> None:
    found = routing(counts, k=k).collapsed()
    assert found == (() if why is None else (Collapse(0, why),))


def test_few_tokens_are_not_judged() -> None:
    forced = [79, 11, 11, 11, 11, 11, 12, 12]  # 158 choices of 8 experts: below 20 each
    assert routing(forced).collapsed() == ()
    assert routing([80, *forced[1:7], 13]).collapsed() == (Collapse(0, "expert 0 gets 100 % of its tokens"),)


def test_a_random_router_is_healthy() -> None:
    rng = np.random.default_rng(0)
    for k, num_experts in ((1, 4), (2, 4), (2, 8), (8, 64), (8, 128)):
        logits = rng.normal(size=(6, 1000, num_experts)) + rng.normal(0, 0.5, (6, 1, num_experts))
        chosen = np.argsort(-logits, axis=-1)[..., :k]
        counts = np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in chosen])
        assert Routing.measure(counts, num_tokens=1000).collapsed() == ()


def test_report() -> None:
    base = routing([250, 250, 250, 250], [497, 3, 250, 250], [250, 250, 250, 250])
    after = routing([350, 250, 250, 150], [498, 2, 250, 250], [495, 5, 250, 250])
    report = RoutingReport(after, base)
    # layer 1 was so before, layer 2 became so
    assert [one.layer for one in report.collapses] == [2]
    assert [one.layer for one in RoutingReport(base, base).collapses] == []
    assert report.scalars == {
        "entropy": pytest.approx(after.entropy.mean()),
        "entropy_min": pytest.approx(after.entropy.min()),
        "entropy_min_layer": 1,
        "moved_max": pytest.approx(0.245),
        "moved_max_layer": 2,
    }
    record: dict[str, Any] = json.loads(json.dumps(report.to_record()))
    assert record["collapsed"] == [2]
    assert record["shares"][0] == [0.35, 0.25, 0.25, 0.15]
    shares = shares_of(record)
    assert shares is not None
    np.testing.assert_allclose(shares, after.shares, atol=5e-5)


def test_a_checkpoint_holds_it() -> None:
    found = routing([400, 300, 200, 100], [1, 499, 499, 1])
    assert Routing.from_dict(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize("damaged", [None, 3, {}, {"shares": None}, {"shares": [[1, "x"]]}, {"shares": [[1], [1, 2]]}])
def test_damaged_shares(damaged: object) -> None:
    assert shares_of(damaged) is None


def test_words() -> None:
    scalars = {"entropy": 0.968, "entropy_min": 0.91, "entropy_min_layer": 3, "moved_max": 0.021, "moved_max_layer": 5}
    assert routing_parts(scalars, start="base model") == [
        "experts: entropy 0.97 (lowest 0.91, layer 3)",
        "moved 0.02 from the base model (layer 5)",
    ]
    assert routing_parts(scalars, start=None) == ["experts: entropy 0.97 (lowest 0.91, layer 3)"]
    many = [Collapse(layer, "why") for layer in range(5)]
    assert describe(many) == "layer 0: why; layer 1: why; layer 2: why; and 2 more"
