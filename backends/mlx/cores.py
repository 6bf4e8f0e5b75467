"""Work on several processor cores at once.

On a CPU, MLX computes everything but large matrix products on one core: a stream is a thread, and everything is on one
stream. Here there are as many threads as cores, each with a stream of its own, and BLAS uses one core for each.
(MLX holds back a thread that is more than a hundred operations ahead of its streams, so that one thread alone, feeding
two streams, would feed one after the other.)
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

from backends.mlx.blas import blas_threads
from core.side_by_side import Done, Piece, in_order

building = threading.Lock()
"""Held while a graph is written down: that goes through the model's modules, which know one adapter at a time."""

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Linux, cgroup v2: microseconds of processor time, or "max", and the period in which a container may use them."""

_own = threading.local()


@functools.cache
def num_cores() -> int:
    """Cores that this process may use, which in a container is fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    found = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(found, _quota() or found))


def _quota() -> int | None:
    """Whole cores that a container's share of the processor needs; None without a limit."""
    try:
        quota, period = (int(number) for number in _CPU_QUOTA.read_text().split())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return math.ceil(quota / period) if period else None


def map_on_cores(
    function: Callable[[Piece], Done], given: Iterable[Piece], *, count: int, blas: int | None = None
) -> Generator[Done, None, None]:
    """`function` of each of `given`, in their order; several at a time, each on a thread and a stream of its own.

    What `function` returns must be computed already: no other thread may wait for this one's stream. Until the
    generator is closed, BLAS is held to fewer cores: use `contextlib.closing`.

    Args:
        count: at most so many at a time. What is alone is computed on this thread.
        blas: cores that BLAS uses for each; None: what the number at a time leaves, so that few keep all cores busy.
    """
    rest = iter(given)
    first = list(itertools.islice(rest, count))
    at_once = max(1, len(first))
    with blas_threads(blas or max(1, num_cores() // at_once)):
        if at_once == 1:
            yield from map(function, itertools.chain(first, rest))
        else:
            gate = threading.Semaphore(at_once)
            yield from in_order(
                lambda piece: _pool().submit(_on_own_stream, gate, function, piece),
                itertools.chain(first, rest),
                at_once=at_once,
            )


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads that live as long as the process: MLX never ends a stream's own thread."""
    return ThreadPoolExecutor(num_cores(), thread_name_prefix="twinkeel-mlx", initializer=_start)


def _start() -> None:
    _own.stream = mx.new_stream(mx.cpu)


def _on_own_stream(gate: threading.Semaphore, function: Callable[[Piece], Done], given: Piece) -> Done:
    with gate, mx.stream(_own.stream):
        return function(given)
