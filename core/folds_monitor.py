"""`monitor` on the parent of folds: the run that is trained now, and the table of all folds below it."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from core.config import RunConfig
from core.errors import UserError
from core.folds import FINAL, FoldResult, FoldsVerdict, fold_name, judge, read_folds, read_plan
from core.folds_screen import table_lines, verdict_lines
from core.monitor import RunReader, Snapshot
from core.run import COMPLETE, CONFIG, ENDED, is_locked, read_state
from core.screen import wrapped
from core.settings import load_config


@dataclass(frozen=True, slots=True)
class FoldsView:
    """The folds of a parent folder at one moment."""

    folder: Path
    status: str
    """Of the whole: `running`, `finished`, `failed`, `interrupted`, or `died`: nobody trains any more."""
    results: tuple[FoldResult, ...]
    verdict: FoldsVerdict | None
    """On the folds that are done."""
    has_final: bool
    start: str
    """What the runs start from, in words."""

    @property
    def has_ended(self) -> bool:
        return self.status in (*ENDED, "died")

    @property
    def exit_code(self) -> int:
        return 1 if self.status in ("failed", "died") else 0

    def lines(self, width: int) -> list[Text]:
        """The table and, at the end, the verdict or how to go on."""
        said: list[str] = []
        if self.status in ("finished", "failed"):
            failed = [fold_name(result.fold) for result in self.results if result.status not in COMPLETE]
            said = verdict_lines(self.folder, self.verdict, failed=failed, has_final=self.has_final, start=self.start)
        elif self.has_ended:
            said = [f"continue with: python cli.py train --resume {self.folder}"]
        lines = [Text(), *table_lines(self.results, self.verdict)]
        return [*lines, Text(), *(Text(part) for line in said for part in _parts(line, width))] if said else lines

    def to_json(self) -> dict[str, Any]:
        values = {} if self.verdict is None else self.verdict.to_dict()
        results = [result.to_dict() for result in self.results]
        return {"folder": str(self.folder), "status": self.status, **values, "results": results}


def _parts(line: str, width: int) -> list[str]:
    """Broken between words and, where one word is too long, in it: a command must be there whole."""
    parts = wrapped(line, width).split("\n")
    return [part[start : start + width] for part in parts for start in range(0, max(len(part), 1), width)]


class FoldsReader:
    """Follows the runs of a parent folder, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._current: Path | None = None
        self._runs: RunReader

    def poll(self) -> Snapshot:
        """The run that is trained now, or was last, with the folds."""
        plan = read_plan(self._folder)
        view = self._view(plan)
        current = self._folder / str(plan.get("current") or self._last(view.results))
        if current != self._current:
            self._current, self._runs = current, RunReader(current)
        return replace(self._runs.poll(), folds=view)

    def _last(self, results: Sequence[FoldResult]) -> str:
        """The run that came last, when none is trained."""
        names = [FINAL, *(fold_name(result.fold) for result in reversed(results))]
        return next((name for name in names if (self._folder / name / CONFIG).is_file()), fold_name(1))

    def _view(self, plan: dict[str, Any]) -> FoldsView:
        # looked at before the plan's status is believed: a process writes it while it holds the lock
        is_dead = plan.get("host") == socket.gethostname() and not is_locked(self._folder)
        plan = read_plan(self._folder) or plan
        status = str(plan.get("status") or "unknown")
        try:
            config = load_config(self._folder / CONFIG)
        except (OSError, UserError):
            config = RunConfig()  # the grades' bounds are the defaults
        results = tuple(read_folds(self._folder))
        return FoldsView(
            folder=self._folder,
            status="died" if status == "running" and is_dead else status,
            results=results,
            verdict=judge(results, config.guard),
            has_final=read_state(self._folder / FINAL).get("status") in COMPLETE,
            start=config.start,
        )
