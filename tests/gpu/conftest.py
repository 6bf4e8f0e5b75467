"""Everything in here needs an NVIDIA GPU and is skipped without one.

`TWINKEEL_TEST_DEVICE=cpu` runs what can run on a CPU: it says that the checks execute, and nothing about a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.protocols import Learner
from tests.backends.conftest import KINDS, Open, missing_package, open_learner
from tests.tiny import make_model

DEVICE_VARIABLE = "TWINKEEL_TEST_DEVICE"
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_layers": 1}
"""With rank 512 its adapter has tensors of 131,072 elements: bitsandbytes pages moments from 100,000 on."""


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
    return {name: make_model(root / name, **settings) for name, settings in (KINDS | {"wide": WIDE}).items()}


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
