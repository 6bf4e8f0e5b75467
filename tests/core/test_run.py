"""Run folders: names, the lock between processes, the newest run, damaged state files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from core import run
from core.errors import UserError
from core.run import (
    CONFIG,
    NewFolder,
    RunLock,
    RunState,
    claim_run_folder,
    existing_run,
    is_locked,
    new_run_folder,
    newest_run,
    read_state,
    write_summary,
)

ROOT = Path(__file__).parents[2]


class FixedClock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> FixedClock:
        return cls(2026, 3, 7, 9, 5)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "datetime", FixedClock)


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_same_minute_twice_gives_another_folder() -> None:
    names = []
    for _ in range(3):
        folder = new_run_folder(None, data_name="expert.jsonl")
        names.append(folder)
        folder.mkdir(parents=True)
    assert [str(name) for name in names] == [
        "runs/expert-0307-0905",
        "runs/expert-0307-0905-2",
        "runs/expert-0307-0905-3",
    ]


def test_choosing_a_name_creates_nothing() -> None:
    new_run_folder(None, data_name="expert.jsonl")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("data_name", "stem"),
    [
        ("my data (new).jsonl", "my-data-new"),
        ("a.b.csv", "a"),
        ("große_Fragen.jsonl", "gro-e_Fragen"),
        (".hidden", "run"),
        ("", "run"),
        ("../../etc/passwd", "run"),
    ],
)
def test_names_are_safe_for_a_shell(data_name: str, stem: str) -> None:
    assert str(new_run_folder(None, data_name=data_name)) == f"runs/{stem}-0307-0905"


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="taken: already exists") as caught:
        new_run_folder("taken", data_name="x")
    assert "--resume taken" in (caught.value.hint or "")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: already exists") as caught:
        new_run_folder("file", data_name="x")
    assert caught.value.hint == "choose another --output, or remove it"


def test_what_is_no_run_is_not_said_to_be_resumable(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    (tmp_path / "my model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already exists") as caught:
        new_run_folder("my model", data_name="x")
    assert caught.value.hint == "choose another --output, or remove it"
    (tmp_path / "my model" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="--resume 'my model'"):
        new_run_folder("my model", data_name="x")


def test_a_new_folder_that_is_not_kept_goes_away_with_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")

    def interrupted(folder: Path) -> None:
        with NewFolder(folder):
            (folder / "part").mkdir()
            (folder / "part" / "file").write_text("")
            (folder / "settings.yaml").write_text("")
            raise KeyboardInterrupt

    for name in ("there", "deep/er"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(Path(name))
    assert os.listdir() == ["there"] and os.listdir("there") == ["mine.txt"]
    with NewFolder(Path("deep/er")) as new:
        new.keep()
    assert Path("deep/er").is_dir()


def test_an_output_that_is_new_or_empty_is_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert new_run_folder("empty", data_name="x") == Path("empty")
    assert new_run_folder("deep/er", data_name="x") == Path("deep/er")


# --- finding a run ----------------------------------------------------------------------------------------------------


def make_run(name: str, state: object, *, changed: float = 1000.0) -> Path:
    folder = run.RUNS / name
    folder.mkdir(parents=True)
    (folder / run.CONFIG).write_text("")
    (folder / run.STATE).write_text(state if isinstance(state, str) else json.dumps(state))
    os.utime(folder / run.STATE, (changed, changed))
    return folder


def test_the_newest_run_is_the_one_that_started_last() -> None:
    make_run("a", {"started": 300.0}, changed=1.0)
    make_run("b", {"started": 100.0}, changed=9000.0)  # still running, so its file is newer
    make_run("c", {"started": 200}, changed=500.0)
    assert newest_run() == Path("runs/a")
    assert existing_run(None) == Path("runs/a")


@pytest.mark.parametrize("damaged", ["", "{", "[1]", "null", '{"started": "yesterday"}', '{"started": null}'])
def test_damaged_state_files_come_last(damaged: str) -> None:
    make_run("damaged", damaged, changed=9000.0)
    make_run("older", damaged, changed=8000.0)
    assert newest_run() == Path("runs/damaged")
    make_run("whole", {"started": 5.0})
    assert newest_run() == Path("runs/whole")


def test_no_runs_yet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs yet"):
        newest_run()
    (tmp_path / "runs" / "begun").mkdir(parents=True)  # without a state file
    with pytest.raises(UserError, match="no runs yet"):
        existing_run(None)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    folder = make_run("real", {})
    assert existing_run(str(folder)) == folder
    for name in ("runs", "nowhere"):
        with pytest.raises(UserError, match=f"{name}: not a run folder"):
            existing_run(name)


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from core.run import RunLock
lock = RunLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def hold_in_another_process(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with hold_in_another_process(tmp_path) as process:
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match="another process is training here") as caught:
            RunLock(tmp_path)
        assert str(tmp_path) in caught.value.what
        assert "monitor" in (caught.value.hint or "")
        process.kill()  # however it ends
        process.wait()
    assert not is_locked(tmp_path)
    RunLock(tmp_path).release()


def test_the_lock_ends_with_its_context(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    assert not is_locked(tmp_path)


def test_looking_does_not_lock(tmp_path: Path) -> None:
    RunLock(tmp_path).release()
    with hold_in_another_process(tmp_path) as process:
        process.kill()
        process.wait()
        assert not is_locked(tmp_path)
        with RunLock(tmp_path):
            assert is_locked(tmp_path)


def test_a_folder_without_a_lock_file(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "nowhere")


# --- state and summary ------------------------------------------------------------------------------------------------


def test_the_state_file_is_whole_after_every_update(tmp_path: Path) -> None:
    before = time.time()
    state = RunState(tmp_path, {"model": "tiny", "step": 0})
    assert read_state(tmp_path) == {}  # nothing is written before the first update
    state.update(status="running", step=3)
    state.update(step=4)
    saved = read_state(tmp_path)
    assert (saved["status"], saved["step"], saved["model"], saved["error"]) == ("running", 4, "tiny", None)
    assert saved["pid"] == os.getpid()
    assert before <= saved["started"] <= saved["updated"] <= time.time()
    assert os.listdir(tmp_path) == [run.STATE]
    assert (state["step"], state["nothing"]) == (4, None)


def test_a_resumed_run_keeps_its_start(tmp_path: Path) -> None:
    RunState(tmp_path, {"started": 12.5}).update()
    assert read_state(tmp_path)["started"] == 12.5


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", "\x00"])
def test_a_damaged_state_file_is_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / run.STATE).write_text(content)
    assert read_state(tmp_path) == {}


def test_the_summary_is_json(tmp_path: Path) -> None:
    write_summary(tmp_path, {"status": "finished", "gap": 0.25, "best_step": None})
    assert json.loads((tmp_path / run.SUMMARY).read_text()) == {"status": "finished", "gap": 0.25, "best_step": None}
    with pytest.raises(ValueError, match="JSON"):
        write_summary(tmp_path, {"gap": float("nan")})


def test_two_starts_in_the_same_minute_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, first_lock = claim_run_folder(None, data_name="rows.jsonl")
    second, second_lock = claim_run_folder(None, data_name="rows.jsonl")
    assert first != second and first.is_dir() and second.is_dir()
    (first / CONFIG).write_text("")
    first_lock.release()
    second_lock.release()
    with pytest.raises(UserError, match="already exists"):
        claim_run_folder(str(first), data_name="rows.jsonl")
