"""The three files are whole after every append, whatever the disk does, and an append costs the same at any length."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from core.journal import COLUMNS, CSV_EXPORT, JOURNAL, JSON_EXPORT, Journal, read_records


def record(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "loss": 2.0 - step / 100, "lr": 1e-4, "grade": None, **values}


def read_all(folder: Path) -> tuple[list[Any], list[Any], list[dict[str, str]]]:
    """Records of the journal, of the JSON array and rows of the CSV; each must be whole."""
    journal = (folder / JOURNAL).read_text()
    assert journal == "" or journal.endswith("\n")
    array = json.loads((folder / JSON_EXPORT).read_text())
    with open(folder / CSV_EXPORT, newline="") as file:
        reader = csv.DictReader(file)
        table = list(reader)
    assert reader.fieldnames == list(COLUMNS)
    assert all(None not in row and None not in row.values() for row in table)
    return [json.loads(line) for line in journal.splitlines()], array, table


def assert_holds(folder: Path, records: list[dict[str, Any]]) -> None:
    journal, array, table = read_all(folder)
    assert journal == array == records
    assert len(table) == len(records)
    for row, expected in zip(table, records, strict=True):
        for name in COLUMNS:
            value = expected.get(name)
            assert row[name] == ("" if value is None else str(value))


def test_all_three_files_are_whole_after_every_append(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert_holds(tmp_path, [])
    records = [record(step, val_loss=1.5, grade="GOOD") if step % 2 else record(step) for step in range(5)]
    for count, one in enumerate(records, start=1):
        journal.append(one)
        assert_holds(tmp_path, records[:count])
    journal.close()


def test_the_newest_record_is_the_last_of_the_array(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(3):
        journal.append(record(step))
    assert json.loads((tmp_path / JSON_EXPORT).read_text())[-1]["step"] == 2
    # one record a line, so that diff and tail work too
    assert len((tmp_path / JSON_EXPORT).read_text().splitlines()) == 3 + 2
    journal.close()


def test_an_append_writes_no_more_after_many_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = os.pwrite

    def pwrite(descriptor: int, content: bytes, offset: int) -> int:
        written.append(len(content))
        return real(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    journal = Journal(tmp_path)
    per_append = []
    for step in range(100, 400):
        journal.append(record(step, loss=1.25, epoch=0.5))
        per_append.append((len(written), sum(written)))
        written.clear()
    journal.close()
    # the first has no comma before it
    assert set(per_append[1:]) == {per_append[-1]}
    assert per_append[-1][0] == 3
    size = len((tmp_path / JOURNAL).read_bytes()) / 300
    assert per_append[-1][1] < 4 * size
    assert_holds(tmp_path, [record(step, loss=1.25, epoch=0.5) for step in range(100, 400)])


def test_an_append_rewrites_no_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    names = (JOURNAL, JSON_EXPORT, CSV_EXPORT)
    before = [(tmp_path / name).stat().st_ino for name in names]
    journal.append(record(1))
    assert [(tmp_path / name).stat().st_ino for name in names] == before
    journal.close()


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(3):
        journal.append(record(step))
    kept = journal.num_bytes
    assert kept == (tmp_path / JOURNAL).stat().st_size
    journal.append(record(3))
    journal.close()
    with open(tmp_path / JOURNAL, "a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line

    journal = Journal(tmp_path, keep_bytes=kept)
    assert_holds(tmp_path, [record(0), record(1), record(2)])
    journal.append(record(30))
    assert_holds(tmp_path, [record(0), record(1), record(2), record(30)])
    journal.close()


def test_without_a_checkpoint_it_begins_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(record(0))
    journal.close()
    journal = Journal(tmp_path)
    assert_holds(tmp_path, [])
    journal.append(record(7))
    assert_holds(tmp_path, [record(7)])
    journal.close()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b"\xff\x00" * 50),
        lambda path: path.write_bytes(path.read_bytes() * 2),
    ],
    ids=["gone", "empty", "cut off", "garbled", "doubled"],
)
@pytest.mark.parametrize("name", [JSON_EXPORT, CSV_EXPORT])
def test_a_damaged_export_is_mended(tmp_path: Path, name: str, spoil: Callable[[Path], None]) -> None:
    journal = Journal(tmp_path)
    for step in range(3):
        journal.append(record(step))
    kept = journal.num_bytes
    journal.close()
    spoil(tmp_path / name)
    journal = Journal(tmp_path, keep_bytes=kept)
    journal.append(record(3))
    assert_holds(tmp_path, [record(step) for step in range(4)])
    journal.close()


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: os.truncate(path, 10)])
def test_a_journal_that_lost_records_is_refused(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    journal = Journal(tmp_path)
    journal.append(record(0))
    kept = journal.num_bytes
    journal.close()
    spoil(tmp_path / JOURNAL)
    with pytest.raises(UserError, match=rf"metrics\.jsonl.*{kept}"):
        Journal(tmp_path, keep_bytes=kept)


class FullDisk:
    """A pwrite with `room` for new bytes: it writes what fits, then raises ENOSPC; bytes in place can be replaced."""

    def __init__(self, room: int) -> None:
        self.room, self.real = room, os.pwrite

    def __call__(self, descriptor: int, content: bytes, offset: int) -> int:
        new = max(offset + len(content) - os.fstat(descriptor).st_size, 0)
        fits = len(content) - max(new - self.room, 0)
        if fits <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= min(new, self.room)
        return self.real(descriptor, content[:fits], offset)


def sizes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (JOURNAL, JSON_EXPORT, CSV_EXPORT))


@pytest.mark.parametrize("num_records", [0, 2])
def test_a_full_disk_leaves_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_records: int) -> None:
    """The disk fills up at any byte of an append: whole files, a message for the user, and it goes on afterwards."""
    before, new = [record(step) for step in range(num_records)], record(9, tokens_per_second=123.456)
    room, needed = 0, math.inf
    while room <= needed:
        folder = tmp_path / str(room)
        folder.mkdir()
        journal = Journal(folder)
        for one in before:
            journal.append(one)
        size = sizes(folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", FullDisk(room))
            problem = None
            try:
                journal.append(new)
            except UserError as error:
                problem = str(error)
        if problem is None:
            needed = sizes(folder) - size
            assert room == needed
        else:
            assert "the disk is full" in problem
            assert str(folder) in problem
        for content in read_all(folder)[:2]:
            assert content in (before, [*before, new])
        assert len(read_all(folder)[2]) in (num_records, num_records + 1)
        kept = journal.num_bytes
        journal.close()

        journal = Journal(folder, keep_bytes=kept)
        first, second = read_all(folder)[:2]
        assert first == second
        journal.append(record(10))
        assert_holds(folder, [*first, record(10)])
        journal.close()
        room += 1
    assert 100 < needed < 400


def test_a_disk_that_takes_nothing_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that copies on write refuses even to replace bytes."""
    journal = Journal(tmp_path)
    journal.append(record(0))

    def pwrite(descriptor: int, content: bytes, offset: int) -> int:
        if os.fstat(descriptor).st_ino == (tmp_path / JOURNAL).stat().st_ino:
            return real(descriptor, content, offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(UserError, match="the disk is full"):
        journal.append(record(1))
    _, array, table = read_all(tmp_path)
    assert array == [record(0)]
    assert len(table) == 1
    journal.close()


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    journal = Journal(tmp_path)
    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="Input/output"):
        journal.append(record(1))
    journal.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_json_does_not_know_is_refused(tmp_path: Path, value: float) -> None:
    journal = Journal(tmp_path)
    journal.append(record(0))
    with pytest.raises(ValueError, match="JSON"):
        journal.append(record(1, loss=value))
    assert_holds(tmp_path, [record(0)])
    journal.close()


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(AssertionError, match="speed"):
        journal.append(record(0, speed=1.0))
    assert_holds(tmp_path, [])
    journal.close()


def test_reading_while_it_is_written(tmp_path: Path) -> None:
    assert list(read_records(tmp_path)) == []
    lines = [json.dumps(record(step)) + "\n" for step in range(3)]
    path = tmp_path / JOURNAL
    path.write_text(lines[0] + lines[1] + lines[2][:-1])  # all but its end of line
    found = list(read_records(tmp_path))
    assert [one for one, _ in found] == [record(0), record(1)]
    assert [offset for _, offset in found] == [len(lines[0]), len(lines[0] + lines[1])]

    offset = found[-1][1]
    assert list(read_records(tmp_path, offset=offset)) == []  # the third line is not whole yet
    path.write_text("".join(lines))
    assert list(read_records(tmp_path, offset=offset)) == [(record(2), len("".join(lines)))]
    assert list(read_records(tmp_path, offset=len("".join(lines)))) == []


def test_reading_passes_over_a_garbled_line(tmp_path: Path) -> None:
    first, last = json.dumps(record(0)) + "\n", json.dumps(record(2)) + "\n"
    (tmp_path / JOURNAL).write_bytes(first.encode() + b"\x00\xff{\n" + last.encode())
    found = list(read_records(tmp_path))
    assert [one["step"] for one, _ in found] == [0, 2]
    assert found[-1][1] == (tmp_path / JOURNAL).stat().st_size


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    journal = Journal(tmp_path)
    journal.append(record(0))
    synced.clear()
    journal.sync()
    assert synced == [(tmp_path / JOURNAL).stat().st_ino]
    journal.close()


def test_the_csv_has_the_numbers_of_a_routing_and_no_lists(tmp_path: Path) -> None:
    routing = {"entropy": 0.9, "entropy_min": 0.8, "entropy_min_layer": 3, "moved_max": 0.1, "moved_max_layer": 2}
    full = record(0, aux_loss=2.25, routing={**routing, "collapsed": [1], "shares": [[0.5, 0.5]]})
    journal = Journal(tmp_path)
    journal.append(full)
    journal.append(record(1))
    journal.close()
    Journal(tmp_path, keep_bytes=(tmp_path / JOURNAL).stat().st_size).close()  # writes the exports anew
    records, array, table = read_all(tmp_path)
    assert records == array == [full, record(1)]
    assert table[0]["aux_loss"] == "2.25"
    assert {name: table[0][f"routing.{name}"] for name in routing} == {n: str(v) for n, v in routing.items()}
    assert table[1]["routing.entropy"] == ""
    assert not [name for name in table[0] if "shares" in name or "collapsed" in name or name == "routing"]
