"""Finished rows of an evaluation, one a line: what makes it go on where it was stopped.

The first line says what the rows were measured with; rows of anything else are thrown away. The lines of a batch are
appended in one write, and a line that was cut off by a kill is dropped, so a journal is whole at every moment.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from core.errors import UserError
from core.files import disk_errors

_FORMAT = 1

Record = Mapping[str, Any]


def fingerprint(*parts: object) -> str:
    """SHA-256 of what decides an evaluation's numbers."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class RowJournal:
    """Records of rows, kept in a file; use as a context. Nothing is written before the first record."""

    def __init__(self, path: Path, key: str, *, anew: bool = False) -> None:
        """
        Args:
            key: what the rows are measured with, as `fingerprint` gives it.
            anew: throw away what is there.
        """
        self._path = path
        self._header = json.dumps({"format": _FORMAT, "fingerprint": key}).encode() + b"\n"
        self._file: BinaryIO | None = None
        self.records: list[dict[str, Any]] = []
        self._keep_bytes = 0
        if not anew:
            self._read()

    def _read(self) -> None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        if not content.startswith(self._header):
            return
        whole = content[: content.rfind(b"\n") + 1]
        self.records = [json.loads(line) for line in whole.splitlines()[1:]]
        self._keep_bytes = len(whole)

    def append(self, records: Iterable[Record]) -> None:
        """Raises: UserError: the disk is full, or another evaluation writes here."""
        added = list(records)
        file = self._opened()
        content = "".join(json.dumps(record) + "\n" for record in added)
        with disk_errors(self._path):
            file.write(content.encode())
            file.flush()
        self.records += [dict(record) for record in added]

    def _opened(self) -> BinaryIO:
        if self._file is not None:
            return self._file
        with disk_errors(self._path):
            file = open(self._path, "r+b" if self._path.exists() else "w+b")  # noqa: SIM115 (open for the evaluation)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"{self._path.parent}: another evaluation is writing here", hint="wait for it, or give --output"
            ) from None
        except OSError:
            pass  # this file system has no locks
        file.truncate(self._keep_bytes)
        file.seek(0, os.SEEK_END)
        if not self._keep_bytes:
            file.write(self._header)
        self._file = file
        return file

    def __enter__(self) -> RowJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
