"""Sizes and widths of batches: little padding, few shapes, never above the limit."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.protocols import IntArray
from data.shapes import MAX_WIDTHS, Limit, Shapes, choose_widths, eval_shapes, train_shapes


def tokens(*positions: int) -> IntArray:
    """Lengths of rows that need so many positions."""
    return np.array(positions, np.int64) + 1


def padding(lengths: IntArray, shapes: Shapes) -> float:
    return 1 - float((lengths - 1).sum()) / shapes.num_positions


def test_evaluation_worked_by_hand() -> None:
    # sorted: 100 99 | 50 50 | 10, or 100 | 99 50 | 50 10: the short batch belongs at the other end
    assert eval_shapes([tokens(50, 10, 100, 50, 99)], Limit(rows=2)) == [Shapes((2, 2, 1), (100, 50, 10))]
    # and here at this one
    assert eval_shapes([tokens(100, 20, 20)], Limit(rows=2)) == [Shapes((1, 2), (100, 20))]
    # 200 positions: one row of 150, two of 90, six of 30
    assert eval_shapes([tokens(150, *[90] * 2, *[30] * 7)], Limit(positions=200)) == [
        Shapes((1, 2, 6, 1), (150, 90, 30, 30))
    ]


def test_splits_share_their_widths() -> None:
    one, other = eval_shapes([tokens(100, 60), tokens(99, 20)], Limit(rows=1))
    assert (one.widths, other.widths) == ((100, 60), (100, 20))  # a width for 99 would spare one position


def test_a_row_above_the_limit_stands_alone_and_widens_no_other_batch() -> None:
    lengths = tokens(*[480] * 3, *[90] * 20, *[20] * 40)
    shapes = train_shapes(lengths, Limit(positions=200))
    assert [shape for shape in zip(shapes.sizes, shapes.widths, strict=True) if shape[1] > 200] == [(1, 480)] * 3
    assert all(size * width <= 200 for size, width in zip(shapes.sizes[3:], shapes.widths[3:], strict=True))
    assert (2, 90) in zip(shapes.sizes, shapes.widths, strict=True)
    assert (10, 20) in zip(shapes.sizes, shapes.widths, strict=True)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(2, 700), min_size=1, max_size=80), st.integers(1, 1000))
def test_a_limit_of_positions_is_kept_and_used(lengths: list[int], limit: int) -> None:
    rows = np.array(lengths)
    for shapes in (train_shapes(rows, Limit(positions=limit)), *eval_shapes([rows], Limit(positions=limit))):
        assert sum(shapes.sizes) == len(rows)
        assert sum(width > limit for width in shapes.widths) == sum(rows - 1 > limit)
        for size, width in list(zip(shapes.sizes, shapes.widths, strict=True))[:-1]:  # the last holds what is left
            assert size == max(limit // width, 1)


def like(mean: int, sigma: float, num: int) -> IntArray:
    return np.clip(np.random.default_rng(1).lognormal(np.log(mean), sigma, num), 20, 2048).astype(np.int64)


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_padding_of_real_sizes_is_below_five_percent(rows: int) -> None:
    for lengths in (like(110, 0.25, 60 * rows), like(90, 0.25, 1000), like(250, 0.6, 5000)):
        shapes = train_shapes(lengths, Limit(rows=rows))
        assert padding(lengths, shapes) < 0.05
        assert len(set(shapes.widths)) <= MAX_WIDTHS
        assert padding(lengths, *eval_shapes([lengths], Limit(rows=rows))) < 0.045


def test_rows_are_mixed_as_far_as_the_padding_allows() -> None:
    """A batch is wider than its rows, sorted, would need: others fit in it."""
    lengths = like(130, 0.2, 400)
    mixed, (plain,) = train_shapes(lengths, Limit(rows=4)), eval_shapes([lengths], Limit(rows=4))
    assert padding(lengths, plain) < 0.03 < padding(lengths, mixed) < 0.05
    for shapes, least in ((mixed, 8), (plain, 0)):
        room = [int((lengths - 1 <= width).sum()) for width in shapes.widths]
        taken = [sum(shapes.sizes[index:]) for index in range(len(shapes))]
        assert float(np.mean(np.subtract(room, taken))) >= least


def test_rows_change_places_even_where_each_batch_has_a_width_of_its_own() -> None:
    lengths = tokens(*(100 * 2**number for number in range(5)), *(150 * 2**number for number in range(5)))
    shapes = train_shapes(lengths, Limit(rows=2))
    assert len(shapes) == 5
    room = [int((lengths - 1 <= width).sum()) - sum(shapes.sizes[index:]) for index, width in enumerate(shapes.widths)]
    assert room == [0, 1, 1, 1, 1]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 5)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(0, 40),
)
def test_widths_are_the_best_of_all_choices(batches: list[tuple[int, int]], max_widths: int, width_cost: int) -> None:
    needed, num_rows = (np.array(column, np.int64) for column in zip(*batches, strict=True))
    rising = sorted(set(needed.tolist()))

    def cost(widths: tuple[int, ...]) -> int:
        computed = sum(rows * min(width for width in widths if width >= need) for need, rows in batches)
        return computed + width_cost * len(widths)

    choices = [(*some, rising[-1]) for size in range(max_widths) for some in combinations(rising[:-1], size)]
    widths = choose_widths(needed, num_rows, max_widths=max_widths, width_cost=width_cost)
    assert len(widths) <= max_widths
    assert list(widths) == sorted(set(widths))
    assert cost(widths) == min(cost(choice) for choice in choices)


def test_long_rows_have_coarse_widths_and_the_longest_its_own() -> None:
    needed = np.arange(1, 8192, dtype=np.int64)
    widths = choose_widths(needed, np.ones_like(needed), width_cost=0)
    assert len(widths) == MAX_WIDTHS
    assert widths[-1] == 8191
    assert all(width % 16 == 0 for width in widths[:-1])


def test_no_rows() -> None:
    none = np.array([], np.int64)
    assert choose_widths(none, none) == ()
    assert eval_shapes([none, tokens(5)], Limit(rows=2)) == [Shapes(), Shapes((1,), (5,))]
    assert len(train_shapes(none, Limit(positions=5))) == 0
