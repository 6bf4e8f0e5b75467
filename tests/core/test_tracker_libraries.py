"""Each tracker with its real library, read back through the library's own reader."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from core.trackers import track
from core.trackers.base import KINDS
from core.trackers.cursor import path_of
from core.trackers.process import TrackerProcess
from core.trackers.wandb_files import records
from tests.core.tracked import STARTED, TrackedRun, last_step, loss, text_of, until
from tests.core.tracker_readers import Reader
from tests.core.wandb_server import KEY, wandb_server

pytestmark = pytest.mark.usefixtures("no_tracker_settings")

NAMES = tuple(KINDS)
STEPS = (0, 10, 20, 30, 40, 50)
EVALUATED = (0, 20, 40)


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
