"""MLX: Metal on a Mac, the CPU elsewhere. Importing this module imports nothing of MLX."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from backends.mlx.blas import SLOW_BLAS, blas_hint, needs_blas, preload_blas
from core.errors import UserError
from core.protocols import DeviceReport, Learner

if TYPE_CHECKING:
    import mlx.core as mx

    from core.adapter import Adapter
    from core.config import RunConfig
    from core.models import ResolvedModel

logger = logging.getLogger("twinkeel")

CHECKPOINT_FROM = 1_000_000_000
"""Parameters from which `train.gradient_checkpointing: auto` is on."""
_PACKAGES = ("mlx", "mlx-lm")

Device = Literal["cpu", "gpu"]


class MlxBackend:
    name = "mlx"

    def probe(self, device: str = "auto") -> DeviceReport:
        """What MLX finds here. Imports `mlx` if it is installed, never `mlx_lm`."""
        try:
            return _probe(device)
        except Exception as error:
            # A broken installation can raise anything at all, and a probe must answer.
            return _unavailable(f"mlx does not work here: {type(error).__name__}: {error}")

    def check(self, config: RunConfig) -> Sequence[str]:
        device = choose_device(config.device)
        warnings_: list[str] = []
        if config.optim.state_bits == 8:
            warnings_.append("optim.state_bits: 8 has no effect on mlx: 32-bit state is used")
        if config.optim.paged:
            warnings_.append("optim.paged: true has no effect on mlx: the state is not paged")
        if device == "cpu":
            warnings_ += _cpu_warnings(config)
        return warnings_

    def open(self, config: RunConfig, model: ResolvedModel, initial: Adapter) -> Learner:
        device = choose_device(config.device)
        self.check(config)
        if device == "cpu" and needs_blas() and not preload_blas():
            logger.warning("%s; %s", SLOW_BLAS, blas_hint())
        restore = prepare_device(device)
        try:
            return _open(config, model, initial, device=device, on_close=restore)
        except BaseException:
            restore()
            raise


def _open(
    config: RunConfig,
    model: ResolvedModel,
    initial: Adapter,
    *,
    device: Device,
    on_close: Callable[[], None],
) -> Learner:
    import mlx.core as mx

    with quiet_libraries():
        from backends.mlx.learner import MlxLearner
        from backends.mlx.loading import load_base
        from backends.mlx.model import Network
        from core.config import residence

        dtype, dtype_name = _compute_type(config.model.dtype, device)
        base = load_base(
            model,
            bits=config.model.bits,
            dtype=dtype,
            trust_remote_code=config.model.trust_remote_code,
            num_absent=initial.layers[0] if config.model.low_memory or config.model.stream_layers else 0,
            stream=config.model.stream_layers,
        )
    checkpoint = config.train.gradient_checkpointing
    if checkpoint == "auto":
        checkpoint = base.num_parameters >= CHECKPOINT_FROM
    network = Network(base, initial, checkpoint=checkpoint)
    return MlxLearner(
        network,
        {name: mx.array(tensor) for name, tensor in initial.tensors.items()},
        config,
        description=", ".join([base.weights, f"{dtype_name} compute", *residence(config), _device_name(device)]),
        num_base_parameters=base.num_parameters,
        accelerator=device == "gpu",
        # On a CPU, MLX compiles with g++ at run time: half a minute for the first step, and no step is faster.
        # Compiled, weights would be held as constants.
        compiled=device == "gpu" and not config.model.stream_layers,
        on_close=on_close,
    )


def _compute_type(name: str, device: Device) -> tuple[mx.Dtype, str]:
    import mlx.core as mx

    if name == "auto":
        name = "bfloat16" if device == "gpu" else "float32"
    dtypes = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
    return dtypes[name], name


def _cpu_warnings(config: RunConfig) -> list[str]:
    found: list[str] = []
    if config.model.dtype not in ("auto", "float32"):
        found.append(f"model.dtype: {config.model.dtype} on a CPU is about 15 times slower than float32 with mlx")
    if config.model.bits == 4:
        found.append("model.bits: 4 on a CPU is about 20 times slower than 16 with mlx; use 16 if the model fits")
    return found


def choose_device(wanted: str) -> Device:
    """Raises `UserError` when MLX is not installed, or for a GPU that is not there."""
    _require_packages()
    import mlx.core as mx

    has_gpu = mx.metal.is_available()
    if wanted == "gpu" and not has_gpu:
        raise UserError(
            "device: gpu, but MLX finds no Metal GPU on this machine",
            hint="use --device cpu, or --backend cuda for an NVIDIA GPU",
        )
    return "gpu" if has_gpu and wanted != "cpu" else "cpu"


def _require_packages() -> None:
    if missing := [name for name in _PACKAGES if name not in _installed()]:
        raise UserError(f"the mlx backend needs {' and '.join(missing)}", hint=_install_hint())


def _installed() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _install_hint() -> str:
    package = "mlx" if sys.platform == "darwin" else '"mlx[cpu]"'
    return f"pip install {package} mlx-lm"


def _probe(device: str) -> DeviceReport:
    packages = _installed()
    if missing := [name for name in _PACKAGES if name not in packages]:
        return _unavailable(f"{' and '.join(missing)} not installed; {_install_hint()}")
    try:
        chosen = choose_device(device)
    except UserError as error:
        return _unavailable(f"{error.what}; {error.hint}")
    from backends.mlx.memory import total_bytes

    notes: tuple[str, ...] = ()
    if chosen == "cpu" and needs_blas():
        library = preload_blas()
        notes = (f"fast BLAS: {library}" if library else f"{SLOW_BLAS}; {blas_hint()}",)
    return DeviceReport(
        backend="mlx",
        available=True,
        device=_device_name(chosen),
        accelerator=chosen == "gpu",
        memory_bytes=total_bytes(),
        notes=notes,
        packages=packages,
    )


def _unavailable(problem: str) -> DeviceReport:
    return DeviceReport(
        backend="mlx",
        available=False,
        device=platform.machine(),
        accelerator=False,
        memory_bytes=0,
        problem=" ".join(problem.split()),
        packages=_installed(),
    )


def _device_name(device: Device) -> str:
    if device == "cpu":
        from backends.mlx.cores import num_cores

        cores = num_cores()
        return f"CPU ({cores} core{'s' if cores > 1 else ''})"
    import mlx.core as mx

    return str(mx.device_info().get("device_name", "Metal GPU"))


def prepare_device(device: Device) -> Callable[[], None]:
    """Makes `device` MLX's default and bounds its buffer cache; returns what undoes it. What a CPU needs beside,
    `keep_freed_memory` and `alternate_streams`, is for the rest of the process."""
    import mlx.core as mx

    from backends.mlx.cores import alternate_streams
    from backends.mlx.memory import CPU_CACHE_BYTES, cache_limit_bytes, keep_freed_memory, total_bytes

    if device == "cpu":
        keep_freed_memory()
        alternate_streams()
    default = mx.default_device()
    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    cache_limit = mx.set_cache_limit(cache_limit_bytes(total_bytes()) if device == "gpu" else CPU_CACHE_BYTES)
    wired_limit: int | None = None
    if device == "gpu":
        # As mlx-lm does: memory that the system may not page out, which macOS 15 can grant.
        recommended = mx.device_info().get("max_recommended_working_set_size")
        wired_limit = mx.set_wired_limit(int(recommended)) if recommended else None

    def restore() -> None:
        mx.set_default_device(default)
        mx.set_cache_limit(cache_limit)
        if wired_limit is not None:
            mx.set_wired_limit(wired_limit)

    return restore


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """mlx-lm imports transformers, which has advice to give about frameworks that are not installed."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    chatty = logging.getLogger("transformers")
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatty.setLevel(level)


__all__ = ["MlxBackend", "choose_device", "prepare_device", "quiet_libraries"]
