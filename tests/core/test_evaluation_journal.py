"""Finished rows survive a kill, and no others are taken for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.errors import UserError
from core.evaluation.journal import RowJournal, fingerprint, forget_others, is_journal, journal_name

ROWS = [{"side": "base", "row": number, "nll": 1 / (number + 3), "text": "§ \ud800"} for number in range(4)]


def write(path: Path, key: str = "one", **options: bool) -> list[dict[str, object]]:
    with RowJournal(path, key, **options) as journal:
        journal.append(ROWS[:2])
        journal.append(ROWS[2:])
        return journal.records


def test_rows_come_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert write(path) == ROWS
    with RowJournal(path, "one") as journal:
        assert journal.records == ROWS


def test_other_settings_start_anew_and_nothing_is_lost_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path)
    with RowJournal(path, "two") as journal:
        assert journal.records == []
    with RowJournal(path, "one") as journal:  # nothing was written yet
        assert journal.records == ROWS
    with RowJournal(path, "two") as journal:
        journal.append(ROWS[:1])
    with RowJournal(path, "two") as journal:
        assert journal.records == ROWS[:1]
    with RowJournal(path, "one") as journal:
        assert journal.records == []


def test_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path)
    with RowJournal(path, "one", anew=True):
        pass  # stopped before its first row
    with RowJournal(path, "one") as journal:
        assert journal.records == []
    write(path)
    with RowJournal(path, "one", anew=True) as journal:
        assert journal.records == []
        journal.append(ROWS[3:])
    with RowJournal(path, "one") as journal:
        assert journal.records == ROWS[3:]


@pytest.mark.parametrize("lost", [1, 5, 40, 90])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "rows.jsonl"
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    with RowJournal(path, "one") as journal:
        kept = len(journal.records)
        assert journal.records == ROWS[:kept] and kept < 4
        journal.append(ROWS[kept:])
    assert path.read_bytes() == whole


def test_two_do_not_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with RowJournal(path, "one") as first, RowJournal(path, "one") as second:
        first.append(ROWS[:1])
        with pytest.raises(UserError, match="another evaluation is writing here"):
            second.append(ROWS[:1])


def test_what_another_has_finished_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    late = RowJournal(path, "one")
    write(path)
    with late, pytest.raises(UserError, match="another evaluation"):
        late.append(ROWS[:1])
    with RowJournal(path, "one") as journal:
        assert journal.records == ROWS


@pytest.mark.parametrize("damage", [b"\0" * 40 + b"\n", b"\0\0\0{\n", b'{"side": "ba\n', b"\xff\n", b"7\n"])
def test_a_damaged_line_and_what_follows_are_dropped(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    write(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], damage, *lines[3:]]))
    with RowJournal(path, "one") as journal:
        assert journal.records == ROWS[:2]
        journal.append(ROWS[2:])
    assert path.read_bytes() == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk at hand")
def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    journal = RowJournal(path, "one")
    journal.append(ROWS[:1])
    assert journal._file is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._file.fileno())
    os.close(full)
    with pytest.raises(UserError, match="the disk is full") as caught, journal:
        journal.append(ROWS[1:])
    assert "same command" in (caught.value.hint or "")
    with RowJournal(path, "one") as journal:
        assert journal.records == ROWS[:1]


def test_journals_of_other_rows_stay_until_they_are_forgotten(tmp_path: Path) -> None:
    names = [journal_name("losses", fingerprint(number)) for number in range(3)]
    assert len(set(names)) == 3 and all(map(is_journal, names)) and not is_journal("rows.jsonl")
    (tmp_path / "rows.jsonl").touch()
    for name in names:
        write(tmp_path / name)
    with RowJournal(tmp_path / names[1], "one") as busy:
        busy.append(ROWS[:1])
        forget_others(tmp_path, names[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[:2], "rows.jsonl"])


def test_nothing_is_written_without_a_row(tmp_path: Path) -> None:
    with RowJournal(tmp_path / "rows.jsonl", "one"):
        pass
    assert not list(tmp_path.iterdir())


def test_fingerprints() -> None:
    assert fingerprint(1, [2, 3]) == fingerprint(1, (2, 3))
    assert fingerprint(1, [2, 3]) != fingerprint(1, [2], [3])
