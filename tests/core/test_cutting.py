"""Batches cut by rows and put together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from core.cutting import cut, take, together
from core.protocols import FILLER_ROW, IGNORE, Batch, Prefix
from tests.backends.conftest import make_batch


def test_cuts_are_even() -> None:
    """Lengths 12, 5, 9 and a filler, 8, 4, 3 and 6 targets: of costs 20, 8 and 15 the largest stands alone."""
    rows = make_batch((12, 5, 9))
    filler = Batch(np.array([FILLER_ROW]), np.zeros_like(rows.inputs[:1]), np.full_like(rows.targets[:1], IGNORE))
    batch = together([filler, rows])
    counts = (batch.targets != IGNORE).sum(axis=1)
    assert counts.tolist() == [0, 8, 4, 6]
    assert [part.tolist() for part in cut(batch, 2, target_cost=1.0)] == [[1], [2, 3]]
    assert [part.tolist() for part in cut(batch, 8, target_cost=1.0)] == [[1], [3], [2]]
    assert [part.tolist() for part in cut(batch, 1, target_cost=1.0)] == [[1, 2, 3]]


def test_rows_are_taken_with_all_that_is_theirs() -> None:
    batch = make_batch((9, 7, 8), first_row=4)
    batch = replace(batch, prefix=Prefix(np.random.default_rng(0).normal(size=(*batch.inputs.shape, 4))))
    found = take(batch, np.array([2, 0]))
    assert found.row_ids.tolist() == [6, 4]
    for taken, row in enumerate([2, 0]):
        np.testing.assert_array_equal(found.inputs[taken], batch.inputs[row])
        np.testing.assert_array_equal(found.targets[taken], batch.targets[row])
        assert found.prefix is not None
        assert batch.prefix is not None
        np.testing.assert_array_equal(found.prefix.states[taken], batch.prefix.states[row])


def test_batches_together() -> None:
    one, two = make_batch((9, 7), width=11), make_batch((5,), first_row=2)
    states = [Prefix(np.random.default_rng(n).normal(size=(*b.inputs.shape, 4))) for n, b in enumerate((one, two))]
    both = [replace(batch, prefix=prefix) for batch, prefix in zip((one, two), states, strict=True)]
    found = together(both)
    assert found.row_ids.tolist() == [0, 1, 2]
    assert found.inputs.shape == found.targets.shape == (3, 11)
    for number, (batch, row) in enumerate([(both[0], 0), (both[0], 1), (both[1], 0)]):
        width = batch.inputs.shape[1]
        assert found.prefix is not None
        assert batch.prefix is not None
        np.testing.assert_array_equal(found.inputs[number, :width], batch.inputs[row])
        np.testing.assert_array_equal(found.targets[number, :width], batch.targets[row])
        np.testing.assert_array_equal(found.prefix.states[number, :width], batch.prefix.states[row])
        assert (found.targets[number, width:] == IGNORE).all()
