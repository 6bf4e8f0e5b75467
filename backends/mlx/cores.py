"""Work on several processor cores at once.

On a CPU, MLX computes everything but large matrix products on one core: a stream is a thread. Here independent pieces
of work are written down as graphs on streams of their own and evaluated in one call, with BLAS on one core for each.

MLX hands out at most about a hundred operations ahead of what its streams have done, all streams together, in the order
in which it goes through the graphs. So the streams are all kept busy only if that order alternates between them: hence
one call for all, in breadth-first order, and outputs in turns. (A thread for each stream would not do: they take each
other's share of the hundred, and each core stands idle for a third of the time.)
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

from backends.mlx.blas import blas_threads

Piece = TypeVar("Piece")
Built = TypeVar("Built")

MAX_STREAMS = 4
"""More would leave each a handful of the operations that are handed out ahead. (Measured with two.)"""
_WIDTH = "MLX_BFS_MAX_WIDTH", "4096"
"""Environment variable. By default MLX leaves breadth-first order where a graph is more than 20 operations wide, as
gradients are, and then goes through one stream's graph before the other's."""

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Linux, cgroup v2: microseconds of processor time, or "max", and the period in which a container may use them."""

_own = threading.local()
"""A stream belongs to the thread that made it."""


@functools.cache
def num_cores() -> int:
    """Cores that this process may use, which in a container is fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    found = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(found, _quota() or found))


def num_streams() -> int:
    """Pieces of work that are computed at a time: of three and four, what leaves fewer cores idle, since each has as
    many for BLAS as the others."""
    cores = num_cores()
    return max(
        (min(cores, MAX_STREAMS - 1), min(cores, MAX_STREAMS)), key=lambda count: (cores // count * count, count)
    )


def alternate_streams() -> None:
    """Has MLX hand out operations to streams in turns, for the rest of the process, if it has evaluated nothing yet and
    the user has not set it. On a GPU, which has one stream, the order is MLX's own."""
    os.environ.setdefault(*_WIDTH)


def _quota() -> int | None:
    """Whole cores that a container's share of the processor needs; None without a limit."""
    try:
        quota, period = (int(number) for number in _CPU_QUOTA.read_text().split())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return math.ceil(quota / period) if period else None


def on_streams(
    build: Callable[[Piece], Built], given: Iterable[Piece], *, count: int, blas: int | None = None
) -> Generator[Built, None, None]:
    """What `build` makes of each of `given`, in their order, computed; several at a time, each on a stream of its own.

    The next group is handed to the streams before what came of one is given out, so that they have something to do
    meanwhile. Until the generator is closed, BLAS is held to fewer cores: use `contextlib.closing`.

    Args:
        build: writes a graph down. Of what it returns (tuples, lists and dictionaries) the arrays are computed.
        count: so many at a time, at most. What is alone is computed on the stream that is in force.
        blas: cores that BLAS uses for each; None: what the number at a time leaves, so that few keep all cores busy.
    """
    rest = iter(given)
    group = list(itertools.islice(rest, count))
    with blas_threads(blas or max(1, num_cores() // max(1, len(group)))):
        try:
            waiting: list[Built] = []
            while group:
                built = _started(build, group)
                mx.eval(_arrays(waiting))  # waits
                yield from waiting
                waiting, group = built, list(itertools.islice(rest, count))
            mx.eval(_arrays(waiting))
            yield from waiting
        finally:
            _settle()  # after an error they still compute, on BLAS's cores as they are set now


def _started(build: Callable[[Piece], Built], group: Sequence[Piece]) -> list[Built]:
    built = []
    for number, piece in enumerate(group):
        with mx.stream(_stream(number) if len(group) > 1 else mx.default_stream(mx.default_device())):
            built.append(build(piece))
    turns = itertools.zip_longest(*(_arrays(one) for one in built))
    in_turns = [array for turn in turns for array in turn if array is not None]
    # MLX has the first array's stream wait for all the others: one that nobody else uses.
    mx.async_eval([mx.zeros((), stream=_waiter()), *in_turns])
    return built


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def _settle() -> None:
    """Waits for this thread's streams. What failed there has been raised, or something before it was."""
    for stream in [*_own.__dict__.get("streams", []), _waiter(), mx.default_stream(mx.cpu)]:
        with contextlib.suppress(RuntimeError):
            mx.synchronize(stream)


def _stream(number: int) -> mx.Stream:
    """This thread's. Streams live as long as the process: MLX never ends one."""
    streams: list[mx.Stream] = _own.__dict__.setdefault("streams", [])
    while len(streams) <= number:
        streams.append(mx.new_stream(mx.cpu))
    return streams[number]


def _waiter() -> mx.Stream:
    if not hasattr(_own, "waiter"):
        _own.waiter = mx.new_stream(mx.cpu)
    waiter: mx.Stream = _own.waiter
    return waiter
