"""Where to compute, how much memory is there, and what to say when it runs out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from core.errors import OutOfMemoryError, UserError
from core.protocols import MemoryStats

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

GPU = "cuda"
# The caching allocator's error is a type of its own; the CPU allocator's is a RuntimeError with this text.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


def choose_device(setting: str) -> torch.device:
    """The device that `config.device` means: `auto`, `cpu` or `gpu`.

    Raises:
        UserError: `gpu` without one.
    """
    import torch

    if setting == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device(GPU, torch.cuda.current_device())
    if setting == "gpu":
        raise UserError(f"device gpu: {missing_gpu()}", hint="use --device cpu, or device: auto")
    return torch.device("cpu")


def missing_gpu() -> str:
    """Why PyTorch has no GPU here, in a few words."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is a build without CUDA"
    return "PyTorch finds no NVIDIA GPU here"


def device_name(device: torch.device) -> str:
    """For people: `NVIDIA H200`, `CPU (2 cores)`."""
    if device.type != GPU:
        return cpu_name()
    import torch

    return str(torch.cuda.get_device_name(device))


def cpu_name() -> str:
    cores = available_cores()
    return f"CPU ({cores} core{'s' if cores != 1 else ''})"


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory_bytes() -> int:
    """Memory of this machine, or of the container if that is less; 0 when unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def total_bytes(device: torch.device) -> int:
    if device.type != GPU:
        return host_memory_bytes()
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def memory_stats(device: torch.device) -> MemoryStats:
    """Bytes that tensors hold on the GPU (without the allocator's cache); on a CPU, of this process."""
    if device.type != GPU:
        current = _resident_bytes()
        # the kernel counts the two differently, and the peak may lag behind
        return MemoryStats(current, max(current, _peak_resident_bytes()), total_bytes(device))
    import torch

    return MemoryStats(
        current_bytes=torch.cuda.memory_allocated(device),
        peak_bytes=torch.cuda.max_memory_allocated(device),
        total_bytes=total_bytes(device),
    )


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return _peak_resident_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def within_memory(work: Callable[[], Result], *, device: torch.device, doing: str) -> Result:
    """`work()`, with the allocators' errors turned into one line that says what was asked for.

    Raises:
        OutOfMemoryError: the work ran out of memory.
    """
    import torch

    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError):
        message = _full(device, doing)
    except RuntimeError as error:
        if _CPU_ALLOCATOR not in str(error):
            raise
        message = _full(device, doing)
    # Raised out here: a context would keep the failed step's frames alive, and their tensors with them.
    if device.type == GPU:
        torch.cuda.empty_cache()
    raise OutOfMemoryError(message)


def _full(device: torch.device, doing: str) -> str:
    stats = memory_stats(device)
    used, total = stats.current_bytes / 2**30, stats.total_bytes / 2**30
    return f"{device_name(device)} is out of memory {doing} ({used:.1f} of {total:.1f} GiB were in use)"
