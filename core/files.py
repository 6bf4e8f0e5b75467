"""Writing files so that they are whole or not there, and reading JSON that may be damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import UserError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, or a place that can't be written to, into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full",
                hint="free some space, then continue with: python cli.py train --resume",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT, errno.EEXIST):
            raise UserError(
                f"{path}: cannot write here ({error.strerror})",
                hint="choose another folder with --output",
            ) from error
        raise


def write_atomic(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Replaces `path` by a file with `content`, in one step; with `durable` it survives a power cut."""
    raw = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        with open(temporary, "wb") as file:
            file.write(raw)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            fsync_folder(path.parent)


def to_json(value: Any) -> str:
    """JSON for people and `jq`; refuses NaN, which is not JSON."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def user_path(text: str) -> Path:
    """The path that a person typed, with `~` for a home folder; of an unknown user it is a name, as in a shell."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def free_name(name: str) -> str:
    """A file or folder that is not there yet: `name`, or that with a number."""
    free, number = name, 2
    while Path(free).exists():
        free, number = f"{name}-{number}", number + 1
    return free


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
