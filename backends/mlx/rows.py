"""Losses of targets, summed for each row of a batch, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from backends.mlx.loss import Selection
from core.protocols import FILLER_ROW, Batch, FloatArray, IntArray, RowLosses


def per_row(batch: Batch, selection: Selection, losses: mx.array) -> RowLosses:
    """Sums the losses of each row in float64. Waits for the device."""
    values = np.array(losses[: selection.num_targets], np.float64)
    return real(batch.row_ids, *summed_by_row(values, selection.row, len(batch.row_ids)))


def summed_by_row(losses: FloatArray, row: IntArray, num_rows: int) -> tuple[FloatArray, IntArray]:
    """Of each of a batch's rows the sum of its losses, and their number."""
    counts = np.bincount(row, minlength=num_rows).astype(np.int64)
    return np.bincount(row, weights=losses, minlength=num_rows).astype(np.float64), counts


def real(row_ids: IntArray, nll: FloatArray, num_targets: IntArray) -> RowLosses:
    """Without fillers."""
    real = row_ids != FILLER_ROW
    return RowLosses(row_ids[real], nll[real], num_targets[real])


def joined(parts: Sequence[RowLosses]) -> RowLosses:
    if not parts:
        return RowLosses(np.zeros(0, np.int64), np.zeros(0, np.float64), np.zeros(0, np.int64))
    return RowLosses(
        np.concatenate([part.row_ids for part in parts]),
        np.concatenate([part.nll for part in parts]),
        np.concatenate([part.num_targets for part in parts]),
    )
