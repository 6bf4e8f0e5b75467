"""`train --folds` from the command line: K runs under one folder, the verdict over them, the run on all rows."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from core.errors import NonFiniteLossError
from core.journal import MACHINE_FIELDS
from core.run import RunLock
from core.screen import make_console
from core.session import Session
from core.workflow.folds import resume_folds
from tests.cli.conftest import Result, write_rows

Train = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
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


def command(model: Path, rows: Path) -> list[str]:
    """The folds that the tests stop; the same settings as those of the fixture `train`."""
    arguments = ["train", *FOLDS, "--final", "--model", model, "--data", rows, "--bits", 16, "--device", "cpu"]
    arguments += ["--output", "run", "--batch-size", 2, "--accumulation", 2, "--max-steps", 4, "--eval-every", 2]
    return [*map(str, arguments), "--max-tokens", "96"]


@pytest.fixture(scope="module")
def finished_once(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What three folds and the run on all rows print and leave."""
    folder, out = tmp_path_factory.mktemp("folds"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(folder)
        assert cli.main(command(model, rows)) == 0, out.getvalue()
    return out.getvalue(), folder / "run"


@pytest.fixture
def finished(finished_once: tuple[str, Path], tmp_path: Path) -> tuple[str, Path]:
    """A copy of it, as `run` in the test's own folder."""
    out, parent = finished_once
    return out, shutil.copytree(parent, tmp_path / "run")


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
    check_final(parent, steps=sorted(one["best_step"] for one in summaries)[1])


def check_rows(parent: Path, names: tuple[str, ...]) -> None:
    """Each of the 24 rows validates once and trains in the others; the last run trains on all."""
    validated = Counter(row for name in names for row in rows_of(parent / name, "validation"))
    assert len(validated) == 24 and set(validated.values()) == {1}
    for name in names:
        held_out, trained = (set(rows_of(parent / name, split)) for split in ("validation", "train"))
        assert not held_out & trained and len(held_out) + len(trained) == 24
    assert sorted(rows_of(parent / "final", "train")) == sorted(validated)
    assert rows_of(parent / "final", "validation") == []


def check_final(parent: Path, *, steps: int) -> None:
    """As many steps as the folds' median, a rate that ends there, and nothing that looks like a judgement."""
    final = parent / "final"
    summary, state = read(final / "training_summary.json"), read(final / "training_state.json")
    assert summary["status"] == "finished" and summary["steps"] == summary["best_step"] == steps
    for name in ("gap", "gap_low", "gap_high", "grade", "best_val_loss", "base_val_loss", "final_gap"):
        assert summary[name] is None, name
    assert summary["not_judged"] == state["not_judged"] == "every row was trained on"
    config = yaml.safe_load((final / "config.yaml").read_text())
    assert config["train"]["max_steps"] == steps and config["guard"]["patience"] is None
    records = losses(final)
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


def test_the_final_run_may_be_asked_for_later(train: Train, tmp_path: Path) -> None:
    result = train(*FOLDS, "--max-steps", "2")
    assert result.code == 0 and "--resume run --final" in result.out and not (tmp_path / "run/final").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("fold-*/metrics.jsonl")}
    assert resume_folds(Path("run"), final=True, console=make_console()) == 0
    assert read(tmp_path / "run/final/training_summary.json")["steps"] == 2
    assert before == {path: path.stat().st_mtime_ns for path in before}, "finished folds are left alone"


STOPPED = """
import os, signal, sys
from core.trainer import Trainer
kept = Trainer._visit
def visit(trainer, step, lr):
    kept(trainer, step, lr)
    if trainer._folder.name == os.environ["STOP_IN"] and step == 3:
        os.kill(os.getpid(), int(os.environ["STOP_BY"]))
Trainer._visit = visit
import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def stop(arguments: list[str], *, cwd: Path, where: str, by: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, and sends it a signal after the third step of a run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STOP_IN": where, "STOP_BY": str(int(by))}
    command = [sys.executable, "-c", STOPPED, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("where", "by", "code"),
    [("fold-2", signal.SIGKILL, -9), ("fold-2", signal.SIGINT, 130), ("final", signal.SIGKILL, -9)],
)
def test_stopped_and_resumed_equals_not_stopped(
    finished: tuple[str, Path],
    run_cli: Train,
    model: Path,
    rows: Path,
    tmp_path: Path,
    where: str,
    by: signal.Signals,
    code: int,
) -> None:
    whole = finished[1].rename(tmp_path / "whole")
    ran = stop(command(model, rows), cwd=tmp_path, where=where, by=by)
    assert ran.returncode == code, ran.stderr
    if by == signal.SIGINT:
        assert "python cli.py train --resume run\n" in ran.stdout
        assert read(tmp_path / "run/folds.json")["status"] == "interrupted"
    assert not (tmp_path / "run/folds_summary.json").exists() or where == "final"
    result = run_cli("train", "--resume", "run")
    assert result.code == 0, result
    for name in ("fold-1", "fold-2", "fold-3", "final"):
        assert losses(tmp_path / "run" / name) == losses(whole / name), name
    one, other = (read(folder / "folds_summary.json") for folder in (tmp_path / "run", whole))
    for name in ("gap", "best_val_loss", "best_step", "luck"):
        assert one[name] == other[name]
    adapters = [(path / "final/adapters/adapter_model.safetensors").read_bytes() for path in (tmp_path / "run", whole)]
    assert adapters[0] == adapters[1]


def test_a_fold_that_fails_does_not_stop_the_others(
    train: Train, run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Session._finish

    def fail(session: Session, *arguments: Any) -> int:
        if session._folder.name == "fold-2":
            raise NonFiniteLossError("step 3: the loss became nan", hint="try a lower rate")
        return begin(session, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "_finish", fail)
        result = train(*FOLDS, "--final")
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


def test_a_taken_output_and_a_second_process(train: Train, run_cli: Train, tmp_path: Path) -> None:
    assert train(*FOLDS, "--max-steps", "2").code == 0
    taken = train(*FOLDS)
    assert taken.code == 2 and "already exists" in taken.err and "train --resume run" in taken.err
    shutil.rmtree(tmp_path / "run/fold-3")
    with RunLock(tmp_path / "run"):
        second = run_cli("train", "--resume", "run")
    assert second.code == 2 and "another process is training here" in second.err
    assert run_cli("train", "--resume", "run").code == 0
    assert read(tmp_path / "run/fold-3/training_summary.json")["status"] == "finished"
