"""Which rows train, which validate, which test: by content, so copies stay together and added rows move few others.

Rows that may not be parted are a unit: equal rows, rows of a group, near copies, and whatever these join. Each unit
has a place between 0 and 1, a hash of what its rows say and of the seed. Validation takes the places below
`data.validation`, test those from the top; so a row that is added finds its side by itself. It can move only

- the rows of the units that it belongs to: with these it is one unit, which may have another place. Rows of a group
  have the group's;
- a unit of about half of the rows, which trains while it is more than half, and one that fills a side that would be
  empty;
- with strata, at most a few rows of its stratum;
- rows of a template, where it makes the template's share of the data set go above a tenth or below: what no more than
  a tenth of the rows say alike makes near copies of them, see `data.near`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from core.errors import UserError
from core.protocols import IntArray
from core.seeding import generator
from data.groups import first_with_same, join
from data.keys import HashArray, RowKeys, positions
from data.near import clusters
from data.sources import count
from data.token_rows import TokenRows

_TEST, _TRAIN, _VALIDATION = -1, 0, 1
"""Sides of a unit; with folds, 1 to `folds`, of which one validates and the others train."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Indices into the rows that were cut, rising."""

    train: list[int]
    validation: list[int]
    test: list[int]


def cut_rows(
    keys: RowKeys,
    *,
    validation: float,
    test: float,
    seed: int,
    near_duplicates: float | None = None,
    folds: int | None = None,
    fold: int = 1,
) -> Cut:
    """Holds out about `validation` of the rows, and about `test` of them.

    Without strata, a unit's place alone decides; a unit with more than half of the rows trains. With strata
    (`keys.stratum`), each gives its share of rows to the nearest whole, units in the order of their places, so an added
    row moves at most a few of its stratum; strata too rare for half a row are one together. A unit belongs to the
    stratum of most of its rows. A side that stays empty gets the unit with the lowest place (test: the highest) of the
    side with the most units.

    Args:
        seed: the same as that of `keys.position`.
        near_duplicates: Jaccard similarity from which rows stay together; None: only equal rows do.
        folds: instead of `validation`, cut what test leaves into so many folds. Every row is in one, and which does not
            depend on `fold`.
        fold: the one that validates, counted from 1.

    Raises:
        UserError: there are fewer units than sides that need one.
    """
    ratios = {_TEST: test} if folds else {_TEST: test, _VALIDATION: validation}
    ratios = {side: ratio for side, ratio in ratios.items() if ratio > 0}
    needed = [*ratios, *(range(1, folds + 1) if folds else [_TRAIN])]
    units = _Units.of(keys, unit_of_rows(keys, near_duplicates=near_duplicates), seed)
    if len(units) < len(needed):
        asked = f"data.folds {folds}" if folds else f"data.validation {validation:g}"
        raise _too_few(keys, len(units), len(needed), asked + (f" and data.test {test:g}" if test else ""))
    assign = _by_place if units.stratum is None else _by_stratum
    side = assign(units, ratios, folds)
    _fill_empty(side, units, needed)
    row_side = side[units.of_row]
    held_out = row_side == (fold if folds else _VALIDATION)
    return Cut(
        train=np.flatnonzero((row_side != _TEST) & ~held_out).tolist(),
        validation=np.flatnonzero(held_out).tolist(),
        test=np.flatnonzero(row_side == _TEST).tolist(),
    )


def unit_of_rows(keys: RowKeys, *, near_duplicates: float | None) -> IntArray:
    """int64 [N]: for each row, the smallest index of a row that it can't be parted from."""
    members = first_with_same(keys.equal)
    everyone = np.arange(len(members))
    if keys.group is not None:
        join(members, everyone, first_with_same(keys.group))
    if near_duplicates is not None and keys.signature is not None:
        join(members, everyone, clusters(keys.signature, threshold=near_duplicates))
    return members


def overlap(keys: RowKeys, others: RowKeys, *, near_duplicates: float | None) -> IntArray:
    """Indices of the rows that are also among `others`: equal, or near copies, or joined to one by near copies."""
    shared = np.isin(keys.equal, others.equal)
    if near_duplicates is not None and keys.signature is not None and others.signature is not None:
        both = clusters(np.concatenate([keys.signature, others.signature]), threshold=near_duplicates)
        shared |= np.isin(both[: len(keys)], both[len(keys) :])
    return np.flatnonzero(shared)


def _too_few(keys: RowKeys, num_units: int, num_needed: int, asked: str) -> UserError:
    what = f"{asked} of {count(len(keys), 'row')} needs at least {num_needed} rows that differ"
    hint = "add rows that differ, or bring files of your own for what is held out"
    ungrouped = RowKeys(keys.position, keys.equal, keys.prompt, keys.answer)
    grouped = RowKeys(keys.position, keys.equal, keys.prompt, keys.answer, group=keys.group)
    if len(np.unique(unit_of_rows(ungrouped, near_duplicates=None))) >= num_needed:
        if len(np.unique(unit_of_rows(grouped, near_duplicates=None))) < num_needed:
            what += " and share no group (data.group)"
            hint = "choose a column with more values, or add groups"
        else:
            what += " and are no near copies (data.near_duplicates)"
            hint = "keep only equal rows together with --set data.near_duplicates=null, or add rows that differ"
    return UserError(f"{what}; there {'is' if num_units == 1 else 'are'} {num_units}", hint=hint)


# Units


@dataclass(frozen=True)
class _Units:
    of_row: IntArray
    """int64 [N]: unit of each row."""
    sizes: IntArray
    """int64 [U]: rows of each unit."""
    place: HashArray
    """uint64 [U]: `place / 2**64` is in [0, 1)."""
    stratum: HashArray | None
    """uint64 [U]: hash of each unit's stratum."""

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def of(cls, keys: RowKeys, members: IntArray, seed: int) -> _Units:
        _, of_row, sizes = np.unique(members, return_inverse=True, return_counts=True)
        own = keys.position if keys.group is None else positions(keys.group, seed=seed)
        lowest = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(lowest, of_row, own)
        # hashed again: the lowest of many is low, and large units would nearly all be held out
        place = positions(lowest, seed=seed)
        stratum = None if keys.stratum is None else _most_frequent(of_row, keys.stratum)
        return cls(of_row, sizes, place, stratum)


def _most_frequent(of_row: IntArray, strata: HashArray) -> HashArray:
    """uint64 [U]: the stratum of most of each unit's rows; of several, that with the lowest hash."""
    values, number = np.unique(strata, return_inverse=True)
    pairs, num_rows = np.unique(of_row * len(values) + number, return_counts=True)
    unit, stratum = np.divmod(pairs, max(len(values), 1))
    order = np.lexsort((stratum, -num_rows, unit))
    _, first = np.unique(unit[order], return_index=True)
    most: HashArray = values[stratum[order][first]]
    return most


# Sides


def _by_place(units: _Units, ratios: Mapping[int, float], folds: int | None) -> IntArray:
    """int64 [U]: side of each unit."""
    side = np.full(len(units), _TRAIN)
    rest = 1 - _exact(ratios.get(_TEST, 0.0))
    if folds:
        borders = np.array([_place(rest * Fraction(fold, folds)) for fold in range(1, folds)], np.uint64)
        side = np.searchsorted(borders, units.place, "right") + 1
    if _VALIDATION in ratios:
        side[units.place < np.uint64(_place(_exact(ratios[_VALIDATION])))] = _VALIDATION
    if _TEST in ratios:
        side[units.place >= np.uint64(_place(rest))] = _TEST
    if not folds:
        side[2 * units.sizes > units.sizes.sum()] = _TRAIN
    return side


def _exact(ratio: float) -> Fraction:
    """The ratio as it was written: 0.1 is a tenth."""
    return Fraction(str(ratio))


def _place(share: Fraction) -> int:
    return int(share * 2**64)


def _by_stratum(units: _Units, ratios: Mapping[int, float], folds: int | None) -> IntArray:
    """int64 [U]: side of each unit."""
    assert units.stratum is not None
    side = np.full(len(units), _TRAIN)
    least = min([*ratios.values(), *([1 / folds] if folds else [])], default=1.0)
    hashes, stratum = np.unique(units.stratum, return_inverse=True)
    is_rare = np.bincount(stratum, weights=units.sizes) * least < 0.5
    stratum = np.where(is_rare[stratum], len(hashes), stratum)
    order = np.lexsort((units.place, stratum))
    for some in np.split(order, np.flatnonzero(np.diff(stratum[order])) + 1):
        num_rows = int(units.sizes[some].sum())
        left = some
        for name, ratio in ratios.items():
            taken = _take(left[::-1] if name == _TEST else left, units.sizes, _nearest(_exact(ratio) * num_rows))
            side[taken] = name
            left = left[~np.isin(left, taken)]
        if folds:
            # rare strata don't all begin with the first fold
            start = int(units.stratum[some].min() % np.uint64(folds))
            side[left] = 1 + (start + _deal(units.sizes[left], folds)) % folds
    return side


def _nearest(number: Fraction) -> int:
    return int(number + Fraction(1, 2))


def _take(units: IntArray, sizes: IntArray, num_rows: int) -> list[int]:
    """The first units that fit into `num_rows`, or, where none does, one of the smallest; one unit is left at least."""
    taken: list[int] = []
    room = num_rows
    for unit in units[:-1].tolist():
        if room == 0:
            break
        if sizes[unit] <= room:
            taken.append(unit)
            room -= int(sizes[unit])
    if not taken and num_rows and len(units) > 1:
        taken.append(int(units[np.argmin(sizes[units])]))
    return taken


def _deal(sizes: IntArray, folds: int) -> IntArray:
    """int64 [U]: from 0, the fold that the middle of each unit falls into when the rows are cut into equal parts."""
    middles: IntArray = 2 * np.cumsum(sizes) - sizes
    return middles * folds // (2 * int(sizes.sum()))


def _fill_empty(side: IntArray, units: _Units, needed: Sequence[int]) -> None:
    """Gives each side that is empty a unit of the side with the most units, not one with most of the rows, in place."""
    is_large = 2 * units.sizes > units.sizes.sum()
    for name in needed:
        if (side == name).any():
            continue
        largest = max(needed, key=lambda other: np.count_nonzero(side == other))
        givers = np.flatnonzero(side == largest)
        if len(givers) > 1:
            givers = givers[~is_large[givers]]
        place = units.place[givers]
        nearest = np.argmax(place) if name == _TEST else np.argmin(place)
        side[givers[nearest]] = name


# Token rows


def probe_rows(rows: TokenRows, *, count: int, seed: int) -> TokenRows:
    """A fixed random selection of training rows, in their order; `row_ids` stay those of the training split."""
    if count >= len(rows):
        return rows
    chosen = generator(seed, "probe").choice(len(rows), count, replace=False)
    return rows.select(np.sort(chosen).tolist())
