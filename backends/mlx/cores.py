"""Work on several processor cores at once.

On a CPU, MLX computes everything but large matrix products on one core: a stream is a thread, and everything is on one
stream. Here there are as many threads as cores, each with a stream of its own, and BLAS uses one core for each.
(MLX holds back a thread that is more than a hundred operations ahead of its streams, so that one thread alone, feeding
two streams, would feed one after the other.)
"""

from __future__ import annotations

import collections
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import mlx.core as mx

from backends.mlx.blas import blas_threads

Given = TypeVar("Given")
Made = TypeVar("Made")

building = threading.Lock()
"""Held while a graph is written down: that goes through the model's modules, which know one adapter at a time."""

_own = threading.local()


def num_cores() -> int:
    """Cores that this process may use, which in a container is fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def map_on_cores(function: Callable[[Given], Made], given: Iterable[Given], *, count: int) -> Iterator[Made]:
    """`function` of each of `given`, in their order; up to `count` at a time, each on a thread and a stream of its own.

    What `function` returns must be computed already: no other thread may wait for this one's stream.
    """
    if count == 1:
        yield from map(function, given)
        return
    waiting: collections.deque[Future[Made]] = collections.deque()
    with blas_threads(max(1, num_cores() // count)):
        try:
            for one in given:
                waiting.append(_pool(count).submit(_on_own_stream, function, one))
                # One more than there are threads, so that none of them waits for this one.
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    """Threads that live as long as the process: MLX never ends a stream's own thread."""
    return ThreadPoolExecutor(count, thread_name_prefix="twinkeel-mlx", initializer=_start)


def _start() -> None:
    _own.stream = mx.new_stream(mx.cpu)


def _on_own_stream(function: Callable[[Given], Made], given: Given) -> Made:
    with mx.stream(_own.stream):
        return function(given)
