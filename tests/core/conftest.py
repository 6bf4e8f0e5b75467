"""What several tests share: a store of prefixes in pieces (`stored_rows` has its rows), a run to watch."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from core import prefix_store
from core.trackers import process
from tests.core.monitored import FakeRun


@pytest.fixture
def one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segment of a store holds a single row."""
    monkeypatch.setattr(prefix_store, "SEGMENT_BYTES", 1)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[FakeRun]:
    fake = FakeRun(tmp_path / "runs" / "expert")
    yield fake
    fake.lock.release()
    fake.journal.close()


@pytest.fixture
def no_tracker_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and no key and no setting of whoever runs the tests; no home to write to; nothing runs later."""
    monkeypatch.setattr(process, "NICENESS", 0)
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def console() -> Console:
    """Of 80 columns; `tests.core.tracked.text_of` has what was printed."""
    return Console(file=io.StringIO(), width=80, highlight=False)
