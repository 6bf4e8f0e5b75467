"""Weights & Biases: online with a key, else offline in the run folder, to be sent with `wandb sync`."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from typing import Any

from core.run import COMPLETE
from core.trackers.base import End, Point, RunFacts, Started
from core.trackers.environment import without_credentials
from core.trackers.wandb_files import last_step_in

FOLDER = "wandb"
MODE = "WANDB_MODE"
_EXIT_CODES = {"failed": 1, "interrupted": 130, **dict.fromkeys(COMPLETE, 0)}

_QUIET = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "disable_job_creation": True,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}
"""What the library would send of the machine, the code and the screen stays here."""


class WandbTracker:
    """See `core.trackers.base.Tracker`. Its steps are ours. Steps that it has are skipped: it refuses lower ones."""

    def start(self, facts: RunFacts, *, last_step: int | None) -> Started:
        os.environ["WANDB_SILENT"] = "true"
        os.environ.setdefault("WANDB_CACHE_DIR", str((facts.folder / FOLDER / "cache").absolute()))
        import wandb

        mode: Any = None if os.environ.get(MODE) else "online"
        why = ""
        if mode and not wandb.login(prompt=False, verify=False):
            mode, why = "offline", ", no key"
        self._step = -1
        kept = _last_kept(facts)
        self._run: Any = wandb.init(
            project=facts.project,
            id=facts.run_id,
            name=facts.name,
            group=facts.group,
            dir=str(facts.folder),
            config=dict(facts.config),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(**{name: value for name, value in _QUIET.items() if name in _fields(wandb)}),
        )
        if self._run.offline:
            command = f"wandb sync {shlex.quote(str(facts.folder / FOLDER))}/offline-run-*-{facts.run_id}"
            return Started(kept, f"offline{why}; upload with: {command}")
        at = int(self._run.starting_step)
        return Started(at - 1 if self._run.resumed and at > 0 else None, without_credentials(str(self._run.url)))

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, "_timestamp": point.time}, step=point.step)
            self._step, self._time = point.step, point.time

    def finish(self, end: End) -> None:
        import wandb

        if end.pictures and end.step == self._step:  # they belong to the newest step; an older one is refused
            pictures = {name: wandb.Image(str(path)) for name, path in end.pictures.items()}
            self._run.log({**pictures, "_timestamp": self._time}, step=end.step)
        self._run.summary.update({name: value for name, value in end.summary.items() if value is not None})
        self._run.finish(exit_code=_EXIT_CODES.get(end.status, 0))


def _last_kept(facts: RunFacts) -> int | None:
    """Newest step in this run's offline files. Those that a killed process left empty go: nothing can read them."""
    newest: int | None = None
    for file in sorted((facts.folder / FOLDER).glob(f"offline-run-*-{facts.run_id}/run-*.wandb")):
        step = last_step_in(file)
        if step is None:
            shutil.rmtree(file.parent)
        else:
            newest = step if newest is None else max(newest, step)
    return newest


def _fields(wandb: Any) -> Any:
    """Names of the settings that this version has."""
    return wandb.Settings.model_fields
