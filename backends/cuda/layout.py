"""A batch end to end: every position once, none of padding, and the start that all rows have in common only once.

All parts of a decoder but attention treat a position by itself. They get the batch as one row of N positions; attention
alone puts them back into rows, where a shared start stands in each of them.

    B rows of T, S shared:     start | row 0's rest | row 1's rest | …       N = S + sum of (length - S)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from core.protocols import IGNORE, Batch, IntArray, TokenArray

SHARED_START = -2
"""Stands where a row id would; no row has it."""


@dataclass(eq=False)
class Layout:
    """Where the N flat positions are in the rows, and the rows' positions among the flat ones.

    It reaches attention as an argument that the decoder and its layers hand on. Without it the batch would be taken for
    one long row, and nothing would look wrong: so it counts how often it was asked.
    """

    num_rows: int
    """B: rows with tokens."""
    width: int
    """T: tokens of the longest row."""
    num_shared: int
    """S"""
    places: torch.Tensor
    """int64 [N]: of each flat position, its place in the flattened [B, T]; of the start the first row's."""
    sources: torch.Tensor
    """int64 [B * T]: of each place, the flat position that it has its states from. Padding has some or other, which is
    never looked at: it comes after the row's tokens."""
    position_ids: torch.Tensor
    """int64 [1, N]: position in the row."""
    num_uses: int = 0
    """Layers whose attention has put the positions back into rows."""

    def to_rows(self, states: torch.Tensor) -> torch.Tensor:
        """[1, heads, N, size] -> [B, heads, T, size]"""
        flat = states[0].transpose(0, 1)
        rows: torch.Tensor = _ToRows.apply(flat.flatten(1), self)
        return rows.view(self.num_rows, self.width, *flat.shape[1:]).transpose(1, 2)

    def from_rows(self, states: torch.Tensor) -> torch.Tensor:
        """[B, T, heads, size] -> [1, N, heads, size]"""
        flat: torch.Tensor = _FromRows.apply(states.flatten(2).flatten(0, 1), self)
        return flat.view(1, -1, *states.shape[2:])


class _ToRows(torch.autograd.Function):  # type: ignore[misc]
    """[N, size] -> [B * T, size]. The gradients of a shared start are added up row after row: autograd's own indexed
    addition adds in any order on a GPU."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return flat.index_select(0, layout.sources)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout, (gradient,) = ctx.layout, gradients
        flat = gradient.index_select(0, layout.places)
        if layout.num_shared:
            rows = gradient.view(layout.num_rows, layout.width, -1)
            flat[: layout.num_shared] = rows[:, : layout.num_shared].sum(0)
        return flat, None


class _FromRows(torch.autograd.Function):  # type: ignore[misc]
    """[B * T, size] -> [N, size]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return rows.index_select(0, layout.places)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout, (gradient,) = ctx.layout, gradients
        rows = gradient.new_zeros(layout.num_rows * layout.width, gradient.shape[1])
        return rows.index_copy_(0, layout.places, gradient), None


@dataclass(frozen=True, eq=False)
class Flat:
    """Which positions of a batch the decoder gets, and where its targets are among them."""

    shape: tuple[int, int]
    """Rows and positions that the decoder sees: (1, N), or (B, T) of a batch that is left as it is."""
    places: IntArray | None
    """int64 [N]: of each of these positions, its place in the flattened batch; None: the batch as it is."""
    targets: IntArray
    """int64 [targets]: of each target, in the order of the flattened batch, its position among them."""
    extents: Sequence[tuple[int, int]]
    """One after the other, what the positions belong to, a row id or `SHARED_START`, and how many there are of it."""
    layout: Layout | None = None
    """What attention needs to know; None where the rows are rows already."""

    @property
    def options(self) -> dict[str, Any]:
        """For transformers' decoder."""
        return {} if self.layout is None else {"layout": self.layout, "position_ids": self.layout.position_ids}

    def tokens(self, batch: Batch) -> TokenArray:
        """int32, of `shape`: what the decoder's positions hold."""
        return batch.inputs if self.places is None else batch.inputs.reshape(-1)[self.places].reshape(self.shape)

    def states(self, states: torch.Tensor) -> torch.Tensor:
        """[B, T, hidden] -> [*shape, hidden], on the host."""
        if self.places is None:
            return states
        return states.flatten(0, 1)[torch.from_numpy(self.places)].unflatten(0, self.shape)


def as_it_is(batch: Batch) -> Flat:
    """A batch with its padding and fillers, as a mixture's routers are counted over."""
    return Flat(
        shape=batch.inputs.shape,
        places=None,
        targets=np.flatnonzero(batch.targets.reshape(-1) != IGNORE),
        extents=[(int(row_id), batch.inputs.shape[1]) for row_id in batch.row_ids],
    )


def flatten(batch: Batch, *, send: Callable[[np.ndarray], torch.Tensor], num_shared: int) -> Flat:
    """Lays a batch end to end.

    Args:
        send: an array to int64 on the device.
        num_shared: length of the start that all rows have in common, which is taken once; less where the batch is a
            part of one that has less in common.
    """
    is_token = batch.is_token
    rows = np.flatnonzero(is_token.any(axis=1))
    lengths = is_token[rows].sum(axis=1)
    assert num_shared < lengths.min(), "a row without a position of its own"
    width = int(lengths.max())
    is_taken = np.arange(width) < lengths[:, None]
    is_taken[1:, :num_shared] = False
    in_rows, in_columns = np.nonzero(is_taken)
    sources = np.zeros(is_taken.shape, np.int64)
    sources[is_taken] = np.arange(len(in_rows))
    sources[1:, :num_shared] = sources[0, :num_shared]
    target_rows, target_columns = np.nonzero(batch.targets[rows] != IGNORE)
    layout = None
    if len(rows) > 1:
        layout = Layout(
            num_rows=len(rows),
            width=width,
            num_shared=num_shared,
            places=send(in_rows * width + in_columns),
            sources=send(sources.reshape(-1)),
            position_ids=send(in_columns[None]),
        )
    return Flat(
        shape=(1, len(in_rows)),
        places=rows[in_rows] * batch.inputs.shape[1] + in_columns,
        targets=sources[target_rows, target_columns],
        extents=[
            (SHARED_START, num_shared),
            *zip(batch.row_ids[rows].tolist(), (lengths - num_shared).tolist(), strict=True),
        ],
        layout=layout,
    )
