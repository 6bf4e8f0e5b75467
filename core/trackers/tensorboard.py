"""TensorBoard: event files in the run folder, written by its own package, without torch or TensorFlow."""

from __future__ import annotations

import shlex
import struct
import time
from collections.abc import Sequence
from typing import Any

from core.trackers.base import End, Point, RunFacts, Started, Value

FOLDER = "tensorboard"
_PATTERN = "events.out.tfevents.*"


class TensorBoardTracker:
    """See `core.trackers.base.Tracker`. Scalars, settings and summary as text, pictures."""

    def start(self, facts: RunFacts, *, last_step: int | None) -> Started:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = facts.folder / FOLDER
        if not any(folder.glob(_PATTERN)):
            last_step = None
        self._writer: Any = EventFileWriter(str(folder))
        # from the second start on, readers drop what they have from this step on: it comes again
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=_next(last_step), session_log=start))
        if last_step is None:
            self._add_text(0, facts.started, "settings", facts.config)
        self._writer.flush()
        logdir = facts.home if facts.group else folder
        return Started(last_step, f"tensorboard --logdir {shlex.quote(str(logdir))}")

    def log(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            self._add(point.step, point.time, values)
        self._writer.flush()

    def finish(self, end: End) -> None:
        now = time.time()
        if end.summary:
            self._add_text(end.step, now, "summary", end.summary)
        for name, path in end.pictures.items():
            self._add_picture(end.step, now, name, path.read_bytes())
        self._writer.close()

    def _add(self, step: int, at: float, values: Sequence[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.add_event(Event(wall_time=at, step=step, summary=Summary(value=values)))

    def _add_text(self, step: int, at: float, name: str, values: Any) -> None:
        """A table in Markdown; format: tensorboard/plugins/text/summary_v2.py."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[_table(values).encode()])
        self._add(step, at, [Summary.Value(tag=name, tensor=tensor, metadata=metadata)])

    def _add_picture(self, step: int, at: float, name: str, png: bytes) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which is always the first
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(step, at, [Summary.Value(tag=name, image=image)])


def _table(values: dict[str, Value]) -> str:
    rows = (
        f"| {name} | {'' if value is None else str(value).replace('|', chr(92) + '|')} |"
        for name, value in values.items()
    )
    return "\n".join(["| name | value |", "|---|---|", *rows])


def _next(step: int | None) -> int:
    return 0 if step is None else step + 1
