"""Trackio: a SQLite file in the run folder, or what TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any

from core.trackers.base import End, Point, RunFacts, Started
from core.trackers.environment import without_credentials

FOLDER, VARIABLE = "trackio", "TRACKIO_DIR"
_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioTracker:
    """See `core.trackers.base.Tracker`. Trackio knows a run by its name, so ours is part of it."""

    def start(self, facts: RunFacts, *, last_step: int | None) -> Started:
        is_own = VARIABLE not in os.environ
        if is_own:  # read when the package is imported
            os.environ[VARIABLE] = str((facts.home / FOLDER).absolute())
        import trackio

        self._run: Any = trackio.init(
            project=facts.project,
            name=f"{facts.name}-{facts.run_id[:4]}",
            group=facts.group,
            config=dict(facts.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._project = facts.project
        # of a run that goes on, trackio asks where it is kept which step comes next
        self._last_step = self._run._next_step - 1
        remote = next((os.environ[name] for name in _REMOTE if os.environ.get(name)), None)
        self._is_local = remote is None
        where = _where(facts, is_own=is_own) if remote is None else without_credentials(remote)
        return Started(None if self._last_step < 0 else self._last_step, where)

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log(dict(point.values), step=point.step)
            self._last_step = point.step

    def finish(self, end: End) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        last: dict[str, Any] = {f"summary/{name}": value for name, value in end.summary.items() if value is not None}
        last |= {name: trackio.Image(path) for name, path in end.pictures.items()}
        if last:
            self._run.log(last, step=end.step)
        self._run.finish()
        # it warns of what it could not write, and goes on
        if self._is_local:
            kept = SQLiteStorage.get_max_step_for_run(self._project, self._run.name, run_id=self._run.id)
            if self._last_step >= 0 and kept != self._last_step:
                raise OSError(f"step {self._last_step} was not written; see its log")
        elif SQLiteStorage.has_pending_data(self._project):
            raise ConnectionError("not all was delivered")


def _where(facts: RunFacts, *, is_own: bool) -> str:
    show = f"trackio show --project {shlex.quote(facts.project)}"
    return f"{VARIABLE}={shlex.quote(str(facts.home / FOLDER))} {show}" if is_own else show
