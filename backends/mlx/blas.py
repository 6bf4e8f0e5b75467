"""A fast BLAS for MLX on Linux, loaded before MLX.

The Linux wheel of MLX links the reference BLAS, which is some 30 times slower than what the processor can do. Symbols
of a library that is already loaded globally take precedence, so loading OpenBLAS or MKL first is all it takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

SLOW_BLAS = "MLX found no fast BLAS here: training on the CPU is about 30 times slower than it could be"
_OPENBLAS = "libopenblas.so.0"
_MKL_MODE = "AUTO,STRICT"
"""MKL's conditional numerical reproducibility: equal bits whatever the arrays' alignment, at no measurable cost."""


@functools.cache
def preload_blas() -> str:
    """Loads MKL (PyPI's `mkl`) or the system's OpenBLAS, unless MLX was imported already.

    Returns:
        The library's file name; "" when none was found, when it came too late, or on macOS, whose MLX needs none.
    """
    if not needs_blas() or "mlx.core" in sys.modules:
        return ""
    for library in _candidates():
        if "mkl" in library:
            # Read once, when MKL is loaded.
            os.environ.setdefault("MKL_CBWR", _MKL_MODE)
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return Path(library).name
    return ""


def needs_blas() -> bool:
    """Whether MLX's own wheel for this system lacks a fast BLAS."""
    return sys.platform.startswith("linux")


def blas_hint() -> str:
    """What to do about `SLOW_BLAS`, for this machine."""
    system = "install the system's OpenBLAS (Debian and Ubuntu: libopenblas0-pthread)"
    return f"pip install mkl, or {system}" if platform.machine() == "x86_64" else system


def _candidates() -> Iterator[str]:
    """MKL of this environment first: it is the same for everyone who installed the same packages."""
    yield from (str(path) for path in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*")))
    yield from _installed_mkl()
    yield _OPENBLAS


def _installed_mkl() -> Iterator[str]:
    """Where the `mkl` package says that its files are (a user's or a system's site-packages)."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield from (str(file.locate()) for file in files if file.name.startswith("libmkl_rt.so"))


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Within it a matrix product uses `count` cores, where the library that `preload_blas` loaded can be told so."""
    found = _thread_setting()
    if found is None:
        yield
        return
    get, set_ = found
    before = get()
    set_(min(count, before))
    try:
        yield
    finally:
        set_(before)


@functools.cache
def _thread_setting() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """How to read and set the number of cores that BLAS uses."""
    name = preload_blas()
    if not name:
        return None
    library = ctypes.CDLL(name)  # loaded already: found by its name
    names = ("openblas_get_num_threads", "openblas_set_num_threads")
    if "mkl" in name:
        names = ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads")
    get, set_ = (getattr(library, function, None) for function in names)
    if get is None or set_ is None:
        return None
    get.argtypes, get.restype = [], ctypes.c_int
    set_.argtypes, set_.restype = [ctypes.c_int], None
    return get, set_
