"""`train --folds` from the command line: K runs under one folder, the verdict over them, the run on all rows."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from core.early_stopping import Decision, EarlyStopping
from core.errors import NonFiniteLossError
from core.journal import MACHINE_FIELDS
from core.row_losses import read_row_losses
from core.run import RunLock
from core.session import Session
from core.trainer import Trainer
from tests.cli.conftest import Result, write_rows

Train = Callable[..., Result]
FOLDS = ("--folds", "3", "--backend", "cuda", "--lr", "1e-2")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def losses(run: Path) -> list[dict[str, Any]]:
    """The records of a run without what measures the machine."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in MACHINE_FIELDS} for record in records]


def rows_of(run: Path, split: str) -> list[str]:
    with open(run / "split.csv") as file:
        return [row["origin"] for row in csv.DictReader(file) if row["split"] == split]


def command(model: Path, rows: Path, *more: object) -> list[str]:
    """Folds whose best step is the third of six."""
    arguments = ["train", *FOLDS, "--model", model, "--data", rows, "--bits", 16, "--device", "cpu", "--output", "run"]
    arguments += ["--batch-size", 2, "--accumulation", 2, "--max-steps", 6, "--eval-every", 3, "--max-tokens", 96]
    return [*map(str, arguments), "--set", "log.every=1", *map(str, more)]


@pytest.fixture(scope="module", autouse=True)
def blank_pictures() -> None:
    """That of the folds is drawn; `_quick` leaves out those of the runs."""


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Every run overfits after its third step, and draws no curves, which cost as much time as all else."""
    update = EarlyStopping.update

    def overfit(stopping: EarlyStopping, loss: float, *, step: int) -> Decision:
        return update(stopping, loss + 10 * (step > 3), step=step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyStopping, "update", overfit)
        patch.setattr("core.session.write_training_curves", lambda folder: None)
        yield


@dataclass(frozen=True)
class Finished:
    out: str
    parent: Path
    """Three folds and the run on all rows."""
    killed: Mapping[str, Path]
    """The parent as it would have been left by a process that was killed in this run."""


def after_step(where: str, step: int, act: Callable[[], object]) -> Any:
    """`Trainer._visit` that also does something after that step of the run in folder `where`."""
    visit = Trainer._visit

    def acting(trainer: Trainer, *arguments: Any, **named: Any) -> None:
        visit(trainer, *arguments, **named)
        if trainer._folder.name == where and trainer.progress.step == step:
            act()

    return acting


KILLED = {"fold-2": 4, "final": 2}
"""Run -> step after which it is killed: one after a checkpoint, one before the first."""


@pytest.fixture(scope="module")
def finished_once(_quick: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """What three folds and the run on all rows print and leave; a row has something that the check warns of."""
    folder, out = tmp_path_factory.mktemp("folds"), io.StringIO()
    rows = write_rows(folder / "colours.jsonl")
    rows.write_text(rows.read_text().replace("Say white 3.", "Say white 3. caf\\u00c3\\u00a9 \\ufffd\\ufffd"))
    killed = {name: folder / f"killed-in-{name}" for name in KILLED}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(folder)
        for name, step in KILLED.items():
            copy = partial(shutil.copytree, folder / "run", killed[name])
            patch.setattr(Trainer, "_visit", after_step(name, step, copy))
        assert cli.main(command(model, rows, "--final")) == 0, out.getvalue()
    return Finished(out.getvalue(), folder / "run", killed)


@pytest.fixture
def finished(finished_once: Finished, tmp_path: Path) -> tuple[str, Path]:
    """A copy of it, as `run` in the test's own folder."""
    return finished_once.out, shutil.copytree(finished_once.parent, tmp_path / "run")


def test_folds_and_the_run_on_all_rows(finished: tuple[str, Path]) -> None:
    out, parent = finished
    names = ("fold-1", "fold-2", "fold-3")
    summaries = [read(parent / name / "training_summary.json") for name in names]
    check_rows(parent, names)
    # the spread is that of the runs' own gaps
    summary = read(parent / "folds_summary.json")
    assert summary["num_done"] == 3 and summary["errors"] == {}
    gaps = [one["gap"] for one in summaries]
    assert summary["gap"]["mean"] == pytest.approx(sum(gaps) / 3) and len(set(gaps)) == 3
    assert summary["gap"]["low"] < summary["gap"]["mean"] < summary["gap"]["high"]
    assert (parent / "plots/folds.png").read_bytes().startswith(b"\x89PNG")
    assert read(parent / "folds.json")["status"] == "finished"
    for heading in ("fold 1 of 3 · run/fold-1", "fold 3 of 3 · run/fold-3", "final run, on all rows"):
        assert heading in out
    assert "over 3 folds" in out and f"[{summaries[1]['gap_low']:z.3f}, " in out
    check_pooled(out, parent, names)
    for found in ("lost in a wrong encoding", "read in another encoding"):
        assert out.count(found) == 1, "what is wrong with the rows is said once"
    assert out.count("early stopping can't act") == 3
    assert "final run, on all rows, to step 3 of the folds' 6 (their median best step" in out
    check_final(parent)


def check_pooled(out: str, parent: Path, names: tuple[str, ...]) -> None:
    """Sum of the losses of all validation rows over the sum of their targets; not the mean over folds, who differ."""
    summary = read(parent / "folds_summary.json")
    measured = {step: [read_row_losses(parent / name, step) for name in names] for step in (0, 3)}
    pooled = {}
    for step, losses in measured.items():
        held_out = [both[0] for both in losses if both is not None]
        pooled[step] = sum(one.nll.sum() for one in held_out) / sum(one.num_targets.sum() for one in held_out)
    found = summary["pooled_val_loss"]
    assert found["base"] == pytest.approx(pooled[0], rel=1e-12) and found["best"] == pytest.approx(pooled[3], rel=1e-12)
    assert found["best"] != pytest.approx(summary["best_val_loss"]["mean"], rel=1e-4)
    assert (
        f"{found['base']:.3f} → {found['best']:.3f}, each of {found['num_targets']} target tokens counted once" in out
    )


def check_rows(parent: Path, names: tuple[str, ...]) -> None:
    """Each of the 24 rows validates once and trains in the others; the last run trains on all."""
    validated = Counter(row for name in names for row in rows_of(parent / name, "validation"))
    assert len(validated) == 24 and set(validated.values()) == {1}
    for name in names:
        held_out, trained = (set(rows_of(parent / name, split)) for split in ("validation", "train"))
        assert not held_out & trained and len(held_out) + len(trained) == 24
    assert sorted(rows_of(parent / "final", "train")) == sorted(validated)
    assert rows_of(parent / "final", "validation") == []


def check_final(parent: Path) -> None:
    """As many steps as the folds' median, at the folds' rates, and nothing that looks like a judgement."""
    steps = 3
    final = parent / "final"
    summary, state = read(final / "training_summary.json"), read(final / "training_state.json")
    assert summary["status"] == "finished" and summary["steps"] == summary["best_step"] == steps
    for name in ("gap", "gap_low", "gap_high", "grade", "best_val_loss", "base_val_loss", "final_gap"):
        assert summary[name] is None, name
    assert summary["not_judged"] == state["not_judged"] == "every row was trained on"
    config = yaml.safe_load((final / "config.yaml").read_text())
    assert config["train"]["max_steps"] == steps and config["guard"]["patience"] is None
    records = losses(final)
    assert [record["lr"] for record in records] == [record["lr"] for record in losses(parent / "fold-1")[: steps + 1]]
    assert state["schedule_steps"] == 6
    assert not {"val_loss", "gap", "grade", "best_val_loss"} & set().union(*records)
    assert records[-1]["probe_loss"] < records[0]["probe_loss"], "it learned"
    assert (final / "adapters/adapter_model.safetensors").is_file()
    assert "Not judged: every row was trained on; judged by the folds: gap" in (final / "training.log").read_text()


def test_generate_and_monitor_take_the_parent(finished: tuple[str, Path], run_cli: Train) -> None:
    assert run_cli("generate", "run", "--prompt", "Say red 0.", "--max-tokens", "2").code == 0
    shown = run_cli("monitor", "run", "--once")
    assert shown.code == 0 and "over 3 folds" in shown.out and "not judged: every row was trained on" in shown.out
    again = run_cli("train", "--resume", "run")
    assert again.code == 2 and "all folds are finished" in again.err


def same_final(parent: Path, other: Path) -> None:
    """The same run to the bit."""
    assert losses(parent / "final") == losses(other / "final")
    adapters = [(path / "final/adapters/adapter_model.safetensors").read_bytes() for path in (parent, other)]
    assert adapters[0] == adapters[1]


def test_the_final_run_may_be_asked_for_later(
    finished: tuple[str, Path], finished_once: Finished, run_cli: Train, model: Path
) -> None:
    parent = finished[1]
    shutil.rmtree(parent / "final")
    (parent / "folds.json").write_text(json.dumps(read(parent / "folds.json") | {"final": False}))
    for arguments in (("train", "--model", model, "--init-adapter", "run"), ("convert", "run")):
        refused = run_cli(*arguments)
        assert refused.code == 2 and "train --resume run --final" in refused.err and "run/fold-1" in refused.err
    before = {path: path.stat().st_mtime_ns for path in parent.glob("fold-*/metrics.jsonl")}
    assert run_cli("train", "--resume", "run", "--final").code == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}, "finished folds are left alone"
    same_final(parent, finished_once.parent)


def test_killed_interrupted_and_resumed_equals_not_stopped(
    finished_once: Finished, run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second fold, gone on with, interrupted in the run on all rows, gone on with."""
    parent, whole = shutil.copytree(finished_once.killed["fold-2"], tmp_path / "run"), finished_once.parent
    assert not (parent / "folds_summary.json").exists() and not (parent / "fold-3").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_visit", after_step("final", 2, lambda: os.kill(os.getpid(), signal.SIGINT)))
        stopped = run_cli("train", "--resume", "run")
    assert stopped.code == 130 and "python cli.py train --resume run\n" in stopped.out
    assert read(parent / "folds.json")["status"] == "interrupted"
    assert read(parent / "final/training_state.json")["step"] == 2
    # the run alone: what it is part of is not asked
    result = run_cli("train", "--resume", "run/final")
    assert result.code == 0, result
    assert run_cli("train", "--resume", "run").code == 0
    assert read(parent / "folds.json")["status"] == "finished"
    for name in ("fold-1", "fold-2", "fold-3"):
        assert losses(parent / name) == losses(whole / name), name
    one, other = (read(folder / "folds_summary.json") for folder in (parent, whole))
    for name in ("gap", "best_val_loss", "pooled_val_loss", "best_step", "luck"):
        assert one[name] == other[name]
    same_final(parent, whole)


def test_killed_before_the_first_checkpoint_of_the_final_run(
    finished_once: Finished, run_cli: Train, tmp_path: Path
) -> None:
    parent = shutil.copytree(finished_once.killed["final"], tmp_path / "run")
    assert not list((parent / "final/checkpoints").iterdir())
    result = run_cli("train", "--resume", "run/final")
    assert result.code == 0 and "no checkpoint yet" in result.out
    same_final(parent, finished_once.parent)


def test_a_fold_that_fails_does_not_stop_the_others(
    finished: tuple[str, Path], run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fold-2", "fold-3", "final"):
        shutil.rmtree(finished[1] / name)
    begin = Session._finish

    def fail(session: Session, *arguments: Any) -> int:
        if session._folder.name == "fold-2":
            raise NonFiniteLossError("step 3: the loss became nan", hint="try a lower rate")
        return begin(session, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "_finish", fail)
        result = run_cli("train", "--resume", "run")
    assert result.code == 1, result
    assert "step 3: the loss became nan" in result.out and "over 2 folds of 3" in result.out
    assert "try again: python cli.py train --resume run" in result.out
    summary = read(tmp_path / "run/folds_summary.json")
    assert summary["errors"] == {"fold-2": "step 3: the loss became nan"} and summary["num_done"] == 2
    assert [one["status"] for one in summary["results"]] == ["finished", "failed", "finished"]
    assert not (tmp_path / "run/final").exists(), "the median of two folds is not that of three"
    again = run_cli("train", "--resume", "run")
    assert again.code == 0 and read(tmp_path / "run/folds_summary.json")["num_done"] == 3
    assert read(tmp_path / "run/final/training_summary.json")["grade"] is None


def test_wrong_input_leaves_nothing_behind(train: Train, rows: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        result = train(*arguments)
        assert result.code == 2 and not (tmp_path / "run").exists(), result
        return result.err

    assert "2" in refused("--folds", "1")
    assert "--folds" in refused("--final")
    assert "data.folds 30" in refused("--folds", "30")
    brought = tmp_path / "brought"
    brought.mkdir()
    shutil.copy(rows, brought / "train.jsonl")
    write_rows(brought / "valid.jsonl", 30)
    message = refused("--folds", "3", "--data", brought)
    assert "brings validation rows of its own" in message and message.count("\n") == 2
    assert "does not exist" in refused("--folds", "3", "--data", tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    assert train("--folds", "30", "--output", "empty").code == 2
    assert list((tmp_path / "empty").iterdir()) == [], "a folder that was there stays, empty"


def test_a_taken_output_and_a_second_process(finished: tuple[str, Path], train: Train, run_cli: Train) -> None:
    taken = train(*FOLDS)
    assert taken.code == 2 and "already exists" in taken.err and "train --resume run" in taken.err
    shutil.rmtree(finished[1] / "fold-3")
    with RunLock(finished[1]):
        second = run_cli("train", "--resume", "run")
    assert second.code == 2 and "another process is training here" in second.err


def test_a_summary_that_was_edited_ends_nothing_in_a_traceback(finished: tuple[str, Path], run_cli: Train) -> None:
    parent = finished[1]
    path = parent / "fold-2/training_summary.json"
    path.write_text(json.dumps(read(path) | {"gap_low": None}))
    shown = run_cli("monitor", "run", "--once")
    assert shown.code == 0 and "over 2 folds of 3" in shown.out and "fold-2/training_summary.json" in shown.out
    assert run_cli("monitor", "run", "--json").code == 0
    shutil.rmtree(parent / "final")
    again = run_cli("train", "--resume", "run")
    assert again.code == 1 and "remove run/fold-2, then: python cli.py train --resume run" in again.out
    assert not (parent / "final").exists(), "the median of two folds is not that of three"
