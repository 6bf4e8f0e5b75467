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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from backends.cuda.memory import GPU
from core.cutting import cut, take
from core.protocols import Batch

Piece = TypeVar("Piece")
Done = TypeVar("Done")

MOST = 8
"""Pieces at a time: each holds its activations."""
MOST_REPEATED = 0.1
"""Share of a batch's positions that its parts may compute again."""


class Workers:
    """As many threads as there are cores for torch; none on a GPU, or where one core is all there is."""

    def __init__(
        self, device: torch.device, *, mode: Callable[[], AbstractContextManager[None]], alone: bool = False
    ) -> None:
        """What is new:

        Args:
            mode: entered around each piece: autocast, say, is a matter of the thread.
            alone: the model changes as it runs, so that there may be one piece at a time only.
        """
        self._mode = mode
        self._cores = torch.get_num_threads()
        self._cores_each = -(-self._cores // MOST)
        self.num_threads = 1 if alone or device.type == GPU else max(self._cores // self._cores_each, 1)
        """Pieces at a time."""
        self._pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Piece], Done], pieces: Iterable[Piece]) -> Generator[Done, None, None]:
        """What `function` makes of each piece without gradients, in order; a few pieces are asked for ahead of time.

        When one fails, no more are asked for, and its error is raised once those under way have ended.
        """
        if self.num_threads == 1:
            for piece in pieces:
                with torch.no_grad(), self._mode():
                    done = function(piece)
                yield done
            return

        def work(piece: Piece) -> Done:
            with torch.no_grad(), self._mode():
                return function(piece)

        with ThreadPoolExecutor(
            self.num_threads, initializer=torch.set_num_threads, initargs=(self._cores_each,)
        ) as pool:
            yield from _in_order(lambda piece: pool.submit(work, piece), pieces, at_once=self.num_threads)

    def at_once(self, function: Callable[[Piece], Done], pieces: Sequence[Piece]) -> list[Done]:
        """What `function` makes of each piece, in order, all at the same time; the cores are divided among them. With
        gradients, if the caller's thread has them.

        When one fails, its error is raised once those under way have ended.

        Args:
            pieces: no more than `num_threads`.
        """
        assert len(pieces) <= self.num_threads, "more pieces than threads"
        if len(pieces) == 1:
            with self._mode():
                return [function(pieces[0])]
        cores, gradients = self._cores // len(pieces), torch.is_grad_enabled()

        def work(piece: Piece) -> Done:
            torch.set_num_threads(cores)
            with torch.set_grad_enabled(gradients), self._mode():
                return function(piece)

        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.num_threads)  # kept: steps come by the thousand
        pool = self._pool
        return list(_in_order(lambda piece: pool.submit(work, piece), pieces, at_once=self.num_threads))


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


def even_parts(batch: Batch, *, most: int, target_cost: float) -> list[Batch]:
    """The rows with targets in parts that take about as long as each other; or the batch as it is, where there can't be
    two. What all rows begin with is computed in each part: there are no more than make it a tenth of the work.

    Args:
        target_cost: see `core.cutting.cut`.
    """
    if most > 1 and (num_shared := batch.num_shared):
        once = batch.num_real_tokens - (np.count_nonzero(batch.is_token.any(axis=1)) - 1) * num_shared
        most = min(most, 1 + int(MOST_REPEATED * once / num_shared))
    if most == 1:
        return [batch]
    return [take(batch, rows) for rows in cut(batch, most, target_cost=target_cost)]


def _parts(batch: Batch, number: int) -> Iterator[Batch]:
    assert batch.prefix is None or batch.prefix.routed is None, "what a mixture's rows routed is known together only"
    ends = np.linspace(0, len(batch.row_ids), min(number, len(batch.row_ids)) + 1).round().astype(int)
    for start, end in pairwise(ends):
        yield take(batch, np.arange(start, end))


def _in_order(
    submit: Callable[[Piece], Future[Done]], pieces: Iterable[Piece], *, at_once: int
) -> Generator[Done, None, None]:
    """What becomes of each piece, in order.

    When one fails, or the generator is closed, no more are asked for, and those under way are waited for.

    Args:
        submit: gives a piece to a pool of threads.
        at_once: pieces that the pool works on at a time; one more is asked for, so that no thread waits for this one.
    """
    waiting: deque[Future[Done]] = deque()
    try:
        for piece in pieces:
            waiting.append(submit(piece))
            if len(waiting) > at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)
