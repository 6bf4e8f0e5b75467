"""One side of `parity` for many jobs, in a process of its own; some with a fault planted on that side only.

Imported by the new process too: nothing here imports torch or mlx by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest

from core.adapter import Adapter
from core.parity_record import certified, record_training, write_record
from core.protocols import IGNORE, Batch
from core.settings import Settings
from core.trainer import TrainingData
from core.workflow.job import Job, prepare
from tests.backends.conftest import ROOT, make_config

FEW_STEPS = 5
COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")


def write_rows(path: Path, *, num_rows: int = 24) -> Path:
    """Short questions and answers, of different lengths, all longer than the tiny sliding window."""
    rng = np.random.default_rng(5)
    with open(path, "w", encoding="utf-8") as file:
        for index in range(num_rows):
            words = " ".join(rng.choice(COLOURS, int(rng.integers(1, 4))))
            row = {"prompt": f"Mix {index}" + "?" * int(rng.integers(0, 5)), "completion": words}
            file.write(json.dumps(row) + "\n")
    return path


def sections(folder: Path, rows: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """Accumulation, clipping that acts, warm-up and cosine, weight decay, label smoothing, on every linear module."""
    plain: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder)},
        "data": {"path": str(rows), "max_tokens": 96},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": "all-linear"},
        "optim": {"lr": 3e-3, "max_grad_norm": 0.5, "weight_decay": 0.1, "label_smoothing": 0.1},
        "schedule": {"name": "cosine", "warmup_ratio": 0.1},
        "train": {"batch_size": 2, "accumulation": 2},
    }
    for name, settings in changes.items():
        plain[name] = {**plain.get(name, {}), **settings}
    return plain


# --- faults -----------------------------------------------------------------------------------------------------------


def _misread_theta(patch: pytest.MonkeyPatch, job: Job) -> Job:
    """MLX loads the model with theta 10000 although its folder says 100000."""
    import backends.mlx.loading as loading

    right = loading._mlx_settings
    patch.setattr(loading, "_mlx_settings", lambda *args: {**right(*args), "rope_theta": 10000.0})
    return job


def _no_window(patch: pytest.MonkeyPatch, job: Job) -> Job:
    """MLX sees the whole row although the folder gives a sliding window."""
    import backends.mlx.loading as loading

    patch.setattr(loading, "_window", lambda raw: None)
    return job


def _scale(patch: pytest.MonkeyPatch, job: Job) -> Job:
    right = Adapter.scale_of
    patch.setattr(Adapter, "scale_of", lambda self, module: 2 * right(self, module))
    return job


def _no_bias_correction(patch: pytest.MonkeyPatch, job: Job) -> Job:
    from backends.mlx.optim import AdamW

    patch.setattr(AdamW, "coefficients", lambda self, lr, step: [1 - lr * self.weight_decay, lr, 1.0])
    return job


def _no_smoothing(patch: pytest.MonkeyPatch, job: Job) -> Job:
    """The learner does not get the label smoothing that the settings ask for."""
    plain = job.config.optim.model_copy(update={"label_smoothing": 0.0})
    return _opened_with(patch, job, lambda config: config.model_copy(update={"optim": plain}))


def _no_clipping(patch: pytest.MonkeyPatch, job: Job) -> Job:
    plain = job.config.optim.model_copy(update={"max_grad_norm": None})
    return _opened_with(patch, job, lambda config: config.model_copy(update={"optim": plain}))


def _no_weight_decay(patch: pytest.MonkeyPatch, job: Job) -> Job:
    plain = job.config.optim.model_copy(update={"weight_decay": 0.0})
    return _opened_with(patch, job, lambda config: config.model_copy(update={"optim": plain}))


def _opened_with(patch: pytest.MonkeyPatch, job: Job, change: Callable[[Any], Any]) -> Job:
    right = job.backend.open
    patch.setattr(job.backend, "open", lambda config, model, initial: right(change(config), model, initial))
    return job


class _Changed:
    """A learner that gets other batches than it was given."""

    def __init__(self, learner: Any, change: Callable[[Batch], Batch]) -> None:
        self._learner = learner
        self._change = change

    def train_step(self, microbatches: Sequence[Batch], **more: Any) -> Any:
        return self._learner.train_step([self._change(batch) for batch in microbatches], **more)

    def evaluate(self, batches: Iterable[Batch]) -> Any:
        return self._learner.evaluate([self._change(batch) for batch in batches])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)


def _shifted_targets(patch: pytest.MonkeyPatch, job: Job) -> Job:
    """Each position learns the token after the next one, as a second shift inside a model would have it."""

    def shifted(batch: Batch) -> Batch:
        targets = np.full_like(batch.targets, IGNORE)
        targets[:, :-1] = batch.targets[:, 1:]
        return replace(batch, targets=targets)

    right = job.backend.open
    patch.setattr(job.backend, "open", lambda *args: _Changed(right(*args), shifted))
    return job


class _OtherBatches:
    """Data of which one batch is not as it should be."""

    def __init__(self, data: TrainingData, change: Callable[[Batch], Batch], *, index: int) -> None:
        self._data = data
        self._change = change
        self._index = index

    def epoch(self, epoch: int) -> list[Batch]:
        batches = list(self._data.epoch(epoch))
        batches[self._index] = self._change(batches[self._index])
        return batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


def _other_token(patch: pytest.MonkeyPatch, job: Job) -> Job:
    """One input token of the third step is another."""

    def changed(batch: Batch) -> Batch:
        inputs = batch.inputs.copy()
        inputs[0, 0] += 1
        return replace(batch, inputs=inputs)

    data: Any = _OtherBatches(job.data, changed, index=4)
    return replace(job, data=data)


def _prompt_targets(patch: pytest.MonkeyPatch, job: Job) -> Job:
    """The second step takes a loss on a token of the question."""

    def changed(batch: Batch) -> Batch:
        targets = batch.targets.copy()
        targets[0, 0] = batch.inputs[0, 1]
        return replace(batch, targets=targets)

    data: Any = _OtherBatches(job.data, changed, index=2)
    return replace(job, data=data)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, Job], Job]] = {
    "misread theta": _misread_theta,
    "no window": _no_window,
    "scale": _scale,
    "no bias correction": _no_bias_correction,
    "no smoothing": _no_smoothing,
    "no clipping": _no_clipping,
    "no weight decay": _no_weight_decay,
    "shifted targets": _shifted_targets,
    "other token": _other_token,
    "prompt targets": _prompt_targets,
}


# --- the process ------------------------------------------------------------------------------------------------------


def record_jobs(backend: str, jobs: list[dict[str, Any]]) -> None:
    """For each job: the settings `sections` for `steps` steps, with `fault` if there is one, recorded in `out`."""
    for plain in jobs:
        settings = Settings(make_config(**plain["sections"], backend=backend), {})
        config, _ = certified(settings, steps=plain["steps"])
        with pytest.MonkeyPatch.context() as patch:
            job = prepare(config, choose_bits=False)
            if fault := plain.get("fault"):
                job = FAULTS[fault](patch, job)
            learner = job.backend.open(job.config, job.model, job.adapter)
            try:
                write_record(Path(plain["out"]), record_training(job, learner))
            finally:
                learner.close()


def record_side(backend: str, jobs: list[dict[str, Any]]) -> None:
    """`record_jobs` in a fresh interpreter."""
    code = (
        "import json, sys\nfrom tests.parity.sides import record_jobs\n"
        "record_jobs(sys.argv[1], json.loads(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, backend, json.dumps(jobs, default=str)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
