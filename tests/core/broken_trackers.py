"""Trackers that break wherever one can, and one that writes down what it gets. They run in the worker's process."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence

from core.trackers.base import End, Point, RunFacts, Started

SECRET = "sk-very-secret-indeed"


class Good:
    """Keeps everything in `kept.jsonl` of the run folder, and remembers nothing by itself."""

    def start(self, facts: RunFacts, *, last_step: int | None) -> Started:
        self._file = open(facts.folder / "kept.jsonl", "a")  # noqa: SIM115
        self._write("start", facts.run_id, facts.name, facts.group, last_step, os.environ.get("FROM_DOTENV"))
        return Started(last_step, "see kept.jsonl")

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self._write("log", point.step, point.time, dict(point.values))

    def finish(self, end: End) -> None:
        self._write("finish", end.status, end.step, dict(end.summary), sorted(end.pictures))

    def _write(self, *what: object) -> None:
        self._file.write(json.dumps(what) + "\n")
        self._file.flush()


class RaisesAtStart(Good):
    def start(self, facts: RunFacts, *, last_step: int | None) -> Started:
        raise ConnectionError(f"no way in\nwith {os.environ.get('SOME_API_KEY')}")


class RaisesAtLog(Good):
    def log(self, points: Sequence[Point]) -> None:
        raise RuntimeError("no more")


class RaisesAtFinish(Good):
    def finish(self, end: End) -> None:
        raise SystemExit("not even that")


class Dies(Good):
    def log(self, points: Sequence[Point]) -> None:
        os.kill(os.getpid(), 9)


class Chatters(Good):
    """Prints as libraries do, in their many ways."""

    def log(self, points: Sequence[Point]) -> None:
        print("hello from Python")
        os.write(1, b"hello from C\n")
        os.write(2, b"and an error\n")
        super().log(points)


class HangsAtStart(Good):
    def start(self, facts: RunFacts, *, last_step: int | None) -> Started:
        super().start(facts, last_step=last_step)
        threading.Event().wait()
        raise AssertionError


class HangsAtLog(Good):
    def log(self, points: Sequence[Point]) -> None:
        super().log(points)
        threading.Event().wait()


class HangsAtFinish(Good):
    def finish(self, end: End) -> None:
        super().finish(end)
        threading.Event().wait()
