from __future__ import annotations

import numpy as np
import pytest

from core.errors import UserError
from core.seeding import stable_hash
from data.batches import TokenRows
from data.split import Cut, cut_rows, num_copies, num_held_out, probe_rows, rows_not_in


def rows_of(values: list[int]) -> TokenRows:
    ids = [np.array([1, value], np.int32) for value in values]
    return TokenRows.of(ids, [np.array([False, True])] * len(ids), [f"a:{value}" for value in values])


def cut(values: list[int], *, validation: float = 0.2, test: float = 0.0, seed: int = 0) -> Cut:
    return cut_rows(rows_of(values), [str(value) for value in values], validation=validation, test=test, seed=seed)


@pytest.mark.parametrize(
    ("num_rows", "ratio", "held_out"),
    [(219, 0.2, 44), (943, 0.1, 95), (30, 0.1, 3), (1, 0.2, 1), (100, 0.07, 7), (9, 0.0, 0)],
)
def test_held_out_is_rounded_up_from_the_ratio_as_written(num_rows: int, ratio: float, held_out: int) -> None:
    assert num_held_out(num_rows, ratio) == held_out


def test_reference_splits() -> None:
    for num_rows, ratio, num_train, num_val in ((219, 0.2, 175, 44), (943, 0.1, 848, 95)):
        done = cut(list(range(num_rows)), validation=ratio)
        assert (len(done.train), len(done.validation), len(done.test)) == (num_train, num_val, 0)
        assert sorted(done.train + done.validation) == list(range(num_rows))


def test_rows_are_taken_in_the_order_of_their_hash() -> None:
    first = sorted(range(10), key=lambda value: stable_hash(7, "split", str(value)))
    done = cut(list(range(10)), validation=0.2, test=0.3, seed=7)
    assert done.validation == sorted(first[:2])
    assert done.test == sorted(first[2:5])
    assert done.train == sorted(first[5:])


def test_an_added_row_or_another_order_moves_few_rows() -> None:
    values = list(range(1000))
    before = {values[index] for index in cut(values).validation}
    changed = [*reversed(values), 5000]
    after = {changed[index] for index in cut(changed).validation}
    assert len(after) == 201
    assert len(before - after) <= 1
    assert {values[index] for index in cut(values, seed=1).validation} != before


def test_copies_stay_on_one_side() -> None:
    values = [value % 40 for value in range(120)]  # three of each
    for seed in range(5):
        done = cut(values, validation=0.25, test=0.25, seed=seed)
        sides = [{values[index] for index in side} for side in (done.train, done.validation, done.test)]
        assert not sides[0] & sides[1]
        assert not sides[0] & sides[2]
        assert not sides[1] & sides[2]
        assert [len(done.train), len(done.validation), len(done.test)] == [60, 30, 30]


def test_same_tokens_from_different_contents_stay_together() -> None:
    rows = rows_of([1, 1, 2, 3, 4, 5])
    for seed in range(20):
        done = cut_rows(rows, list("abcdef"), validation=0.5, test=0.0, seed=seed)
        assert (0 in done.train) == (1 in done.train)


def test_sides_without_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.validation 0\.2 and data\.test 0 of 1 row leave none to train"):
        cut([1])
    with pytest.raises(UserError, match=r"data\.validation 0\.2 of 3 rows gives no validation row"):
        cut([1, 1, 1])
    with pytest.raises(UserError, match="leave none to train"):
        cut([1, 2, 3], validation=0.6, test=0.3)


def test_copies_are_counted_and_found_elsewhere() -> None:
    assert num_copies(rows_of([1, 2, 1, 1, 3])) == 2
    assert rows_not_in(rows_of([1, 2, 3]), [rows_of([2]), rows_of([9])]) == [0, 2]


def test_probe_keeps_row_ids_and_is_fixed() -> None:
    rows = rows_of(list(range(100)))
    probe = probe_rows(rows, count=10, seed=3)
    assert len(probe) == 10
    assert probe.row_ids.tolist() == sorted(set(probe.row_ids.tolist()))
    assert [ids[1] for ids in probe.ids] == probe.row_ids.tolist()
    assert probe.origin == [f"a:{row}" for row in probe.row_ids]
    assert probe_rows(rows, count=10, seed=3).row_ids.tolist() == probe.row_ids.tolist()
    assert probe_rows(rows, count=10, seed=4).row_ids.tolist() != probe.row_ids.tolist()
    assert len(probe_rows(rows, count=200, seed=3)) == 100
