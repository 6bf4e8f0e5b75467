from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.protocols import IGNORE
from data.batches import Batches, TokenRows, choose_widths, epoch_batches, eval_batches, padding_share


def rows_of(lengths: list[int]) -> TokenRows:
    """Row `i` holds `100 i + 1, 100 i + 2, …`; its last half are targets."""
    ids = [np.arange(100 * row + 1, 100 * row + length + 1, dtype=np.int32) for row, length in enumerate(lengths)]
    is_target = [np.arange(length) >= max(length // 2, 1) for length in lengths]
    return TokenRows.of(ids, is_target, [f"a:{row}" for row in range(len(lengths))])


LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=60)


def seen(batches: Batches) -> list[int]:
    return [int(row) for batch in batches for row in batch.row_ids]


def test_batch_worked_by_hand() -> None:
    rows = TokenRows.of(
        [np.array([5, 6, 7, 8], np.int32), np.array([9, 10, 11], np.int32)],
        [np.array([False, False, True, True]), np.array([False, True, False])],
        ["a:1", "a:2"],
    )
    (batch,) = eval_batches(rows, batch_size=2, widths=(4,))
    assert batch.row_ids.tolist() == [0, 1]
    assert batch.inputs.tolist() == [[5, 6, 7, 0], [9, 10, 0, 0]]
    assert batch.targets.tolist() == [[IGNORE, 7, 8, IGNORE], [10, IGNORE, IGNORE, IGNORE]]
    assert (batch.row_ids.dtype, batch.inputs.dtype, batch.targets.dtype) == (np.int64, np.int32, np.int32)
    assert batch.num_targets == rows.num_targets == 3


@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.integers(1, 7), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_has_every_row_once_and_at_most_one_short_batch(
    lengths: list[int], batch_size: int, max_widths: int, epoch: int
) -> None:
    rows = rows_of(lengths)
    widths = choose_widths(rows, max_widths=max_widths)
    batches = epoch_batches(rows, batch_size=batch_size, seed=1, epoch=epoch, widths=widths)
    assert sorted(seen(batches)) == list(range(len(rows)))
    assert len(batches) == -(-len(rows) // batch_size)
    assert sum(len(batch.row_ids) < batch_size for batch in batches) == (len(rows) % batch_size > 0)
    assert sum(batch.num_targets for batch in batches) == rows.num_targets
    for batch in batches:
        assert batch.inputs.shape == batch.targets.shape
        longest = max(lengths[row] for row in batch.row_ids) - 1
        assert batch.inputs.shape[1] == min(width for width in widths if width >= longest)
        for row, inputs, targets in zip(batch.row_ids, batch.inputs, batch.targets, strict=True):
            ids, is_target = rows.ids[row], rows.is_target[row]
            assert inputs[: len(ids) - 1].tolist() == ids[:-1].tolist()
            assert targets[targets != IGNORE].tolist() == ids[is_target].tolist()
            assert all(inputs[at] + 1 == targets[at] for at in np.flatnonzero(targets != IGNORE))


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 7))
def test_evaluation_has_every_row_once_widest_first(lengths: list[int], batch_size: int) -> None:
    rows = rows_of(lengths)
    widths = choose_widths(rows, max_widths=3)
    batches = eval_batches(rows, batch_size=batch_size, widths=widths)
    assert sorted(seen(batches)) == list(range(len(rows)))
    assert list(batches.widths) == sorted(batches.widths, reverse=True)
    assert seen(batches) == seen(eval_batches(rows, batch_size=batch_size, widths=widths))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    rows = rows_of([10 + row % 30 for row in range(90)])
    widths = choose_widths(rows)

    def order(seed: int, epoch: int) -> list[int]:
        return seen(epoch_batches(rows, batch_size=4, seed=seed, epoch=epoch, widths=widths))

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    short = [
        tuple(sorted(min(epoch_batches(rows, batch_size=4, seed=0, epoch=epoch, widths=widths).groups, key=len)))
        for epoch in range(8)
    ]
    assert len(set(short)) > 4  # not always the same rows in the short batch


def test_batches_are_in_no_order_of_width() -> None:
    rows = rows_of([9] * 40 + [60] * 40)
    widths = epoch_batches(rows, batch_size=4, seed=0, epoch=0, widths=(8, 64)).widths
    assert Counter(widths) == {8: 10, 64: 10}
    assert list(widths) != sorted(widths)
    assert list(widths) != sorted(widths, reverse=True)


def test_a_selection_keeps_its_row_ids() -> None:
    rows = rows_of([5, 9, 7]).select([0, 2])
    (batch,) = eval_batches(rows, batch_size=4, widths=(8,))
    assert batch.row_ids.tolist() == [0, 2]
    assert batch.inputs[1, :2].tolist() == [201, 202]


def test_slices_are_batches() -> None:
    rows = rows_of([5] * 10)
    batches = epoch_batches(rows, batch_size=2, seed=0, epoch=0, widths=(8,))
    assert seen(batches[3:]) == seen(batches)[6:]
    assert batches[-1].row_ids.tolist() == seen(batches)[-2:]


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.integers(1, 4), st.sampled_from([1, 8]))
def test_widths_are_the_best_of_all_choices(lengths: list[int], max_widths: int, multiple: int) -> None:
    lengths = lengths[:12]
    rows = rows_of(lengths)
    needed = sorted({-(-(length - 1) // multiple) * multiple for length in lengths})

    def computed(widths: tuple[int, ...]) -> int:
        return sum(min(width for width in widths if width >= length - 1) for length in lengths)

    choices = [(*some, needed[-1]) for size in range(max_widths) for some in combinations(needed[:-1], size)]
    widths = choose_widths(rows, max_widths=max_widths, multiple=multiple)
    assert len(widths) <= max_widths
    assert list(widths) == sorted(set(widths))
    assert all(width % multiple == 0 for width in widths)
    assert computed(widths) == min(computed(choice) for choice in choices)


def test_widths_cover_all_the_rows_given() -> None:
    assert choose_widths(rows_of([9]), rows_of([41]), max_widths=2) == (8, 40)
    assert choose_widths(rows_of([9, 41, 42]), max_widths=1) == (48,)
    assert choose_widths(rows_of([])) == ()


def test_padding_share_worked_by_hand() -> None:
    rows = rows_of([9, 5])  # 8 and 4 positions in a batch of 2 x 8
    assert padding_share(eval_batches(rows, batch_size=2, widths=(8,)), rows) == pytest.approx(0.25)
    assert padding_share([], rows_of([])) == 0.0


def test_no_rows_make_no_batches() -> None:
    assert list(eval_batches(rows_of([]), batch_size=2, widths=())) == []
