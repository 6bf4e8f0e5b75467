"""Dropout of what enters an adapter (Srivastava et al. 2014, JMLR 15:1929).

On a CPU torch draws a float for each element, on one thread, from the process's one generator: with a rate of 0.05
that takes longer than the 576 x 576 product that the adapter stands beside, and threads would get whatever masks their
turn brings. Here an element takes a byte of a generator's output, and a mask is a function of the run's seed, the step,
the micro-batch, the row and the module. However a batch is cut, and when a layer is computed a second time
(checkpointing, streaming), a row has the same masks. The start that all rows of a micro-batch share is there once, and
so is its mask: for each row by itself masks are distributed as ever, and so the gradient has the same expectation.

On a GPU, where torch's is one pass over the elements, it is used, and draws from the device's generator.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from backends.cuda.layout import SHARED_START
from backends.cuda.memory import GPU

_LEVELS = 256
"""Of a byte."""
_MOST = (_LEVELS - 1) / _LEVELS
"""The highest rate that a byte can draw."""
_STRIDE = 2**40
"""Numbers between the beginnings of two rows' streams: more than any row needs."""
_of_thread = threading.local()


@dataclass(frozen=True, eq=False)
class Masks:
    """All masks of a micro-batch, or of some of its rows."""

    seed: int
    """Of the micro-batch."""
    extents: Sequence[tuple[int, int]]
    """`backends.cuda.layout.Flat.extents`"""

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within it, in this thread, dropout has these masks. A backward pass belongs inside: it may compute again."""
        before = getattr(_of_thread, "masks", None)
        _of_thread.masks = self
        try:
            yield
        finally:
            _of_thread.masks = before

    def draw(self, x: torch.Tensor, rate: float, place: int, *, expert: int | None = None) -> Mask:
        """The mask of `x`, [..., in], in the module at `place`.

        Args:
            expert: `x` are the tokens that were routed to it, which are in no row's order.
        """
        width, count = x.shape[-1], x[..., 0].numel()
        extents = self.extents if expert is None else [(0, count)]
        assert sum(length for _, length in extents) == count, "masks of another layout"
        numbers = -(-width // 8) + 1  # of 8 bytes each; the last one is for the position's threshold
        drawn = np.empty((count, numbers), np.uint64)
        bits = np.random.PCG64((self.seed, place, 0 if expert is None else expert + 1))
        start = at = 0
        for row_id, length in extents:
            beginning = (row_id - SHARED_START) * _STRIDE
            bits.advance(beginning - at)
            drawn[start : start + length] = bits.random_raw(length * numbers).reshape(length, numbers)
            start, at = start + length, beginning + length * numbers
        return Mask(torch.from_numpy(drawn.view(np.uint8))[:, :width], _thresholds(drawn[:, -1], rate), _used(rate))


@dataclass(frozen=True, eq=False)
class Mask:
    """Which elements of [N, in] are dropped."""

    bytes: torch.Tensor
    """uint8 [N, in]"""
    thresholds: torch.Tensor
    """uint8 [N, 1]: an element is dropped if its byte is less."""
    rate: float

    @property
    def scale(self) -> float:
        """What makes up for the elements that are dropped."""
        return 1.0 / (1.0 - self.rate)

    def factors(self, like: torch.Tensor) -> torch.Tensor:
        """[N, in] in the type of `like`: 0 where dropped, else 1."""
        # a comparison into a float array is one vectorised pass; a bool array would take another to become one
        return torch.ge(self.bytes, self.thresholds, out=torch.empty(self.bytes.shape, dtype=like.dtype))

    def keep(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows`, [N, in], with 0 for what is dropped; not scaled."""
        return self.factors(rows).mul_(rows)


def dropout(x: torch.Tensor, rate: float, place: int, *, expert: int | None = None) -> torch.Tensor:
    """`x`, [..., in], with 0 for what is dropped, and the rest scaled so that the expectation stays.

    Args:
        place: of the module; see `Masks.draw`.
    """
    if x.device.type == GPU:
        return F.dropout(x, rate)
    found: torch.Tensor = _Dropout.apply(x, draw(x, rate, place, expert=expert))
    return found


def draw(x: torch.Tensor, rate: float, place: int, *, expert: int | None = None) -> Mask:
    """From the masks that this thread uses; see `Masks.draw`."""
    masks: Masks | None = getattr(_of_thread, "masks", None)
    assert masks is not None, "dropout outside a training step"
    return masks.draw(x, rate, place, expert=expert)


class _Dropout(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: Mask) -> torch.Tensor:
        ctx.mask = mask
        return _scaled(x, mask)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scaled(gradient, ctx.mask), None


def _scaled(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    return mask.keep(x.reshape(-1, x.shape[-1])).mul_(mask.scale).view(x.shape)


def _used(rate: float) -> float:
    return min(rate, _MOST)


def _thresholds(drawn: np.ndarray, rate: float) -> torch.Tensor:
    """uint8 [N, 1] from a number for each position. Bytes have 256 levels: where the rate lies between two, as many
    positions take the upper one as make it the rate of each element, the threshold's draw included."""
    lower, share = divmod(_used(rate) * _LEVELS, 1.0)
    return torch.from_numpy((lower + (drawn < share * 2.0**64)).astype(np.uint8))[:, None]
