"""The losses of every row, written and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.protocols import RowLosses
from core.row_losses import read_row_losses, read_splits, write_row_losses


def losses(seed: int, num_rows: int) -> RowLosses:
    rng = np.random.default_rng(seed)
    return RowLosses(rng.permutation(num_rows), rng.gamma(5, 3, num_rows), rng.integers(1, 50, num_rows))


def assert_same(one: RowLosses, other: RowLosses) -> None:
    for name, dtype in (("row_ids", np.int64), ("nll", np.float64), ("num_targets", np.int64)):
        assert getattr(one, name).dtype == dtype
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_round_trip(tmp_path: Path) -> None:
    validation, probe = losses(0, 7), losses(1, 4)
    write_row_losses(tmp_path, 50, validation=validation, probe=probe)
    write_row_losses(tmp_path, 100, validation=probe, probe=validation)
    for step, expected in ((50, (validation, probe)), (100, (probe, validation))):
        found = read_row_losses(tmp_path, step)
        assert found is not None
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
            assert one.mean == other.mean


def test_no_evaluation_is_none(tmp_path: Path) -> None:
    assert read_row_losses(tmp_path, 0) is None
    write_row_losses(tmp_path, 0, validation=losses(0, 3), probe=losses(0, 3))
    assert read_row_losses(tmp_path, 1) is None


@pytest.mark.parametrize("kept", [0, 4, 100, 500])
def test_a_damaged_file_is_no_evaluation(tmp_path: Path, kept: int) -> None:
    write_row_losses(tmp_path, 5, validation=losses(0, 7), probe=losses(1, 4))
    path = tmp_path / "row_losses" / "step5.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert read_row_losses(tmp_path, 5) is None and read_splits(tmp_path, 5) == {}


def test_a_file_without_its_row_numbers_is_no_evaluation(tmp_path: Path) -> None:
    write_row_losses(tmp_path, 5, validation=losses(0, 7), probe=losses(1, 4))
    path = tmp_path / "row_losses" / "step5.safetensors"
    save_file({name: values for name, values in load_file(path).items() if "row_ids" not in name}, path)
    assert read_splits(tmp_path, 5) == {}


def test_the_same_evaluation_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "row_losses" / "step5.safetensors"
    contents = []
    for _ in range(2):
        write_row_losses(tmp_path, 5, validation=losses(0, 7), probe=losses(1, 4))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_other_programs_can_read_it(tmp_path: Path) -> None:
    write_row_losses(tmp_path, 5, validation=losses(0, 7), probe=losses(1, 4))
    tensors = load_file(tmp_path / "row_losses" / "step5.safetensors")
    expected = {f"{split}.{name}" for split in ("val", "probe") for name in ("row_ids", "nll", "num_targets")}
    assert set(tensors) == expected
    np.testing.assert_array_equal(tensors["val.nll"], losses(0, 7).nll)


def test_rows_that_are_views_are_saved_as_what_they_show(tmp_path: Path) -> None:
    whole = losses(0, 10)
    part = RowLosses(whole.row_ids[::2], whole.nll[::2], whole.num_targets[::2])
    write_row_losses(tmp_path, 1, validation=part, probe=whole)
    found = read_row_losses(tmp_path, 1)
    assert found is not None
    assert_same(found[0], part)
