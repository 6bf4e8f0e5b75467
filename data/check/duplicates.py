"""Rows that say the same: copies, near copies, and one question with several answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.protocols import BoolArray, IntArray
from data.check.inspection import MAX_NAMED
from data.keys import RowKeys
from data.near import clusters

_POSITIONS = 2.0**64
_CHUNK = 10_000
"""Rows that are looked at first, for names and for a quick answer."""
_FEW_ANSWERS = 20
"""Answers of which there are no more than this, each to several questions, are labels."""


@dataclass(frozen=True, slots=True)
class Alike:
    """Rows that are alike, and some of them by name."""

    num_rows: int
    named: tuple[tuple[str, ...], ...]
    """The rows that are alike, such as `train.jsonl:4` and `train.jsonl:9`; at most `MAX_NAMED`."""


@dataclass(frozen=True, slots=True)
class Leak:
    """Held-out rows that have a copy among the rows to train on."""

    num_rows: int
    """Held out."""
    exact: Alike
    near: Alike
    """With a near copy, but no exact one."""

    @property
    def share(self) -> float:
        """Of the held-out rows, those with a near copy."""
        return self.near.num_rows / self.num_rows if self.num_rows else 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """What comparing all rows found."""

    exact: Alike
    """Rows that are the same as an earlier one of their split."""
    near: Alike
    """Rows that are nearly the same as an earlier one of their split, exact copies left out."""
    num_clusters: int
    """Sets of near copies."""
    largest_cluster: int
    naive: Leak | None
    """What cutting rows off one by one would do; None where the data brings its own validation rows."""
    given: Mapping[str, Leak]
    """Split that the data brings -> its rows that are in the training file as well."""
    disagreeing: Alike
    """Questions that come with more than one answer."""
    answers_are_labels: bool


Names = Callable[[int], str]
"""Index among all rows -> `train.jsonl:17`."""


def _names(parts: Sequence[Sequence[str]]) -> Names:
    ends = np.cumsum([len(part) for part in parts])

    def name(index: int) -> str:
        number = int(np.searchsorted(ends, index, side="right"))
        return parts[number][index - int(ends[number]) + len(parts[number])]

    return name


def compare(
    keys: Mapping[str, RowKeys],
    origins: Mapping[str, Sequence[str]],
    *,
    threshold: float | None,
    validation: float,
) -> Comparison:
    """Compares the rows of a data set, all with all.

    Args:
        keys: by the split that the data brings, in the order of its rows.
        origins: the rows' names, in the same order.
        threshold: similarity from which two rows are near copies (`data.near_duplicates`); None: not looked for.
        validation: share of the rows that is held out, where the data brings no validation rows.
    """
    splits = list(keys)
    equal = np.concatenate([keys[split].equal for split in splits])
    position = np.concatenate([keys[split].position for split in splits])
    side = np.repeat(np.arange(len(splits)), [len(keys[split].equal) for split in splits])
    is_train = side == splits.index("train")
    names = _names([origins[split] for split in splits])
    cluster = _clusters([keys[split] for split in splits], equal, threshold)
    exact = _repeated(equal, side)
    near = _repeated(cluster, side) & ~exact
    one_of_each = np.unique(equal, return_index=True)[1]
    sizes = np.unique(cluster[one_of_each], return_counts=True)[1]
    return Comparison(
        exact=_named(exact, equal, side, names),
        near=_named(near, cluster, side, names),
        num_clusters=int(np.count_nonzero(sizes > 1)),
        largest_cluster=int(sizes.max(initial=0)),
        naive=None if "validation" in keys else _naive(position, is_train, equal, cluster, validation, names),
        given={
            split: _leak(side == number, is_train, equal, cluster, names)
            for number, split in enumerate(splits)
            if split != "train"
        },
        disagreeing=_disagreeing([keys[split] for split in splits], names),
        answers_are_labels=_few_answers([keys[split] for split in splits]),
    )


def _clusters(keys: Sequence[RowKeys], equal: npt.NDArray[np.uint64], threshold: float | None) -> IntArray:
    """int64 [n]: the same for rows that are copies or near copies of each other."""
    signatures = [some.signature for some in keys if some.signature is not None]
    if threshold is None or len(signatures) < len(keys):
        _, first, same = np.unique(equal, return_index=True, return_inverse=True)
        return first[same].astype(np.int64)
    # half a gigabyte for a million rows: not copied where that can be helped
    return clusters(signatures[0] if len(signatures) == 1 else np.concatenate(signatures), threshold=threshold)


def _repeated(values: npt.NDArray[np.generic], side: IntArray) -> BoolArray:
    """bool [n]: whether an earlier row of the same split has the value."""
    repeated = np.ones(len(values), np.bool_)
    for number in range(int(side.max(initial=-1)) + 1):
        rows = np.flatnonzero(side == number)
        repeated[rows[np.unique(values[rows], return_index=True)[1]]] = False
    return repeated


def _named(chosen: BoolArray, values: npt.NDArray[np.generic], side: IntArray, names: Names) -> Alike:
    """Each with the first row that it is like."""
    pairs = []
    for index in np.flatnonzero(chosen)[:MAX_NAMED]:
        first = int(np.flatnonzero((values == values[index]) & (side == side[index]))[0])
        pairs.append((names(int(index)), names(first)))
    return Alike(int(np.count_nonzero(chosen)), tuple(pairs))


def _naive(
    position: npt.NDArray[np.uint64],
    is_train: BoolArray,
    equal: npt.NDArray[np.uint64],
    cluster: IntArray,
    validation: float,
    names: Names,
) -> Leak:
    """Holds rows out one by one, each where its content puts it."""
    held_out = is_train & (position / _POSITIONS < validation)
    return _leak(held_out, is_train & ~held_out, equal, cluster, names)


def _leak(
    held_out: BoolArray,
    train: BoolArray,
    equal: npt.NDArray[np.uint64],
    cluster: IntArray,
    names: Names,
) -> Leak:
    exact = held_out & np.isin(equal, equal[train])
    near = held_out & np.isin(cluster, cluster[train]) & ~exact
    alike = []
    for found, values in ((exact, equal), (near, cluster)):
        named = np.flatnonzero(found)[:MAX_NAMED]
        firsts = [int(np.flatnonzero(train & (values == values[index]))[0]) for index in named]
        pairs = tuple((names(int(index)), names(first)) for index, first in zip(named, firsts, strict=True))
        alike.append(Alike(int(np.count_nonzero(found)), pairs))
    return Leak(int(np.count_nonzero(held_out)), *alike)


def _disagreeing(keys: Sequence[RowKeys], names: Names) -> Alike:
    prompt, answer = (np.concatenate([getattr(some, name) for some in keys]) for name in ("prompt", "answer"))
    asked = np.flatnonzero(prompt != 0)
    order = asked[np.lexsort((answer[asked], prompt[asked]))]
    ordered = prompt[order]
    differs = (ordered[1:] == ordered[:-1]) & (answer[order][1:] != answer[order][:-1])
    questions = ordered[1:][differs]  # rising
    questions = questions[np.diff(questions, prepend=np.uint64(0)) != 0]
    rows = asked[np.isin(prompt[asked], questions)]
    named = list(dict.fromkeys(prompt[rows[:_CHUNK]].tolist()))[:MAX_NAMED]
    answered: dict[int, dict[int, str]] = {question: {} for question in named}
    for index in rows[:_CHUNK][np.isin(prompt[rows[:_CHUNK]], np.array(named, np.uint64))]:
        answered[int(prompt[index])].setdefault(int(answer[index]), names(int(index)))
    return Alike(len(questions), tuple(tuple(some.values())[:4] for some in answered.values()))


def _few_answers(keys: Sequence[RowKeys]) -> bool:
    asked = np.concatenate([some.prompt for some in keys]) != 0
    answers = np.concatenate([some.answer for some in keys])[asked]
    if len(np.unique(answers[:_CHUNK])) > _FEW_ANSWERS:
        return False
    return 0 < len(np.unique(answers)) <= min(_FEW_ANSWERS, len(answers) // 5)
