"""What is seen in single rows, and that it is the same however the rows are divided."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from typing import Any

import pytest

from data.check.inspection import MAX_LABELS, MAX_NAMED, OTHER_LABELS, Inspection, Lengths
from data.formats import Example, Message


def example(answer: str = "An answer.", number: int = 1, *, prompt: str = "A question?", **other: Any) -> Example:
    turns = (Message("user", prompt), Message("assistant", answer))
    return Example(f"rows.jsonl, line {number}", f"rows.jsonl:{number}", messages=turns, is_pair=True, **other)


def add(inspection: Inspection, some: Example, **counts: Any) -> None:
    inspection.add(some, **{"num_tokens": 20, "num_targets": 5, "lost_targets": 0, "has_end": True, **counts})


def seen(some: Example, **counts: Any) -> set[str]:
    """Kinds that are noted of one row, without those that every row has."""
    inspection = Inspection()
    add(inspection, some, **counts)
    return set(inspection.noted) - {"longest", "shortest", "fewest-targets"}


def test_a_row_as_it_should_be_is_not_noted() -> None:
    assert seen(example("Größe: 10 µm, naïve café, 東京, 🙂, “quoted” … — fine.\n\tIndented.")) == set()


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        ({"num_targets": 3, "lost_targets": 2, "has_end": False}, "truncated"),
        ({"num_targets": 0, "lost_targets": 5, "has_end": False}, "answer-lost"),
        ({"num_targets": 0, "has_end": False}, "no-targets"),
        ({"has_end": False}, "no-end"),
    ],
)
def test_what_becomes_of_an_answer_is_noted(counts: dict[str, Any], kind: str) -> None:
    assert seen(example(), **counts) == {kind}


@pytest.mark.parametrize("answer", ["\u200b\u2060", "nan", " NULL ", "[deleted]", "\ufeff"])
def test_an_answer_that_says_nothing_is_noted(answer: str) -> None:
    assert seen(example(answer)) == {"empty-answer"}


@pytest.mark.parametrize("answer", ["0", "-", "No", "none", "?"])
def test_a_short_answer_is_an_answer(answer: str) -> None:
    assert seen(example(answer)) == set()


def test_a_question_may_be_anything() -> None:
    assert seen(example(prompt="nan")) == set()


def test_the_worst_rows_are_named_and_all_are_counted() -> None:
    inspection = Inspection()
    for number in range(1, 101):
        add(inspection, example(number=number), num_targets=1, lost_targets=number % 50 + 1)
    noted = inspection.of_kind("truncated")
    assert noted.num_rows == 100
    assert len(noted.rows) == MAX_NAMED
    assert [row.origin for row in noted.rows[:4]] == [f"rows.jsonl:{number}" for number in (49, 99, 48, 98)]
    assert noted.rows[0].detail == "50 of 51 target tokens cut off"


def test_totals_are_sums() -> None:
    inspection = Inspection()
    add(inspection, example(), num_tokens=10, num_targets=4, lost_targets=2)
    add(inspection, example(), num_tokens=30, num_targets=1, lost_targets=9)
    totals = inspection.num_rows, inspection.num_tokens, inspection.num_targets, inspection.num_lost_targets
    assert totals == (2, 40, 5, 11)


def made(numbers: range) -> Inspection:
    inspection = Inspection()
    for number in numbers:
        answer = ("fine", "nan", "cafÃ©", "a\x00b", "write to me@uni.edu")[number % 5]
        some = example(answer, number, label=("yes", "no", "maybe")[number % 3])
        add(inspection, some, num_tokens=7 * number % 90 + 1, num_targets=number % 7, lost_targets=number % 4)
    return inspection


@pytest.mark.parametrize("borders", [(0, 200), (0, 1, 200), (0, 50, 51, 120, 200), (0, 100, 100, 200)])
def test_parts_that_are_merged_are_the_same_as_the_whole(borders: tuple[int, ...]) -> None:
    merged = Inspection()
    for start, stop in pairwise(borders):
        merged.merge(pickle.loads(pickle.dumps(made(range(start, stop)))))
    assert merged.to_json() == made(range(200)).to_json()


def test_it_comes_back_from_json() -> None:
    inspection = made(range(60))
    again = Inspection.from_json(json.loads(json.dumps(inspection.to_json())))
    assert json.dumps(again.to_json()) == json.dumps(inspection.to_json())
    again.merge(made(range(60, 70)))  # and is of use


def test_labels_are_counted_up_to_a_bound() -> None:
    inspection = Inspection()
    for number in range(MAX_LABELS + 10):
        add(inspection, example(label=f"label {number}"))
    add(inspection, example(label="label 3"))
    assert inspection.labels["label 3"] == 2
    assert inspection.labels[OTHER_LABELS] == 10
    assert len(inspection.labels) == MAX_LABELS + 1


def test_quantiles_are_exact_for_rows_of_usual_length() -> None:
    lengths = Lengths()
    for length in [5, 1, 3, 2, 4, 2000, 7, 6, 9, 8]:
        lengths.add(length)
    assert [lengths.quantile(share) for share in (0.0, 0.1, 0.5, 0.9, 0.91, 1.0)] == [1, 1, 5, 9, 2000, 2000]
    assert (lengths.num_above(8), lengths.num_below(3)) == (2, 2)


def test_long_lengths_are_kept_to_a_thousandth() -> None:
    lengths = Lengths()
    for length in (123_457, 123_458, 9_999_999):
        lengths.add(length)
    assert 0 <= 123_457 - lengths.quantile(0.1) <= 124
    assert 0 <= 9_999_999 - lengths.quantile(1.0) <= 10_000
    assert len(lengths.counts) == 2


def test_bars_cover_all_rows_in_round_steps() -> None:
    lengths = Lengths()
    for length in range(13, 203):
        lengths.add(length)
    bars = list(lengths.bars(10))
    assert bars[0] == (0, 19, 7)
    assert bars[1] == (20, 39, 20)
    assert bars[-1] == (200, 219, 3)
    assert sum(rows for _, _, rows in bars) == 190
    assert list(Lengths().bars(10)) == []
