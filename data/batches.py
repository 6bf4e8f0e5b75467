"""Token rows -> batches of a few widths.

Every row comes exactly once an epoch, and none is dropped. Order and grouping are a function of (seed, epoch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from core.protocols import IGNORE, Batch, IntArray
from core.seeding import generator
from data.shapes import Shapes
from data.token_rows import BoolArray as BoolArray
from data.token_rows import TokenRows as TokenRows


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """Batches as a plan; a batch's arrays are made when it is asked for."""

    rows: TokenRows
    groups: tuple[IntArray, ...]
    """Positions in `rows` of each batch's rows."""
    widths: tuple[int, ...]
    """Width of each batch: T, one less than the tokens that fit."""

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Batches: ...

    def __getitem__(self, index: int | slice) -> Batch | Batches:
        if isinstance(index, slice):
            return Batches(self.rows, self.groups[index], self.widths[index])
        return _batch(self.rows, self.groups[index], self.widths[index])


def _batch(rows: TokenRows, group: IntArray, width: int) -> Batch:
    inputs = np.zeros((len(group), width), np.int32)  # the padding's value does not matter
    targets = np.full((len(group), width), IGNORE, np.int32)
    for position, index in enumerate(group):
        ids, is_target = rows.ids[index], rows.is_target[index]
        inputs[position, : len(ids) - 1] = ids[:-1]
        targets[position, : len(ids) - 1] = np.where(is_target[1:], ids[1:], IGNORE)
    return Batch(rows.row_ids[group], inputs, targets)


def epoch_batches(rows: TokenRows, shapes: Shapes, *, seed: int, epoch: int) -> Batches:
    """The training batches of an epoch, of the given shapes; (seed, epoch) decides which rows meet, and the order.

    `shapes` is what `train_shapes` gave for the rows' lengths.
    """
    random = generator(seed, "order", epoch)
    groups = _fill(rows, shapes, random)
    order = random.permutation(len(groups))
    return Batches(rows, tuple(groups[index] for index in order), tuple(shapes.widths[index] for index in order))


def eval_batches(rows: TokenRows, shapes: Shapes) -> Batches:
    """Every row once, in a fixed order: the widest batches first, so that memory runs out at once or not at all.

    `shapes` is what `eval_shapes` gave for the rows' lengths.
    """
    return Batches(rows, tuple(_fill(rows, shapes, None)), shapes.widths)


def _fill(rows: TokenRows, shapes: Shapes, random: np.random.Generator | None) -> list[IntArray]:
    """Rows for each batch: from the narrowest up, any of those that fit and are not taken yet, or the shortest.

    Rows left over fit in what is wider, so whatever is drawn, all find a place.
    """
    assert sum(shapes.sizes) == len(rows)
    widths = np.array(shapes.widths, np.int64)
    rising = np.argsort(rows.lengths, kind="stable")
    groups = [rising[:0]] * len(shapes)
    waiting, start = rising[:0], 0
    for width in np.unique(widths):
        stop = int(np.searchsorted(rows.lengths[rising], width + 1, side="right"))
        waiting = np.concatenate([waiting, rising[start:stop]])
        waiting = waiting if random is None else random.permutation(waiting)
        start = stop
        for index in np.flatnonzero(widths == width)[::-1]:
            groups[index], waiting = np.split(waiting, [shapes.sizes[index]])
            assert len(groups[index]) == shapes.sizes[index]
    return groups


def padding_share(batches: Batches) -> float:
    """Share of the batches' positions that hold no token, from 0 to 1."""
    num_needed = int((batches.rows.lengths[np.concatenate(batches.groups)] - 1).sum()) if batches.groups else 0
    num_positions = sum(len(group) * width for group, width in zip(batches.groups, batches.widths, strict=True))
    return 1.0 - num_needed / num_positions if num_positions else 0.0
