"""What a tracker has of a run: `trackers/<name>.json` in the run folder, written by the tracker's process alone."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import read_json, to_json, write_atomic
from core.records import whole
from core.trackers.base import FOLDER

_LOCK_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a tracker is."""

    run_id: str
    project: str
    last_step: int | None = None
    """Newest step that was given to it; None: none yet."""
    summary: str | None = None
    """Checksum of the end that it was told."""
    where: str | None = None
    error: str | None = None
    """Why it is off, if it is."""

    def after(self, step: int) -> Cursor:
        return replace(self, last_step=step)


def path_of(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.json"


def read_cursor(folder: Path, name: str, *, project: str) -> Cursor:
    """Where it stopped; the start of a new run there if it has none, or one in another project."""
    kept = read_json(path_of(folder, name))
    if isinstance(kept, dict) and isinstance(kept.get("run_id"), str) and kept.get("project") == project:
        words = {key: kept[key] for key in ("summary", "where", "error") if isinstance(kept.get(key), str)}
        return Cursor(kept["run_id"], project, whole(kept.get("last_step")), **words)
    return Cursor(uuid.uuid4().hex[:12], project)


def write_cursor(folder: Path, name: str, cursor: Cursor) -> None:
    write_atomic(path_of(folder, name), to_json({"format": 1, **asdict(cursor)}))


def checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def writing_alone(folder: Path, name: str, *, patience: float) -> Iterator[None]:
    """Keeps a second process from sending to the same tracker run.

    Args:
        patience: seconds that another one gets to end: that of a run which was killed still sends what it has.

    Raises:
        UserError: it did not.
    """
    path = folder / FOLDER / f".{name}.lock"
    path.parent.mkdir(exist_ok=True)
    deadline = time.monotonic() + patience
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another process sends {folder} to {name}") from None
                time.sleep(_LOCK_POLL_SECONDS)
            except OSError:
                break  # this file system has no locks
        yield
