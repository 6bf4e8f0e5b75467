"""A run that holds nothing out: it trains to its last step, keeps that adapter, and claims nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.checkpoint import Checkpointer
from core.config import DataConfig, RunConfig
from core.errors import NonFiniteLossError
from core.journal import Journal
from core.progress import Progress
from core.protocols import Batch
from core.row_losses import read_row_losses
from core.schedule import Plan
from core.trainer import Status, Trainer
from core.verdict import summarize, verdict_lines
from tests.fakes import NAME, FakeData, FakeLearner, SilentScreen


class AllTrain(FakeData):
    @property
    def validation(self) -> Sequence[Batch]:
        return []


CONFIG = RunConfig.model_validate(
    {
        "optim": {"lr": 0.3},
        "train": {"accumulation": 2, "max_steps": 11},
        "eval": {"every": 4},
        "guard": {"patience": 1},
        "checkpoint": {"every": 3, "keep": 2},
        "log": {"every": 2},
    }
)


class Run:
    def __init__(
        self,
        folder: Path,
        *,
        learner: FakeLearner | None = None,
        stop_at: int | None = None,
        schedule_steps: int | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.learner, self.screen = folder, learner or FakeLearner(), SilentScreen()
        self.saved: list[np.ndarray[Any, Any]] = []
        self.beats: list[dict[str, Any]] = []
        self.checkpointer = Checkpointer(folder, keep=2)
        self.checkpoint = self.checkpointer.latest()
        self.journal = Journal(folder, keep_bytes=self.checkpoint.trainer["journal_bytes"] if self.checkpoint else 0)
        self.trainer = Trainer(
            config=CONFIG,
            learner=self.learner,
            data=AllTrain(),
            folder=folder,
            journal=self.journal,
            checkpointer=self.checkpointer,
            screen=self.screen,
            save_best=lambda tensors: self.saved.append(np.array(tensors[NAME])),
            heartbeat=lambda values: self.beats.append(dict(values)),
            schedule_steps=schedule_steps,
            should_interrupt=lambda: stop_at is not None and self.trainer.progress.step >= stop_at,
        )

    def run(self) -> Status:
        try:
            return self.trainer.run(self.checkpoint)
        finally:
            self.journal.close()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def test_the_last_adapter_is_kept_and_nothing_is_claimed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert run.run() == "finished"
    assert run.trainer.best_step == 11 and not run.trainer.is_judged
    assert run.screen.evaluations == [0, 4, 8, 11]
    assert len(run.saved) == 1 and np.array_equal(run.saved[0], run.learner.logits)
    records = run.records()
    assert not {"val_loss", "gap", "grade", "best_step", "best_val_loss"} & set().union(*records)
    probes = [record["probe_loss"] for record in records if "probe_loss" in record]
    assert len(probes) == 4 and probes[-1] < probes[0]
    assert run.beats[-1]["best_step"] == 11 and run.beats[-1]["best_val_loss"] is None
    assert run.beats[-1]["base_val_loss"] is None
    json.dumps(run.beats, allow_nan=False)
    assert read_row_losses(run.folder, 4) is None, "no row's loss can be held against another weight's"
    assert 11 in run.checkpointer.steps()


def test_it_may_stop_in_the_middle_of_a_longer_schedule(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", schedule_steps=22)
    assert run.run() == "finished" and run.trainer.progress.step == 11
    # one warm-up step of 22, then a cosine from the peak: step 11 is 9 of 21 parts down
    rates = {record["step"]: record["lr"] for record in run.records()}
    assert rates[2] == pytest.approx(0.3) and rates[11] == pytest.approx(0.15 * (1 + math.cos(math.pi * 9 / 21)))
    checkpoint = run.checkpointer.latest()
    assert checkpoint is not None and checkpoint.trainer["schedule_steps"] == 22
    to_its_end = Run(tmp_path / "other")
    to_its_end.run()
    assert not np.array_equal(run.learner.logits, to_its_end.learner.logits)


def test_resumed_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole")
    whole.run()
    assert Run(tmp_path / "parts", stop_at=7).run() == "interrupted"
    again = Run(tmp_path / "parts")
    assert again.trainer.best_step == 0 and again.run() == "finished"
    assert np.array_equal(again.learner.logits, whole.learner.logits)
    assert np.array_equal(again.saved[-1], whole.saved[-1])
    losses = [[record.get("loss") for record in run.records()] for run in (whole, again)]
    assert losses[0] == losses[1]


def test_a_loss_that_is_no_number_still_stops_it(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="step 5"):
        Run(tmp_path / "run", learner=FakeLearner(fail_at=5)).run()


def summary_of(status: str, *, step: int = 11, test: float = 0.0) -> dict[str, Any]:
    trainer: Any = SimpleNamespace(
        progress=Progress(step=step, num_target_tokens=99, num_tokens=200, train_seconds=1.0),
        plan=Plan(steps_per_epoch=5, total_steps=11),
        best_step=step if status == "finished" else 0,
        is_judged=False,
        elapsed_seconds=3.0,
    )
    config = RunConfig(backend="cuda", data=DataConfig(test=test))
    return summarize(trainer, config=config, model="tiny", status=status, num_train_rows=80, num_val_rows=0)


def lines(folder: Path, summary: dict[str, Any]) -> list[str]:
    return verdict_lines(summary, gap=None, guard=CONFIG.guard, folder=folder, next_command="type this")


def test_its_verdict_is_the_folds(tmp_path: Path) -> None:
    summary = summary_of("finished")
    assert (summary["best_step"], summary["gap"], summary["grade"]) == (11, None, None)
    assert lines(tmp_path / "final", summary)[0] == "Not judged: every row was trained on"
    folds = {"gap": {"mean": 0.2, "sd": 0.05}, "grade": "MODERATE", "num_done": 4}
    (tmp_path / "folds_summary.json").write_text(json.dumps(folds))
    said = lines(tmp_path / "final", summary)
    assert said[0] == (
        "Not judged: every row was trained on; judged by the folds: gap 0.200 ± 0.050, MODERATE (4 folds)"
    )
    assert said[-1] == "  next      type this" and not any("grade" in line.lower() for line in said)
    assert summary_of("finished", test=0.1)["not_judged"] == "every row but those for testing was trained on"
    stopped = lines(tmp_path / "final", summary_of("interrupted", step=5))
    assert stopped[1] == "  stopped at step 5 of 11" and "train --resume" in stopped[-1]
