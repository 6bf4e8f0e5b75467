"""How many rows at which width the batches of a split have: the same in every epoch, whatever rows are in them.

The padding, the number of batches, the memory they need and the shapes that a backend compiles are therefore known
before the first step. Which rows meet in a batch is drawn anew each epoch, among those that fit (`data.batches`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.protocols import IntArray

MAX_WIDTHS = 32
"""Never more, whatever they would spare."""
WIDTH_COST = 80
"""Positions an epoch that a further width must spare in training. MLX compiles each width anew, in about 0.2 s: at
1,000 positions a second and three epochs a width has then paid for itself. A small data set so gets few widths."""
EVAL_WIDTH_COST = 16
"""The same in evaluation, whose rows come back more often and whose widths compile faster, without a backward pass."""
WIDTH_SHARE = 0.0015
"""Share of all positions that a further width must spare as well: a large data set gets 16 to 20 widths where 60 would
pay by the above, because what is left of its padding is not worth the memory that MLX keeps for each."""
MAX_PADDING = 0.048
"""Padding up to which rows are mixed further than they need be. So it stays below 5 % wherever rows that are sorted by
length, a quarter of each batch changing places, stay below it."""
_SPREADS = (0.5, 0.25, 0.15, 0.1, 0.07, 0.05, 0.035, 0.02, 0.01, 0.0)
"""How much longer than a batch's own longest row, as a share, a row may be that can come into it; tried in turn."""
_RESOLUTION = 512
"""Widths that are told apart: where rows are longer, they are rounded up to multiples."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How many rows fit in a batch: so many, or as many as fit in so many positions, at least one."""

    rows: int | None = None
    positions: int | None = None

    def __post_init__(self) -> None:
        assert (self.rows is None) != (self.positions is None)

    def rows_at(self, width: int) -> int:
        if self.rows is not None:
            return self.rows
        assert self.positions is not None
        return max(self.positions // width, 1)


@dataclass(frozen=True, slots=True)
class Shapes:
    """The batches of an epoch, the longest rows' first."""

    sizes: tuple[int, ...] = ()
    """Rows in each batch."""
    widths: tuple[int, ...] = ()
    """Width of each batch: T, one less than the tokens that fit."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_positions(self) -> int:
        return sum(size * width for size, width in zip(self.sizes, self.widths, strict=True))


def train_shapes(lengths: IntArray, limit: Limit) -> Shapes:
    """Shapes that leave little padding, and many rows to draw each batch from.

    Batches of neighbours by length have the least padding, but then the same rows would meet in every epoch. So a batch
    is made somewhat wider than its rows need, that rows of the next batch fit in it as well: by as much as
    `MAX_PADDING` allows, and never so little that no rows could change places.

    Args:
        lengths: int64 [N]: tokens of each row, at least 2, in any order.
    """
    needed = np.sort(lengths) - 1

    def shapes_at(spread: float, least: int = 0) -> Shapes:
        return _rounded([_Layout(needed, limit, spread, least)], WIDTH_COST)[0]

    def is_padded(spread: float) -> bool:
        return bool(needed.sum() < (1 - MAX_PADDING) * shapes_at(spread).num_positions)

    spread = _SPREADS[bisect_left(_SPREADS[:-1], True, key=lambda spread: not is_padded(spread))]
    shapes = shapes_at(spread)
    return shapes_at(spread, least=1) if _is_rigid(shapes, needed) else shapes


def _is_rigid(shapes: Shapes, needed: IntArray) -> bool:
    """Whether in most batches no row could stand but their own: few small batches, each with a width of its own."""
    stops = len(needed) - np.concatenate([[0], np.cumsum(shapes.sizes)[:-1]])
    fitting = np.searchsorted(needed, np.array(shapes.widths), side="right")
    return bool(np.count_nonzero(fitting > stops) < len(shapes) / 3)


def eval_shapes(splits: Sequence[IntArray], limit: Limit) -> list[Shapes]:
    """Shapes for rows that are sorted by length, which leaves the least padding; the splits share their widths."""
    return _rounded([_Layout(np.sort(lengths) - 1, limit, None) for lengths in splits], EVAL_WIDTH_COST)


def _rounded(layouts: Sequence[_Layout], width_cost: float) -> list[Shapes]:
    """The layouts' shapes at the widths that are best for all of them together."""
    exact = [layout.shapes() for layout in layouts]
    sizes = np.array([size for shapes in exact for size in shapes.sizes], np.int64)
    needed = np.array([width for shapes in exact for width in shapes.widths], np.int64)
    most = layouts[0].limit.positions if layouts else None
    is_long = needed > (most or needed.max(initial=0))
    # a row that is a batch of its own must not make the others' width more than the limit
    cost = max(width_cost, WIDTH_SHARE * float((sizes * needed).sum()))
    widths = choose_widths(needed[~is_long], sizes[~is_long], width_cost=cost)
    widths += choose_widths(needed[is_long], sizes[is_long], width_cost=cost)
    return [layout.shapes(widths) for layout in layouts]


class _Layout:
    """Rows sorted by length and cut into batches, from the longest down."""

    def __init__(self, needed: IntArray, limit: Limit, spread: float | None, least: int = 0) -> None:
        self.limit = limit
        self._least = least
        self._needed: list[int] = needed.tolist()
        self._spread = spread

    def shapes(self, widths: Sequence[int] | None = None) -> Shapes:
        """With `widths`, each batch has the smallest of them that it fits in."""
        num_short = len(self._needed) % self.limit.rows if self.limit.rows else 0
        found = [self._cut(first, widths) for first in dict.fromkeys((num_short, 0))]
        return min(found, key=lambda shapes: shapes.num_positions)

    def _cut(self, num_first: int, widths: Sequence[int] | None) -> Shapes:
        """`num_first` is how many rows the first batch has, if it is the short one."""
        sizes: list[int] = []
        chosen: list[int] = []
        stop = len(self._needed)
        while stop:
            width = self._width(stop)
            width = width if widths is None else widths[bisect_left(widths, width)]
            size = min(num_first if num_first and not sizes else self.limit.rows_at(width), stop)
            sizes.append(size)
            chosen.append(width)
            stop -= size
        return Shapes(tuple(sizes), tuple(chosen))

    def _width(self, stop: int) -> int:
        """Width of the batch whose longest row is the one before `stop`."""
        needed, longest = self._needed, self._needed[stop - 1]
        if self._spread is None:
            return longest
        size = self.limit.rows_at(longest)
        if size == 1:
            return longest
        reach = bisect_right(needed, (1 + self._spread) * longest)
        # a quarter of a batch at least can change places; from three more batches, rows meet by chance as it is
        reach = min(max(reach, stop + max(size // 4, self._least)), stop + 3 * size, len(needed))
        width = needed[reach - 1]
        most = self.limit.positions
        if most is not None and longest <= most < width:
            width = needed[bisect_right(needed, most) - 1]
        return width


def choose_widths(
    needed: IntArray, num_rows: IntArray, *, max_widths: int = MAX_WIDTHS, width_cost: float = WIDTH_COST
) -> tuple[int, ...]:
    """The widths, rising and at most `max_widths`, that leave the least padding, each width counted as `width_cost`.

    Exact: dynamic programming over the histogram of widths. With c(j) rows that need at most width w(j), the best cost
    of covering the first j widths with k is `best[k, j] = min over i < j of best[k - 1, i] + w(j) (c(j) - c(i))`.

    Args:
        needed: int64 [B]: width that each batch needs.
        num_rows: int64 [B]: rows of each batch.
    """
    if not len(needed):
        return ()
    longest = int(needed.max())
    multiple = -(-longest // _RESOLUTION)
    rounded = np.minimum(-(-needed // multiple) * multiple, longest)
    width, where = np.unique(rounded, return_inverse=True)
    covered = np.concatenate([[0], np.cumsum(np.bincount(where, weights=num_rows))])
    cost = np.where(
        np.arange(len(width) + 1)[:, None] < np.arange(1, len(width) + 1),
        width * (covered[1:] - covered[:, None]),
        np.inf,
    )
    best = np.concatenate([[0.0], cost[0]])
    totals = [best[-1] + width_cost]
    previous: list[IntArray] = []
    for num_widths in range(2, min(max_widths, len(width)) + 1):
        total = best[:, None] + cost
        previous.append(total.argmin(axis=0))
        best = np.concatenate([[0.0], total.min(axis=0)])
        totals.append(best[-1] + num_widths * width_cost)
    return _walk_back(width, previous[: int(np.argmin(totals))])


def _walk_back(width: IntArray, previous: Sequence[IntArray]) -> tuple[int, ...]:
    """The chosen widths: the last one, then at each step the one before it, until none is left to cover."""
    chosen = []
    at = len(width)
    for step in [*reversed(previous), np.zeros(len(width), np.int64)]:
        chosen.append(int(width[at - 1]))
        at = int(step[at - 1])
        if at == 0:
            break
    return tuple(reversed(chosen))
