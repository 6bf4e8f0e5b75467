"""The metrics of a run: an append-only journal and two exports that are always whole.

`metrics.jsonl` is the source: one record a line, never changed. `training_metrics.json` (a JSON array) and
`training_metrics.csv` hold the same records. Appending costs the same after 100,000 records as after one: the array's
closing bracket is overwritten by the new record and a new bracket in a single write.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import UserError
from core.files import disk_errors, write_atomic
from core.routing import SCALARS

JOURNAL = "metrics.jsonl"
JSON_EXPORT = "training_metrics.json"
CSV_EXPORT = "training_metrics.csv"

FIELDS = (
    "step",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "memory_gb",
    "time",
    "val_loss",
    "probe_loss",
    "gap",
    "gap_low",
    "gap_high",
    "grade",
    "best_step",
    "best_val_loss",
    "general_loss",
    "general_flipped",
    "aux_loss",
    "routing",
)
"""Fields of a record. Units: losses and gap in nats per target token, memory in GB (10^9 bytes), time in seconds since
the run began, over all its processes. `general_loss` is the loss on the general texts, `general_flipped` the share of
their targets at which another token is the most likely one than before the first step (`core.general`). `aux_loss` is
the load-balancing loss of a trained router, without its weight, per token; `routing` is
`core.routing.RoutingReport.to_record` of a mixture's evaluation."""

ROUTING = "routing"
COLUMNS = (*(name for name in FIELDS if name != ROUTING), *(f"{ROUTING}.{name}" for name in SCALARS))
"""Columns of the CSV: the fields, and of `routing` the plain numbers."""

MACHINE_FIELDS = frozenset({"tokens_per_second", "memory_gb", "time"})
"""Fields that measure the machine: the only ones in which a resumed run differs from one that was never stopped."""

_ARRAY_END = b"\n]\n"

Record = Mapping[str, Any]


class Journal:
    """Appends records to the three files of a run folder."""

    def __init__(self, folder: Path, *, keep_bytes: int = 0) -> None:
        """Opens the journal and drops what lies behind `keep_bytes`, the size when the checkpoint was written.

        Raises:
            UserError: it is shorter than that: records were removed.
        """
        self._folder = folder
        self._file = _open_journal(folder / JOURNAL, keep_bytes)
        lines = (folder / JOURNAL).read_bytes().splitlines()
        self._write_exports(lines)
        self._array_is_empty = not lines
        # not in append mode: Linux ignores the offset of pwrite there
        self._array = open(folder / JSON_EXPORT, "r+b")  # noqa: SIM115
        self._csv = open(folder / CSV_EXPORT, "r+b")  # noqa: SIM115

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def append(self, record: Record) -> None:
        """Adds one record to the journal first, then to the exports.

        Raises:
            ValueError: a value that JSON does not know, such as NaN.
            UserError: the disk is full; each file is whole, without the record or with it.
        """
        assert record.keys() <= set(FIELDS), record.keys() - set(FIELDS)
        line = json.dumps(record, allow_nan=False).encode()
        self._append_whole(self._file.fileno(), line + b"\n", self._folder / JOURNAL)
        self._append_to_array(line)
        self._append_whole(self._csv.fileno(), _csv_line(record), self._folder / CSV_EXPORT)

    def sync(self) -> None:
        """Makes the journal survive a power cut; called before each checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        for file in (self._file, self._array, self._csv):
            file.close()

    def _append_whole(self, descriptor: int, content: bytes, path: Path) -> None:
        size = os.fstat(descriptor).st_size
        with disk_errors(path):
            try:
                _write_all(descriptor, content, size)
            except OSError:
                os.ftruncate(descriptor, size)
                raise

    def _append_to_array(self, line: bytes) -> None:
        descriptor = self._array.fileno()
        size = os.fstat(descriptor).st_size
        start = size - len(_ARRAY_END)
        comma = b"" if self._array_is_empty else b","
        with disk_errors(self._folder / JSON_EXPORT):
            try:
                _write_all(descriptor, comma + b"\n" + line + _ARRAY_END, start)
            except OSError:
                # first the old end in its old place, which needs no new block, then off with what was added
                os.pwrite(descriptor, _ARRAY_END, start)
                os.ftruncate(descriptor, size)
                raise
        self._array_is_empty = False

    def _write_exports(self, lines: Sequence[bytes]) -> None:
        """Writes both exports anew from the journal: a killed process may have left them a record behind."""
        body = b"".join(b"\n" + line + b"," for line in lines).removesuffix(b",")
        write_atomic(self._folder / JSON_EXPORT, b"[" + body + _ARRAY_END)
        rows = b"".join(_csv_line(json.loads(line)) for line in lines)
        write_atomic(self._folder / CSV_EXPORT, (",".join(COLUMNS) + "\r\n").encode() + rows)


def _open_journal(path: Path, keep_bytes: int) -> BinaryIO:
    with disk_errors(path):
        file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (open for the life of the run)
        size = os.fstat(file.fileno()).st_size
        if size >= keep_bytes:
            file.truncate(keep_bytes)
            return file
    file.close()
    raise UserError(
        f"{path}: {size} bytes, but {keep_bytes} when the checkpoint was written",
        hint="put the file back as it was, or start a new run without --resume",
    )


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    """One write at `offset`; a disk that fills up in the middle shows as a short write, so the rest is tried."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _csv_line(record: Record) -> bytes:
    text = io.StringIO()
    routing = record.get(ROUTING)
    routing = routing if isinstance(routing, dict) else {}
    flat = {**record, **{f"{ROUTING}.{name}": routing.get(name) for name in SCALARS}}
    csv.writer(text).writerow([flat.get(name) for name in COLUMNS])
    return text.getvalue().encode()


def read_records(folder: Path, *, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Records from byte `offset` on, each with the offset behind it; a line still being written is left for later."""
    try:
        file = open(folder / JOURNAL, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield json.loads(line), offset
            except ValueError:
                continue
