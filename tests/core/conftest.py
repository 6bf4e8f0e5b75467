"""What the tests of the store of prefixes share; `stored_rows` has their rows."""

from __future__ import annotations

import pytest

from core import prefix_store


@pytest.fixture
def one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segment of a store holds a single row."""
    monkeypatch.setattr(prefix_store, "SEGMENT_BYTES", 1)
