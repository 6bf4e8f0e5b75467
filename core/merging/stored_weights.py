"""The weights of a model folder as they lie on disk: where each tensor is, and rows of it in NumPy.

Nothing is read before it is asked for, and never more than was asked for, so that a model larger than memory passes
through. bfloat16, which NumPy lacks, is the upper half of a float32; values are rounded to the nearest one, ties to the
even one (IEEE 754), as torch does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.models.folder import read_header, weight_files

Values = npt.NDArray[np.float32]

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that can be calculated with: safetensors' name -> the name in `config.json`."""
SIZES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file. For reading, it is a matrix of the last axis' width; a vector is one row."""

    name: str
    path: Path
    dtype: str
    """safetensors' name: `BF16`."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    num_bytes: int

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])


def stored_tensors(folder: Path, *, name: str | None = None) -> list[Stored]:
    """Every tensor of a folder in Hugging Face layout, file by file in the order of the bytes.

    Args:
        name: what the user calls the model; the folder itself by default.

    Raises:
        UserError: a file is missing or damaged, or two files hold the same tensor.
    """
    found: list[Stored] = []
    for path in weight_files(folder, name=name):
        header = read_header(path)
        header.pop("__metadata__", None)
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        for tensor, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            begin, end = entry["data_offsets"]
            found.append(Stored(tensor, path, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin))
    _refuse_twins(found, name or str(folder))
    return found


def _refuse_twins(found: Sequence[Stored], name: str) -> None:
    first: dict[str, Stored] = {}
    for tensor in found:
        twin = first.setdefault(tensor.name, tensor)
        if twin is not tensor:
            raise UserError(
                f"{name}: {twin.path.name} and {tensor.path.name} both hold {tensor.name}",
                hint="remove the file that does not belong to the model, or download the model again",
            )


class WeightReader:
    """Reads rows of stored tensors; one file is open at a time. Use as a context."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def read_bytes(self, tensor: Stored, begin: int, size: int) -> bytes:
        """`size` bytes of a tensor from its byte `begin`.

        Raises:
            UserError: the file ends before.
        """
        if self._file is None or self._path != tensor.path:
            self._close()
            self._file, self._path = open(tensor.path, "rb"), tensor.path  # noqa: SIM115 (closed in _close)
        self._file.seek(tensor.offset + begin)
        raw = self._file.read(size)
        if len(raw) != size:
            raise UserError(f"{tensor.path}: ends within {tensor.name}", hint="copy or download the model again")
        return raw

    def read_rows(self, tensor: Stored, first: int, last: int) -> Values:
        """Rows `first` to `last` (not included) of a floating tensor: a new float32 array [last - first, width]."""
        row_bytes = tensor.width * SIZES[tensor.dtype]
        raw = self.read_bytes(tensor, first * row_bytes, (last - first) * row_bytes)
        return to_float32(raw, tensor.dtype).reshape(last - first, tensor.width)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._path = None


def to_float32(raw: bytes, dtype: str) -> Values:
    """Stored values as a new float32 array [values]; exact for every type in `FLOATS`."""
    if dtype == "BF16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def from_float32(values: Values, dtype: str) -> npt.NDArray[np.generic]:
    """`values` rounded to `dtype`; bfloat16 as its bits, uint16. What float16 can't hold becomes infinite."""
    if dtype == "F32":
        return values.astype("<f4", copy=False)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype("<f2")
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> 16) & 1
    odd += 0x7FFF  # half of the last place kept, less one where that place is even
    odd += bits
    odd >>= 16
    rounded = odd.astype("<u2")
    if np.isnan(values).any():  # the sum above may have made infinity of it, or wrapped around
        nan = np.isnan(values)
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded
