"""The PyTorch backend. Importing this module imports neither torch nor transformers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backends.cuda import memory
from core.adapter import Adapter
from core.architecture import read_architecture
from core.config import RunConfig, residence
from core.errors import UserError
from core.protocols import DeviceReport, Learner

if TYPE_CHECKING:
    import torch

    from backends.cuda.streaming import Source
    from core.models import ResolvedModel

NEEDED = ("torch", "transformers", "peft")
QUANTISER = "bitsandbytes"
CHECKPOINTING_FROM = 1e9
"""Parameters from which gradient checkpointing `auto` is on."""
BFLOAT16_CAPABILITY = (8, 0)
"""First CUDA compute capability with bfloat16 arithmetic (Ampere)."""


class CudaBackend:
    """`core.protocols.Backend` in PyTorch, transformers, PEFT and bitsandbytes: on an NVIDIA GPU or a CPU."""

    name = "cuda"

    def probe(self, device: str = "auto") -> DeviceReport:
        """What this machine has. Never raises; torch is imported only if it may find a GPU."""
        packages = installed_packages()
        missing = [package for package in NEEDED if package not in packages]
        if missing:
            problem = f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}"
            return self._report(packages, problem=problem)
        if device == "cpu":
            return self._report(packages)
        try:
            return self._probe_gpu(packages, wanted=device == "gpu")
        except (ImportError, OSError, RuntimeError) as error:
            return self._report(packages, problem=f"PyTorch does not work here: {error}")

    def _probe_gpu(self, packages: dict[str, str], *, wanted: bool) -> DeviceReport:
        import torch

        if not torch.cuda.is_available():
            reason = memory.missing_gpu()
            if wanted:
                return self._report(packages, problem=f"{reason}; use --device cpu")
            return self._report(packages, notes=(f"{reason}; training runs on the CPU",))
        device = memory.choose_device("gpu")
        return DeviceReport(
            backend=self.name,
            available=True,
            device=memory.device_name(device),
            accelerator=True,
            memory_bytes=memory.total_bytes(device),
            notes=_quantiser_note(packages),
            packages=packages,
        )

    def _report(self, packages: dict[str, str], *, problem: str = "", notes: tuple[str, ...] = ()) -> DeviceReport:
        return DeviceReport(
            backend=self.name,
            available=not problem,
            device=memory.cpu_name(),
            accelerator=False,
            memory_bytes=memory.host_memory_bytes(),
            problem=problem,
            notes=notes + (() if problem else _quantiser_note(packages)),
            packages=packages,
        )

    def check(self, config: RunConfig) -> Sequence[str]:
        """Warnings for settings that have no effect here, each with field and value.

        Raises:
            UserError: a package or a GPU that is not there.
        """
        if missing := [package for package in NEEDED if package not in installed_packages()]:
            raise UserError(
                f"the cuda backend needs {' and '.join(missing)}",
                hint=f"pip install {' '.join(missing)}",
            )
        if config.model.bits == 4 and importlib.util.find_spec(QUANTISER) is None:
            raise UserError(
                f"model.bits 4 needs {QUANTISER}, which is not installed",
                hint=f"pip install {QUANTISER}, or set model.bits=16",
            )
        device = memory.choose_device(config.device)
        return [*_state_warnings(config, device), *_type_warnings(config, device)]

    def open(
        self, config: RunConfig, model: ResolvedModel, initial: Adapter, *, source: Source | None = None
    ) -> Learner:
        """Loads the frozen base and puts `initial` on it.

        Args:
            source: where a mixture's weights come from for 4 bits, instead of the model folder.

        Raises:
            UserError: a model that can't be loaded, or a device that is not there.
            OutOfMemoryError: the model does not fit.
        """
        device = memory.choose_device(config.device)
        self.check(config)
        return memory.within_memory(
            lambda: _open(config, model, initial, device, source),
            device=device,
            doing=f"while loading {model.name}",
        )


def installed_packages() -> dict[str, str]:
    """Versions of the packages that this backend imports, without importing them."""
    versions: dict[str, str] = {}
    for package in (*NEEDED, QUANTISER):
        if importlib.util.find_spec(package) is None:
            continue
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _quantiser_note(packages: dict[str, str]) -> tuple[str, ...]:
    if QUANTISER in packages:
        return ()
    return (f"{QUANTISER} is not installed: model.bits must be 16",)


def _state_warnings(config: RunConfig, device: torch.device) -> list[str]:
    found = []
    if device.type != memory.GPU and config.optim.state_bits == 8:
        found.append("optim.state_bits 8 has no effect on a CPU: the optimiser's state is 32-bit")
    if device.type != memory.GPU and config.optim.paged:
        found.append("optim.paged true has no effect on a CPU: its memory is not paged by CUDA")
    return found


def _type_warnings(config: RunConfig, device: torch.device) -> list[str]:
    dtype = config.model.dtype
    if device.type != memory.GPU:
        if dtype in ("bfloat16", "float16"):
            return [f"model.dtype {dtype} is many times slower than float32 on most CPUs"]
        return []
    import torch

    if dtype in ("auto", "bfloat16") and (torch.cuda.get_device_capability(device) < BFLOAT16_CAPABILITY):
        return [f"model.dtype {dtype}: this GPU emulates bfloat16; float16 is faster on it"]
    return []


def _open(
    config: RunConfig, model: ResolvedModel, initial: Adapter, device: torch.device, source: Source | None
) -> Learner:
    from backends.cuda.halves import AbsentLayers
    from backends.cuda.learner import CudaLearner
    from backends.cuda.model import enable_checkpointing, load_base, put_adapter

    dtype = compute_dtype(config.model.dtype, device)
    stream, leaves_out = config.model.stream_layers, config.model.stream_layers or config.model.low_memory
    num_left_out = initial.layers[0] if leaves_out else 0
    base, pieces = load_base(
        model, config.model, device=device, dtype=dtype, num_left_out=num_left_out, stream=stream, source=source
    )
    absent: AbsentLayers | None = None
    if leaves_out:
        assert pieces is not None, "layers are left out of a model that is read in pieces"
        absent = AbsentLayers(base, pieces, num_left_out)
    num_parameters = read_architecture(Path(model.path)).num_parameters
    checkpointing = config.train.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = num_parameters >= CHECKPOINTING_FROM
    if checkpointing and not stream:  # streamed layers are recomputed anyway
        enable_checkpointing(base)
    return CudaLearner(
        base,
        put_adapter(base, initial),
        config=config,
        device=device,
        dtype=dtype,
        num_base_parameters=num_parameters,
        description=_describe(config, dtype, device, checkpointing=checkpointing and not stream),
        frozen=absent,
        stream=stream,
    )


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU, float32 on a CPU."""
    import torch

    if setting == "auto":
        return torch.bfloat16 if device.type == memory.GPU else torch.float32
    dtype: torch.dtype = getattr(torch, setting)
    return dtype


def _describe(config: RunConfig, dtype: torch.dtype, device: torch.device, *, checkpointing: bool) -> str:
    weights = "NF4 4-bit" if config.model.bits == 4 else f"{8 * dtype.itemsize}-bit"
    parts = [f"{weights} weights", f"{str(dtype).removeprefix('torch.')} compute"]
    if checkpointing:
        parts.append("gradient checkpointing")
    parts += residence(config)
    return ", ".join([*parts, memory.device_name(device)])
