"""What several tests share: a store of prefixes in pieces (`stored_rows` has its rows), a run to watch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core import prefix_store
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
