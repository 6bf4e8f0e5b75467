"""A run folder to watch, and what `monitor` prints of one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from core import monitor
from core.config import RunConfig, to_plain
from core.journal import Journal
from core.run import RunLock, RunState

TOTAL, EVERY = 120, 50


class FakeRun:
    """A run folder as the trainer writes it: 2 s a step, 10 s an evaluation, a record every 10 steps."""

    def __init__(self, folder: Path, **state: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        config = RunConfig.model_validate({"guard": {"grades": [0.04, 0.2, 0.4]}})
        (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
        self.lock = RunLock(folder)
        self.journal = Journal(folder)
        self.time = 0.0
        initial = {
            "backend": "cuda",
            "model": "org/Mistral-7B",
            "precision": "nf4",
            "rank": 16,
            "total_steps": TOTAL,
            "epochs": 3,
            "eval_every": EVERY,
            "patience": 3,
            "memory_total_gb": 24.0,
        }
        self.state = RunState(folder, initial | state)
        self.state.update(status="running", phase="training", step=0, epoch=0.0, elapsed_seconds=0.0)

    def record(self, step: int, **values: Any) -> None:
        self.time += 2.0 * 10 if step else 0.0
        self.time += 10.0 if "val_loss" in values else 0.0
        self.journal.append(
            {
                "step": step,
                "epoch": step / 40,
                "loss": 2.0 - step / 1000 if step else None,
                "lr": 1e-4 if step else None,
                "grad_norm": 0.5 if step else None,
                "tokens_per_second": 1234.5 if step else None,
                "memory_gb": 21.4,
                "time": self.time,
                **values,
            }
        )
        self.state.update(step=step, epoch=step / 40, elapsed_seconds=self.time, patience_left=3)

    def evaluation(self, step: int, val: float, probe: float, grade: str = "GOOD") -> None:
        gap = val - probe
        self.record(
            step,
            val_loss=val,
            probe_loss=probe,
            gap=gap,
            gap_low=gap - 0.03,
            gap_high=gap + 0.05,
            grade=grade,
            best_step=step or None,
            best_val_loss=val if step else None,
        )

    def until_60(self) -> FakeRun:
        self.evaluation(0, 2.6, 2.58, "EXCELLENT")
        for step in (10, 20, 30, 40):
            self.record(step)
        self.evaluation(50, 1.9, 1.8)
        self.record(60)
        self.state.update(base_val_loss=2.6, best_step=50, best_val_loss=1.9, last_checkpoint_step=50)
        return self

    def die(self) -> None:
        self.lock.release()


def text(snapshot: monitor.Snapshot, width: int, height: int | None = None, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, color_system=None)
    console.print(monitor.render(snapshot, width, height))
    file.flush()
    return raw.getvalue().decode(encoding)
