"""Flat arrays that grow at their end: in memory while they are small, then in the files of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import UserError

Array = npt.NDArray[Any]
SPILL_BYTES = 64 * 2**20
"""What is kept in memory before it is written."""


class ArrayStore:
    """Arrays by name, built piece by piece.

    Args:
        folder: where they go when they are large, made when the first do; None: they stay in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._pieces: dict[str, list[Array]] = {}
        self._num_written: dict[str, int] = {}
        self._num_bytes = 0

    def append(self, arrays: Mapping[str, Array]) -> None:
        """Adds a piece to each of the arrays; the pieces of one have the same dtype and shape, but for the length."""
        for name, array in arrays.items():
            self._pieces.setdefault(name, []).append(array)
            self._num_bytes += array.nbytes
        if self._folder is not None and self._num_bytes >= SPILL_BYTES:
            self._spill(self._folder)

    def finish(self) -> dict[str, Array]:
        """The whole arrays; those in files are mapped."""
        if self._folder is not None and self._num_written:
            self._spill(self._folder)
        if self._folder is None or not self._num_written:
            return {name: np.concatenate(pieces) for name, pieces in self._pieces.items()}
        kinds = {name: pieces[0][:0] for name, pieces in self._pieces.items()}
        return {name: read_array(self._folder / file_name(name), like) for name, like in kinds.items()}

    def _spill(self, folder: Path) -> None:
        """Writes what is in memory. A disk that is full leaves everything in memory, and no files."""
        try:
            if not self._num_written:  # one that somebody removed must not come back without its rows
                folder.mkdir(parents=True, exist_ok=True)
            for name, pieces in self._pieces.items():
                with open(folder / file_name(name), "ab") as file:
                    for piece in pieces:
                        piece.tofile(file)
                self._num_written[name] = self._num_written.get(name, 0) + sum(map(len, pieces))
                self._pieces[name] = [pieces[0][:0].copy()]  # says what the array is of
            self._num_bytes = 0
        except OSError:
            self._take_back(folder)

    def _take_back(self, folder: Path) -> None:
        """Raises: UserError: what was written can't be read."""
        for name, num_rows in self._num_written.items():
            like = self._pieces[name][0]
            width = int(np.prod(like.shape[1:]))
            try:
                flat = np.fromfile(folder / file_name(name), like.dtype, count=num_rows * width)
                self._pieces[name].insert(0, flat.reshape(num_rows, *like.shape[1:]))
            except (OSError, ValueError):
                raise UserError(
                    f"{folder}: rows that were put here can't be read again",
                    hint="was the folder removed? start again, or set TWINKEEL_CACHE to another disk",
                ) from None
        for name in self._pieces:  # who keeps the arrays writes them anew
            with suppress(OSError):
                (folder / file_name(name)).unlink(missing_ok=True)
        self._folder = None


def file_name(name: str) -> str:
    return f"{name}.bin"


def write_array(path: Path, array: Array) -> None:
    """Writes an array's values, unless the file, which then is of the same size, is what the array is a map of."""
    if not path.exists() or path.stat().st_size != array.nbytes:
        with open(path, "wb") as file:
            array.tofile(file)


def read_array(path: Path, like: Array) -> Array:
    """Maps a file as an array [N, ...] of the dtype and the other dimensions of `like`; nobody can write to it.

    Raises: OSError, ValueError: no file, or not a whole number of rows.
    """
    row_bytes = like.dtype.itemsize * int(np.prod(like.shape[1:]))
    num_rows, rest = divmod(path.stat().st_size, row_bytes)
    if rest:
        raise ValueError(f"{path.name} is cut off")
    if not num_rows:
        return like[:0]
    # an array over the map, because a memmap's own slices cost several times as much
    return np.asarray(np.memmap(path, like.dtype, "r", shape=(num_rows, *like.shape[1:])))
