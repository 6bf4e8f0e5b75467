"""Weights as they lie on disk, and the way to float32 and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.errors import UserError
from core.merging.stored_weights import Stored, WeightReader, from_float32, stored_tensors, to_float32


def every_kind_of_value() -> np.ndarray:
    """Every upper half of a float32 (subnormal, infinite, NaN, both signs), each with lower halves around the tie."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper | lower).reshape(-1).view(np.float32)


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_rounding_is_that_of_torch(dtype: str, name: str) -> None:
    torch = pytest.importorskip("torch")
    values = every_kind_of_value()
    expected = torch.from_numpy(values.copy()).to(getattr(torch, name))
    found = from_float32(values, dtype)
    is_nan = np.isnan(values)
    bits = expected.view(torch.int32 if dtype == "F32" else torch.int16).numpy().view(f"<u{found.itemsize}")
    assert np.array_equal(found.view(bits.dtype)[~is_nan], bits[~is_nan])
    assert np.isnan(to_float32(found[is_nan].tobytes(), dtype)).all()
    # and back, exactly
    wide = to_float32(found.tobytes(), dtype)
    assert np.array_equal(wide, expected.float().numpy(), equal_nan=True)


def test_bfloat16_by_hand() -> None:
    """1 + 2^-8 lies between two bfloat16 numbers, 1 and 1 + 2^-7: the even one is 1. 1 + 3 * 2^-8 goes up."""
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert to_float32(from_float32(values, "BF16").tobytes(), "BF16").tolist() == [1, 1 + 2**-6, 1 + 2**-7]


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    first, second = np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.arange(5, dtype=np.float16)
    save_file({"b": first, "a": second}, tmp_path / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in stored_tensors(tmp_path)}
    stack, vector = tensors["b"], tensors["a"]
    assert (stack.num_rows, stack.width, vector.num_rows, vector.width) == (6, 4, 1, 5)
    with WeightReader() as reader:
        assert reader.read_rows(stack, 2, 5).tolist() == first.reshape(6, 4)[2:5].tolist()
        assert reader.read_rows(vector, 0, 1).tolist() == [[0, 1, 2, 3, 4]]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        save_file({"w": np.zeros(2, np.float32)}, tmp_path / name)
    with pytest.raises(UserError, match="both hold w"):
        stored_tensors(tmp_path)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    with WeightReader() as reader, pytest.raises(UserError, match="ends within w"):
        reader.read_rows(Stored("w", path, "F32", (4,), offset=0, num_bytes=16), 0, 1)
