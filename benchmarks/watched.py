"""A run of the tool itself, in this process, with a clock at its parts: rows, loading, evaluations, steps.

Nothing of the run is changed: it gets settings as `cli.py train` does, and goes through `core.workflow.train`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.common import Result, peak_resident_bytes

if TYPE_CHECKING:
    from core.config import RunConfig

GUARD_OFF = ("guard.patience=null", "schedule.name=constant", "schedule.warmup_ratio=0")
"""Every step is taken, each at the same rate."""


@dataclass
class Clock:
    """Seconds of a run's parts."""

    rows: float = 0.0
    """Reading, tokenising and batching the rows, before the model is loaded."""
    load: float = 0.0
    """From the model's folder to a learner."""
    evaluations: list[float] = field(default_factory=list)
    """Of the validation split and of the probe, in turn."""
    loaded_at: float = 0.0
    """Seconds after the process's start when the model was there."""
    loaded_bytes: int = 0
    """Memory then in use."""


def since_start() -> float:
    """Seconds since this process began."""
    import psutil

    return time.time() - float(psutil.Process().create_time())


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which notes how long each call took."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = function(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return found

    return call


@contextmanager
def clock_at(
    clock: Clock, backend: str, *, on_learner: Callable[[Any], object] = lambda learner: None
) -> Iterator[None]:
    """Within it, a run of `backend` in this process is timed; `on_learner` gets its learner."""
    import backends
    from core.workflow import job

    kind: Any = type(backends.get(backend))

    def opened(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        learner = load(*args, **kwargs)
        clock.load += time.perf_counter() - began
        clock.loaded_at, clock.loaded_bytes = since_start(), learner.memory().current_bytes
        learner.evaluate = timed(learner.evaluate, clock.evaluations)
        on_learner(learner)
        return learner

    def read(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        rows = load_rows(*args, **kwargs)
        clock.rows += time.perf_counter() - began
        return rows

    load, load_rows = kind.open, job.load_rows
    with patch.object(kind, "open", opened), patch.object(job, "load_rows", read):
        yield


def watched_train(
    assignments: Sequence[str], *, backend: str, run: Path, on_learner: Callable[[Any], object] = lambda learner: None
) -> Result:
    """Trains as `cli.py train --set … --set …` would, to the last step, and says how long each part took.

    Args:
        assignments: settings, all but backend and output.
        run: the run folder.
    """
    from rich.console import Console

    from core.settings import resolve
    from core.workflow.train import train

    clock = Clock()
    settings = resolve(assignments=[*assignments, f"backend={backend}", f"output={run}"])
    with clock_at(clock, backend, on_learner=on_learner):
        code = train(settings, console=Console(file=sys.stderr))
    assert code == 0, f"the run ended with {code}"
    return _read(run, clock, settings.config)


def _read(run: Path, clock: Clock, config: RunConfig) -> Result:
    """What the clock and the run folder say."""
    from core.checkpoint import Checkpointer

    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["steps"] == summary["total_steps"], "the run stopped early"
    last = Checkpointer(run, keep=config.checkpoint.keep).latest()
    assert last is not None and last.step == summary["steps"]
    total, every = summary["steps"], config.eval.every
    count = num_evaluations(total, every)
    # after the last evaluation the saved adapter is checked; that is no evaluation of the split
    evaluations = clock.evaluations[: 2 * count]
    assert len(evaluations) == 2 * count
    store = summary["prefix_store"] or {}
    return {
        "rows_seconds": clock.rows,
        "load_seconds": clock.load,
        "loaded_at": clock.loaded_at,
        "loaded_gb": clock.loaded_bytes / 1e9,
        "fill_seconds": store.get("seconds", 0.0),
        "filled_rows": store.get("computed_rows", 0),
        "steps": total,
        "steps_seconds": last.trainer["progress"]["train_seconds"],
        "evaluation_seconds": evaluations[0::2],
        "probe_seconds": evaluations[1::2],
        "base_loss": summary["base_val_loss"],
        "own_loss": summary["final_val_loss"],
        "best_step": summary["best_step"],
        "store_bytes": store_bytes(),
        **peaks(config.backend, config.device),
    }


def num_evaluations(total_steps: int, every: int) -> int:
    """Before the first step, every so many, and after the last."""
    return 1 + total_steps // every + (total_steps % every > 0)


def store_bytes() -> int:
    """What the prefix store takes on the disk; the caller has made TWINKEEL_CACHE a folder of its own."""
    root = Path(os.environ["TWINKEEL_CACHE"]) / "prefix"
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def peaks(backend: str, device: str) -> Result:
    """Peak of the resident memory, and of the accelerator's where there is one, in GB."""
    found = {"resident_gb": peak_resident_bytes() / 1e9}
    if backend == "mlx" and device != "cpu":
        import mlx.core as mx

        if mx.metal.is_available():
            found["device_gb"] = mx.get_peak_memory() / 1e9
    if backend == "cuda" and device != "cpu":
        import torch

        if torch.cuda.is_available():
            found["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found | {"peak_gb": found.get("device_gb", found["resident_gb"])}
