"""`track`: sends a run's records to trackers, as if they had been there while it ran."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from core.errors import UserError
from core.folds import FINAL, fold_name, is_folds, read_plan
from core.journal import JOURNAL
from core.records import whole
from core.trackers.process import TrackerProcess, check_installed, command, log_of

FAILED = 1
"""Exit code when a tracker has not got everything."""
SILENCE_SECONDS = 120.0
"""A tracker that says nothing for so long is given up."""
_LOCK_SECONDS = 2.0
_POLL_SECONDS = 0.05


def track(folder: Path, *, to: Sequence[str], console: Console) -> int:
    """Sends what each tracker does not have yet, of one run or of all folds; returns the exit code.

    Raises:
        UserError: a package is not installed, or there is nothing to send.
    """
    names = list(dict.fromkeys(to))
    check_installed(names, said_by="--to")
    runs = runs_of(folder)
    if not runs:
        raise UserError(f"{folder}: no records yet", hint=f"watch it with: python cli.py monitor {folder}")
    failed: dict[Path, list[str]] = {}
    for run in runs:
        for process in _send(run, names):
            _say(console, run, process, with_run=len(runs) > 1)
            if process.progress.error is not None:
                failed.setdefault(run, []).append(process.name)
    for run, left in failed.items():
        console.print(Text(f"  again with: {command(run, *left)}"), soft_wrap=True)
    return FAILED if failed else 0


def runs_of(folder: Path) -> list[Path]:
    """The run, or the folds and the run after them, as far as they have records."""
    runs = [folder]
    if is_folds(folder):
        num_folds = whole(read_plan(folder).get("folds")) or 0
        runs = [*(folder / fold_name(fold) for fold in range(1, num_folds + 1)), folder / FINAL]
    return [run for run in runs if (run / JOURNAL).is_file() and (run / JOURNAL).stat().st_size]


def _send(run: Path, names: Sequence[str]) -> list[TrackerProcess]:
    """To all trackers at once; returns them when each has ended or was given up."""
    processes = [
        TrackerProcess(run, name, on_change=lambda process: None, lock_seconds=_LOCK_SECONDS) for name in names
    ]
    try:
        for process in processes:
            process.close_input()
        for process in processes:
            while not process.has_ended:
                if time.monotonic() - process.heard > SILENCE_SECONDS:
                    process.kill(f"silent for {SILENCE_SECONDS:.0f} s")
                time.sleep(_POLL_SECONDS)
    finally:
        for process in processes:
            if not process.has_ended:
                process.kill("stopped")
    return processes


def _say(console: Console, run: Path, process: TrackerProcess, *, with_run: bool) -> None:
    progress = process.progress
    name = f"{run.name} · {process.name}" if with_run else process.name
    if progress.error is not None:
        line = Text(f"{name}: {progress.error}; its library's own words: {log_of(run, process.name)}")
        line.stylize("red", 0, len(name))
    elif progress.num_records:
        line = Text(f"{name}: {progress.num_records} record{'' if progress.num_records == 1 else 's'} sent")
    else:
        line = Text(f"{name}: has all of it already")
    console.print(line, soft_wrap=True)
    if progress.error is None and progress.where:
        console.print(Text(f"  {progress.where}"), soft_wrap=True)
