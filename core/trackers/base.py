"""What a tracker is to us: a small object that takes a run's points, and the table of those that there are.

A tracker lives in a process of its own (`core.trackers.worker`), so it may block, print or break as it likes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FOLDER = "trackers"
"""In the run folder: for each tracker what it has (`<name>.json`) and what its library said (`<name>.log`)."""

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Point:
    """One record of the journal as trackers take it."""

    step: int
    time: float
    """When, in seconds since 1970: a function of the record, so that a point that is sent twice is the same twice."""
    values: Mapping[str, float]
    """Such as `train/loss`: see `core.trackers.points`."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Which run it is."""

    folder: Path
    home: Path
    """Where a tracker that writes files keeps them: the run folder, or for a fold the folder of all folds, so that
    they are seen together."""
    run_id: str
    """Ours, the same through all stops, in 12 letters and digits."""
    name: str
    project: str
    group: str | None
    """Of a fold: what its folds have in common."""
    started: float
    """When the run began, in seconds since 1970."""
    config: Mapping[str, Value]
    """Settings by their dotted names, and a few facts."""


@dataclass(frozen=True, slots=True)
class Started:
    """What a tracker says when it is ready."""

    last_step: int | None
    """Newest step that it has of this run; None: nothing. What follows is sent."""
    where: str
    """Where to look, or what to type for it, in a line."""


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended, or stands when it was killed or still runs."""

    status: str
    """As in `training_state.json`; `running` when nothing has ended it."""
    step: int
    """The last one that was sent; 0 if none was."""
    summary: Mapping[str, Value]
    """Numbers and words of `training_summary.json`; empty when there is none, or the tracker has it already."""
    pictures: Mapping[str, Path]
    """Name -> PNG file."""


class Tracker(Protocol):
    """One tracker's run. Any exception means that this tracker is lost for now, never the run."""

    def start(self, facts: RunFacts, *, last_step: int | None) -> Started:
        """Opens the tracker's run, or goes on with it; `last_step`: what it had by our own count."""
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Takes points, in the order of their steps, each step once."""
        ...

    def finish(self, end: End) -> None:
        """Returns when all that was logged is where it belongs."""
        ...


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """An entry of the table."""

    place: str
    """`module:class`, imported in the tracker's own process only."""
    packages: tuple[tuple[str, ...], ...]
    """Distributions that are needed; of each tuple any one will do."""


KINDS: dict[str, TrackerKind] = {
    "wandb": TrackerKind("core.trackers.wandb:WandbTracker", (("wandb",),)),
    "tensorboard": TrackerKind("core.trackers.tensorboard:TensorBoardTracker", (("tensorboard",),)),
    "trackio": TrackerKind("core.trackers.trackio:TrackioTracker", (("trackio",),)),
    "mlflow": TrackerKind(
        "core.trackers.mlflow:MlflowTracker", (("mlflow-skinny", "mlflow"), ("sqlalchemy",), ("alembic",))
    ),
}


def load(place: str) -> Tracker:
    """The tracker at `module:class`."""
    module, _, name = place.partition(":")
    tracker: Any = getattr(importlib.import_module(module), name)()
    return tracker  # type: ignore[no-any-return]
