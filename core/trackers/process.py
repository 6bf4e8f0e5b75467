"""A run's trackers, seen from the process that trains or from `track`: their processes, and what they say."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.run import ENDED, read_state
from core.trackers.base import FOLDER, KINDS
from core.trackers.environment import environment, for_worker, one_line

_log = logging.getLogger("twinkeel")

FINISH_SECONDS = 60.0
"""What a finished run waits for its trackers at most."""
STOP_SECONDS = 10.0
"""Likewise one that was stopped: who stopped it wants to go."""
LOCK_SECONDS = 30.0
"""What a run that goes on waits for the tracker of the process that was killed."""
ORPHAN_SECONDS = 60.0
"""How long a tracker outlives a run that was killed, to send what is written already."""
NICENESS = 10
"""Of the trackers' processes: the training goes first where processors are few."""
_QUIET_SECONDS = 3.0
"""From where waiting is said."""
_POLL_SECONDS = 0.05


def check_installed(names: Sequence[str], *, said_by: str = "log.trackers") -> None:
    """Raises: UserError: the package of a tracker is not installed, or `.env` can't be read.

    Args:
        said_by: the setting or the flag that names the trackers.
    """
    for name in names:
        if absent := missing_packages(name):
            raise UserError(
                f"{said_by}: {name} needs {' and '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} "
                "not installed",
                hint=f'pip install -e ".[{name}]", or leave {name} out of {said_by}',
            )
    if names:
        environment()


def missing_packages(name: str) -> list[str]:
    """Distributions that a tracker needs and that are not there; nothing is imported."""
    return [some[0] for some in KINDS[name].packages if not any(map(_is_installed, some))]


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


@dataclass(slots=True)
class TrackerProgress:
    """What a tracker's process has said so far."""

    where: str | None = None
    num_records: int = 0
    """Sent by this process."""
    error: str | None = None
    is_done: bool = False


class TrackerProcess:
    """One tracker's process, and a thread that hears what it says."""

    def __init__(
        self, folder: Path, name: str, *, on_change: Callable[[TrackerProcess], None], lock_seconds: float
    ) -> None:
        self.name = name
        self.progress = TrackerProgress()
        self.heard = time.monotonic()
        """When it last said something."""
        self._on_change = on_change
        # the libraries leave their temporary files behind, some even when they end well
        self._scratch = tempfile.mkdtemp(prefix="twinkeel-")
        numbers = (str(lock_seconds), str(ORPHAN_SECONDS), str(NICENESS))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "core.trackers.worker", str(folder), name, KINDS[name].place, *numbers],
            env=for_worker() | {"TMPDIR": self._scratch},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours to decide on
            text=True,
        )
        self._listener = threading.Thread(target=self._listen, name=f"tracker {name}", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        progress = self.progress
        try:
            for line in self._process.stdout:
                self.heard = time.monotonic()
                with suppress(json.JSONDecodeError):  # a process that was killed may leave half a line
                    self._take(json.loads(line))
        finally:
            code = self._process.wait()
            shutil.rmtree(self._scratch, ignore_errors=True)
        if not progress.is_done and progress.error is None:
            progress.error = f"its process ended with {code if code >= 0 else signal.Signals(-code).name}"
            self._on_change(self)

    def _take(self, message: Mapping[str, Any]) -> None:
        progress, event = self.progress, message["event"]
        if event == "ready":
            progress.where = message["where"]
        elif event == "sent":
            progress.num_records += message["records"]
        elif event == "done":
            progress.is_done = True
        elif event == "failed":
            progress.error = message["error"]
        self._on_change(self)

    def close_input(self) -> None:
        """Says that the run's process is done: the tracker sends the rest and ends."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    @property
    def has_ended(self) -> bool:
        """Whether it is gone and all that it said was heard."""
        return not self._listener.is_alive()

    def kill(self, reason: str) -> None:
        """Ends a process that does not end by itself, with all that it started."""
        self.progress.error = self.progress.error or reason
        # Darwin refuses (EPERM) to signal a group that is all zombies
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class RunTrackers:
    """The trackers of a run that is training."""

    def __init__(self, folder: Path, names: Sequence[str], *, should_stop: Callable[[], bool]) -> None:
        """`should_stop`: whether somebody wants the process to end."""
        self._folder = folder
        self._should_stop = should_stop
        self._warned: set[str] = set()
        self._announced: dict[str, str] = {}
        self._processes: list[TrackerProcess] = []
        for name in names:
            try:
                self._processes.append(TrackerProcess(folder, name, on_change=self._hear, lock_seconds=LOCK_SECONDS))
            except (OSError, UserError) as error:
                self._warn(name, f"can't be started ({one_line(error)})")

    def _warn(self, name: str, error: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            _log.warning("%s: %s; send it later with: %s", name, error, command(self._folder, name))

    def _hear(self, process: TrackerProcess) -> None:
        """Called by the listener's thread."""
        name, progress = process.name, process.progress
        if progress.error is not None:
            self._warn(name, progress.error)
        elif progress.where is not None and self._announced.get(name) != progress.where:
            self._announced[name] = progress.where
            _log.info("  tracker  %s: %s", name, progress.where)

    def close(self) -> None:
        """Lets the trackers send the rest, for a bounded time, and says where to look."""
        for process in self._processes:
            process.close_input()
        was_stopped = self._should_stop() or read_state(self._folder).get("status") not in ENDED
        self._wait(STOP_SECONDS if was_stopped else FINISH_SECONDS, was_stopped=was_stopped)
        for process in self._processes:
            if not process.has_ended:
                process.kill("did not end in time")
                self._hear(process)
        for process in self._processes:
            if process.progress.is_done:
                _log.info("  tracker  %s: %s", process.name, process.progress.where)

    def _wait(self, seconds: float, *, was_stopped: bool) -> None:
        began, is_said = time.monotonic(), False
        while (left := [process.name for process in self._processes if not process.has_ended]) and (
            gone := time.monotonic() - began
        ) < seconds:
            if self._should_stop() and not was_stopped:
                return
            if gone > _QUIET_SECONDS and not is_said:
                is_said = True
                _log.info("  waiting up to %d s for %s (Ctrl-C: don't)", seconds, ", ".join(left))
            time.sleep(_POLL_SECONDS)


@contextmanager
def tracking(folder: Path, names: Sequence[str], *, should_stop: Callable[[], bool]) -> Iterator[None]:
    """While the context lasts, what the journal gets goes to these trackers too."""
    if not names:
        yield
        return
    trackers = RunTrackers(folder, names, should_stop=should_stop)
    try:
        yield
    finally:
        trackers.close()


def command(folder: Path, *names: str) -> str:
    return f"python cli.py track {shlex.quote(str(folder))} --to {' '.join(names)}"


def log_of(folder: Path, name: str) -> Path:
    """What the tracker's library had to say."""
    return folder / FOLDER / f"{name}.log"
