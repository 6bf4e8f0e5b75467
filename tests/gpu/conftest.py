"""Everything in here needs an NVIDIA GPU and is skipped without one.

`TWINKEEL_TEST_DEVICE=cpu` runs what can run on a CPU: it says that the checks execute, and nothing about a GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.protocols import Learner
from tests.backends.conftest import KINDS, Open, missing_package, open_learner
from tests.tiny import make_model

DEVICE_VARIABLE = "TWINKEEL_TEST_DEVICE"
LARGER: dict[str, dict[str, Any]] = {
    "wide": {"hidden_size": 256, "intermediate_size": 256, "num_layers": 1},
    "deep": {"num_layers": 8},
}
"""`wide` with rank 512 has adapter tensors of 131,072 elements: bitsandbytes pages moments from 100,000 on."""


def why_skipped(device: str) -> str | None:
    """What is missing here; torch is imported only where it is installed."""
    if package := missing_package("cuda"):
        return f"{package} is not installed"
    if device == "cpu":
        return None
    import torch

    return None if torch.cuda.is_available() else "no NVIDIA GPU (torch.cuda.is_available() is false)"


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    """`gpu`, or `cpu` for a dry run: the setting that learners are opened with."""
    chosen = os.environ.get(DEVICE_VARIABLE, "gpu")
    if reason := why_skipped(chosen):
        pytest.skip(reason)
    return chosen


@pytest.fixture
def gpu(device: str) -> None:
    """For checks that mean nothing on a CPU."""
    if device == "cpu":
        pytest.skip("dry run on a CPU: this check needs the GPU")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model of each kind."""
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, **settings) for name, settings in (KINDS | LARGER).items()}


@pytest.fixture
def opened(device: str) -> Iterator[Open]:
    """Opens learners, on `device` unless told otherwise, and closes them after the test."""
    learners: list[Learner] = []

    def open_one(folder: Path, **sections: Any) -> Learner:
        learners.append(open_learner("cuda", folder, **{"device": device, **sections}))
        return learners[-1]

    yield open_one
    for learner in learners:
        learner.close()


@pytest.fixture
def exact_attention() -> Iterator[None]:
    """Attention in plain matrix products: the fast kernels add up their gradients in no fixed order."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def no_waiting() -> Iterator[set[str]]:
    """torch raises when the host waits for the device; yields the modules that called torch.cuda.synchronize."""
    import torch

    callers: set[str] = set()
    real, mode = torch.cuda.synchronize, torch.cuda.get_sync_debug_mode()

    def note(*args: Any) -> None:  # torch's debug mode does not see this call
        callers.add(sys._getframe(1).f_globals["__name__"])
        torch.cuda.set_sync_debug_mode("default")
        real(*args)
        torch.cuda.set_sync_debug_mode("error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", note)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield callers
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def memory_left(num_bytes: int) -> Iterator[None]:
    """This process may take so much more of the GPU than it holds."""
    import torch

    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + num_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
