"""Rows in portions by the bytes of their states."""

from __future__ import annotations

import numpy as np
import pytest

from core import portions as module
from core.portions import portions


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([4], [[4]]),
        ([3, 2, 5, 5, 1], [[3, 2], [5], [5], [1]]),
        ([9, 1, 2], [[9], [1, 2]]),  # a row that alone is too much
        ([1, 9], [[1], [9]]),
    ],
)
def test_a_portion_holds_as_many_as_fit(
    lengths: list[int], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PORTION_BYTES", 5 * 8)
    rows = [np.zeros(length, np.int32) for length in lengths]
    assert [[len(row) for row in portion] for portion in portions(rows, bytes_per_token=8)] == expected
