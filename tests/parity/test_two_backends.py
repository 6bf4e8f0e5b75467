"""MLX and PyTorch train the same adapter in float32, and each planted fault is found where it first shows.

Each backend records everything in one process of its own, so that neither loads the other's numerical libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.adapter import LORA_B
from core.parity import Report, compare
from core.parity_record import hash_tensors, read_record
from tests.backends.conftest import skip_without
from tests.parity.sides import FEW_STEPS, record_side, sections, write_rows
from tests.tiny import make_model

NUM_STEPS = 50
THETA = {"rope_theta": 100000.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama-old-rope": {**THETA},
    "llama-new-rope-tied": {**THETA, "new_rope_style": True, "tied": True},
    "mistral-window": {**THETA, "model_type": "mistral", "sliding_window": 6},
    "mixtral": {**THETA, "model_type": "mixtral", "new_rope_style": True},
}
EXPERTS = ["mlp.gate", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"]
"""The router too: each side must send every token to the same experts."""

# name -> model, changes to the settings
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-old-rope": ("llama-old-rope", {}),
    "llama-new-rope-tied": ("llama-new-rope-tied", {}),
    "mistral-window": ("mistral-window", {}),
    "mixtral-attention": ("mixtral", {"lora": {"targets": "attention"}}),
    "mixtral-experts": ("mixtral", {"lora": {"targets": EXPERTS}}),
    "sgd": ("llama-old-rope", {"optim": {"name": "sgd", "momentum": 0.9, "lr": 0.1}}),
    "lion": ("llama-old-rope", {"optim": {"name": "lion", "lr": 3e-4}}),
    "adafactor": ("llama-old-rope", {"optim": {"name": "adafactor"}}),
}
DECAYS = {
    "strong-decay": ("llama-old-rope", {"optim": {"weight_decay": 1.0}}),
    "weak-decay": ("llama-old-rope", {"optim": {"weight_decay": 0.01, "lr": 2e-4}}),
}
"""Trained for few steps only; the second has the settings' defaults."""

# fault -> side it is planted on, model, where it must be found
FAULTS: dict[str, tuple[str, str, str, int | None]] = {
    "misread theta": ("mlx", "llama-old-rope", "base losses", 0),
    "no window": ("mlx", "mistral-window", "base losses", 0),
    "shifted targets": ("cuda", "llama-old-rope", "base losses", 0),
    "scale": ("cuda", "llama-old-rope", "gradient norm", 1),
    "no smoothing": ("mlx", "llama-old-rope", "gradient norm", 1),
    "no bias correction": ("mlx", "llama-old-rope", "loss", 2),
    "no weight decay": ("mlx", "strong-decay", "gradient norm", 2),
    "no clipping": ("mlx", "sgd", "loss", 2),
    "other token": ("mlx", "llama-old-rope", "inputs", 3),
    "prompt targets": ("cuda", "llama-old-rope", "targets", 2),
}
NO_DECAY = {"slow decay": ("llama-old-rope", NUM_STEPS), "weak decay": ("weak-decay", FEW_STEPS)}
"""MLX without weight decay, where it shows late, and where it is too small to be found, which is said."""


pytestmark = pytest.mark.timeout(600)  # the records of all tests are made in the first one


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records `<root>/<backend>/<training>`; few steps in `few-<training>`; with a fault in `<fault>`."""
    for backend in ("mlx", "cuda"):
        skip_without(backend)
    root = tmp_path_factory.mktemp("parity")
    rows = write_rows(root / "rows.jsonl")
    models = {name: make_model(root / "models" / name, **kw) for name, kw in MODELS.items()}
    plain = {name: sections(models[model], rows, **changes) for name, (model, changes) in (TRAININGS | DECAYS).items()}
    for backend in ("mlx", "cuda"):
        out = root / backend
        jobs = [{"sections": plain[name], "steps": NUM_STEPS, "out": out / name} for name in TRAININGS]
        few = {training for _, training, _, _ in FAULTS.values()} | set(DECAYS)
        jobs += [{"sections": plain[name], "steps": FEW_STEPS, "out": out / f"few-{name}"} for name in sorted(few)]
        jobs += [
            {"sections": plain[training], "steps": FEW_STEPS, "out": out / fault, "fault": fault}
            for fault, (side, training, _, _) in FAULTS.items()
            if side == backend
        ]
        if backend == "mlx":
            jobs += [
                {"sections": plain[training], "steps": steps, "out": out / name, "fault": "no weight decay"}
                for name, (training, steps) in NO_DECAY.items()
            ]
        record_side(backend, jobs)
    return root


def _compared(recorded: Path, name: str) -> Report:
    return compare(read_record(recorded / "mlx" / name), read_record(recorded / "cuda" / name))


@pytest.mark.parametrize("name", TRAININGS)
def test_the_same_training(recorded: Path, name: str) -> None:
    report = _compared(recorded, name)
    assert report.first is None, report.first
    assert report.verdict == "same" and report.exit_code == 0
    assert len(report.steps) == NUM_STEPS
    assert (report.a.backend, report.b.backend) == ("mlx", "cuda")
    assert max(step.loss_difference for step in report.steps) <= 1e-4
    assert max(step.norm_difference for step in report.steps) <= 1e-3
    assert max(row.difference for row in [*report.base_rows, *report.final_rows]) <= 1e-4
    assert max(tensor.difference for tensor in report.tensors) <= 1e-3


@pytest.mark.parametrize("name", TRAININGS)
def test_the_training_does_something(recorded: Path, name: str) -> None:
    """Clipping acts, every tensor moves and the loss falls: or there would be nothing to agree on."""
    record = read_record(recorded / "cuda" / name)
    norms = [step.grad_norm for step in record.steps]
    assert sum(norm > 0.5 for norm in norms) > NUM_STEPS / 2
    assert all(np.any(tensor) for key, tensor in record.adapter.items() if key.endswith(LORA_B))
    assert sum(record.rows.final_nll) < 0.98 * sum(record.rows.base_nll)
    assert record.initial_adapter != hash_tensors(record.adapter)
    rates = [step.lr for step in record.steps]
    assert rates[0] < max(rates) and rates[-1] < 0.1 * max(rates)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_where_it_first_shows(recorded: Path, fault: str) -> None:
    side, training, place, step = FAULTS[fault]
    good = _compared(recorded, f"few-{training}")
    assert good.verdict == "same", good.first
    names = {backend: fault if backend == side else f"few-{training}" for backend in ("mlx", "cuda")}
    report = compare(*(read_record(recorded / backend / name) for backend, name in names.items()))
    assert report.exit_code == 1
    assert report.first is not None
    assert (report.first.place, report.first.step) == (place, step), report.first
    assert report.verdict == ("not comparable" if place in ("inputs", "targets") else "different")


def test_a_weight_decay_that_shows_late_is_not_taken_for_rounding(recorded: Path) -> None:
    found = compare(read_record(recorded / "mlx" / "slow decay"), read_record(recorded / "cuda" / "llama-old-rope"))
    first = found.first
    assert first is not None and first.step is not None and 2 < first.step < NUM_STEPS
    assert "weight_decay=0: if they agree then" in first.hint and "rounding" not in first.hint


def test_a_weight_decay_that_is_too_weak_to_be_proven_is_named(recorded: Path) -> None:
    """A side that ignores it passes at the defaults in so few steps: so that is said, and with which value it shows."""
    weak = compare(read_record(recorded / "mlx" / "weak decay"), read_record(recorded / "cuda" / "few-weak-decay"))
    assert weak.verdict == "same"
    (line,) = (line for line in weak.unproven if "decay" in line)
    assert line.startswith("weight decay is too small here to be proven: 0.01 shortens the adapter by")
    enough = float(line.rpartition("=")[2])
    rates = sum(step.lr for step in weak.a.steps)
    assert rates * enough == pytest.approx(2e-3, rel=0.01)
    strong = _compared(recorded, "few-strong-decay")
    assert not [line for line in strong.unproven if "decay" in line]
    assert not _compared(recorded, "llama-old-rope").unproven, "everything shows over fifty steps"
