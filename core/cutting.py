"""Batches cut by rows, for as many cores, and put together again: on a CPU each part is computed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from core.protocols import IGNORE, Batch, IntArray, Prefix


def cut(batch: Batch, num_parts: int, *, target_cost: float) -> list[IntArray]:
    """The batch's rows, fillers left out, in at most `num_parts` parts that take about as long as each other.

    The costliest row comes first, and each one goes where least is waiting (Graham's LPT rule); within a part rows stay
    in the batch's order. A function of the batch's shape alone, so a run that is resumed cuts alike.

    Args:
        target_cost: what a target adds to a position's cost of 1.
    """
    costs = batch.is_token.sum(axis=1) + target_cost * (batch.targets != IGNORE).sum(axis=1)
    rows = np.flatnonzero(costs)
    parts: list[list[int]] = [[] for _ in range(max(1, min(num_parts, len(rows))))]
    waiting = np.zeros(len(parts))
    for row in rows[np.argsort(-costs[rows], kind="stable")]:
        least = int(waiting.argmin())
        parts[least].append(int(row))
        waiting[least] += costs[row]
    return [np.array(sorted(part), np.int64) for part in parts]


def target_cost(sizes: Any, *, num_layers: int) -> float:
    """Multiply-adds that a target adds, over those that every position takes in so many dense layers; roughly.

    Args:
        sizes: what holds `vocab_size`, `hidden_size` and `intermediate_size`, named as in `config.json`.
    """
    return float(sizes.vocab_size / (num_layers * (2 * sizes.hidden_size + 3 * sizes.intermediate_size)))


def take(batch: Batch, rows: IntArray) -> Batch:
    """Some rows of a batch, int64 [R], in this order. A mixture's routing, which is a batch's, is lost."""
    prefix = batch.prefix and Prefix(batch.prefix.states[rows])
    return Batch(batch.row_ids[rows], batch.inputs[rows], batch.targets[rows], prefix)


def together(batches: Sequence[Batch]) -> Batch:
    """All rows as one batch; either all have a prefix, or none. A mixture's routing, which is a batch's, is lost."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch.inputs.shape[1] for batch in batches)
    prefixes = [batch.prefix.states for batch in batches if batch.prefix is not None]
    return Batch(
        np.concatenate([batch.row_ids for batch in batches]),
        _stacked([batch.inputs for batch in batches], width, fill=0),
        _stacked([batch.targets for batch in batches], width, fill=IGNORE),
        Prefix(_stacked(prefixes, width, fill=0)) if prefixes else None,
    )


def _stacked(arrays: Sequence[npt.NDArray[Any]], width: int, *, fill: int) -> npt.NDArray[Any]:
    """[rows, T, ...] each, made `width` wide, one below the other."""
    return np.concatenate(
        [
            np.pad(array, [(0, 0), (0, width - array.shape[1]), *[(0, 0)] * (array.ndim - 2)], constant_values=fill)
            for array in arrays
        ]
    )
