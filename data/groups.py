"""Which rows belong together: a union-find over arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from core.protocols import IntArray


def first_with_same(values: npt.NDArray[Any]) -> IntArray:
    """int64 [N]: for each value, the index of the first that is the same."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64, copy=False)


def join(members: IntArray, some: IntArray, others: IntArray) -> None:
    """Puts rows `some[i]` and `others[i]` into one group, for every i, in place.

    Args:
        members: int64 [N], the smallest index of the group that each row belongs to; of `np.arange(N)`, each row is a
            group of its own.
    """
    while True:
        low, high = np.minimum(members[some], members[others]), np.maximum(members[some], members[others])
        apart = low < high
        if not apart.any():
            return
        some, others = some[apart], others[apart]
        np.minimum.at(members, high[apart], low[apart])
        while True:
            further = members[members]
            if np.array_equal(further, members):
                break
            members[:] = further
