"""What PyTorch's profiler says of training steps: time by kind of operation, and how often the host waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MATMUL = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"),
    "optimiser and clipping": ("Optimizer.", "foreach", "fused_adam", "linalg_vector_norm"),
    "loss": ("logsumexp", "log_softmax", "nll_loss", "gather", "scatter"),
    "views and bookkeeping": (
        *("transpose", "t", "view", "as_strided", "reshape", "unsqueeze", "squeeze", "permute", "unsafe_view"),
        *("expand", "slice", "select", "detach", "narrow", "split", "chunk", "unbind", "flatten", "alias"),
    ),
    "copies": ("to", "copy", "clone", "contiguous", "index", "embedding", "cat", "stack", "fill", "zero", "empty"),
    "norms and elementwise": (
        *(
            "mul",
            "add",
            "sub",
            "rsub",
            "div",
            "pow",
            "mean",
            "sum",
            "rsqrt",
            "sqrt",
            "neg",
            "silu",
            "sigmoid",
            "exp",
            "addcmul",
        ),
        *("cos", "sin", "max", "amax", "softmax", "where", "native_dropout", "lerp", "native_layer_norm", "rms_norm"),
    ),
}
"""Operations by kind, in this order; a name stands for those that begin with it and go on with `_` or nothing."""
HEAD, LINEAR = "matrix products of the head", "other matrix products"
OTHER, OUTSIDE = "other", "outside of operations"
BOOKKEEPING, OPTIMISER = "views and bookkeeping", "optimiser and clipping"
RANGE = "steps without a log"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
READS = ("aten::item", "aten::_local_scalar_dense")


def by_kind(run: Callable[[], None], *, vocab_size: int) -> dict[str, float]:
    """Share of each kind of operation in the time of `run`, on a GPU in that of its kernels."""
    from torch.autograd import DeviceType

    profiler, seconds = _profiled(run)
    on_gpu = _on_gpu()
    found = dict.fromkeys((LINEAR, HEAD, *KINDS, OTHER), 0.0)
    for event in profiler.events():
        if event.name == RANGE or event.device_type != DeviceType.CPU:  # a kernel's time is with what launched it
            continue
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = OPTIMISER if _in_optimiser(event) else _kind(event.name, event.input_shapes, vocab_size)
        found[kind] += own / 1e6
    whole = sum(found.values()) if on_gpu else max(seconds, sum(found.values()))
    shares = {kind: own / whole for kind, own in found.items()}
    return shares if on_gpu else shares | {OUTSIDE: 1.0 - sum(shares.values())}


def host_waits(run: Callable[[], None], num_steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """How often in a step the host waits for the device, by the call that does, and how often it reads a scalar, which
    is a wait only where the scalar is on the device (AdamW's step counts are not)."""
    profiler, _ = _profiled(run)
    events = list(profiler.events())
    # the profiler itself waits for the device at its end
    whole = next(event.time_range for event in events if event.name == RANGE)
    inside = [event.name for event in events if whole.start <= event.time_range.start <= whole.end]
    waits, reads = (
        {name: sum(one.startswith(name) for one in inside) / num_steps for name in names} for names in (WAITS, READS)
    )
    return waits, reads


def _profiled(run: Callable[[], None]) -> tuple[Any, float]:
    """A profile of `run`, and its seconds in it; the device's work is done before it ends."""
    import time

    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _on_gpu() else [])]
    run()  # warm
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        began = time.perf_counter()
        with record_function(RANGE):
            run()
        if _on_gpu():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return profiler, seconds


def _on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _in_optimiser(event: Any) -> bool:
    while event is not None:
        if event.name.startswith("Optimizer."):
            return True
        event = event.cpu_parent
    return False


def _head_sizes(vocab_size: int) -> set[int]:
    """Of the vocabulary, and of the parts that a CPU takes it in; no other size of the model is to be one of these."""
    from backends.cuda.loss import COLUMNS

    return {vocab_size, COLUMNS, vocab_size % COLUMNS} - {0}


def _kind(key: str, shapes: Any, vocab_size: int) -> str:
    # a function's own time, forward (ours begin with `_`) or backward, is what stands between its operations
    if "autograd::" in key or key.startswith("_") or key.rstrip("0123456789").endswith("Backward"):
        return BOOKKEEPING
    name = key.removeprefix("aten::").lstrip("_")
    if name.rstrip("_") in MATMUL:
        lists = [shape for shape in shapes or () if isinstance(shape, list)]
        return HEAD if any(size in shape for size in _head_sizes(vocab_size) for shape in lists) else LINEAR
    for kind, names in KINDS.items():
        if any(name == one or name.startswith(one if one.endswith(".") else f"{one}_") for one in names):
            return kind
    return OTHER
