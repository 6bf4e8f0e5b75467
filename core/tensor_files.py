"""Reading safetensors into NumPy float32, whatever floating type they were stored in."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import UserError

_NUMPY_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def read_float32(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor of a file in float32. bfloat16, which NumPy lacks, is the upper half of a float32.

    Raises:
        UserError: the file is missing or damaged, or holds a tensor that is not floating.
    """
    from safetensors import SafetensorError, deserialize

    try:
        found = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", hint="copy the adapter again, whole") from None
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(f"{path}: can't be read ({error})", hint="copy the adapter again, whole") from None
    return {name: _as_float32(path, name, tensor["dtype"], tensor["data"], tensor["shape"]) for name, tensor in found}


def _as_float32(path: Path, name: str, dtype: str, data: bytes, shape: list[int]) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype in _NUMPY_TYPES:
        values = np.frombuffer(data, _NUMPY_TYPES[dtype]).astype(np.float32)
    else:
        raise UserError(
            f"{path}: {name} is {dtype}, not a floating type", hint="save the adapter in float32 or bfloat16"
        )
    if not np.isfinite(values).all():
        raise UserError(f"{path}: {name} holds NaN or infinite values", hint="the training that made it had diverged")
    return values.reshape(shape)
