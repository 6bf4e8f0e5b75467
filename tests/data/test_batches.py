"""Rows in batches: every one once, where it fits, with others in every epoch."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.protocols import IGNORE
from data.batches import Batches, TokenRows, epoch_batches, eval_batches, padding_share
from data.shapes import Limit, Shapes, eval_shapes, train_shapes


def rows_of(lengths: list[int]) -> TokenRows:
    """Row `i` holds `100 i + 1, 100 i + 2, …`; its last half are targets."""
    ids = [np.arange(100 * row + 1, 100 * row + length + 1, dtype=np.int32) for row, length in enumerate(lengths)]
    is_target = [np.arange(length) >= max(length // 2, 1) for length in lengths]
    return TokenRows.of(ids, is_target, [f"a:{row}" for row in range(len(lengths))])


LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=60)
LIMITS = st.one_of(
    st.integers(1, 7).map(lambda rows: Limit(rows=rows)), st.integers(1, 300).map(lambda n: Limit(positions=n))
)


def seen(batches: Batches) -> list[int]:
    return [int(row) for batch in batches for row in batch.row_ids]


def epoch_of(rows: TokenRows, limit: Limit, *, seed: int = 0, epoch: int = 0) -> Batches:
    return epoch_batches(rows, train_shapes(rows.lengths, limit), seed=seed, epoch=epoch)


def test_batch_worked_by_hand() -> None:
    rows = TokenRows.of(
        [np.array([5, 6, 7, 8], np.int32), np.array([9, 10, 11], np.int32)],
        [np.array([False, False, True, True]), np.array([False, True, False])],
        ["a:1", "a:2"],
    )
    (batch,) = eval_batches(rows, Shapes((2,), (4,)))
    assert batch.row_ids.tolist() == [1, 0]
    assert batch.inputs.tolist() == [[9, 10, 0, 0], [5, 6, 7, 0]]
    assert batch.targets.tolist() == [[10, IGNORE, IGNORE, IGNORE], [IGNORE, 7, 8, IGNORE]]
    assert [str(part.dtype) for part in (batch.row_ids, batch.inputs, batch.targets)] == ["int64", "int32", "int32"]
    assert batch.num_targets == rows.num_targets == 3


@settings(deadline=None, max_examples=200)
@given(LENGTHS, LIMITS, st.integers(0, 3))
def test_an_epoch_has_every_row_once_in_a_batch_that_fits(lengths: list[int], limit: Limit, epoch: int) -> None:
    rows = rows_of(lengths)
    shapes = train_shapes(rows.lengths, limit)
    batches = epoch_batches(rows, shapes, seed=1, epoch=epoch)
    assert sorted(seen(batches)) == list(range(len(rows)))
    assert sum(batch.num_targets for batch in batches) == rows.num_targets
    # the same shapes in every epoch: as many batches, as much memory, nothing new to compile
    assert Counter(batch.inputs.shape for batch in batches) == Counter(zip(shapes.sizes, shapes.widths, strict=True))
    if limit.rows is not None:
        assert len(batches) == -(-len(rows) // limit.rows)
        assert sum(len(batch.row_ids) < limit.rows for batch in batches) == (len(rows) % limit.rows > 0)
    for batch in batches:
        if limit.positions is not None:
            assert batch.num_tokens <= limit.positions or len(batch.row_ids) == 1
        for row, inputs, targets in zip(batch.row_ids, batch.inputs, batch.targets, strict=True):
            ids, is_target = rows.ids[row], rows.is_target[row]
            assert inputs[: len(ids) - 1].tolist() == ids[:-1].tolist()
            assert targets[targets != IGNORE].tolist() == ids[is_target].tolist()
            assert all(inputs[at] + 1 == targets[at] for at in np.flatnonzero(targets != IGNORE))


@settings(deadline=None, max_examples=100)
@given(LENGTHS, LIMITS)
def test_evaluation_has_every_row_once_sorted_widest_first(lengths: list[int], limit: Limit) -> None:
    rows = rows_of(lengths)
    (shapes,) = eval_shapes([rows.lengths], limit)
    batches = eval_batches(rows, shapes)
    assert sorted(seen(batches)) == list(range(len(rows)))
    assert list(batches.widths) == sorted(batches.widths, reverse=True)
    longest, shortest = ([pick(lengths[row] for row in group) for group in batches.groups] for pick in (max, min))
    assert all(above >= below for above, below in zip(shortest, longest[1:], strict=False))
    assert seen(batches) == seen(eval_batches(rows, shapes))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    rows = rows_of([10 + row % 30 for row in range(90)])

    def order(seed: int, epoch: int) -> list[int]:
        return seen(epoch_of(rows, Limit(rows=4), seed=seed, epoch=epoch))

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    short = [
        tuple(sorted(min(epoch_of(rows, Limit(rows=4), epoch=epoch).groups, key=len).tolist())) for epoch in range(8)
    ]
    assert len(set(short)) > 4  # not always the same rows in the short batch


def lengths_like(mean: int, sigma: float, num: int) -> list[int]:
    lengths = np.random.default_rng(0).lognormal(np.log(mean), sigma, num)
    return [int(length) for length in np.clip(lengths, 20, 512)]


@pytest.mark.parametrize("limit", [Limit(rows=2), Limit(rows=4), Limit(rows=8), Limit(positions=1024)], ids=str)
def test_other_rows_meet_in_every_epoch(limit: Limit) -> None:
    """Of the pairs in one batch, few are together again in the next epoch; by sorting alone, all would be."""
    rows = rows_of(lengths_like(130, 0.25, 180))

    def pairs(epoch: int) -> set[tuple[int, int]]:
        groups = epoch_of(rows, limit, epoch=epoch).groups
        return {pair for group in groups for pair in combinations(sorted(group.tolist()), 2)}

    epochs = [pairs(epoch) for epoch in range(6)]
    again = [len(one & other) / len(one) for one, other in combinations(epochs, 2)]
    assert max(again) < 0.4
    assert sum(again) / len(again) < 0.3
    # over a few epochs a row meets several times as many others as in one
    assert len(set.union(*epochs)) > 2.5 * len(epochs[0])


def test_a_row_comes_with_rows_of_its_length() -> None:
    rows = rows_of(lengths_like(130, 0.25, 400))
    batches = epoch_of(rows, Limit(rows=4))
    assert padding_share(batches) < 0.05
    assert len(set(batches.widths)) <= 20
    spread = [np.ptp(rows.lengths[group]) for group in batches.groups]
    assert np.mean(spread) < np.ptp(rows.lengths) / 8


def test_batches_are_in_no_order_of_width() -> None:
    rows = rows_of([9] * 40 + [60] * 40)
    widths = epoch_of(rows, Limit(rows=4)).widths
    assert Counter(widths) == {8: 9, 59: 11}  # one of the short rows changes places with a long one
    assert list(widths) != sorted(widths)
    assert list(widths) != sorted(widths, reverse=True)


def test_a_selection_keeps_its_row_ids() -> None:
    rows = rows_of([5, 9, 7]).select([0, 2])
    (batch,) = eval_batches(rows, Shapes((2,), (8,)))
    assert batch.row_ids.tolist() == [0, 2]
    assert batch.inputs[1, :2].tolist() == [201, 202]


def test_rows_of_one_data_set_are_put_together_without_a_copy() -> None:
    rows = rows_of([5, 9, 7, 4])
    some, others = rows.select([0, 2]), rows.select([3])
    both = others.followed_by(some)
    assert both.flat_ids is rows.flat_ids
    assert [ids.tolist() for ids in both.ids] == [rows.ids[index].tolist() for index in (3, 0, 2)]
    assert both.origin == ["a:3", "a:0", "a:2"]
    assert both.row_ids.tolist() == [0, 1, 2]
    assert (both.num_targets, both.largest_id) == (some.num_targets + others.num_targets, 304)
    foreign = TokenRows.of([np.array([900, 901], np.int32)], [np.array([False, True])], ["b:7"])
    mixed = some.followed_by(foreign)
    assert [ids.tolist() for ids in mixed.ids][1:] == [rows.ids[2].tolist(), [900, 901]]
    assert mixed.origin == ["a:0", "a:2", "b:7"]
    assert (mixed.num_targets, mixed.num_tokens, mixed.largest_id) == (some.num_targets + 1, 14, 901)


def test_slices_are_batches() -> None:
    rows = rows_of([5] * 10)
    batches = epoch_of(rows, Limit(rows=2))
    assert seen(batches[3:]) == seen(batches)[6:]
    assert batches[-1].row_ids.tolist() == seen(batches)[-2:]


def test_padding_share_worked_by_hand() -> None:
    rows = rows_of([9, 5])  # 8 and 4 positions in a batch of 2 x 8
    assert padding_share(eval_batches(rows, Shapes((2,), (8,)))) == pytest.approx(0.25)
    assert padding_share(eval_batches(rows_of([]), Shapes())) == 0.0


def test_no_rows_make_no_batches() -> None:
    (shapes,) = eval_shapes([rows_of([]).lengths], Limit(rows=2))
    assert list(eval_batches(rows_of([]), shapes)) == []
