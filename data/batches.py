"""Token rows -> batches of a few widths.

Every row comes exactly once an epoch, and none is dropped. The order is a function of (seed, epoch).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

from core.protocols import IGNORE, Batch, IntArray, TokenArray
from core.seeding import generator

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TokenRows:
    """The rows of a split. `is_target[i][t]` says whether token `t` of row `i` is to be predicted; token 0 never is."""

    ids: list[TokenArray]
    """int32 [num_tokens] each"""
    is_target: list[BoolArray]
    """bool [num_tokens] each"""
    origin: list[str]
    """`train.jsonl:17`"""
    row_ids: IntArray
    """int64 [N]: index of each row in its split; a selection keeps them."""

    @classmethod
    def of(cls, ids: list[TokenArray], is_target: list[BoolArray], origin: list[str]) -> TokenRows:
        return cls(ids, is_target, origin, np.arange(len(ids), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> IntArray:
        """int64 [N]: tokens of each row."""
        return np.fromiter((len(row) for row in self.ids), np.int64, len(self.ids))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def num_targets(self) -> int:
        return sum(int(np.count_nonzero(row)) for row in self.is_target)

    def select(self, indices: Iterable[int]) -> TokenRows:
        """Some of the rows, which keep their row ids."""
        chosen = np.fromiter(indices, np.int64)
        return TokenRows(
            [self.ids[index] for index in chosen],
            [self.is_target[index] for index in chosen],
            [self.origin[index] for index in chosen],
            self.row_ids[chosen],
        )

    def renumbered(self) -> TokenRows:
        """The same rows as a split of their own."""
        return TokenRows.of(self.ids, self.is_target, self.origin)


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


def epoch_batches(rows: TokenRows, *, batch_size: int, seed: int, epoch: int, widths: Sequence[int]) -> Batches:
    """The training batches of an epoch, in an order that (seed, epoch) decides.

    Rows are shuffled and grouped by padded width. What does not fill a batch moves up to the next width, so that at
    most one batch of the epoch is short. `widths` is what `choose_widths` gave for rows at least as long.
    """
    random = generator(seed, "order", epoch)
    groups = _fill(rows, random.permutation(len(rows)), batch_size, widths)
    order = random.permutation(len(groups))
    return _plan(rows, [groups[index] for index in order], widths)


def eval_batches(rows: TokenRows, *, batch_size: int, widths: Sequence[int]) -> Batches:
    """Every row once, in a fixed order: the widest batches first, so that memory runs out at once or not at all."""
    groups = _fill(rows, np.arange(len(rows)), batch_size, widths)
    return _plan(rows, groups[::-1], widths)


def _fill(rows: TokenRows, order: IntArray, batch_size: int, widths: Sequence[int]) -> list[IntArray]:
    """Cuts the rows, in `order` within a width, into groups of `batch_size`; the last may be smaller."""
    assert len(rows) == 0 or rows.lengths.max() - 1 <= max(widths)
    bucket = np.searchsorted(np.sort(widths), rows.lengths[order] - 1)
    groups: list[IntArray] = []
    left_over = order[:0]
    for index in range(len(widths)):
        members = np.concatenate([left_over, order[bucket == index]])
        num_full = len(members) // batch_size * batch_size
        groups += np.split(members[:num_full], num_full // batch_size) if num_full else []
        left_over = members[num_full:]
    return [*groups, left_over] if len(left_over) else groups


def _plan(rows: TokenRows, groups: Sequence[IntArray], widths: Sequence[int]) -> Batches:
    """Each group at the smallest width that holds its longest row."""
    rising = sorted(widths)
    longest = [int(rows.lengths[group].max()) - 1 for group in groups]
    return Batches(rows, tuple(groups), tuple(rising[bisect_left(rising, length)] for length in longest))


def padding_share(batches: Iterable[Batch], rows: TokenRows) -> float:
    """Share of the positions of an epoch's batches over `rows` that hold no token, from 0 to 1."""
    num_computed = sum(batch.num_tokens for batch in batches)
    return 1.0 - (rows.num_tokens - len(rows)) / num_computed if num_computed else 0.0


def choose_widths(*rows: TokenRows, max_widths: int = 8, multiple: int = 8) -> tuple[int, ...]:
    """The at most `max_widths` widths (multiples of `multiple`, rising) that leave the least padding in all of `rows`.

    Exact: dynamic programming over the histogram of lengths. With c(j) rows of at most width w(j), the best cost of
    covering the first j widths with k of them is `best[k, j] = min over i < j of best[k - 1, i] + w(j) (c(j) - c(i))`.
    """
    lengths = np.concatenate([part.lengths for part in rows]) - 1
    rounded = -(-lengths // multiple) * multiple
    width, num_rows = np.unique(rounded, return_counts=True)
    if not len(width):
        return ()
    covered = np.concatenate([[0], np.cumsum(num_rows)])
    num_widths = min(max_widths, len(width))
    # cost[i, j]: positions that are computed for the rows after the first i widths, padded to the j-th; i < j
    cost = np.where(
        np.arange(len(width) + 1)[:, None] < np.arange(1, len(width) + 1),
        width * (covered[1:] - covered[:, None]),
        np.inf,
    )
    best = np.concatenate([[0.0], cost[0]])
    previous = []
    for _ in range(num_widths - 1):
        total = best[:, None] + cost
        previous.append(total.argmin(axis=0))
        best = np.concatenate([[0.0], total.min(axis=0)])
    return _walk_back(width, previous)


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
