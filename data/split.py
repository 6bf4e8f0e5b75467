"""Which rows train, which validate, which test: by content, so that copies stay together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from core.errors import UserError
from core.seeding import generator, stable_hash
from data.batches import TokenRows
from data.sources import count


@dataclass(frozen=True, slots=True)
class Cut:
    """Indices into the rows that were cut, rising."""

    train: list[int]
    validation: list[int]
    test: list[int]


def cut_rows(rows: TokenRows, contents: Sequence[str], *, validation: float, test: float, seed: int) -> Cut:
    """Holds out `ceil(ratio * rows)` rows for validation, and the same way for testing.

    Rows are taken in the order of a hash of (seed, content): the rows' order does not matter, and a row more or less
    moves few others. Rows with the same tokens are on one side, even if that makes a side smaller.

    Raises:
        UserError: a ratio that is not 0 gives no row, or no row is left to train on.
    """
    groups = _groups(rows, contents, seed)
    held_out: dict[str, list[int]] = {}
    for name, ratio in (("validation", validation), ("test", test)):
        held_out[name] = sorted(_take(groups, num_held_out(len(rows), ratio)))
        if ratio > 0 and not held_out[name]:
            raise UserError(
                f"data.{name} {ratio:g} of {count(len(rows), 'row')} gives no {name} row (copies stay together)",
                hint=f"add rows that differ, or a {name} file of your own",
            )
    train = sorted(index for group in groups for index in group)
    if not train:
        raise UserError(
            f"data.validation {validation:g} and data.test {test:g} of {count(len(rows), 'row')} leave none to train",
            hint="add rows, or lower data.validation and data.test",
        )
    return Cut(train, held_out["validation"], held_out["test"])


def num_held_out(num_rows: int, ratio: float) -> int:
    """ceil(ratio * num_rows), with the ratio as it was written: 0.1 of 30 rows is 3."""
    return math.ceil(Fraction(str(ratio)) * num_rows)


def _groups(rows: TokenRows, contents: Sequence[str], seed: int) -> list[list[int]]:
    """Indices of rows with the same tokens, in the order of their content's hash."""
    groups: dict[bytes, list[int]] = {}
    for index, ids in enumerate(rows.ids):
        groups.setdefault(ids.tobytes(), []).append(index)
    hashes = [stable_hash(seed, "split", content) for content in contents]
    return sorted(groups.values(), key=lambda group: min(hashes[index] for index in group))


def _take(groups: list[list[int]], num_rows: int) -> list[int]:
    """Removes the first groups that fit into `num_rows` from `groups`, and returns their rows."""
    taken: list[int] = []
    left: list[list[int]] = []
    for group in groups:
        if len(taken) + len(group) <= num_rows:
            taken += group
        else:
            left.append(group)
    groups[:] = left
    return taken


def num_copies(rows: TokenRows) -> int:
    """Rows that have the same tokens as an earlier one."""
    return len(rows) - len({ids.tobytes() for ids in rows.ids})


def rows_not_in(rows: TokenRows, others: Iterable[TokenRows]) -> list[int]:
    """Indices of the rows whose tokens no row of `others` has."""
    taken = {ids.tobytes() for other in others for ids in other.ids}
    return [index for index, ids in enumerate(rows.ids) if ids.tobytes() not in taken]


def probe_rows(rows: TokenRows, *, count: int, seed: int) -> TokenRows:
    """A fixed random selection of training rows, in their order; `row_ids` stay those of the training split."""
    if count >= len(rows):
        return rows
    chosen = generator(seed, "probe").choice(len(rows), count, replace=False)
    return rows.select(np.sort(chosen).tolist())
