"""What a tracker's process finds in its environment: the user's, `.env` in the working folder, and quiet defaults."""

from __future__ import annotations

import os
import re
from pathlib import Path

from core.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]

_DEFAULTS = {
    # nobody asked for these to be sent
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # a tracker computes nothing
    "OMP_NUM_THREADS": "1",
    # git's own word on where it is missing
    "GIT_PYTHON_REFRESH": "quiet",
}
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_SHORTEST_SECRET = 6
_USERINFO = re.compile(r"(?<=://)(?:[^/\s]*|[^:/\s]*:[^@\s]*)@")
"""User and password of an address. A password in SQLAlchemy's addresses may hold a slash."""
_TOKEN = re.compile(r"(token=)\S+", re.IGNORECASE)
_LONGEST_ERROR = 160


def environment(folder: Path | None = None) -> dict[str, str]:
    """The user's variables, then those of `.env` in `folder` (default: the working folder) that are not set.

    Raises:
        UserError: `.env` can't be read.
    """
    file = (folder or Path.cwd()) / ".env"
    written: dict[str, str | None] = {}
    if file.is_file():
        from dotenv import dotenv_values

        try:
            written = dotenv_values(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read", hint="it is a text file with lines NAME=value") from error
    return _DEFAULTS | {name: value for name, value in written.items() if value is not None} | dict(os.environ)


def for_worker() -> dict[str, str]:
    """`environment` of a process that finds this package."""
    found = environment()
    known = found.get("PYTHONPATH")
    return found | {"PYTHONPATH": os.pathsep.join([str(_ROOT), *([known] if known else [])])}


def one_line(error: BaseException) -> str:
    """What went wrong, in a line, without secrets."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = without_secrets(text)
    return text if len(text) <= _LONGEST_ERROR else text[: _LONGEST_ERROR - 1] + "…"


def without_secrets(text: str) -> str:
    """The text without what a variable named like a key holds, and without users, passwords and tokens in addresses."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return _TOKEN.sub(r"\1***", _USERINFO.sub("***@", text))


def without_credentials(url: str) -> str:
    """The address without user, password and query, to be shown and kept. (`urlunsplit` would harm `sqlite:///x`.)"""
    return re.sub(r"\?[^#]*", "", _USERINFO.sub("", url))
