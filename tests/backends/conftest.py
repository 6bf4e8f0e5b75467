"""Learners on tiny models for the backends' tests, in this process or in a new one.

`tests.backends.conftest` is imported by new processes too, so nothing here imports torch or mlx by itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads of a tiny model mostly wait; spinning, they would take the cores from other tests' processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest

import backends
from core.adapter import Adapter, plan_adapter
from core.architecture import read_architecture
from core.config import RunConfig
from core.models import ResolvedModel
from core.protocols import IGNORE, Batch, Learner, TrainState
from tests.tiny import PAD_ID, VOCAB_SIZE, make_model

PACKAGES = {"mlx": ("mlx", "mlx_lm"), "cuda": ("torch", "transformers", "peft")}
ROOT = Path(__file__).parents[2]
Open = Callable[..., Learner]
LR = 3e-3

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 6},
    "mixtral": {"model_type": "mixtral"},
}


def missing_package(backend: str) -> str | None:
    """The first package that `backend` lacks here."""
    return next((p for p in PACKAGES[backend] if importlib.util.find_spec(p) is None), None)


def skip_without(backend: str) -> None:
    if package := missing_package(backend):
        pytest.skip(f"{backend}: {package} is not installed")


@pytest.fixture(scope="session", params=["mlx", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return str(request.param)


@pytest.fixture(scope="session", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model of each kind."""
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, **settings) for name, settings in KINDS.items()}


@pytest.fixture
def llama(folders: dict[str, Path]) -> Path:
    return folders["llama"]


@pytest.fixture
def opened(backend: str) -> Iterator[Open]:
    """Opens learners on `backend` and closes them after the test."""
    learners: list[Learner] = []

    def open_one(folder: Path, *, initial: Adapter | None = None, **sections: Any) -> Learner:
        learners.append(open_learner(backend, folder, initial=initial, **sections))
        return learners[-1]

    yield open_one
    for learner in learners:
        learner.close()


def make_config(**sections: Any) -> RunConfig:
    """A configuration for tiny models: 16 bits, rank 4, no dropout, no clipping, no decay, unless told otherwise."""
    plain: dict[str, Any] = {
        "device": "cpu",
        "model": {"bits": 16},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "optim": {"max_grad_norm": None, "weight_decay": 0.0},
        "moe": {"aux_loss_weight": 0.0},
    }
    for name, settings in sections.items():
        plain[name] = {**plain.get(name, {}), **settings} if isinstance(settings, dict) else settings
    return RunConfig.model_validate(plain)


def resolved(folder: Path) -> ResolvedModel:
    return ResolvedModel(path=folder, name=folder.name, revision=None, source="folder", note="", parameters=0)


def make_adapter(folder: Path, config: RunConfig, *, filled: bool = True) -> Adapter:
    """The planned adapter; `filled` also gives B values, so that every tensor matters from the first step."""
    router = config.moe.train_router
    adapter = plan_adapter(config.lora, read_architecture(folder), seed=config.train.seed, router=router)
    if not filled:
        return adapter
    rng = np.random.default_rng(7)
    return adapter.with_tensors(
        {
            name: rng.normal(0, 0.05, t.shape).astype(np.float32) if name.endswith("lora_B") else t
            for name, t in adapter.tensors.items()
        }
    )


def open_learner(backend: str, folder: Path, *, initial: Adapter | None = None, **sections: Any) -> Learner:
    config = make_config(**sections)
    adapter = make_adapter(folder, config) if initial is None else initial
    return backends.get(backend).open(config, resolved(folder), adapter)


def make_batch(
    lengths: Sequence[int] = (12, 9), *, width: int | None = None, first_row: int = 0, seed: int = 0
) -> Batch:
    """Random rows of these lengths; the first third of each has no loss, and padding fills up to `width`."""
    width = width or max(lengths)
    inputs = np.full((len(lengths), width), PAD_ID, np.int32)
    targets = np.full((len(lengths), width), IGNORE, np.int32)
    for row, length in enumerate(lengths):
        tokens = np.random.default_rng([seed, first_row + row]).integers(3, VOCAB_SIZE, length + 1)
        inputs[row, :length] = tokens[:-1]
        targets[row, length // 3 : length] = tokens[1 + length // 3 :]
    return Batch(np.arange(first_row, first_row + len(lengths)), inputs, targets)


def one_row(batch: Batch, row: int) -> Batch:
    """A batch of this row alone."""
    part = slice(row, row + 1)
    return Batch(batch.row_ids[part], batch.inputs[part], batch.targets[part])


def microbatches(step: int = 1) -> list[Batch]:
    """Two unequal micro-batches; others for every step."""
    return [
        make_batch((12, 9), width=16, seed=step),
        make_batch((16, 7, 3), first_row=2, seed=step),
    ]


def added_product(sum_: Any, a: Sequence[int], b: Sequence[int], **_: Any) -> int:
    """Operations of `addmm_` for matrices of these shapes: torch's counter knows it only as `addmm`."""
    return 2 * a[0] * a[1] * b[1]


# --- states in files, and new processes


def save_state(path: Path, state: TrainState) -> None:
    arrays = {f"adapter:{name}": array for name, array in state.adapter.items()}
    arrays |= {f"optimizer:{name}": array for name, array in state.optimizer.items()}
    np.savez(path, steps=np.array(state.optimizer_steps), **arrays)


def load_state(path: Path) -> TrainState:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    steps = int(arrays.pop("steps"))
    parts: dict[str, dict[str, np.ndarray]] = {"adapter": {}, "optimizer": {}}
    for name, array in arrays.items():
        part, _, rest = name.partition(":")
        parts[part][rest] = array
    return TrainState(parts["adapter"], parts["optimizer"], steps)


def assert_same_state(one: TrainState, other: TrainState) -> None:
    """Equal bit for bit."""
    assert one.optimizer_steps == other.optimizer_steps
    for ours, theirs in ((one.adapter, other.adapter), (one.optimizer, other.optimizer)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype, name
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def in_new_process(function: str, *arguments: Any, module: str = __name__, timeout: float = 120.0) -> None:
    """Calls a function of `module`, this one if no other is named, with JSON arguments in a fresh interpreter."""
    code = f"import json, sys\nfrom {module} import {function}\n{function}(*json.loads(sys.argv[1]))\n"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments, default=str)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def train_from(backend: str, folder: str, jobs: list[dict[str, Any]]) -> None:
    """For each job: open with `sections`, import `before`, do the optimiser steps `steps`, save `after`."""
    for job in jobs:
        learner = open_learner(backend, Path(folder), **job["sections"])
        learner.import_state(load_state(Path(job["before"])))
        for step in job["steps"]:
            learner.train_step(microbatches(step), step=step, lr=job["lr"])
        save_state(Path(job["after"]), learner.export_state())
        learner.close()


def record_training(backend: str, jobs: list[dict[str, Any]]) -> None:
    """For each job: train at the rates `lrs`, save the losses, norms, row losses and the state under `out`."""
    for job in jobs:
        learner = open_learner(backend, Path(job["folder"]), **job["sections"])
        losses, norms = [], []
        if job.get("before"):
            learner.import_state(load_state(Path(job["before"])))
        first = learner.export_state().optimizer_steps + 1
        for step, lr in enumerate(job["lrs"], start=first):
            output = learner.train_step(microbatches(step), step=step, lr=lr)
            losses.append(float(output.loss))
            norms.append(float(output.grad_norm))
        rows = learner.evaluate(microbatches(999))
        out = Path(job["out"])
        np.savez(out / "record.npz", losses=losses, norms=norms, nll=rows.nll)
        save_state(out / "state.npz", learner.export_state())
        learner.close()
