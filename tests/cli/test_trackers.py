"""`log.trackers` and `track` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.trackers import process
from core.trackers.base import KINDS, TrackerKind
from core.trainer import Trainer
from tests.cli.conftest import Result
from tests.core.broken_trackers import SECRET
from tests.kill.campaign import outcome

BROKEN = {"wandb": "RaisesAtStart", "tensorboard": "RaisesAtLog", "trackio": "HangsAtLog", "mlflow": "RaisesAtFinish"}


def without_trackers(folder: Path) -> dict[str, Any]:
    """All that the run left, but what is the trackers' own."""
    found = outcome(folder)
    found["files"] = [name for name in found["files"] if not name.startswith(("trackers", "tensorboard", "kept.jsonl"))]
    return found


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def recorded(folder: Path, name: str) -> list[tuple[int, float]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def assert_holds(found: list[tuple[int, float]], records: list[tuple[int, float]]) -> None:
    """The records' steps, each once, and their values in 32 bits."""
    assert [step for step, _ in found] == [step for step, _ in records]
    assert [value for _, value in found] == pytest.approx([value for _, value in records], rel=1e-6)


def test_broken_trackers_leave_the_run_as_it_is(
    train: Callable[..., Result], run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--set", "log.every=1").code == 0
    for name, kind in BROKEN.items():
        monkeypatch.setitem(KINDS, name, TrackerKind(f"tests.core.broken_trackers:{kind}", ()))
    monkeypatch.setattr(process, "FINISH_SECONDS", 5.0)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    names = ",".join(BROKEN)
    result = train("--set", "log.every=1", "--set", f"log.trackers=[{names}]", "--output", "tracked")
    assert result.code == 0
    assert result.err == ""
    for name in BROKEN:
        assert result.out.count(f"send it later with: python cli.py track tracked --to {name}") == 1
    assert SECRET not in result.out + Path("tracked/training.log").read_text()
    assert without_trackers(Path("run")) == without_trackers(Path("tracked"))


def test_a_stopped_run_goes_on_in_the_same_tracker_run(
    train: Callable[..., Result], run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    settings = ("--set", "log.trackers=[tensorboard]", "--set", "log.every=1", "--set", "checkpoint.every=2")
    step = Trainer._train_step

    def stops(self: Trainer, number: int, lr: float) -> None:
        if number == 4:
            raise KeyboardInterrupt
        step(self, number, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stops)
        assert train(*settings).code == 130
    assert [number for number, _ in scalars(Path("run"), "train/epoch")] == [0, 1, 2, 3]
    result = run_cli("train", "--resume", "run")
    assert result.code == 0
    assert result.out.count("  tracker  tensorboard: tensorboard --logdir run/tensorboard") == 2
    for tag in ("train/loss", "train/epoch", "eval/gap"):
        assert_holds(scalars(Path("run"), tag), recorded(Path("run"), tag.split("/")[1]))


def test_track_a_run_that_was_trained_without(train: Callable[..., Result], run_cli: Callable[..., Result]) -> None:
    pytest.importorskip("tensorboard")
    assert train().code == 0
    before = outcome(Path("run"))
    result = run_cli("track", "run", "--to", "tensorboard")
    assert (result.code, result.err) == (0, "")
    assert result.out == "tensorboard: 3 records sent\n  tensorboard --logdir run/tensorboard\n"
    assert_holds(scalars(Path("run"), "eval/val_loss"), recorded(Path("run"), "val_loss"))
    assert run_cli("track", "run", "--to", "tensorboard", "tensorboard").out.startswith("tensorboard: has all of it")
    assert without_trackers(Path("run")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("track", "nowhere", "--to", "wandb"), "nowhere: not a run folder"),
        (("track", "--to", "wandb"), "runs: no runs yet"),
        (("track", "run", "--to", "tensorbord"), "invalid choice: 'tensorbord'"),
        (("track", "run"), "--to"),
    ],
)
def test_wrong_input(run_cli: Callable[..., Result], arguments: tuple[str, ...], words: str) -> None:
    result = run_cli(*arguments)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_a_missing_package_is_found_before_anything_is_made(
    train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "wandb", TrackerKind("x:y", (("no-such-package",),)))
    result = train("--set", "log.trackers=[wandb]")
    assert result.code == 2
    assert "log.trackers: wandb needs no-such-package, which is not installed" in result.err
    assert 'pip install -e ".[wandb]"' in result.err
    assert "loading" not in result.out
    assert not Path("run").exists()
