"""Memory and device facts, and what running out of memory looks like in MLX."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from core.errors import OutOfMemoryError
from core.protocols import MemoryStats

CPU_CACHE_BYTES = 64 << 20
"""Bound of MLX's buffer cache on a CPU: batches have sizes of their own, so little of a larger one is used again."""
_GIB = 2**30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
_OUT_OF_MEMORY = (
    "unable to allocate",
    "attempting to allocate",
    "insufficient memory",
    "outofmemory",
    "out of memory",
    "resource limit",
    "bad_alloc",
)


class MemoryMeter:
    """Bytes in use and at most. On Metal the buffer cache counts: MLX's own figures leave it out."""

    def __init__(self, *, accelerator: bool) -> None:
        self._accelerator = accelerator
        self._peak = 0
        if accelerator:
            mx.reset_peak_memory()

    def read(self) -> MemoryStats:
        total = total_bytes()
        if self._accelerator:
            current = mx.get_active_memory() + mx.get_cache_memory()
            peak = mx.get_peak_memory()
        else:
            current, peak = resident_bytes(), peak_resident_bytes()
        self._peak = max(self._peak, current, peak)
        return MemoryStats(current_bytes=current, peak_bytes=self._peak, total_bytes=total)


def cache_limit_bytes(total: int) -> int:
    """Bound of MLX's buffer cache on a GPU: a sixteenth of the memory, between 1 and 8 GiB."""
    return min(max(total // 16, _GIB), 8 * _GIB)


def total_bytes() -> int:
    """The machine's memory; on a Mac, which shares it, what the GPU can use is a part of this."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> None:
    """Tells glibc not to give freed buffers back to the system, nor to map those up to 32 MB, its limit, anew.

    MLX's own buffer cache gives out buffers of nearly the same size only. Without this, every 1,024 numbers of a large
    result cost a page fault, which takes several times as long as adding them. For the rest of the process;
    `trim_memory` gives back what is free.
    """
    if mallopt := getattr(_libc(), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def trim_memory() -> None:
    if malloc_trim := getattr(_libc(), "malloc_trim", None):
        malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def resident_bytes() -> int:
    """Resident set of this process (without /proc: its largest so far)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_resident_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far; `ru_maxrss` is in KiB on Linux and in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def translate_out_of_memory(task: str) -> Iterator[None]:
    """Turns MLX's allocation errors, which are RuntimeErrors told apart by their text, into `OutOfMemoryError`."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(f"out of memory in {task}") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory in {task}: {' '.join(str(error).split())}") from error


def is_out_of_memory(error: Exception) -> bool:
    return any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)
