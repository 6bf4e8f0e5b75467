"""Finished rows of an evaluation, one a line: what makes it go on where it was stopped.

What the rows were measured with is in the journal's name, shortened, and whole in its first line; rows of anything else
are not taken. The lines of a batch are appended in one write, and what a kill or a fault of the disk has left of one is
dropped with all that follows it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from core.errors import UserError
from core.files import disk_errors

_FORMAT = 1

Record = Mapping[str, Any]


def fingerprint(*parts: object) -> str:
    """SHA-256 of what decides an evaluation's numbers."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def journal_name(kind: str, key: str) -> str:
    """File name of the journal of some rows, of which a folder can hold several.

    Args:
        kind: `losses` or `answers`.
        key: as `fingerprint` gives it.
    """
    return f"{kind}-{key[:8]}.jsonl"


def is_journal(name: str) -> bool:
    """Whether a file of this name is a journal; those without a key are of an earlier version."""
    return re.fullmatch(r"(losses|answers)(-[0-9a-f]{8})?\.jsonl", name) is not None


def forget_others(folder: Path, keep: Iterable[str]) -> None:
    """Deletes all journals but those named, and those that another evaluation is writing."""
    kept = set(keep)
    for path in folder.iterdir():
        if not is_journal(path.name) or path.name in kept:
            continue
        with disk_errors(path), open(path, "rb") as file:
            if _lock(file.fileno()):
                path.unlink()


def _lock(descriptor: int) -> bool:
    """Whether nobody else has the file locked; a file system without locks says nothing against it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


class RowJournal:
    """Records of rows, kept in a file; use as a context. Nothing is written before the first record."""

    def __init__(self, path: Path, key: str, *, anew: bool = False) -> None:
        """
        Args:
            key: what the rows are measured with, as `fingerprint` gives it.
            anew: throw away what is there, as soon as the context begins.
        """
        self._path = path
        self._header = json.dumps({"format": _FORMAT, "fingerprint": key}).encode() + b"\n"
        self._file: FileIO | None = None
        self._anew = anew
        self.records: list[dict[str, Any]] = []
        self._found_bytes = 0
        """The file's length when it was read."""
        self._keep_bytes = 0
        """How much of that is whole."""
        if not anew:
            self._read()

    def _read(self) -> None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        self._found_bytes = len(content)
        if not content.startswith(self._header):
            return
        self._keep_bytes = len(self._header)
        for line in content[self._keep_bytes :].split(b"\n")[:-1]:
            try:
                record = json.loads(line.decode())
            except ValueError:
                return
            if not isinstance(record, dict):
                return
            self.records.append(record)
            self._keep_bytes += len(line) + 1

    def append(self, records: Iterable[Record]) -> None:
        """Raises: UserError: the disk is full, or another evaluation writes here."""
        added = list(records)
        file = self._opened()
        self._write(file, "".join(json.dumps(record) + "\n" for record in added).encode())
        self.records += [dict(record) for record in added]

    def _write(self, file: FileIO, content: bytes) -> None:
        with disk_errors(self._path):
            try:
                while content:  # a disk that gets full takes a part
                    content = content[file.write(content) :]
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UserError(
                    f"{self._path}: the disk is full", hint="free some space, then give the same command again"
                ) from error

    def _opened(self) -> FileIO:
        """The file, locked, with what is whole of it and a header."""
        if self._file is not None:
            return self._file
        with disk_errors(self._path):
            # unbuffered, so that nothing that could not be written is left to be written when it is closed
            file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 (open for the evaluation)
        is_ours = _lock(file.fileno())
        # one that is over by now has added to what was read
        if not is_ours or (not self._anew and self._path.stat().st_size != self._found_bytes):
            file.close()
            raise UserError(
                f"{self._path.parent}: another evaluation is writing here", hint="wait for it, or give --output"
            )
        self._file = file
        file.truncate(self._keep_bytes)
        if not self._keep_bytes:
            self._write(file, self._header)
        return file

    def __enter__(self) -> RowJournal:
        if self._anew and self._path.exists():
            self._opened()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
