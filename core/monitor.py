"""Watching a run from its folder: what is in the files, what follows from them, and whether anybody still trains.

Reads files only, while the run writes them. A refresh reads what the journal gained since the last one and keeps a
history of bounded size, so it costs the same after 100,000 steps as after ten. `core.monitor_screen` draws it.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.chart import Curve, Point
from core.config import BASE_MODEL, GuardConfig
from core.errors import UserError
from core.expert_map import collapse_warning
from core.files import read_json
from core.folds import is_folds
from core.journal import JOURNAL
from core.overfitting import advice, relative_warning
from core.records import Pace, Record, clean, gap_of, number, whole
from core.run import COMPLETE, CONFIG, ENDED, STATE, SUMMARY, is_locked, read_state
from core.settings import load_config

if TYPE_CHECKING:
    from rich.console import Console

    from core.folds_monitor import FoldsReader, FoldsView
    from core.monitor_screen import Screen

SILENT_SECONDS = 120.0
"""Without a sign of life for so long, a run on another machine may be dead; a living one reports every second."""
RECENT_EVALUATIONS = 16
_FINGERPRINT_BYTES = 256
_RESIZE_SECONDS = 0.25
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment. Losses in nats per target token, times in seconds."""

    folder: Path
    status: str
    """`status` of the state file, or `died`: nobody trains any more; `silent`: no sign of life from another machine;
    `unknown`: no state file that can be read."""
    state: Mapping[str, Any]
    guard: GuardConfig
    newest: Record
    """The last record; empty when there is none."""
    evaluations: tuple[Record, ...]
    """The last records with an evaluation, oldest first."""
    loss: tuple[Point, ...]
    """Training loss as (step, mean), at most `core.chart.MAX_POINTS`; likewise `val` and `probe`."""
    val: tuple[Point, ...]
    probe: tuple[Point, ...]
    eta_seconds: float | None
    elapsed_seconds: float | None
    silent_seconds: float
    """Since the state file was last written."""
    problems: tuple[str, ...] = ()
    """What is missing or damaged, a line each."""
    warnings: tuple[str, ...] = ()
    """What the numbers warn of, a line each."""
    verdict: str | None = None
    """The summary's sentence on overfitting, once the run has ended."""
    folds: FoldsView | None = None
    """Of which this run is one, when their parent folder is watched."""

    @property
    def has_ended(self) -> bool:
        if self.folds is not None:
            return self.folds.has_ended
        return self.status in (*ENDED, "died")

    @property
    def exit_code(self) -> int:
        if self.folds is not None:
            return self.folds.exit_code
        return 1 if self.status in ("failed", "died") else 0

    @property
    def step(self) -> int:
        return whole(self.state.get("step")) or whole(self.newest.get("step")) or 0

    @property
    def total_steps(self) -> int | None:
        return whole(self.state.get("total_steps"))

    @property
    def evaluation(self) -> Record:
        """The newest evaluation; empty when there is none."""
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def next_eval_step(self) -> int | None:
        every, total = whole(self.state.get("eval_every")), self.total_steps
        if self.has_ended or not every or not total or self.step >= total:
            return None
        return min((self.step // every + 1) * every, total)

    @property
    def tokens_per_second(self) -> float | None:
        return number(self.newest.get("tokens_per_second"))

    def trend(self, name: str) -> float | None:
        """Change of `val_loss`, `probe_loss` or `gap` from the evaluation before to the newest."""
        if len(self.evaluations) < 2:
            return None
        before, after = (number(record.get(name)) for record in self.evaluations[-2:])
        return None if before is None or after is None else after - before


def snapshot(folder: Path) -> Snapshot:
    """The run as its files show it now; never raises for what is in them."""
    return reader_of(folder).poll()


def reader_of(folder: Path) -> RunReader | FoldsReader:
    """What follows a run, or the runs of folds."""
    if not is_folds(folder):
        return RunReader(folder)
    from core.folds_monitor import FoldsReader

    return FoldsReader(folder)


def render(snapshot: Snapshot, width: int, height: int | None = None) -> Screen:
    """The screen, `width` columns wide and, when `height` is given, filling at most so many lines."""
    from core.monitor_screen import Screen

    return Screen(snapshot, width, height)


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    """All of it as JSON can hold it: the state's fields, with the `status` seen here, and what follows from them."""
    return {
        **snapshot.state,
        "run": str(snapshot.folder),
        "status": snapshot.status,
        "step": snapshot.step,
        "elapsed_seconds": snapshot.elapsed_seconds,
        "eta_seconds": snapshot.eta_seconds,
        "tokens_per_second": snapshot.tokens_per_second,
        "next_eval_step": snapshot.next_eval_step,
        "patience_left": snapshot.state.get("patience_left"),
        "trend": {name: snapshot.trend(name) for name in ("val_loss", "probe_loss", "gap")},
        "newest_record": dict(snapshot.newest) or None,
        "newest_evaluation": dict(snapshot.evaluation) or None,
        "silent_seconds": snapshot.silent_seconds,
        "problems": list(snapshot.problems),
        "warnings": list(snapshot.warnings),
        "verdict": snapshot.verdict,
        **({} if snapshot.folds is None else {"folds": snapshot.folds.to_json()}),
    }


# --- the live screen --------------------------------------------------------------------------------------------------


def watch(folder: Path, *, refresh: float, console: Console) -> int:
    """Shows the run every `refresh` seconds until it ends or Ctrl-C; the last screen stays.

    Returns 0 when the run finished, stopped early, was interrupted or is still going; 1 when it failed or died.
    """
    reader = reader_of(folder)
    shown: Snapshot | None = None
    try:
        follow = _live if console.is_terminal else _lines
        for current in follow(reader, refresh, console):
            shown = current
    except KeyboardInterrupt:
        shown = shown or reader.poll()
    assert shown is not None
    console.print(render(shown, console.width))
    return shown.exit_code


def _live(reader: RunReader | FoldsReader, refresh: float, console: Console) -> Iterator[Snapshot]:
    """On the terminal's second screen, so that resizing leaves no debris."""
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            current = reader.poll()
            live.update(render(current, console.width, console.height), refresh=True)
            yield current
            if current.has_ended:
                return
            size, until = console.size, time.monotonic() + refresh
            while (left := until - time.monotonic()) > 0:
                time.sleep(min(left, _RESIZE_SECONDS))
                if console.size != size:
                    size = console.size
                    live.update(render(current, size.width, size.height), refresh=True)


def _lines(reader: RunReader | FoldsReader, refresh: float, console: Console) -> Iterator[Snapshot]:
    """Into a file or a pipe: a line for each new evaluation."""
    from core.monitor_screen import evaluation_line

    last: Any = None
    while True:
        current = reader.poll()
        shown = (current.folder, current.evaluation.get("step"))
        if current.evaluation and shown != last:
            last = shown
            console.print(evaluation_line(current))
        yield current
        if current.has_ended:
            return
        time.sleep(refresh)


# --- reading ----------------------------------------------------------------------------------------------------------


class RunReader:
    """Follows one run folder; `poll` reads what is new."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._guard = GuardConfig()
        self._config_read: int | None = None
        self._config_problem: str | None = None
        self._updated: tuple[float | None, float] | None = None
        self._forget()

    def _forget(self) -> None:
        self._offset, self._inode, self._fingerprint = 0, 0, b""
        self._damaged = 0
        self._pace = Pace()
        self._newest: Record = {}
        self._evaluations: deque[Record] = deque(maxlen=RECENT_EVALUATIONS)
        self._curves = {name: Curve() for name in ("loss", "val_loss", "probe_loss")}

    def poll(self) -> Snapshot:
        """The run now."""
        state, is_alive = self._state()
        self._read_journal()
        self._read_guard()
        status = str(state.get("status") or "unknown")
        silent = self._silence(state)
        is_here = state.get("host") == socket.gethostname()
        if is_alive and status in ("interrupted", "failed"):
            status = "starting"  # being resumed: the state is written after the first step
        elif status not in (*ENDED, "unknown"):
            if not is_alive and is_here:
                status = "died"
            elif not is_here and silent > SILENT_SECONDS:
                status = "silent"
        elapsed = number(state.get("elapsed_seconds"))
        if elapsed is not None and is_alive and status == "running":
            elapsed += silent
        return Snapshot(
            folder=self._folder,
            status=status,
            state=state,
            guard=self._guard,
            newest=clean(self._newest),
            evaluations=tuple(map(clean, self._evaluations)),
            loss=self._curves["loss"].points,
            val=self._curves["val_loss"].points,
            probe=self._curves["probe_loss"].points,
            eta_seconds=None if status in (*ENDED, "died") else self._eta(state, elapsed),
            elapsed_seconds=elapsed,
            silent_seconds=silent,
            problems=tuple(self._problems(state)),
            warnings=tuple(self._warnings(state)),
            verdict=self._verdict() if status in COMPLETE else None,
        )

    def _state(self) -> tuple[dict[str, Any], bool]:
        """The state, and whether a process of this machine holds the run's lock.

        A process writes its state between taking and releasing the lock; so one that nobody holds, looked at before and
        after, with a state that says "running" in between, is a dead one's.
        """
        is_alive = is_locked(self._folder)
        state = read_state(self._folder)
        return clean(state), is_alive or is_locked(self._folder)

    def _silence(self, state: Mapping[str, Any]) -> float:
        """Seconds since the state was written; by this clock alone once a change was seen, for clocks may differ."""
        updated, now = number(state.get("updated")), time.monotonic()
        if self._updated is None:
            age = 0.0 if updated is None else max(time.time() - updated, 0.0)
            self._updated = (updated, now - age)
        elif self._updated[0] != updated:
            self._updated = (updated, now)
        return now - self._updated[1]

    def _read_journal(self) -> None:
        try:
            file = open(self._folder / JOURNAL, "rb")  # noqa: SIM115
        except OSError:
            self._forget()
            return
        with file:
            # a resumed run cuts the journal back and grows it again: then what was just before the offset is different
            before = os.pread(file.fileno(), len(self._fingerprint), self._offset - len(self._fingerprint))
            inode = os.fstat(file.fileno()).st_ino
            if before != self._fingerprint or inode != self._inode:
                self._forget()
                self._inode = inode
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # still being written
                    break
                self._offset += len(line)
                self._fingerprint = line[-_FINGERPRINT_BYTES:]
                self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            record = _DECODER.decode(line.decode())
        except ValueError:
            record = None
        step = whole(record.get("step")) if isinstance(record, dict) else None
        if step is None or step < self._newest.get("step", 0):
            self._damaged += 1
            return
        self._newest = record
        self._pace.add(record)
        for name, curve in self._curves.items():
            value = number(record.get(name))
            if value is not None:
                curve.add(step, value)
                if name == "val_loss":
                    self._evaluations.append(record)

    def _read_guard(self) -> None:
        """Grades and warnings are the run's own; `config.yaml` is read again when it changed."""
        path = self._folder / CONFIG
        try:
            changed = path.stat().st_mtime_ns
            if changed == self._config_read:
                return
            self._guard, self._config_read, self._config_problem = load_config(path).guard, changed, None
        except (OSError, UserError):
            self._guard, self._config_read = GuardConfig(), None
            self._config_problem = f"{CONFIG}: missing or damaged; the grades' bounds are the defaults"

    def _eta(self, state: Mapping[str, Any], elapsed: float | None) -> float | None:
        total, every = whole(state.get("total_steps")), whole(state.get("eval_every"))
        if not total or not every or self._pace.last is None:
            return None
        at, step = self._pace.last
        left = self._pace.seconds_for(total - step, math.ceil(total / every) - step // every)
        if left is None:
            return None
        return max(left - max((elapsed or at) - at, 0.0), 0.0)

    def _problems(self, state: Mapping[str, Any]) -> Iterator[str]:
        if not self._folder.is_dir():
            yield f"{self._folder}: no such folder"
            return
        if not state:
            yield f"{STATE}: {'damaged' if (self._folder / STATE).exists() else 'not there (yet)'}"
        if not self._newest and (state.get("step") or not state):  # at step 0 the first record is still to come
            yield f"{JOURNAL}: {'no record yet' if (self._folder / JOURNAL).exists() else 'not there (yet)'}"
        if self._damaged:
            yield f"{JOURNAL}: {self._damaged:,} damaged line{'s' * (self._damaged > 1)} left out"
        if self._config_problem:
            yield self._config_problem

    def _warnings(self, state: Mapping[str, Any]) -> Iterator[str]:
        newest = self._evaluations[-1] if self._evaluations else {}
        base, val = number(state.get("base_val_loss")), number(newest.get("val_loss"))
        if base is not None and val is not None and newest.get("step") and val > base:
            yield f"validation loss is {val - base:.3f} above what it was before training"
        gap = gap_of(newest)
        if gap and (text := relative_warning(gap, self._guard)):
            yield text
        if text := collapse_warning(newest):
            yield text

    def _verdict(self) -> str | None:
        summary = read_json(self._folder / SUMMARY)
        if not isinstance(summary, dict):
            return None
        gap, base = gap_of({**summary, "val_loss": summary.get("best_val_loss")}), number(summary.get("base_val_loss"))
        if gap is None:
            return None
        if base is not None and gap.val_loss >= base:
            start = summary.get("start", BASE_MODEL)
            return f"No better than the {start}: validation loss {base:.3f} before, {gap.val_loss:.3f} at best"
        return advice(gap, self._guard)
