"""Finished rows survive a kill, and no others are taken for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import UserError
from core.evaluation.journal import RowJournal, fingerprint

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


def test_nothing_is_written_without_a_row(tmp_path: Path) -> None:
    with RowJournal(tmp_path / "rows.jsonl", "one"):
        pass
    assert not list(tmp_path.iterdir())


def test_fingerprints() -> None:
    assert fingerprint(1, [2, 3]) == fingerprint(1, (2, 3))
    assert fingerprint(1, [2, 3]) != fingerprint(1, [2], [3])
