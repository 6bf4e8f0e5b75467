"""Each tracker with its real library, read back through the library's own reader; and trackers that break."""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from core.errors import UserError
from core.run import write_summary
from core.trackers import command, process, track
from core.trackers.base import KINDS, TrackerKind
from core.trackers.cursor import path_of, writing_alone
from core.trackers.points import flat, point_of
from core.trackers.process import RunTrackers, TrackerProcess, check_installed
from core.trackers.wandb_files import records
from tests.core.broken_trackers import SECRET
from tests.core.tracked import STARTED, TrackedRun, loss
from tests.core.wandb_server import KEY, WandbServer, wandb_server

NAMES = tuple(KINDS)
STEPS = (0, 10, 20, 30, 40, 50)
EVALUATED = (0, 20, 40)


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key and no setting of whoever runs the tests; no home to write to."""
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80, highlight=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


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


def until(condition: Callable[[], object]) -> None:
    """Waits for what another process does; the suite's timeout ends it."""
    while not condition():
        time.sleep(0.02)


def last_step(folder: Path, name: str) -> Any:
    file = path_of(folder, name)
    return json.loads(file.read_text())["last_step"] if file.is_file() else None


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


# --- each library -----------------------------------------------------------------------------------------------------


class Reader:
    """Reads runs back: each library's own reader."""

    def __init__(self, server: WandbServer) -> None:
        self.server = server

    def read(self, name: str, run: TrackedRun) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Any]]:
        """Metric -> steps and values, in the library's order; and settings, summary and pictures as it has them."""
        found: tuple[dict[str, list[tuple[int, float]]], dict[str, Any]] = getattr(self, f"_{name}")(run)
        return found

    def _tensorboard(self, run: TrackedRun) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        tags = events.Tags()
        scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
        words = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
        return scalars, {
            "rank": "| lora.rank | 4 |" in words["settings"],
            "best": "| best_val_loss | 2.75 |" in words["summary"],
            "picture": tags["images"] == ["training_curves"] and events.Images("training_curves")[0].width == 1,
        }

    def _mlflow(self, run: TrackedRun) -> Any:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{run.folder.parent}/mlflow/mlflow.db")
        experiment = client.get_experiment_by_name("twinkeel")
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id], f"run_name = '{name_of(run)}' AND tags.group = 'cv'")
        assert found.info.status == "FINISHED"
        names = [name for name in found.data.metrics if not name.startswith("summary/")]
        histories = {name: client.get_metric_history(found.info.run_id, name) for name in names}
        summary = found.data.metrics["summary/best_val_loss"], found.data.tags["summary.grade"]
        return (
            {name: [(one.step, one.value) for one in history] for name, history in histories.items()},
            {
                "rank": found.data.params["lora.rank"] == "4",
                "best": summary == (2.75, "MODERATE"),
                "picture": [one.path for one in client.list_artifacts(found.info.run_id)] == ["training_curves.png"],
            },
        )

    def _trackio(self, run: TrackedRun) -> Any:
        code = (
            "import json, sys, trackio\nfrom trackio.sqlite_storage import SQLiteStorage\n"
            "(run,) = [run for run in trackio.Api().runs('twinkeel') if run.name.startswith(sys.argv[1])]\n"
            "logs = SQLiteStorage.get_logs('twinkeel', run.name, run_id=run.id)\n"
            "print(json.dumps([run.config, logs], default=str))"
        )
        environment = {**os.environ, "TRACKIO_DIR": str(run.folder.parent / "trackio")}
        command = [sys.executable, "-c", code, name_of(run)]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        config, logs = json.loads(out.stdout)
        assert config["_Group"] == "cv"
        scalars: dict[str, list[tuple[int, float]]] = {}
        for log in logs:
            for key, value in log.items():
                if key.startswith(("train/", "eval/", "general/", "routing/")):
                    scalars.setdefault(key, []).append((log["step"], value))
        return scalars, {
            "rank": config["lora.rank"] == 4,
            "best": logs[-1]["summary/best_val_loss"] == 2.75,
            "picture": "training_curves" in logs[-1]
            and len(list(run.folder.parent.glob(f"trackio/media/**/{name_of(run)}*/**/*.png"))) == 1,
        }

    def _wandb(self, run: TrackedRun) -> Any:
        """Reads offline files by handing them to a server, as `wandb sync` does; what came online is there."""
        if files := sorted(glob.glob(f"{run.folder}/wandb/offline-run-*")):
            own = {"WANDB_BASE_URL": self.server.url, "WANDB_API_KEY": KEY, "WANDB_CACHE_DIR": str(run.folder)}
            environment = {**os.environ, **own}
            command = [sys.executable, "-m", "wandb", "sync", *files]
            subprocess.run(command, env=environment, cwd=run.folder, capture_output=True, text=True, check=True)
        run_id = json.loads(path_of(run.folder, "wandb").read_text())["run_id"]
        facts, summary = self.server.runs[run_id], self.server.summaries[run_id]
        scalars: dict[str, list[tuple[int, float]]] = {}
        for line in self.server.history(run_id):
            for key, value in line.items():
                if "/" in key:
                    scalars.setdefault(key, []).append((line["_step"], value))
        assert self.server.unknown == []
        assert (facts["displayName"], facts["groupName"]) == (name_of(run), "cv")
        assert summary["_timestamp"] == STARTED + 50
        return scalars, {
            "rank": json.loads(facts["config"])["lora.rank"]["value"] == 4,
            "best": summary["best_val_loss"] == 2.75 and summary["grade"] == "MODERATE",
            "picture": "training_curves" in summary and any(".png" in path for path in self.server.uploads),
        }


def name_of(fold: TrackedRun) -> str:
    return f"{fold.folder.parent.name}-{fold.folder.name}"


@pytest.fixture
def reader() -> Iterator[Reader]:
    with wandb_server() as server:
        yield Reader(server)


@pytest.fixture
def folds(tmp_path: Path) -> tuple[TrackedRun, TrackedRun]:
    """Two runs of one group; nothing is recorded yet."""
    runs = TrackedRun(tmp_path / "cv" / "fold-1"), TrackedRun(tmp_path / "cv" / "fold-2")
    (tmp_path / "cv" / "folds.json").write_text(json.dumps({"folds": 2}))
    return runs


def assert_whole(found: tuple[dict[str, list[tuple[int, float]]], dict[str, Any]]) -> None:
    """Every record once, in order, with its values."""
    scalars, rest = found
    assert scalars["train/loss"] == [(step, loss(step)) for step in STEPS if step]
    assert scalars["train/epoch"] == [(step, step / 40) for step in STEPS]
    assert [step for step, _ in scalars["eval/val_loss"]] == list(EVALUATED)
    assert scalars["eval/grade"] == [(step, 2.0) for step in EVALUATED]
    assert scalars["general/loss"] == [(step, 1.5) for step in EVALUATED]
    assert scalars["routing/entropy"] == [(step, 0.75) for step in EVALUATED]
    assert rest == {"rank": True, "best": True, "picture": True}


def killed_and_resumed(run: TrackedRun, name: str, *, is_there: Callable[[], object] = lambda: True) -> None:
    """The process of run and tracker die at once; then the run goes on from the checkpoint of step 20.

    Args:
        is_there: what else has to be true before they die.
    """
    run.records(0, 10, 20)
    run.checkpoint()
    run.record(30)
    folder = Path(os.path.relpath(run.folder))
    sender = TrackerProcess(folder, name, on_change=lambda one: None, lock_seconds=0)
    until(lambda: (last_step(run.folder, name) == 30 and is_there()) or sender.has_ended)
    assert sender.progress.error is None
    sender.kill("killed")
    run.resume()
    run.records(30, 40, 50, speed=70.0)
    run.end()
    sender = TrackerProcess(folder, name, on_change=lambda one: None, lock_seconds=10)
    sender.close_input()
    until(lambda: sender.has_ended)
    assert sender.progress.error is None
    assert sender.progress.is_done


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_missing_and_nothing_is_there_twice(
    name: str, reader: Reader, folds: tuple[TrackedRun, TrackedRun], tmp_path: Path, console: Console
) -> None:
    """One run was killed and resumed, the other was trained without trackers; then `track` sends what is missing."""
    pytest.importorskip(name)
    killed, without = folds
    killed_and_resumed(killed, name)
    without.records(*STEPS)
    without.end()
    assert track(Path("cv"), to=[name], console=console) == 0
    said = text_of(console)
    assert f"fold-1 · {name}: has all of it already" in said
    assert f"fold-2 · {name}: 6 records sent" in said
    where = {
        "wandb": "offline, no key; upload with: wandb sync cv/fold-2/wandb/offline-run-*-",
        "tensorboard": "  tensorboard --logdir cv\n",
        "trackio": "  TRACKIO_DIR=cv/trackio trackio show --project twinkeel\n",
        "mlflow": "mlflow ui --backend-store-uri sqlite:///cv/mlflow/mlflow.db\n",
    }
    assert where[name] in said
    for run in folds:
        assert_whole(reader.read(name, run))
    # nothing lies elsewhere
    assert {path.name for path in tmp_path.iterdir()} == {"cv", "home"}
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_wandb_online_goes_on_where_the_server_is(folds: tuple[TrackedRun, TrackedRun], reader: Reader) -> None:
    """With a key from `.env`. Some steps were uploaded when the process was killed, the newest was not."""
    pytest.importorskip("wandb")
    run, server = folds[0], reader.server
    variables = {"API_KEY": KEY, "BASE_URL": server.url, "_FILE_STREAM_TRANSMIT_INTERVAL": "0.1"}
    Path(".env").write_text("".join(f"WANDB_{name}={value}\n" for name, value in variables.items()))
    killed_and_resumed(run, "wandb", is_there=lambda: any(server.files.values()))
    assert "WANDB_API_KEY" not in os.environ
    assert_whole(reader.read("wandb", run))
    written = [path.read_bytes() for path in run.folder.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in one for one in written)
    where = json.loads(path_of(run.folder, "wandb").read_text())["where"]
    assert where.startswith(server.url)


@pytest.mark.parametrize("reader_of", ["event_accumulator", "plugin_event_accumulator"])
def test_tensorboard_drops_what_was_written_and_not_counted(tmp_path: Path, reader_of: str) -> None:
    """Killed between writing and counting: steps 10 and 20 come again, and 20 lies there cut in the middle."""
    pytest.importorskip("tensorboard")
    from core.trackers.base import Point, RunFacts
    from core.trackers.tensorboard import TensorBoardTracker

    facts = RunFacts(tmp_path, tmp_path, "id", "run", "twinkeel", None, STARTED, {"lora.rank": 4})
    points = [Point(step, STARTED + step, {"train/epoch": step / 40}) for step in (0, 10, 20, 30)]
    first = TensorBoardTracker()
    assert first.start(facts, last_step=7).last_step is None  # the files are gone
    first.log(points[:3])
    first._writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    second = TensorBoardTracker()
    assert second.start(facts, last_step=0).last_step == 0
    second.log(points[1:])
    second._writer.close()
    readers = pytest.importorskip(f"tensorboard.backend.event_processing.{reader_of}")
    events = readers.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = events.Scalars("train/epoch") if reader_of == "event_accumulator" else events.Tensors("train/epoch")
    assert [event.step for event in found] == [0, 10, 20, 30]


def test_offline_files_are_read_to_where_they_were_cut() -> None:
    """The format's own example: a record of 97,270 bytes lies in four pieces; a block's last 6 bytes are padding."""
    first, long, last = b"a" * 1000, b"b" * 97270, b"c" * 8000
    content = b":W&B" + bytes(3)

    def piece(kind: int, body: bytes) -> bytes:
        return bytes(4) + len(body).to_bytes(2, "little") + bytes([kind]) + body

    content += piece(1, first)
    rest, kind = long, 2
    while rest:
        room = 32768 - len(content) % 32768
        if room < 7:
            content += bytes(room)
            continue
        part, rest = rest[: room - 7], rest[room - 7 :]
        content += piece(4 if not rest else kind, part)
        kind = 3
    content += piece(1, last)
    assert list(records(content)) == [first, long, last]
    assert list(records(content[:-1])) == [first, long]
    assert list(records(content[:40000])) == [first]
    assert list(records(content[:5])) == []
    assert list(records(b"something else")) == []


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
    assert kept[-1][3]["error"] == "it broke"


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


@pytest.mark.usefixtures("broken")
def test_a_tracker_outlives_a_killed_run_to_send_what_is_written(tmp_path: Path) -> None:
    """The run's process dies by SIGKILL; its tracker sends what is in the journal, without an end, and goes."""
    run = TrackedRun(tmp_path / "run")
    run.records(0, 10)
    code = (
        "import os, sys, pathlib\nfrom core.trackers import base, process\n"
        "base.KINDS['Good'] = base.TrackerKind('tests.core.broken_trackers:Good', ())\n"
        "process.TrackerProcess(pathlib.Path('run'), 'Good', on_change=lambda one: None, lock_seconds=0)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    root = str(Path(__file__).parents[2])
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, check=False)
    assert ended.returncode == -signal.SIGKILL
    kept = run.folder / "kept.jsonl"
    until(lambda: kept.is_file() and '"finish"' in kept.read_text())
    with writing_alone(run.folder, "Good", patience=30.0):
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line[1] for line in lines if line[0] == "log"] == [0, 10]
    assert lines[-1] == ["finish", "running", 10, {}, []]


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


def test_a_package_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "mlflow", TrackerKind("x:y", (("no-such-mlflow", "nor-this"), ("no-such-alchemy",))))
    with pytest.raises(UserError) as caught:
        check_installed(["mlflow"])
    assert caught.value.what == (
        "log.trackers: mlflow needs no-such-mlflow and no-such-alchemy, which are not installed"
    )
    assert caught.value.hint == 'pip install -e ".[mlflow]", or leave mlflow out of log.trackers'
