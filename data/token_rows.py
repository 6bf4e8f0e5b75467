"""Token rows of any number and length over a few flat arrays, in memory or mapped from files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from core.protocols import IntArray, TokenArray

BoolArray = npt.NDArray[np.bool_]
Item = TypeVar("Item", bound=np.generic)


class Ragged(Sequence[npt.NDArray[Item]], Generic[Item]):
    """Rows of different lengths, each a view of one flat array."""

    def __init__(self, flat: npt.NDArray[Item], starts: IntArray, lengths: IntArray) -> None:
        self._flat = flat
        self._starts = starts
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[Item]: ...

    @overload
    def __getitem__(self, index: slice) -> Ragged[Item]: ...

    def __getitem__(self, index: int | slice) -> npt.NDArray[Item] | Ragged[Item]:
        if isinstance(index, slice):
            return Ragged(self._flat, self._starts[index], self._lengths[index])
        start = self._starts[index]
        return self._flat[start : start + self._lengths[index]]

    def __iter__(self) -> Iterator[npt.NDArray[Item]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, eq=False)
class Origins(Sequence[str]):
    """Where rows were read, `train.jsonl:17`: made of a file's name and a number when it is asked for."""

    names: tuple[str, ...]
    files: npt.NDArray[np.int32]
    """int32 [N]: index into `names`."""
    numbers: IntArray
    """int64 [N]"""

    @classmethod
    def of(cls, origins: Iterable[str]) -> Origins:
        parts = [origin.rpartition(":") for origin in origins]
        names = {name: index for index, name in enumerate(dict.fromkeys(name for name, _, _ in parts))}
        files = np.array([names[name] for name, _, _ in parts], np.int32)
        return cls(tuple(names), files, np.array([int(number) for _, _, number in parts], np.int64))

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return f"{self.names[self.files[index]]}:{self.numbers[index]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def select(self, chosen: IntArray) -> Origins:
        return Origins(self.names, self.files[chosen], self.numbers[chosen])


@dataclass(frozen=True)
class TokenRows:
    """The rows of a split. `is_target[i][t]` says whether token `t` of row `i` is to be predicted; token 0 never is."""

    flat_ids: TokenArray
    """int32: the tokens of these rows, and of others, one row after the other."""
    flat_targets: BoolArray
    """bool, of the same length."""
    starts: IntArray
    """int64 [N]: where each row begins in the flat arrays."""
    lengths: IntArray
    """int64 [N]: tokens of each row."""
    origin: Origins
    """`train.jsonl:17`"""
    row_ids: IntArray
    """int64 [N]: index of each row in its split; a selection keeps them."""

    @classmethod
    def of(cls, ids: Sequence[TokenArray], is_target: Sequence[BoolArray], origin: Iterable[str]) -> TokenRows:
        """A split of rows that come one by one.

        Args:
            ids: int32 [num_tokens] each.
            is_target: bool [num_tokens] each.
        """
        flat_ids = np.concatenate([np.empty(0, np.int32), *ids])
        flat_targets = np.concatenate([np.empty(0, np.bool_), *is_target])
        lengths = np.fromiter((len(row) for row in ids), np.int64, len(ids))
        return cls.over(flat_ids, flat_targets, lengths, Origins.of(origin))

    @classmethod
    def over(cls, flat_ids: TokenArray, flat_targets: BoolArray, lengths: IntArray, origin: Origins) -> TokenRows:
        """A split of rows that lie one after the other."""
        assert len(flat_ids) == len(flat_targets) == lengths.sum()
        return cls(flat_ids, flat_targets, np.cumsum(lengths) - lengths, lengths, origin, np.arange(len(lengths)))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def ids(self) -> Ragged[np.int32]:
        """int32 [num_tokens] each"""
        return Ragged(self.flat_ids, self.starts, self.lengths)

    @cached_property
    def is_target(self) -> Ragged[np.bool_]:
        """bool [num_tokens] each"""
        return Ragged(self.flat_targets, self.starts, self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def num_targets(self) -> int:
        return int(self._reduce(np.add, self.flat_targets).sum())

    @property
    def largest_id(self) -> int:
        """The largest token id of any row. There must be a row."""
        return int(self._reduce(np.maximum, self.flat_ids).max())

    def _reduce(self, function: np.ufunc, flat: npt.NDArray[np.generic]) -> IntArray:
        """int64 [N]: sum or maximum of each row, in the order in which the rows lie."""
        order = np.argsort(self.starts, kind="stable")
        edges = np.stack([self.starts[order], (self.starts + self.lengths)[order]], axis=1).ravel()
        # what lies between an end and the next start is reduced as well, and dropped
        edges = edges[:-1] if len(edges) and edges[-1] == len(flat) else edges
        if not len(edges):
            return np.empty(0, np.int64)
        return np.asarray(function.reduceat(flat, edges, dtype=np.int64)[::2], np.int64)

    def select(self, indices: Iterable[int]) -> TokenRows:
        """Some of the rows, which keep their row ids; their tokens are not copied."""
        chosen = indices if isinstance(indices, np.ndarray) else np.fromiter(indices, np.int64)
        return TokenRows(
            self.flat_ids,
            self.flat_targets,
            self.starts[chosen],
            self.lengths[chosen],
            self.origin.select(chosen),
            self.row_ids[chosen],
        )

    def followed_by(self, later: TokenRows) -> TokenRows:
        """These rows and others as one split; tokens that lie in the same arrays are not copied."""
        flat_ids, flat_targets, offset = self.flat_ids, self.flat_targets, 0
        if later.flat_ids is not flat_ids:
            offset = len(flat_ids)
            flat_ids = np.concatenate([flat_ids, later.flat_ids])
            flat_targets = np.concatenate([flat_targets, later.flat_targets])
        names = self.origin.names
        return TokenRows(
            flat_ids,
            flat_targets,
            np.concatenate([self.starts, later.starts + offset]),
            np.concatenate([self.lengths, later.lengths]),
            Origins(
                names + later.origin.names,
                np.concatenate([self.origin.files, later.origin.files + np.int32(len(names))]),
                np.concatenate([self.origin.numbers, later.origin.numbers]),
            ),
            np.arange(len(self) + len(later)),
        )

    def renumbered(self) -> TokenRows:
        """The same rows as a split of their own."""
        return TokenRows(
            self.flat_ids, self.flat_targets, self.starts, self.lengths, self.origin, np.arange(len(self.lengths))
        )
