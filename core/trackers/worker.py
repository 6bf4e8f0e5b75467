"""The process that stands between the journal and one tracker.

    python -m core.trackers.worker RUN NAME PLACE LOCK_SECONDS ORPHAN_SECONDS NICENESS

It follows `metrics.jsonl` from its beginning, sends what the tracker does not have yet, and ends when its input is
closed: by the run's process at its end, or by the system when that process was killed. Whether the run is over then,
and how, is in the run folder. What libraries print goes to `trackers/<name>.log`; standard output carries one JSON
object a line for the process that started this one: `ready`, `sent`, `done` or `failed`.

A process of its own, because a tracker's library may hang, crash, print, fork, take signals and memory, or hold
Python's lock: none of it can reach the training.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from core.config import to_plain
from core.files import read_json
from core.folds import is_folds
from core.journal import read_records
from core.run import CONFIG, CURVES, ENDED, EXPERTS_PLOT, SUMMARY, read_state
from core.settings import load_config
from core.trackers.base import FOLDER, End, Point, RunFacts, Tracker, Value, load
from core.trackers.cursor import Cursor, checksum, read_cursor, write_cursor, writing_alone
from core.trackers.environment import one_line, without_secrets
from core.trackers.points import flat, point_of

POLL_SECONDS = 0.5
CHUNK = 50
"""Points that are sent at once, when there are so many."""

_FACTS = ("model", "backend", "device", "precision", "num_train_rows", "num_val_rows", "num_parameters")

Report = Callable[[Mapping[str, Any]], None]


class Feed:
    """Sends a run to one tracker."""

    def __init__(self, folder: Path, name: str, tracker: Tracker, *, report: Report) -> None:
        self._folder = folder
        self._name = name
        self._tracker = tracker
        self._report = report
        self._offset = 0
        self.stage = "start"
        """What is being done, for the message when it fails."""

    def run(self, has_ended: Callable[[float], bool]) -> None:
        """Starts, follows the journal until `has_ended(seconds)`, which waits that long, and ends.

        Raises:
            Exception: whatever the tracker raises; `stage` says where.
        """
        config = load_config(self._folder / CONFIG)
        self._cursor = read_cursor(self._folder, self._name, project=config.log.project)
        if self._has_all():
            self._report({"event": "ready", "where": self._cursor.where})
            return
        self._keep(replace(self._cursor, error=None))
        facts = facts_of(self._folder, run_id=self._cursor.run_id, project=config.log.project)
        self._started = facts.started
        started = self._tracker.start(facts, last_step=self._cursor.last_step)
        self._keep(replace(self._cursor, last_step=started.last_step, where=started.where))
        self._report({"event": "ready", "where": started.where})
        self.stage = "sending"
        while not has_ended(0.0 if self._send() else POLL_SECONDS):
            pass
        while self._send():
            pass
        self._finish()

    def _send(self) -> bool:
        """Sends the next points; returns whether there may be more at once."""
        points: list[Point] = []
        last = -1 if self._cursor.last_step is None else self._cursor.last_step
        for record, offset in read_records(self._folder, offset=self._offset):
            self._offset = offset
            point = point_of(record, started=self._started)
            # what a resumed run computes again has the values that it had
            if point is not None and point.step > last:
                points.append(point)
                last = point.step
            if len(points) == CHUNK:
                break
        if not points:
            return False
        self._tracker.log(points)
        self._keep(self._cursor.after(last))
        self._report({"event": "sent", "records": len(points), "step": last})
        return len(points) == CHUNK

    def _has_all(self) -> bool:
        """Whether the run is over and the tracker was told so: then it is not even started."""
        status, _, digest = self._end()
        steps = [record.get("step", 0) for record, _ in read_records(self._folder)]
        newest = self._cursor.last_step
        return status in ENDED and digest == self._cursor.summary and newest == max(steps, default=None)

    def _end(self) -> tuple[str, dict[str, Value], str]:
        """Status, summary and the checksum of both."""
        status = str(read_state(self._folder).get("status"))
        if status not in ENDED:
            return "running", {}, checksum({})
        found = read_json(self._folder / SUMMARY)
        summary = flat(found) if isinstance(found, dict) else {}
        summary.pop("error", None)  # its text may name anything on this machine; the status says that it failed
        return status, summary, checksum({"status": status, **summary})

    def _finish(self) -> None:
        self.stage = "end"
        status, summary, digest = self._end()
        is_new = bool(summary) and digest != self._cursor.summary
        pictures = {path.stem: path for path in (self._folder / CURVES, self._folder / EXPERTS_PLOT) if path.is_file()}
        step = self._cursor.last_step or 0
        self._tracker.finish(End(status, step, summary if is_new else {}, pictures if is_new else {}))
        self._keep(replace(self._cursor, summary=digest))

    def fail(self, error: BaseException) -> None:
        """Writes down and reports what went wrong."""
        reason = f"{self.stage} failed ({one_line(error)})"
        self._report({"event": "failed", "error": reason})
        if hasattr(self, "_cursor"):
            self._keep(replace(self._cursor, error=reason))

    def _keep(self, cursor: Cursor) -> None:
        self._cursor = cursor
        write_cursor(self._folder, self._name, cursor)


def facts_of(folder: Path, *, run_id: str, project: str) -> RunFacts:
    """What the run folder says of itself."""
    folder = folder.absolute() if folder == Path() else folder
    config, state = load_config(folder / CONFIG), read_state(folder)
    parent = folder.absolute().parent
    is_fold = is_folds(parent)
    started = state.get("started")
    facts = {name: state.get(name) for name in _FACTS if state.get(name) is not None}
    return RunFacts(
        folder=folder,
        home=folder.parent if is_fold else folder,
        run_id=run_id,
        name=f"{parent.name}-{folder.name}" if is_fold else folder.absolute().name,
        project=project,
        group=parent.name if is_fold else None,
        started=float(started) if isinstance(started, int | float) else 0.0,
        config=flat(to_plain(config)) | flat(facts, prefix="run."),
    )


# --- the process ------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Returns 0 when all was sent."""
    folder, name, place = Path(arguments[0]), arguments[1], arguments[2]
    lock_seconds, orphan_seconds = map(float, arguments[3:5])
    threading.Thread(target=_end_with, args=(os.getppid(), orphan_seconds), daemon=True).start()
    (folder / FOLDER).mkdir(exist_ok=True)
    channel = _take_output(folder / FOLDER / f"{name}.log")
    os.nice(int(arguments[5]))

    def report(message: Mapping[str, Any]) -> None:
        try:
            channel.write(json.dumps(message) + "\n")
            channel.flush()
        except OSError:  # nobody listens any more: the run was killed
            return

    feed: Feed | None = None
    try:
        with writing_alone(folder, name, patience=lock_seconds):
            feed = Feed(folder, name, load(place), report=report)
            feed.run(_InputClosed())
            report({"event": "done"})
    except BaseException as error:
        print(without_secrets(traceback.format_exc()), file=sys.stderr, flush=True)
        if feed is None:
            report({"event": "failed", "error": f"start failed ({one_line(error)})"})
        else:
            feed.fail(error)
        return 1
    return 0


def _take_output(log: Path) -> IO[str]:
    """Gives libraries a file to print to; returns what was standard output."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    return channel


def _end_with(parent: int, seconds: float) -> None:
    """Ends this process so long after the one that started it was killed: nobody else would when a tracker hangs."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    time.sleep(seconds)
    os._exit(1)


class _InputClosed:
    """Whether the process that started this one has closed our input, as the system does for one that was killed."""

    def __init__(self) -> None:
        self._is_closed = False

    def __call__(self, seconds: float) -> bool:
        """Waits for it so long."""
        if not self._is_closed and select.select([sys.stdin], [], [], seconds)[0]:
            self._is_closed = not os.read(sys.stdin.fileno(), 1)
        return self._is_closed


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # some libraries wait for ever in what they do at exit
    os._exit(code)
