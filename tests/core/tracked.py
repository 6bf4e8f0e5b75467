"""A run folder for trackers, whose journal can be cut back as a resumed run cuts it."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from core.config import RunConfig, to_plain
from core.journal import Journal
from core.run import RunState, write_summary
from core.trackers.cursor import path_of

STARTED = 1_700_000_000.0
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""One pixel."""


class TrackedRun:
    """Writes what a training writes; `loss` and `val_loss` are functions of the step."""

    def __init__(self, folder: Path, **log: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        config = RunConfig.model_validate({"log": log, "lora": {"rank": 4}})
        (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
        self.state = RunState(folder, {"started": STARTED, "model": "tiny", "backend": "cuda"})
        self.state.update(status="running")
        self.journal = Journal(folder)
        self.bytes = 0

    def record(self, step: int, *, speed: float = 100.0) -> None:
        record: dict[str, Any] = {
            "step": step,
            "epoch": step / 40,
            "loss": None if step == 0 else loss(step),
            "lr": 1e-4,
            "tokens_per_second": speed,
            "time": float(step),
        }
        if step % 20 == 0:
            record |= {"val_loss": 3.0 - step / 200, "gap": 0.2, "grade": "MODERATE", "best_step": None}
            record |= {"general_loss": 1.5, "routing": {"entropy": 0.75, "collapsed": [], "shares": [[0.5, 0.5]]}}
        self.journal.append(record)

    def records(self, *steps: int, speed: float = 100.0) -> None:
        for step in steps:
            self.record(step, speed=speed)

    def checkpoint(self) -> None:
        """To here the journal is cut back when the run goes on."""
        self.bytes = self.journal.num_bytes

    def resume(self) -> None:
        self.journal.close()
        self.journal = Journal(self.folder, keep_bytes=self.bytes)
        self.state.update(status="running")

    def end(self, status: str = "finished", **summary: Any) -> None:
        write_summary(self.folder, {"status": status, "best_val_loss": 2.75, "grade": "MODERATE", **summary})
        (self.folder / "training_curves.png").write_bytes(PNG)
        self.state.update(status=status)


def loss(step: int) -> float:
    """Exact in 32 bits."""
    return 2.0 - step / 64


def until(condition: Callable[[], object]) -> None:
    """Waits for what another process does; the suite's timeout ends it."""
    while not condition():
        time.sleep(0.02)


def last_step(folder: Path, name: str) -> Any:
    file = path_of(folder, name)
    return json.loads(file.read_text())["last_step"] if file.is_file() else None


def text_of(console: Console) -> str:
    """What was printed."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
