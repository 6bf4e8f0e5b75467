"""Dropout of what enters an adapter (Srivastava et al. 2014, JMLR 15:1929).

On a CPU torch draws a float for each element, on one thread, from the process's one generator: with a rate of 0.05
that takes longer than the 576 x 576 product that the adapter stands beside, and threads would get whatever masks their
turn brings. Here an element takes a byte of a generator's output, and a mask is a function of the run's seed, the step,
the micro-batch, the row and the module. However a batch is cut, and when a layer is computed a second time
(checkpointing, streaming), a row has the same masks. Tokens that are in no row's order, such as those that a router
sends to an expert, are drawn for as they come. The start that all rows of a micro-batch share is there once, and so is
its mask: for each row by itself masks are distributed as ever, and so the gradient has the same expectation.

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
from core.seeding import stable_hash

_LEVELS = 256
"""Of a byte."""
_BETWEEN_ROWS = 0x9E3779B97F4A7C15F39CC0605CEDC835
"""Numbers between the beginnings of two rows' streams: 2**128 over the golden ratio, as in NumPy's `jumped`. Streams a
power of two apart would share the low bits of PCG64's state."""
_PERIOD = 2**128
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
        """Within it this thread draws from these masks. A backward pass belongs inside: it may compute again."""
        before = getattr(_of_thread, "masks", None)
        _of_thread.masks = self
        try:
            yield
        finally:
            _of_thread.masks = before

    def draw(self, x: torch.Tensor, rate: float, module: str, *, expert: int | None = None) -> Mask:
        """The mask of what enters a module, [..., in].

        Args:
            module: its name.
            expert: `x` are the tokens that were routed to it, which are in no row's order.
        """
        width, count = x.shape[-1], x[..., 0].numel()
        extents = self.extents
        if expert is not None or sum(length for _, length in extents) != count:  # a model of its own code may repack
            extents = [(0, count)]
        numbers = -(-width // 8) + 1  # of 8 bytes each; the last one is for the position's threshold
        drawn = np.empty((count, numbers), np.uint64)
        bits = np.random.PCG64(stable_hash(self.seed, module, expert))
        start = at = 0
        for row_id, length in extents:
            beginning = (row_id - SHARED_START) * _BETWEEN_ROWS
            bits.advance((beginning - at) % _PERIOD)
            drawn[start : start + length] = bits.random_raw(length * numbers).reshape(length, numbers)
            start, at = start + length, beginning + length * numbers
        return Mask(torch.from_numpy(drawn.view(np.uint8))[:, :width], _thresholds(drawn[:, -1], rate))


@dataclass(frozen=True, eq=False)
class Mask:
    """Which elements of [N, in] are dropped."""

    levels: torch.Tensor
    """uint8 [N, in]"""
    thresholds: torch.Tensor
    """uint8 or int16 [N, 1]: an element is dropped if its level is less."""

    def factors(self, like: torch.Tensor) -> torch.Tensor:
        """[N, in] in the type of `like`: 0 where dropped, else 1."""
        # a comparison into a float array is one vectorised pass; a bool array would take another to become one
        return torch.ge(self.levels, self.thresholds, out=torch.empty(self.levels.shape, dtype=like.dtype))

    def keep(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows`, [N, in], with 0 for what is dropped; not scaled."""
        return self.factors(rows).mul_(rows)


def drop(x: torch.Tensor, rate: float, module: str, *, training: bool, expert: int | None = None) -> torch.Tensor:
    """`x`, [..., in]; in training with 0 for what is dropped, and the rest over 1 - `rate`: the expectation stays.

    Args:
        module, expert: see `Masks.draw`.
    """
    if not training or rate == 0.0:
        return x
    if x.device.type == GPU:
        return F.dropout(x, rate)
    mask = draw(x, rate, module, expert=expert)
    found: torch.Tensor = _Drop.apply(x, 1.0 / (1.0 - rate), mask.levels, mask.thresholds)
    return found


def draw(x: torch.Tensor, rate: float, module: str, *, expert: int | None = None) -> Mask:
    """From the masks that this thread uses; see `Masks.draw`."""
    masks: Masks | None = getattr(_of_thread, "masks", None)
    assert masks is not None, "dropout outside a training step"
    return masks.draw(x, rate, module, expert=expert)


class _Drop(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float, *mask: torch.Tensor) -> torch.Tensor:
        ctx.scale = scale
        ctx.save_for_backward(*mask)  # and nowhere else: checkpointing forgets what is saved, and draws it again
        return _kept(x, scale, Mask(*mask))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _kept(gradient, ctx.scale, Mask(*ctx.saved_tensors)), None, None, None


def _kept(x: torch.Tensor, scale: float, mask: Mask) -> torch.Tensor:
    return mask.keep(x.reshape(-1, x.shape[-1])).mul_(scale).view(x.shape)


def _thresholds(drawn: np.ndarray, rate: float) -> torch.Tensor:
    """[N, 1] from a number for each position. Bytes have 256 levels: where the rate lies between two, as many positions
    take the upper one as make it the rate of each element, the threshold's draw included."""
    lower, share = divmod(rate * _LEVELS, 1.0)
    dtype = np.uint8 if lower < _LEVELS - 1 else np.int16  # the upper one may be 256
    return torch.from_numpy((lower + (drawn < share * 2.0**64)).astype(dtype))[:, None]
