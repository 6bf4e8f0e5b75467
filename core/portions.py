"""Rows in portions whose states fit in memory together, while layers are read one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from core.protocols import TokenArray

PORTION_BYTES = 1 << 29
"""States that wait on the device between one frozen layer and the next."""


def portions(rows: Sequence[TokenArray], *, bytes_per_token: int) -> Iterator[Sequence[TokenArray]]:
    """The rows in their order; a portion's states take at most `PORTION_BYTES`, unless one row alone takes more."""
    num_bytes, start = 0, 0
    for index, row in enumerate(rows):
        size = len(row) * bytes_per_token
        if index > start and num_bytes + size > PORTION_BYTES:
            yield rows[start:index]
            num_bytes, start = 0, index
        num_bytes += size
    if start < len(rows):
        yield rows[start:]
