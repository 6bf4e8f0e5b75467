"""Run folders as a finished run leaves them, with the numbers that a test gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from core.config import RunConfig, to_plain
from core.journal import Journal
from core.protocols import RowLosses
from core.row_losses import write_row_losses
from core.run import RunState, write_split, write_summary

STEPS = (0, 10, 20)
VAL = (3.0, 2.0, 2.2)
PROBE = (2.98, 1.9, 1.5)


def losses(nll: Sequence[float], targets: Sequence[int]) -> RowLosses:
    return RowLosses(np.arange(len(nll)), np.array(nll, float), np.array(targets, np.int64))


def make_run(
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    status: str = "finished",
    data: str = "d.jsonl",
    val: Sequence[float] = VAL,
    probe: Sequence[float] = PROBE,
    val_nll: Mapping[int, Sequence[float]] | None = None,
    targets: Sequence[int] = (1, 2, 3, 4),
    origins: Sequence[str] | None = None,
    state: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """A run with an evaluation at each of `STEPS`, the best at 10 of 20.

    Args:
        val_nll: step -> nats of each validation row; by default as `val` has it for every token.
        summary: changes to it; it has no `status` of a killed run.
    """
    folder.mkdir(parents=True)
    config = RunConfig.model_validate(settings or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    _write_journal(folder, val, probe)
    written = val_nll or {step: [loss * count for count in targets] for step, loss in zip(STEPS, val, strict=True)}
    for step, nll in written.items():
        mean = probe[STEPS.index(step)]
        write_row_losses(folder, step, validation=losses(nll, targets), probe=losses([2 * mean] * 3, [2, 2, 2]))
    names = origins or [f"{data}:{number}" for number in range(1, len(targets) + 1)]
    rows = [("train", number, f"{data}:{100 + number}") for number in range(3)]
    write_split(folder, [*rows, *(("validation", number, name) for number, name in enumerate(names))])
    RunState(
        folder,
        {
            "backend": "cuda",
            "model": "org/model",
            "data": data,
            "device": "CPU (2 cores)",
            "precision": "32-bit weights",
            "num_train_rows": 3,
            "num_val_rows": len(targets),
            "total_steps": 20,
            "steps_per_epoch": 10,
            "epochs": 2.0,
            "best_step": 10,
            **(state or {}),
        },
    ).update(status=status, step=20)
    write_summary(folder, _summary(status, val, probe, len(targets)) | dict(summary or {}))
    return folder


def _write_journal(folder: Path, val: Sequence[float], probe: Sequence[float]) -> None:
    journal = Journal(folder)
    for step, loss, other in zip(STEPS, val, probe, strict=True):
        journal.append(
            {
                "step": step,
                "epoch": step / 10,
                "loss": None if step == 0 else loss + 0.1,
                "lr": None if step == 0 else 1e-4,
                "val_loss": loss,
                "probe_loss": other,
                "gap": loss - other,
                "gap_low": loss - other - 0.02,
                "gap_high": loss - other + 0.03,
                "grade": "GOOD",
                "time": float(step),
            }
        )
    journal.close()


def _summary(status: str, val: Sequence[float], probe: Sequence[float], num_val_rows: int) -> dict[str, Any]:
    return {
        "status": status,
        "start": "base model",
        "model": "org/model",
        "error": None,
        "steps": 20,
        "total_steps": 20,
        "base_val_loss": val[0],
        "best_val_loss": val[1],
        "best_step": 10,
        "best_epoch": 1,
        "probe_loss": probe[1],
        "gap": val[1] - probe[1],
        "gap_low": val[1] - probe[1] - 0.02,
        "gap_high": val[1] - probe[1] + 0.03,
        "grade": "GOOD",
        "not_judged": None,
        "routing": None,
        "base_gap": val[0] - probe[0],
        "num_train_rows": 3,
        "num_val_rows": num_val_rows,
        "num_target_tokens": 1234,
        "tokens_per_second": 321.0,
        "peak_memory_gb": 1.5,
        "wall_seconds": 65.0,
    }


def bind_to_data(folder: Path, fingerprint: str) -> None:
    """A checkpoint that says which data the run is bound to."""
    path = folder / "checkpoints" / "epoch1_step10" / "trainer.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"identity": {"data": fingerprint}}))
