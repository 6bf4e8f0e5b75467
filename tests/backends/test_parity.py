"""What tests/parity leaves open: the optimiser's state after training, a checkpoint taken over, both rope styles.

Each backend trains in a process of its own, so that neither loads the other's numerical libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.protocols import TrainState
from tests.backends.conftest import (
    in_new_process,
    load_state,
    make_adapter,
    make_config,
    record_training,
    save_state,
    skip_without,
)
from tests.tiny import make_model

NUM_STEPS = 10
RATES = [3e-3 * 0.9**step for step in range(NUM_STEPS)]
SECTIONS: dict[str, Any] = {
    "optim": {"max_grad_norm": 1.0, "weight_decay": 0.1, "label_smoothing": 0.1},
    "lora": {"rank": 4, "alpha": 8, "targets": "all-linear"},
}
THETA = {"rope_theta": 100000.0}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "adafactor": {"name": "adafactor"},
    "lion": {"name": "lion"},
    "sgd": {"name": "sgd", "momentum": 0.9, "lr": 0.1},
}

CONTINUED = ["adamw", "adafactor"]
NUM_CONTINUED = 5
VARIANTS: dict[str, dict[str, Any]] = {
    "old": THETA,
    "new": {**THETA, "new_rope_style": True},
    "default": {},
}


def _sections(optimizer: str) -> dict[str, Any]:
    return {**SECTIONS, "optim": {**SECTIONS["optim"], **OPTIMIZERS[optimizer]}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each backend's records: `<run>/record.npz` and `<run>/state.npz`; one process for each backend."""
    for backend in ("mlx", "cuda"):
        skip_without(backend)
    root = tmp_path_factory.mktemp("parity")
    variants = {name: make_model(root / "models" / name, **kw) for name, kw in VARIANTS.items()}
    for backend in ("mlx", "cuda"):
        jobs = [_training(root, backend, name, variants["old"]) for name in OPTIMIZERS]
        jobs += [_continuing(root, backend, name, variants["old"]) for name in CONTINUED]
        jobs += [_job(root, backend, name, folder, lrs=[]) for name, folder in variants.items()]
        in_new_process(record_training.__name__, backend, jobs)
    return {backend: root / backend for backend in ("mlx", "cuda")}


def _job(root: Path, backend: str, name: str, folder: Path, **more: Any) -> dict[str, Any]:
    out = root / backend / name
    out.mkdir(parents=True)
    return {"folder": folder, "sections": SECTIONS, "out": out, **more}


def _training(root: Path, backend: str, name: str, folder: Path) -> dict[str, Any]:
    job = _job(root, backend, name, folder, sections=_sections(name), lrs=RATES)
    adapter = make_adapter(folder, make_config(**job["sections"]))
    before = job["out"] / "before.npz"
    save_state(before, TrainState(adapter.tensors, {}, 0))
    return {**job, "before": before}


def _continuing(root: Path, backend: str, name: str, folder: Path) -> dict[str, Any]:
    """Both backends go on from where MLX ended."""
    before = root / "mlx" / name / "state.npz"
    job = _job(root, backend, f"{name}-continued", folder, lrs=[1e-3] * NUM_CONTINUED)
    return {**job, "sections": _sections(name), "before": before}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_optimiser_state(trained: dict[str, Path], name: str) -> None:
    states = {backend: load_state(folder / name / "state.npz") for backend, folder in trained.items()}
    assert states["cuda"].optimizer and states["cuda"].optimizer.keys() == states["mlx"].optimizer.keys()
    for slot, array in states["cuda"].optimizer.items():
        assert array.shape == states["mlx"].optimizer[slot].shape
        difference = np.linalg.norm(array - states["mlx"].optimizer[slot])
        assert np.linalg.norm(array) > 0 and difference <= 5e-3 * np.linalg.norm(array), slot


@pytest.mark.parametrize("name", CONTINUED)
def test_a_checkpoint_of_one_continues_on_the_other(trained: dict[str, Path], name: str) -> None:
    """More steps from MLX's state: on PyTorch as on MLX."""
    out = {backend: folder / f"{name}-continued" for backend, folder in trained.items()}
    for folder in out.values():
        assert load_state(folder / "state.npz").optimizer_steps == NUM_STEPS + NUM_CONTINUED
    losses = {backend: np.load(folder / "record.npz")["losses"] for backend, folder in out.items()}
    np.testing.assert_allclose(losses["mlx"], losses["cuda"], rtol=1e-5)


@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_rope_styles_are_read_alike_and_theta_matters(trained: dict[str, Path], backend: str) -> None:
    """The same weights under the old and the new key: equal losses; with the default theta, others."""
    found = {name: np.load(trained[backend] / name / "record.npz")["nll"] for name in VARIANTS}
    np.testing.assert_array_equal(found["old"], found["new"])
    assert np.abs(found["default"] / found["old"] - 1).max() > 1e-4
