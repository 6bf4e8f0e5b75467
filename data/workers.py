"""A function over many items, here or in worker processes; results come in the order of the items."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

from core.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
_WAITING = 2
"""Items for each worker that are read ahead: it never waits for the reader, and few are in memory."""


def in_order(
    function: Callable[[Item], Result], items: Iterable[tuple[str, Item]], *, parallel: bool
) -> Iterator[tuple[str, Result]]:
    """`function` of each item, with the item's tag.

    Args:
        function: with `parallel`, it is copied to as many processes as there are cores.

    Raises:
        UserError: a worker process ended. Whatever `function` raises is raised for the first such item.
    """
    if parallel and num_cores() > 1:
        yield from _in_processes(function, items, num_cores())
    else:
        for tag, item in items:
            yield tag, function(item)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(
    function: Callable[[Item], Result], items: Iterable[tuple[str, Item]], num_workers: int
) -> Iterator[tuple[str, Result]]:
    # spawned, not forked: a copy of a process that has threads, such as a tokenizer's, may hang
    pool = ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_start, initargs=(pickle.dumps(function),)
    )
    waiting: deque[tuple[str, Future[Result]]] = deque()
    try:
        for tag, item in items:
            with _without_interrupts():
                waiting.append((tag, pool.submit(_call, item)))
            if len(waiting) >= _WAITING * num_workers:
                tag, future = waiting.popleft()
                yield tag, future.result()
        for tag, future in waiting:
            yield tag, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process that prepares the data ended unexpectedly",
            hint="is there enough memory? then start again",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started in here never sees Ctrl-C: this one does, and ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in a worker ------------------------------------------------------------------------------------------------------

_function: Callable[[Any], Any]


def _start(pickled: bytes) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    _function = pickle.loads(pickled)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for items for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
