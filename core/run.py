"""The run folder: its name, its lock, its state file, and how to find the newest one."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from core.errors import UserError
from core.files import disk_errors, read_json, to_json, write_atomic

RUNS = Path("runs")
CONFIG = "config.yaml"
STATE = "training_state.json"
SUMMARY = "training_summary.json"
LOG = "training.log"
CURVES = "training_curves.png"
EXPERTS_PLOT = "experts.png"
ADAPTERS = "adapters"
ROW_LOSSES = "row_losses"
SPLIT = "split.csv"
LOCK = ".lock"
FOLDS = "folds.json"
"""In the parent folder of a run's folds: the plan and how far it is."""
_LOCK_ATTEMPTS = 3

ENDED = ("finished", "early_stopped", "interrupted", "failed")
"""Values of `status` for a run that no process is training."""
COMPLETE = ("finished", "early_stopped")


def new_run_folder(output: str | None, *, data_name: str) -> Path:
    """The folder of a new run: `output`, or `runs/<data>-<MMDD>-<HHMM>` with a number when that exists.

    Raises:
        UserError: `output` exists and is not an empty folder.
    """
    if output is not None:
        path = Path(output)
        # a lock alone was left by a process that was killed before it wrote anything
        if path.exists() and (not path.is_dir() or {item.name for item in path.iterdir()} - {LOCK}):
            is_run = (path / CONFIG).is_file()
            other = f"continue it with: python cli.py train --resume {shlex.quote(output)}" if is_run else "remove it"
            raise UserError(f"{path}: already exists", hint=f"choose another --output, or {other}")
        return path
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", data_name.split(".")[0]).strip("-") or "run"
    base = RUNS / f"{stem}-{datetime.now():%m%d-%H%M}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def claim_run_folder(output: str | None, *, data_name: str) -> tuple[Path, RunLock]:
    """Makes the folder of a new run and locks it, so that of two that start at once neither writes into the other's.

    Raises:
        UserError: `output` is taken, or another process has just taken it.
    """
    while True:
        folder = new_run_folder(output, data_name=data_name)
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir(exist_ok=output is not None)
            except FileExistsError:
                continue  # a run that started in the same minute was quicker
        lock = RunLock(folder)
        if (folder / CONFIG).exists():
            lock.release()
            new_run_folder(output, data_name=data_name)
        return folder, lock


class NewFolder:
    """A folder that a command makes; use as a context. What was made goes away at the end, unless `keep` was called.

    So a command that is interrupted or fails does not stand in the way of its own repetition.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_kept = False

    def keep(self) -> None:
        self._is_kept = True

    def __enter__(self) -> NewFolder:
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._before = set(self._folder.iterdir())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_kept:
            return
        for path in set(self._folder.iterdir()) - self._before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self._made:
            with suppress(OSError):  # somebody else has put something there meanwhile
                path.rmdir()


def newest_run(root: Path = RUNS) -> Path:
    """The run, or the folds, that were started last.

    Raises:
        UserError: there is none.
    """
    states = sorted([*root.glob(f"*/{STATE}"), *root.glob(f"*/{FOLDS}")], key=_started)
    if not states:
        raise UserError(f"{root}: no runs yet", hint="start one with: python cli.py train --preset quickstart")
    running = [state for state in states if is_locked(state.parent)]  # a resumed run may have been started long ago
    return (running or states)[-1].parent


def _started(state_file: Path) -> tuple[float, float]:
    state = read_json(state_file)
    started = state.get("started") if isinstance(state, dict) else None
    return (float(started) if isinstance(started, int | float) else 0.0, state_file.stat().st_mtime)


def existing_run(path: str | None) -> Path:
    """The run folder that a command means: the one named, or the newest.

    Raises:
        UserError: the folder is not a run.
    """
    if path is None:
        return newest_run()
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not a run folder (no {CONFIG})", hint="see the runs with: ls runs")
    return folder


class RunLock:
    """Keeps a second process out of a run folder; use as a context.

    The system releases it when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        with disk_errors(path):
            self._file = open(path, "a")  # noqa: SIM115 (held for the life of the run)
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    return  # this file system has no locks: better unguarded than no run at all
                # a monitor that looks whether the run is alive holds the lock for an instant
                time.sleep(0.05 * (attempt + 1 < _LOCK_ATTEMPTS))
        self._file.close()
        raise UserError(
            f"{folder}: another process is training here",
            hint=f"watch it with: python cli.py monitor {folder}",
        )

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        self._file.close()


def is_locked(folder: Path) -> bool:
    """Whether a process on this machine is training in the folder."""
    try:
        file = open(folder / LOCK)  # noqa: SIM115
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


class RunState:
    """`training_state.json`: where the run stands, for `monitor` and `--resume`. Replaced whole at each update."""

    def __init__(self, folder: Path, initial: Mapping[str, Any]) -> None:
        self._path = folder / STATE
        self._values: dict[str, Any] = {
            "format": 1,
            "status": "starting",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.time(),
            "error": None,
            **initial,
        }

    def update(self, **values: Any) -> None:
        self._values |= values
        self._values["updated"] = time.time()
        write_atomic(self._path, to_json(self._values))

    def __getitem__(self, name: str) -> Any:
        return self._values.get(name)


def read_state(folder: Path) -> dict[str, Any]:
    """The state file's content; empty when it is missing or damaged."""
    state = read_json(folder / STATE)
    return state if isinstance(state, dict) else {}


def write_split(folder: Path, rows: Iterable[tuple[str, int, str]]) -> None:
    """Writes `split.csv`: for each row its split, its number there (as in `row_losses`) and where it was read."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("split", "row", "origin"))
    writer.writerows(rows)
    write_atomic(folder / SPLIT, text.getvalue())


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes `training_summary.json`, the verdict."""
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
