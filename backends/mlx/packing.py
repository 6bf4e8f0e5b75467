"""The positions of a batch that are computed, one after the other: padding left out, a shared start once.

Norms, projections and MLPs look at one position at a time: they take all positions of all rows as one matrix. Only
attention needs to know where a row begins (`layers.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.protocols import Batch, IntArray

Layout = tuple[int, tuple[tuple[int, int], ...]]
"""How N positions make up rows: the first S are the start of all rows; then, for each group of rows of one length,
(rows, length of each without the start). Plain numbers, so that a compiled function can take it."""

MIN_SPARED = 0.05
"""Share of the positions that a shared start must spare to be taken apart."""
_SHARED_STEP = 16
"""Where functions are compiled for each shape, a shared start's length is a multiple of this: few shapes."""


@dataclass(frozen=True, slots=True)
class Packed:
    """N positions of some rows of a batch."""

    entering: npt.NDArray[np.generic]
    """int32 [N]: tokens; or [N, D]: their `Prefix.states`, float32, float16, or bfloat16's bits as uint16."""
    targets: npt.NDArray[np.int32]
    """int32 [N]"""
    row: IntArray
    """int64 [N]: the position's row in the batch; of the start, the first one that has it."""
    layout: Layout


def pack(batch: Batch, *, rows: IntArray | None = None, by_row: bool, share: bool) -> Packed:
    """Lays out the positions of a batch, or of some of its rows.

    Args:
        rows: indices of rows; None: all.
        by_row: leave out the padding and filler rows: rows have lengths of their own. Otherwise few shapes come out:
            all rows have the batch's width.
        share: take what all rows begin with apart (`Batch.num_shared`), if that spares enough.
    """
    is_token = batch.is_token
    width = batch.inputs.shape[1]
    lengths = is_token.sum(axis=1) if by_row else np.full(len(is_token), width)
    kept = np.arange(len(lengths)) if rows is None else rows
    if by_row and lengths[kept].any():
        kept = kept[lengths[kept] > 0]
    shared = _num_shared(batch, kept, int(lengths[kept].sum()), by_row=by_row) if share else 0
    # The start is read where it is real: a filler, whatever it holds, never lends it to the others.
    source = kept[is_token[kept].any(axis=1).argmax()]
    index = [source * width + np.arange(shared)]
    index += [row * width + np.arange(shared, max(lengths[row], 1)) for row in kept]
    flat = np.concatenate(index)
    if by_row:
        groups = tuple((1, max(int(lengths[row]), 1) - shared) for row in kept)
    else:
        groups = ((len(kept), width - shared),)
    entering = batch.inputs if batch.prefix is None else batch.prefix.states
    return Packed(
        entering=np.ascontiguousarray(entering.reshape(len(is_token) * width, *entering.shape[2:])[flat]),
        targets=batch.targets.reshape(-1)[flat],
        row=flat // width,
        layout=(shared, groups),
    )


def _num_shared(batch: Batch, rows: IntArray, num_positions: int, *, by_row: bool) -> int:
    part = Batch(batch.row_ids[rows], batch.inputs[rows], batch.targets[rows])
    shared = part.num_shared
    if not by_row:
        shared -= shared % _SHARED_STEP
    return shared if (len(rows) - 1) * shared >= MIN_SPARED * num_positions else 0
