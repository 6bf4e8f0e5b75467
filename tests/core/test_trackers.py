"""What trackers get, trackers that break, and the command."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from rich.console import Console

from core.errors import UserError
from core.run import write_summary
from core.trackers import command, process
from core.trackers.base import KINDS, TrackerKind
from core.trackers.command import track
from core.trackers.cursor import path_of, writing_alone
from core.trackers.environment import one_line, without_credentials, without_secrets
from core.trackers.mlflow import _where as mlflow_where
from core.trackers.points import flat, point_of
from core.trackers.process import RunTrackers, TrackerProcess, check_installed
from core.trackers.worker import facts_of
from tests.core.broken_trackers import SECRET
from tests.core.tracked import TrackedRun, last_step, text_of, until

pytestmark = pytest.mark.usefixtures("no_tracker_settings")

STEPS = (0, 10, 20, 30, 40, 50)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trackers of `broken_trackers` in the table, by the names of their classes."""
    from tests.core import broken_trackers

    for name, value in vars(broken_trackers).items():
        if isinstance(value, type) and value.__module__ == broken_trackers.__name__:
            monkeypatch.setitem(KINDS, name, TrackerKind(f"{broken_trackers.__name__}:{name}", ()))


@pytest.fixture
def said() -> Iterator[list[tuple[int, str]]]:
    """Level and text of what was logged."""
    lines: list[tuple[int, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append((record.levelno, record.getMessage()))

    handler, logger = Keep(), logging.getLogger("twinkeel")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_names_are_grouped_and_a_grade_is_a_number() -> None:
    record = {
        "step": 20,
        "epoch": 0.5,
        "loss": None,
        "lr": 1e-4,
        "time": 7.5,
        "val_loss": 1.5,
        "grade": "CRITICAL",
        "best_step": None,
        "general_flipped": 0.25,
        "routing": {"entropy": 0.75, "shares": [[1.0]]},
    }
    point = point_of(record, started=1000.0)
    assert point is not None
    assert (point.step, point.time) == (20, 1007.5)
    assert point.values == {
        "train/epoch": 0.5,
        "train/lr": 1e-4,
        "train/seconds": 7.5,
        "eval/val_loss": 1.5,
        "eval/grade": 3.0,
        "general/flipped": 0.25,
        "routing/entropy": 0.75,
    }
    assert point_of({"loss": 1.0}, started=0.0) is None


def test_settings_by_their_dotted_names() -> None:
    found = flat({"lora": {"rank": 4, "targets": ["q", "v"]}, "fields": {}, "moves": [{"a": 1}], "output": None})
    assert found == {"lora.rank": 4, "lora.targets": "q, v", "output": None}


def test_of_absolute_paths_the_last_part_is_sent(tmp_path: Path) -> None:
    run = TrackedRun(tmp_path / "run")
    settings = {
        "model": {"path": "/home/me/models/tiny"},
        "data": {"path": "~/data/nli.jsonl"},
        "output": "runs/expert",
        "log": {"project": "twinkeel"},
    }
    (run.folder / "config.yaml").write_text(yaml.safe_dump(settings))
    run.state.update(model="/home/me/models/tiny")
    config = facts_of(run.folder, run_id="id", project="twinkeel").config
    assert [config[name] for name in ("model.path", "data.path", "run.model", "output")] == [
        "tiny",
        "nli.jsonl",
        "tiny",
        "runs/expert",
    ]
    assert not any("me/" in str(value) or "~" in str(value) for value in config.values())
    assert flat({"files": ["/home/me/a.jsonl", "b/c.jsonl"], "root": "/"}) == {
        "files": "a.jsonl, b/c.jsonl",
        "root": "/",
    }


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:hunter2secret@ml.example:5000/x", "https://ml.example:5000/x"),
        ("https://hunter2secret@ml.example", "https://ml.example"),
        ("https://ml.example/?write_token=hunter2secret#/runs", "https://ml.example/#/runs"),
        ("postgresql://me:hunter2@secret@db.example/mlflow", "postgresql://db.example/mlflow"),
        ("postgresql://me:hunter2/secret@db.example/mlflow", "postgresql://db.example/mlflow"),
        ("sqlite:///runs/me@home/mlflow.db", "sqlite:///runs/me@home/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("me/space", "me/space"),
    ],
)
def test_an_address_is_shown_without_credentials(url: str, shown: str) -> None:
    assert without_credentials(url) == shown
    where = mlflow_where(url)
    assert where == shown if url.startswith("https") else where.endswith(f"mlflow ui --backend-store-uri {shown}")
    assert "secret" not in without_secrets(f"can't reach {url} (refused)")


def test_an_error_keeps_its_words_without_the_credentials() -> None:
    error = ConnectionError("no answer from https://me:pw@ml.example/api?write_token=abc; is postgresql://db/x there?")
    assert one_line(error) == (
        "ConnectionError: no answer from https://***@ml.example/api?write_token=*** is postgresql://db/x there?"
    )


# --- trackers that break ----------------------------------------------------------------------------------------------

RAISES = {
    "RaisesAtStart": "start failed (ConnectionError: no way in with ***)",
    "RaisesAtLog": "sending failed (RuntimeError: no more)",
    "RaisesAtFinish": "end failed (SystemExit: not even that)",
    "Dies": "its process ended with SIGKILL",
}


@pytest.mark.usefixtures("broken")
def test_a_tracker_that_fails_is_one_line_and_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[tuple[int, str]]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    run = TrackedRun(tmp_path / "run")
    run.records(*STEPS)
    run.end()
    trackers = RunTrackers(Path("run"), [*RAISES, "Good"], should_stop=lambda: False)
    trackers.close()
    warnings = sorted(text for level, text in said if level == logging.WARNING)
    assert warnings == sorted(
        f"{name}: {reason}; send it later with: python cli.py track run --to {name}" for name, reason in RAISES.items()
    )
    assert [text for level, text in said if level == logging.INFO].count("  tracker  Good: see kept.jsonl") == 2
    assert json.loads(path_of(run.folder, "RaisesAtLog").read_text())["error"] == RAISES["RaisesAtLog"]
    kept = [path.read_text() for path in run.folder.glob("trackers/*")]
    assert not any(SECRET in text for text in kept)


@pytest.mark.usefixtures("broken")
def test_a_tracker_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[tuple[int, str]]
) -> None:
    """It is in the middle of it when the run ends, and somebody presses Ctrl-C instead of waiting."""
    names = ["HangsAtStart", "HangsAtLog", "HangsAtFinish"]
    run = TrackedRun(tmp_path / "run")
    run.records(*STEPS)
    run.end()
    waits = {"HangsAtStart": '["start"', "HangsAtLog": '["log", 50', "HangsAtFinish": '["finish"'}
    pids = []
    for name in names:
        (run.folder / "kept.jsonl").unlink(missing_ok=True)
        gone: list[bool] = []
        trackers = RunTrackers(Path("run"), [name], should_stop=lambda gone=gone: bool(gone))  # type: ignore[misc]
        pids.append(trackers._processes[0]._process.pid)
        trackers._processes[0].close_input()
        kept = run.folder / "kept.jsonl"
        until(lambda name=name, kept=kept: kept.is_file() and waits[name] in kept.read_text())  # type: ignore[misc]
        gone.append(True)
        monkeypatch.setattr(process, "STOP_SECONDS", 0.0)
        trackers.close()
    warnings = [text for level, text in said if level == logging.WARNING]
    assert warnings == [
        f"{name}: did not end in time; send it later with: python cli.py track run --to {name}" for name in names
    ]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.usefixtures("broken")
def test_what_a_library_prints_is_kept_from_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], console: Console
) -> None:
    run = TrackedRun(tmp_path / "run")
    run.records(0, 10)
    run.end()
    assert track(Path("run"), to=["Chatters"], console=console) == 0
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    log = (run.folder / "trackers" / "Chatters.log").read_text()
    assert {"hello from Python", "hello from C", "and an error"} <= set(log.splitlines())


@pytest.mark.usefixtures("broken")
def test_track_after_a_failure_sends_the_rest_to_the_same_run(tmp_path: Path, console: Console) -> None:
    run = TrackedRun(tmp_path / "run")
    run.records(*STEPS)
    run.end("failed", error="it broke")
    KINDS["Good"], good = KINDS["RaisesAtFinish"], KINDS["Good"]
    try:
        assert track(Path("run"), to=["Good"], console=console) == 1
    finally:
        KINDS["Good"] = good
    assert "Good: end failed (SystemExit: not even that); its library's own words: run/trackers/Good.log" in " ".join(
        text_of(console).split()
    )
    assert "again with: python cli.py track run --to Good" in text_of(console)
    assert track(Path("run"), to=["Good"], console=console) == 0
    kept = [json.loads(line) for line in (run.folder / "kept.jsonl").read_text().splitlines()]
    first, second = (line for line in kept if line[0] == "start")
    assert first[1] == second[1]  # our number of the run
    assert [line[1] for line in kept if line[0] == "log"] == list(STEPS)
    assert kept[-1][:3] == ["finish", "failed", 50]
    assert kept[-1][3]["grade"] == "MODERATE"
    assert "error" not in kept[-1][3]


@pytest.mark.usefixtures("broken")
def test_another_project_gets_all_of_it(tmp_path: Path, console: Console) -> None:
    for project in ("one", "two"):
        run = TrackedRun(tmp_path / "run", project=project)
        run.records(0, 10)
        run.end()
        assert track(Path("run"), to=["Good"], console=console) == 0
        (tmp_path / "run" / "metrics.jsonl").unlink()
    kept = [json.loads(line) for line in (tmp_path / "run" / "kept.jsonl").read_text().splitlines()]
    assert [line[1] for line in kept if line[0] == "log"] == [0, 10, 0, 10]
    assert len({line[1] for line in kept if line[0] == "start"}) == 2


def start_and_be_killed(name: str, *, orphan_seconds: float) -> int:
    """A process starts a tracker for `run` and dies by SIGKILL; returns the id of the tracker's process."""
    code = (
        "import os, sys, pathlib\nfrom core.trackers import base, process\n"
        f"process.ORPHAN_SECONDS = {orphan_seconds}\n"
        f"base.KINDS['{name}'] = base.TrackerKind('tests.core.broken_trackers:{name}', ())\n"
        f"one = process.TrackerProcess(pathlib.Path('run'), '{name}', on_change=lambda one: None, lock_seconds=0)\n"
        "print(one._process.pid, flush=True)\n"
        "while not os.path.exists('run/kept.jsonl'): pass\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    return int(ended.stdout)


def test_a_tracker_outlives_a_killed_run_to_send_what_is_written(tmp_path: Path) -> None:
    """Without an end: the run has none."""
    run = TrackedRun(tmp_path / "run")
    run.records(0, 10)
    start_and_be_killed("Good", orphan_seconds=60.0)
    with writing_alone(run.folder, "Good", patience=60.0):
        lines = [json.loads(line) for line in (run.folder / "kept.jsonl").read_text().splitlines()]
    assert [line[1] for line in lines if line[0] == "log"] == [0, 10]
    assert lines[-1] == ["finish", "running", 10, {}, []]


def test_one_that_hangs_does_not_outlive_it_for_ever(tmp_path: Path) -> None:
    TrackedRun(tmp_path / "run")
    process_id = start_and_be_killed("HangsAtStart", orphan_seconds=0.0)
    until(lambda: not is_running(process_id))


def is_running(process_id: int) -> bool:
    """A process that nobody waits for stays as a zombie where process 1 is no real one."""
    return process_id in psutil.pids() and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE


@pytest.mark.usefixtures("broken")
def test_records_come_while_the_run_goes_on(tmp_path: Path) -> None:
    run = TrackedRun(tmp_path / "run")
    sender = TrackerProcess(run.folder, "Good", on_change=lambda one: None, lock_seconds=0)
    for step in STEPS:
        run.record(step)
        until(lambda step=step: last_step(run.folder, "Good") == step)  # type: ignore[misc]
    run.end()
    sender.close_input()
    until(lambda: sender.has_ended)
    assert sender.progress.num_records == len(STEPS)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("broken")
def test_folds_are_runs_of_one_group(tmp_path: Path, console: Console) -> None:
    for name in ("fold-1", "fold-2"):
        run = TrackedRun(tmp_path / "cv" / name)
        run.records(0, 10)
        run.end()
    (tmp_path / "cv" / "folds.json").write_text(json.dumps({"folds": 3, "final": True}))
    assert track(Path("cv"), to=["Good"], console=console) == 0
    assert "fold-1 · Good: 2 records sent" in text_of(console)
    starts = [
        json.loads((tmp_path / "cv" / name / "kept.jsonl").read_text().splitlines()[0]) for name in ("fold-1", "fold-2")
    ]
    assert [start[2:4] for start in starts] == [["cv-fold-1", "cv"], ["cv-fold-2", "cv"]]
    assert starts[0][1] != starts[1][1]


@pytest.mark.usefixtures("broken")
def test_the_environment_is_stronger_than_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    run = TrackedRun(tmp_path / "run")
    run.records(0)
    run.end()
    (tmp_path / ".env").write_text("FROM_DOTENV=file\n")
    assert track(Path("run"), to=["Good"], console=console) == 0
    monkeypatch.setenv("FROM_DOTENV", "set")
    write_summary(run.folder, {"status": "finished", "other": 1})
    assert track(Path("run"), to=["Good"], console=console) == 0
    kept = [json.loads(line) for line in (run.folder / "kept.jsonl").read_text().splitlines()]
    assert [line[5] for line in kept if line[0] == "start"] == ["file", "set"]


@pytest.mark.usefixtures("broken")
def test_track_gives_up_one_that_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    run = TrackedRun(tmp_path / "run")
    run.records(0)
    run.end()
    monkeypatch.setattr(command, "SILENCE_SECONDS", 0.0)
    assert track(Path("run"), to=["HangsAtStart"], console=console) == 1
    assert "HangsAtStart: silent for 0 s" in text_of(console)


@pytest.mark.usefixtures("broken")
def test_two_processes_never_send_to_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    run = TrackedRun(tmp_path / "run")
    run.records(0)
    monkeypatch.setattr(command, "_LOCK_SECONDS", 0.0)
    with writing_alone(run.folder, "Good", patience=0.0):
        assert track(Path("run"), to=["Good"], console=console) == 1
    assert "another process sends run to Good" in " ".join(text_of(console).split())
    assert not (run.folder / "kept.jsonl").exists()


def test_nothing_to_send(tmp_path: Path, console: Console) -> None:
    TrackedRun(tmp_path / "run")
    with pytest.raises(UserError, match="run: no records yet"):
        track(Path("run"), to=["tensorboard"], console=console)


def test_a_dotenv_file_that_cannot_be_read_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"WANDB_API_KEY=\xff\xfe")
    check_installed([])
    with pytest.raises(UserError, match=r"\.env: cannot be read"):
        check_installed(["tensorboard"])


@pytest.mark.usefixtures("broken")
def test_a_process_that_cannot_start_is_a_tracker_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[tuple[int, str]]
) -> None:
    run = TrackedRun(tmp_path / "run")
    run.records(0)
    run.end()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    RunTrackers(Path("run"), ["Good"], should_stop=lambda: False).close()
    ((level, text),) = said
    assert level == logging.WARNING
    assert text.startswith("Good: can't be started (FileNotFoundError: ")
    assert text.endswith("; send it later with: python cli.py track run --to Good")


def test_a_group_that_cannot_be_killed_any_more_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Darwin one of zombies only can't be signalled."""
    run = TrackedRun(tmp_path / "run")
    monkeypatch.setitem(KINDS, "Gone", TrackerKind("no.such:place", ()))
    sender = TrackerProcess(run.folder, "Gone", on_change=lambda one: None, lock_seconds=0)
    until(lambda: sender.has_ended)
    assert sender._process.returncode == 1  # it was waited for

    def refuse(group: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "killpg", refuse)
    sender.kill("did not end in time")


@pytest.mark.usefixtures("broken")
def test_half_a_line_of_a_killed_process_is_not_taken_for_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    run = TrackedRun(tmp_path / "run")
    run.records(0)
    monkeypatch.setattr(sys, "executable", "/bin/echo")  # prints its arguments and ends with 0
    assert track(Path("run"), to=["Good"], console=console) == 1
    assert "Good: its process ended with 0" in text_of(console)


def test_a_package_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "mlflow", TrackerKind("x:y", (("no-such-mlflow", "nor-this"), ("no-such-alchemy",))))
    with pytest.raises(UserError) as caught:
        check_installed(["mlflow"])
    assert caught.value.what == (
        "log.trackers: mlflow needs no-such-mlflow and no-such-alchemy, which are not installed"
    )
    assert caught.value.hint == 'pip install -e ".[mlflow]", or leave mlflow out of log.trackers'
    with pytest.raises(UserError) as caught:
        check_installed(["mlflow"], said_by="--to")
    assert caught.value.what.startswith("--to: mlflow needs no-such-mlflow")
    assert caught.value.hint == 'pip install -e ".[mlflow]", or leave mlflow out of --to'
