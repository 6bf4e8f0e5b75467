"""Files that appear whole or not at all, and errors of the disk in words."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from pathlib import Path

import pytest

from core import files
from core.errors import UserError


def test_write_atomic_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    files.write_atomic(path, "a long first content")
    files.write_atomic(path, "später")
    assert path.read_text(encoding="utf-8") == "später"
    files.write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_home_folder_and_a_name_that_looks_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.user_path("~/talk.jsonl") == tmp_path / "talk.jsonl"
    assert files.user_path("~no_such_user_here.jsonl") == Path("~no_such_user_here.jsonl")
    assert files.user_path("-") == Path("-")


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("broken", ["replace", "fsync", "open"])
def test_a_crash_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, durable: bool
) -> None:
    path = tmp_path / "file.txt"
    files.write_atomic(path, "old")

    def crash(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.open" if broken == "open" else f"os.{broken}", crash)
    if broken == "fsync" and not durable:
        files.write_atomic(path, "new")
        expected = "new"
    else:
        with pytest.raises(KeyboardInterrupt):
            files.write_atomic(path, "new", durable=durable)
        expected = "old"
    monkeypatch.undo()
    assert path.read_text() == expected


def test_durable_synchronises_content_before_and_folder_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace = os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: events.append("folder" if os.fstat(fd).st_ino == tmp_path.stat().st_ino else "file")
    )
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    files.write_atomic(tmp_path / "file", "content", durable=True)
    assert events == ["file", "rename", "folder"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "cannot write here"),
        (errno.EACCES, "cannot write here"),
    ],
)
def test_errors_of_the_disk_name_the_file(tmp_path: Path, number: int, words: str) -> None:
    path = tmp_path / "file.txt"
    with pytest.raises(UserError, match=words) as caught, files.disk_errors(path):
        raise OSError(number, os.strerror(number))
    assert str(path) in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.hint


def test_a_file_in_the_place_of_a_folder_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"), files.disk_errors(tmp_path / "taken" / "run"):
        (tmp_path / "taken" / "run").mkdir(parents=True, exist_ok=True)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output") as caught, files.disk_errors(tmp_path):
        raise OSError(errno.EIO, "Input/output error")
    assert not isinstance(caught.value, UserError)


def test_to_json_is_readable_and_strict() -> None:
    assert files.to_json({"name": "Käthe", "n": [1, None]}) == '{\n "name": "Käthe",\n "n": [\n  1,\n  null\n ]\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        files.to_json({"loss": math.nan})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1} x'])
def test_damaged_json_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    assert files.read_json(path) is None
    path.write_bytes(content)
    assert files.read_json(path) is None
    path.write_text(json.dumps({"a": [1]}))
    assert files.read_json(path) == {"a": [1]}


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert files.sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
