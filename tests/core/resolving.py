"""What the tests of settings share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.config import RunConfig
from core.errors import UserError
from core.settings import (
    resolve,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def value_of(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def refusal(**sources: Any) -> UserError:
    """The error of a resolution; both its parts must be one line each."""
    with pytest.raises(UserError) as caught:
        resolve(**sources)
    assert "\n" not in caught.value.what
    assert "\n" not in (caught.value.hint or "")
    return caught.value
