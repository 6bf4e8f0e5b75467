"""What reading, tokenising and splitting say of the rows."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """A line for people, and what it is about."""

    kind: str
    """Of a finding of the check: `bad-rows`."""
    text: str
    num_rows: int = 0
    """Rows it is about; 0 for what is about the whole."""
