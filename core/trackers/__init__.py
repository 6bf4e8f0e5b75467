"""Experiment trackers: W&B, TensorBoard, Trackio, MLflow. The journal is the source; each tracker follows it.

`process` starts one process for each tracker beside the training (`tracking`) or after it (`command.track`); `worker`
is what runs there: it reads `metrics.jsonl`, knows by `cursor` what was sent, and calls one of `wandb`, `tensorboard`,
`trackio`, `mlflow` behind `base.Tracker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def track(folder: Path, *, to: Sequence[str], console: Console) -> int:
    """See `core.trackers.command.track`."""
    from core.trackers.command import track

    return track(folder, to=to, console=console)
