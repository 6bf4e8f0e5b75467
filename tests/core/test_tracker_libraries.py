"""Each tracker with its real library, read back through the library's own reader."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from core.journal import read_records
from core.trackers.base import FOLDER, KINDS, Point, RunFacts, load
from core.trackers.command import track
from core.trackers.cursor import path_of
from core.trackers.points import point_of
from core.trackers.process import TrackerProcess
from core.trackers.wandb_files import records
from core.trackers.worker import Feed
from tests.core.tracked import STARTED, TrackedRun, last_step, loss, text_of, until
from tests.core.tracker_readers import Reader
from tests.core.wandb_server import KEY, wandb_server

pytestmark = pytest.mark.usefixtures("no_tracker_settings")

NAMES = tuple(KINDS)
STEPS = (0, 10, 20, 30, 40, 50)
EVALUATED = (0, 20, 40)
OF_ALL_FOLDS = ("mlflow", "trackio")
"""Where the folds of a group share one database."""
LOST_BY_A_KILL = ("wandb", "trackio")
"""Whose library had not written yet what it was given."""


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


def killed_and_trained_on(run: TrackedRun, name: str) -> None:
    """The process of run and tracker die at once; then the run goes on from the checkpoint of step 20, to its end."""
    run.records(0, 10, 20)
    run.checkpoint()
    run.record(30)
    folder = Path(os.path.relpath(run.folder))
    sender = TrackerProcess(folder, name, on_change=lambda one: None, lock_seconds=0)
    until(lambda: last_step(run.folder, name) == 30 or sender.has_ended)
    assert sender.progress.error is None
    sender.kill("killed")
    run.resume()
    run.records(30, 40, 50, speed=70.0)
    run.end()


def send_here(folder: Path, name: str) -> None:
    """Sends a whole run without a process, which would have to load the library once more."""
    (folder / FOLDER).mkdir()
    Feed(folder, name, load(KINDS[name].place), report=lambda message: None).run(lambda seconds: True)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_missing_and_nothing_is_there_twice(
    name: str, reader: Reader, folds: tuple[TrackedRun, TrackedRun], tmp_path: Path, console: Console
) -> None:
    """One run was killed and resumed, the other was trained without trackers; then what is missing is sent."""
    pytest.importorskip(name)
    killed, without = folds
    killed_and_trained_on(killed, name)
    assert track(Path("cv/fold-1"), to=[name], console=console) == 0
    said = text_of(console)
    assert f"{name}: {6 if name in LOST_BY_A_KILL else 2} records sent" in said
    where = {
        "wandb": "offline, no key; upload with: wandb sync cv/fold-1/wandb/offline-run-*-",
        "tensorboard": "  tensorboard --logdir cv\n",
        "trackio": "  TRACKIO_DIR=cv/trackio trackio show --project twinkeel\n",
        "mlflow": "mlflow ui --backend-store-uri sqlite:///cv/mlflow/mlflow.db\n",
    }
    assert where[name] in said
    sent = [killed]
    if name in OF_ALL_FOLDS:
        without.records(*STEPS)
        without.end()
        if name == "trackio":  # whose folder is fixed once it is imported
            assert track(Path("cv/fold-2"), to=[name], console=console) == 0
        else:
            send_here(Path("cv/fold-2"), name)
        sent.append(without)
    for run in sent:
        assert_whole(reader.read(name, run))
    # nothing lies elsewhere
    assert {path.name for path in tmp_path.iterdir()} == {"cv", "home"}
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_wandb_online_goes_on_where_the_server_is(
    folds: tuple[TrackedRun, TrackedRun], reader: Reader, console: Console
) -> None:
    """With a key from `.env`. Some steps were uploaded when the process was killed, the newest was not."""
    pytest.importorskip("wandb")
    run, server = folds[0], reader.server
    variables = {"API_KEY": KEY, "BASE_URL": server.url}
    Path(".env").write_text("".join(f"WANDB_{name}={value}\n" for name, value in variables.items()))
    killed_and_trained_on(run, "wandb")
    # the library uploads every 15 seconds, whatever its settings say: so as if it just had when the step was 20
    points = [point_of(record, started=STARTED) for record, _ in read_records(run.folder)]
    lines = [json.dumps({**point.values, "_step": point.step}) for point in points if point and point.step <= 20]
    (run_id,) = server.runs
    server.files[run_id] = dict(enumerate(lines))
    assert track(run.folder, to=["wandb"], console=console) == 0
    assert "wandb: 3 records sent" in text_of(console)
    assert "WANDB_API_KEY" not in os.environ
    assert_whole(reader.read("wandb", run))
    written = [path.read_bytes() for path in run.folder.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in one for one in written)
    where = json.loads(path_of(run.folder, "wandb").read_text())["where"]
    assert where.startswith(server.url)


def test_mlflow_takes_points_of_any_size() -> None:
    """A request holds 1000 numbers. `train/epoch` tells that a step is there, so it is in the last one of its step."""
    pytest.importorskip("mlflow")
    from core.trackers.mlflow import MlflowTracker

    requests: list[list[tuple[int, str]]] = []

    class Client:
        def log_batch(self, run: str, *, metrics: list[Any]) -> None:
            requests.append([(metric.step, metric.key) for metric in metrics])

    tracker = MlflowTracker()
    tracker._client, tracker._id = Client(), "run"
    many = {"train/epoch": 1.0} | {f"routing/{number}": 0.5 for number in range(1200)}
    tracker.log([Point(1, STARTED, many), Point(2, STARTED, {"train/epoch": 2.0})])
    assert [len(request) for request in requests] == [1000, 201, 1]
    assert [request[-1] for request in requests[1:]] == [(1, "train/epoch"), (2, "train/epoch")]
    requests.clear()
    tracker.log([Point(3, STARTED, {})])
    assert not any(requests)


@pytest.mark.parametrize("reader_of", ["event_accumulator", "plugin_event_accumulator"])
def test_tensorboard_drops_what_was_written_and_not_counted(tmp_path: Path, reader_of: str) -> None:
    """Killed between writing and counting: steps 10 and 20 come again, and 20 lies there cut in the middle."""
    pytest.importorskip("tensorboard")
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
