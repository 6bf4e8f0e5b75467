"""Independent pieces of work side by side on a CPU's cores: rows to be filled in, batches to be evaluated, the parts of
a batch to be trained on.

torch would spread each operation over the cores and wait for the slowest after each. A thread for each piece, which
keeps its operations to itself, waits for nobody: narrow products and elementwise passes run at full speed on all cores,
and a core that another program takes away stops one piece and not all of them. A GPU has one queue: there, one piece
comes after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from backends.cuda.memory import GPU
from core.cutting import cut, take
from core.protocols import IGNORE, Batch, IntArray

Piece = TypeVar("Piece")
Done = TypeVar("Done")

MOST = 8
"""Pieces at a time: each holds its activations."""
MOST_PARTS = 4
"""Of a batch that is trained on: each part holds a gradient of the whole adapter for a moment."""
MOST_UNPACKING = 2
"""The same with 4-bit weights, which each part unpacks for itself."""
SERIAL = 0.15
"""Share of a batch's time that more cores don't shorten when its operations are spread over them (Amdahl 1967): two
cores take 1.1 to 1.2 times half of what one takes."""


class Workers:
    """As many threads as there are cores for torch; none on a GPU, or where one core is all there is."""

    def __init__(
        self, device: torch.device, *, mode: Callable[[], AbstractContextManager[None]], alone: bool = False
    ) -> None:
        """What is new:

        Args:
            mode: autocast, say, which is a matter of the thread.
            alone: the model changes as it runs, so that there may be one piece at a time only.
        """
        self.mode = mode
        self.num_cores = torch.get_num_threads()
        self._cores_each = -(-self.num_cores // MOST)
        self.num_threads = 1 if alone or device.type == GPU else max(self.num_cores // self._cores_each, 1)
        """Pieces at a time."""
        self._pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Piece], Done], pieces: Iterable[Piece]) -> Generator[Done, None, None]:
        """What `function` makes of each piece in the mode and without gradients, in order; a few pieces are asked for
        ahead of time.

        When one fails, no more are asked for, and its error is raised once those under way have ended.
        """

        def work(piece: Piece) -> Done:
            with torch.no_grad(), self.mode():
                return function(piece)

        if self.num_threads == 1:
            yield from map(work, pieces)
        else:
            yield from self._in_order(work, pieces, cores=self._cores_each)

    def spread(self, function: Callable[[Piece], Done], pieces: Sequence[Piece]) -> list[Done]:
        """What `function` makes of each piece, in order, all at the same time; the cores are divided among them. With
        gradients if the caller's thread has them; the mode is for `function` to enter.

        When one fails, its error is raised once those under way have ended.

        Args:
            pieces: no more than `num_threads`.
        """
        assert len(pieces) <= self.num_threads, "more pieces than threads"
        if len(pieces) == 1:
            return [function(pieces[0])]
        with_gradients = torch.is_grad_enabled()

        def work(piece: Piece) -> Done:
            with torch.set_grad_enabled(with_gradients):
                return function(piece)

        return list(self._in_order(work, pieces, cores=self.num_cores // len(pieces)))

    def _in_order(
        self, work: Callable[[Piece], Done], pieces: Iterable[Piece], *, cores: int
    ) -> Generator[Done, None, None]:
        """What becomes of each piece, in order, with so many cores for each.

        One piece more is asked for than is worked on, so that no thread waits for this one. When one fails, or the
        generator is closed, no more are asked for, and those under way are waited for.
        """

        def on_cores(piece: Piece) -> Done:
            torch.set_num_threads(cores)  # of this thread, and of threads that torch has not seen yet
            return work(piece)

        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.num_threads)  # kept: steps come by the thousand
        waiting: deque[Future[Done]] = deque()
        try:
            for piece in pieces:
                waiting.append(self._pool.submit(on_cores, piece))
                if len(waiting) > self.num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            # the threads, not the results known here: an interrupt may have come before a piece was noted
            self.close()
            raise

    def close(self) -> None:
        """Waits for what is under way, and ends the threads; the next pieces start others."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def last_ones_in_parts(batches: Iterable[Batch], *, at_once: int) -> Iterator[Batch]:
    """The batches in their order, rows too; the last few, if they are fewer than are computed at once, in parts.

    So nothing waits for a whole batch that is computed alone. With another number of threads a row is beside others,
    which may change its last bit.
    """
    num_all, kept = 0, deque[Batch]()
    for batch in batches:
        num_all += 1
        kept.append(batch)
        if len(kept) == at_once:
            yield kept.popleft()
    num_last = num_all % at_once
    while len(kept) > num_last:
        yield kept.popleft()
    for batch in kept:
        yield from _parts(batch, at_once // num_last)


def _parts(batch: Batch, number: int) -> Iterator[Batch]:
    assert batch.prefix is None or batch.prefix.routed is None, "what a mixture's rows routed is known together only"
    ends = np.linspace(0, len(batch.row_ids), min(number, len(batch.row_ids)) + 1).round().astype(int)
    for start, end in pairwise(ends):
        yield take(batch, np.arange(start, end))


def even_parts(batch: Batch, *, most: int, cores: int, target_cost: float) -> list[Batch]:
    """The rows with targets in parts that take about as long as each other, for as many threads; in one where more
    would take longer: what all rows begin with is computed in each part, and all wait for the costliest.

    Args:
        most: parts at most.
        cores: divided among the parts.
        target_cost: see `core.cutting.cut`.
    """
    if most == 1:
        return [batch]
    lengths, num_shared = batch.is_token.sum(axis=1), batch.num_shared
    targets = (batch.targets != IGNORE).sum(axis=1)

    def duration(rows: Sequence[IntArray]) -> float:
        """Of the costliest part, in what a position takes one core."""
        costs = [
            lengths[some].sum() - (len(some) - 1) * num_shared + target_cost * targets[some].sum() for some in rows
        ]
        each = cores // len(rows)
        return float(max(costs)) * ((1 - SERIAL) / each + SERIAL)

    cuts = [cut(batch, number, target_cost=target_cost) for number in range(most, 0, -1)]
    best = min(cuts, key=duration)
    return [take(batch, rows) for rows in best] if len(best) > 1 else [batch]
