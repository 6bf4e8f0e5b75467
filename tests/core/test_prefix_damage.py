"""Stored prefixes that are damaged, foreign or contradictory are computed again, never used."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core import prefix_store
from core.models.folder import read_header
from core.prefix_store import KEY_FILE
from core.protocols import Prefix, TokenArray
from tests.core.stored_rows import (
    KEY,
    ROWS,
    compute,
    fill,
    flip_last_bit,
    has,
    ignore,
    open_store,
    prefix_of,
    row_of,
    segment_of,
    segments,
)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_to_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def header_is_a_list(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"[]")


def header_nests_deep(path: Path) -> None:
    path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)


def huge_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def foreign(path: Path) -> None:
    """Of another program: the same tensors without our metadata."""
    save_file(load_file(path), path)


def other_format(path: Path) -> None:
    raw = path.read_bytes()
    assert raw.count(b"twinkeel prefixes 1") == 1
    path.write_bytes(raw.replace(b"twinkeel prefixes 1", b"twinkeel prefixes 0"))


def other_shape(path: Path) -> None:
    """A third of the columns and three times the rows: as many bytes, but another row's length."""
    raw = path.read_bytes()
    assert raw.count(b"[6,8]") == 1
    path.write_bytes(raw.replace(b"[6,8]", b"[8,6]"))


def strange_offsets(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"data_offsets":[0,', b'"data_offsetx":[0,'))


def absurd_shape(path: Path) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b"[6,8]", b"[" + b"9" * 40 + b",8]")
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def of_another_base(path: Path) -> None:
    """Whole, of the same rows, but what another base made of them."""
    root = path.parent.parent
    fill(root / "elsewhere", [ROWS[2]], layers="3")
    shutil.copy(segment_of(root / "elsewhere", ROWS[2]), path)
    shutil.rmtree(root / "elsewhere")


DAMAGES = [
    *(cut, cut_to_half, empty, flip_last_bit, garbage, header_is_a_list, header_nests_deep, huge_header),
    *(foreign, other_format, other_shape, absurd_shape, strange_offsets, of_another_base),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_said_removed_and_computed_again(
    tmp_path: Path, one_row_each: None, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    fill(tmp_path)
    path = segment_of(tmp_path, ROWS[2])
    damage(path)
    store = open_store(tmp_path)
    assert store.find(ROWS) == [2]
    assert [(record.name, record.levelname) for record in caplog.records] == [("twinkeel", "WARNING")]
    assert caplog.messages == [f"{path}: damaged; its rows are computed again"]
    assert not path.exists() and len(segments(tmp_path)) == 4
    store.fill([ROWS[2]], compute, on_row=ignore)
    assert has(store)
    again = open_store(tmp_path)
    assert again.find(ROWS) == [] and has(again)
    assert len(caplog.messages) == 1


def test_a_segment_with_a_damaged_row_is_dropped_whole(tmp_path: Path) -> None:
    fill(tmp_path)
    flip_last_bit(segments(tmp_path)[0])
    assert open_store(tmp_path).find(ROWS) == [0, 1, 2, 3, 4]
    assert not segments(tmp_path)


def test_rows_that_nobody_wants_are_not_checked(tmp_path: Path, one_row_each: None) -> None:
    fill(tmp_path)
    flip_last_bit(segment_of(tmp_path, ROWS[2]))
    store = open_store(tmp_path)
    assert store.find(ROWS[:2]) == [] and has(store, ROWS[:2])
    assert len(segments(tmp_path)) == 5
    assert store.find(ROWS) == [2], "but when somebody does"


def test_no_flipped_bit_makes_a_wrong_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One after the other, in every byte of a segment."""
    caplog.set_level(logging.ERROR)
    rows = [row_of(3, 1), row_of(4)]

    def with_routing(given: Sequence[TokenArray]) -> Iterator[Prefix]:
        return (prefix_of(row, "float16", hidden=4, routed=True) for row in given)

    open_store(tmp_path).fill(rows, with_routing, on_row=ignore)
    (path,) = segments(tmp_path)
    raw = path.read_bytes()
    kept = 0
    for position in range(len(raw)):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1 << position % 8]) + raw[position + 1 :])
        store = open_store(tmp_path)
        missing = store.find(rows)
        for index in set(range(len(rows))) - set(missing):
            found, expected = store.get(rows[index]), next(with_routing([rows[index]]))
            assert found.routed is not None and expected.routed is not None
            assert found.states.dtype == expected.states.dtype and found.states.tobytes() == expected.states.tobytes()
            assert found.states.shape == expected.states.shape and found.routed.shape == expected.routed.shape
            assert found.routed.tobytes() == expected.routed.tobytes()
            kept += 1
    assert kept < 0.2 * len(raw), "a bit in a row's name loses that row alone; all others are noticed"


def test_segments_that_contradict_each_other_are_all_computed_again(
    tmp_path: Path, one_row_each: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A key that did not tell two bases apart: nobody knows which of them is the right one."""
    fill(tmp_path, ROWS[:3])
    wider = open_store(tmp_path)
    wider.fill(ROWS[3:4], lambda rows: (prefix_of(row, hidden=9) for row in rows), on_row=ignore)
    assert open_store(tmp_path).find(ROWS) == [0, 1, 2, 3, 4]
    assert len(caplog.messages) == 4 and not segments(tmp_path)


def test_what_contradicts_the_rows_in_use_is_computed_again(tmp_path: Path, one_row_each: None) -> None:
    store = fill(tmp_path, ROWS[:3])
    other = open_store(tmp_path)
    other.fill(ROWS[3:4], lambda rows: (prefix_of(row, "float16") for row in rows), on_row=ignore)
    assert store.find(ROWS) == [3, 4]
    assert has(store, ROWS[:3]) and len(segments(tmp_path)) == 3


def test_a_folder_with_the_key_of_another_base_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    (path,) = segments(tmp_path)
    (path.parent / KEY_FILE).write_text(json.dumps({**KEY, "layers": "3"}))
    store = open_store(tmp_path)
    assert store.find(ROWS) == [0, 1, 2, 3, 4]
    assert caplog.messages == [f"{path}: damaged; its rows are computed again"]
    store.fill(ROWS, compute, on_row=ignore)
    assert json.loads((path.parent / KEY_FILE).read_text()) == KEY
    assert open_store(tmp_path).find(ROWS) == []


def test_a_missing_key_file_is_written_again(tmp_path: Path) -> None:
    fill(tmp_path, ROWS[:3])
    key = segments(tmp_path)[0].parent / KEY_FILE
    key.unlink()
    assert open_store(tmp_path).find(ROWS) == [3, 4], "the segments themselves say what they belong to"
    fill(tmp_path)
    assert json.loads(key.read_text()) == KEY


def test_a_file_that_cannot_be_opened_is_left_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of file descriptors is no damage."""
    fill(tmp_path)

    def fail(path: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(prefix_store, "read_header", fail)
    assert open_store(tmp_path).find(ROWS) == [0, 1, 2, 3, 4]
    (path,) = segments(tmp_path)
    assert caplog.messages == [f"{path}: can't be read (Too many open files); its rows are computed again"]


def test_a_segment_that_goes_while_we_look_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)

    def evicted(path: Path) -> dict[str, Any]:
        path.unlink()
        return read_header(path)

    monkeypatch.setattr(prefix_store, "read_header", evicted)
    assert open_store(tmp_path).find(ROWS) == [0, 1, 2, 3, 4]
    assert not caplog.messages


def test_a_disk_that_reads_back_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lying(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        flip_last_bit(Path(path))

    monkeypatch.setattr("safetensors.numpy.save_file", lying)
    store = fill(tmp_path)
    assert has(store) and not segments(tmp_path)
    assert len(caplog.messages) == 1 and "what was written does not read back" in caplog.messages[0]
