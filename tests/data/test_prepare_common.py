"""What all kinds of `data prepare` share: the walk, the manifest, the folder that is whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from core.errors import UserError
from data.prepare.common import Record, Sample, Seen, check_output, is_prepared, walk_files, write_prepared


class Lines:
    """A kind for these tests: a row for each line of each file."""

    name = "lines"
    group = "source"

    def settings(self) -> Mapping[str, Any]:
        return {"upper": False}

    def tools(self) -> Mapping[str, str]:
        return {"splitter": "1.0"}

    def samples(self, source: Path, record: Record) -> Iterator[Sample]:
        for file in walk_files(source, record):
            content = record.read(file.path, file.name).decode()
            record.advance()
            if not content:
                record.left_out.add("empty files", file.name)
            for line in content.splitlines():
                yield Sample({"text": line}, file.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "é.txt").write_text("ä\nb\n", encoding="utf-8")
    (folder / "a.txt").write_text("one\n")
    (folder / "c.txt").write_text("")
    return folder


def prepare(source: Path, output: Path, *, force: bool = False, record: Record | None = None) -> dict[str, Any]:
    record = record or Record()
    kind = Lines()
    manifest = write_prepared(kind.samples(source, record), output, kind=kind, record=record, force=force)
    written: dict[str, Any] = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    assert written == manifest.to_json()
    return written


def test_rows_and_manifest_say_what_was_made_of_what(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    manifest = prepare(source, output)
    rows = (output / "rows.jsonl").read_bytes()
    assert rows.decode() == (
        '{"text": "one", "source": "a.txt"}\n{"text": "ä", "source": "b/é.txt"}\n{"text": "b", "source": "b/é.txt"}\n'
    )
    assert manifest == {
        "format": "twinkeel prepared rows",
        "version": 1,
        "kind": "lines",
        "settings": {"upper": False},
        "tools": {"splitter": "1.0"},
        "group": "source",
        "rows": {"file": "rows.jsonl", "number": 3, "size": len(rows), "sha256": hashlib.sha256(rows).hexdigest()},
        "left_out": {"empty files": {"number": 1, "named": ["c.txt"]}},
        "noted": {},
        "sources": [
            {"path": "a.txt", "size": 4, "sha256": hashlib.sha256(b"one\n").hexdigest(), "rows": 1},
            {"path": "b/é.txt", "size": 5, "sha256": hashlib.sha256("ä\nb\n".encode()).hexdigest(), "rows": 2},
            {"path": "c.txt", "size": 0, "sha256": hashlib.sha256(b"").hexdigest(), "rows": 0},
        ],
    }
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "rows.jsonl"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_the_same_bytes_wherever_the_source_lies(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "one")
    moved = source.rename(tmp_path / "elsewhere")
    prepare(moved, tmp_path / "two")
    for name in ("rows.jsonl", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_rows_written_inside_their_own_source_are_the_same_the_next_time(source: Path, tmp_path: Path) -> None:
    """Neither the folder that is being written nor the one it replaces is seen, whatever their names."""
    prepare(source, tmp_path / "elsewhere")
    for _ in range(2):
        prepare(source, source / "prepared" / "out", force=True)
        for name in ("rows.jsonl", "manifest.json"):
            assert (source / "prepared" / "out" / name).read_bytes() == (tmp_path / "elsewhere" / name).read_bytes()


def test_an_existing_folder_is_kept_unless_it_is_an_earlier_preparation(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    prepare(source, output)
    before = (output / "rows.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds prepared rows already") as refused:
        prepare(source, output)
    assert "--force" in (refused.value.hint or "")
    (source / "a.txt").write_text("other\n")
    prepare(source, output, force=True)
    assert (output / "rows.jsonl").read_bytes() == before.replace(b"one", b"other")
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a folder that data prepare wrote"):
        prepare(source, output, force=True)
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_is_not_ours_is_refused_even_by_force(what: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if what == "file":
        output.write_text("x")
    elif what == "folder":
        output.mkdir()
        (output / "x").touch()
    else:
        (tmp_path / "real").mkdir()
        output.symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="not a folder that data prepare wrote"):
        check_output(output, force=True)


def test_an_empty_folder_is_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert prepare(source, tmp_path / "out")["rows"]["number"] == 3


def test_nothing_is_left_when_the_samples_fail(source: Path, tmp_path: Path) -> None:
    def failing() -> Iterator[Sample]:
        yield Sample({"text": "a"}, "a")
        raise UserError("bad source")

    output = tmp_path / "folder" / "out"
    with pytest.raises(UserError, match="bad source"):
        write_prepared(failing(), output, kind=Lines(), record=Record())
    assert not output.parent.exists()
    prepare(source, output)
    before = (output / "rows.jsonl").read_bytes()
    with pytest.raises(UserError, match="bad source"):
        write_prepared(failing(), output, kind=Lines(), record=Record(), force=True)
    assert (output / "rows.jsonl").read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_no_rows_are_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").touch()
    with pytest.raises(UserError, match="no row came out of it; left out: empty files 1"):
        prepare(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_samples_are_written_as_they_come(tmp_path: Path) -> None:
    """Nothing but counts is kept: before each sample, all but a buffer's worth of the earlier ones is on the disk."""
    text = "x" * 100_000
    behind = []

    def many() -> Iterator[Sample]:
        for number in range(50):
            (written,) = tmp_path.glob(".out-*/rows.jsonl")
            behind.append(number * len(text) - written.stat().st_size)
            yield Sample({"text": text}, f"{number}")

    write_prepared(many(), tmp_path / "out", kind=Lines(), record=Record())
    assert max(behind) < 2 * len(text)


def test_half_a_character_is_left_out_and_said(tmp_path: Path) -> None:
    record = Record()
    samples = iter([Sample({"text": "good"}, "a"), Sample({"text": "\ud83d"}, "b")])
    manifest = write_prepared(samples, tmp_path / "out", kind=Lines(), record=record)
    assert manifest.num_rows == 1
    assert manifest.left_out == {"rows with half a character": {"number": 1, "named": ["b"]}}


def test_a_place_that_cannot_be_written_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write here"):
        prepare(source, tmp_path / "file" / "out")


def test_the_walk_goes_by_name_and_follows_no_link(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.txt", "a/x/1", "a-b", "B"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "B")
    os.mkfifo(tmp_path / "pipe")
    record = Record()
    names = [file.name for file in walk_files(tmp_path, record)]
    assert names == ["B", "a/x/1", "a-b", "b/a.txt", "b/z.txt"]
    assert record.left_out.to_json() == {
        "devices, pipes and sockets": {"number": 1, "named": ["pipe"]},
        "symbolic links": {"number": 2, "named": ["link", "loop"]},
    }


def test_the_walk_skips_folders_by_name_by_rule_and_its_own(source: Path, tmp_path: Path) -> None:
    prepare(source, source / "prepared" / "one")
    (source / "odd").mkdir()
    (source / "odd" / "mark").touch()
    record = Record()
    walk = walk_files(
        source,
        record,
        skipped_folders={"b": "folders called b"},
        skip_folder=lambda folder: "marked folders" if (folder / "mark").exists() else None,
    )
    assert [file.name for file in walk] == ["a.txt", "c.txt"]
    assert {reason: entry["named"] for reason, entry in record.left_out.to_json().items()} == {
        "folders called b": ["b/"],
        "folders that data prepare wrote": ["prepared/one/"],
        "marked folders": ["odd/"],
    }
    assert is_prepared(source / "prepared" / "one")
    assert not is_prepared(source)


def test_a_single_file_is_a_source(source: Path) -> None:
    assert [file.name for file in walk_files(source / "b" / "é.txt", Record())] == ["é.txt"]
    with pytest.raises(UserError, match="no such file or folder"):
        list(walk_files(source / "nothing", Record()))


def test_reasons_are_counted_and_the_first_three_named() -> None:
    record = Record()
    for number in range(5):
        record.left_out.add("odd files", f"{number}")
    assert record.left_out["odd files"] == 5
    assert record.left_out.to_json() == {"odd files": {"number": 5, "named": ["0", "1", "2"]}}


def test_seen_tells_repeats() -> None:
    seen = Seen()
    assert [seen.is_new(text) for text in ("a", "b", "a", "\ud83d", "\ud83d")] == [True, True, False, True, False]


def test_progress_is_shown_on_a_terminal_only(source: Path, tmp_path: Path) -> None:
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
        record = Record(console)
        with record.progress("preparing lines"):
            record.expect(3)
            prepare(source, tmp_path / f"out{is_terminal}", record=record)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("preparing lines" in shown and "3/3" in shown) == is_terminal
        assert is_terminal or shown == ""
