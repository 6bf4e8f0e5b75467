"""Work that threads do side by side, taken back in its order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from typing import TypeVar

Piece = TypeVar("Piece")
Done = TypeVar("Done")


def in_order(
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
