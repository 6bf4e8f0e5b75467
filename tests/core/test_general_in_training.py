"""`eval.general` in the loop: at every evaluation, the same after a stop, and nowhere when it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoint import Checkpointer
from core.config import RunConfig
from core.errors import NonFiniteLossError
from core.journal import COLUMNS, MACHINE_FIELDS, Journal, read_records
from core.monitor import RunReader
from core.monitor_screen import screen_lines
from core.prefix import plan_prefixes
from core.screen import record_line
from core.trainer import Trainer
from core.verdict import summarize
from tests.fakes import FakeData, FakeLearner, SilentScreen

CONFIG = RunConfig.model_validate(
    {
        "optim": {"lr": 0.3},
        "train": {"epochs": 2, "accumulation": 2},
        "eval": {"every": 3},
        "guard": {"patience": None},
        "checkpoint": {"every": 2},
    }
)
NAMES = ("general_loss", "general_flipped")


class Fallible(FakeLearner):
    """Its replay is not a number from step `replay_fails_at` on."""

    def __init__(self, replay_fails_at: int | None = None) -> None:
        super().__init__()
        self.replay_fails_at = replay_fails_at

    def replay(self, batches: Any) -> Any:
        found = super().replay(batches)
        if self.replay_fails_at is not None and self.steps >= self.replay_fails_at:
            found.nll[0] = np.nan
        return found


def make(
    folder: Path, *, general: bool = True, stop_at: int | None = None, learner: FakeLearner | None = None
) -> tuple[Trainer, Journal, Any]:
    folder.mkdir(exist_ok=True)
    data = FakeData()
    if general:
        data.general_rows = [np.array([1, 2, 3]), np.array([15, 15])]
    checkpointer = Checkpointer(folder, keep=3)
    checkpoint = checkpointer.latest()
    journal = Journal(folder, keep_bytes=checkpoint.trainer["journal_bytes"] if checkpoint else 0)
    trainer = Trainer(
        config=CONFIG,
        learner=learner or FakeLearner(),
        data=data,
        folder=folder,
        journal=journal,
        checkpointer=checkpointer,
        screen=SilentScreen(),
        save_best=lambda tensors: None,
        heartbeat=lambda values: None,
        should_interrupt=lambda: stop_at is not None and trainer.progress.step >= stop_at,
    )
    return trainer, journal, checkpoint


def run(folder: Path, **options: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    trainer, journal, checkpoint = make(folder, **options)
    try:
        trainer.run(checkpoint)
    finally:
        journal.close()
    return trainer, [record for record, _ in read_records(folder)]


def plain(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in MACHINE_FIELDS} for record in records]


def test_every_evaluation_has_it_and_the_best_is_summed_up(tmp_path: Path) -> None:
    trainer, records = run(tmp_path / "run")
    measured = [record for record in records if "general_loss" in record]
    assert [record["step"] for record in measured] == [0, 3, 6, 8]
    # before the first step every token is as likely: log 16; the first of them counts as the most likely
    assert measured[0]["general_loss"] == pytest.approx(np.log(16)) and measured[0]["general_flipped"] == 0.0
    logits = trainer.learner.logits[0].astype(np.float64)  # type: ignore[attr-defined]
    logp = logits - np.log(np.exp(logits).sum())
    assert measured[-1]["general_loss"] == pytest.approx(-logp[[1, 2, 3, 15, 15]].mean())
    assert measured[-1]["general_flipped"] == 1.0 and logits.argmax() != 0
    summary = summarize(trainer, config=CONFIG, model="m", status="finished", num_train_rows=20, num_val_rows=6)
    best = next(record for record in measured if record["step"] == summary["best_step"])
    assert summary["base_general_loss"] == measured[0]["general_loss"]
    assert [summary[name] for name in NAMES] == [best[name] for name in NAMES]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 6, 7])
def test_stopped_and_resumed_it_leaves_the_same(tmp_path: Path, stop_at: int) -> None:
    whole, records = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_at=stop_at)
    again, resumed = run(tmp_path / "parts")
    assert plain(resumed) == plain(records)
    assert again.progress.general_start == whole.progress.general_start
    assert again.progress.best_general == whole.progress.best_general


def test_it_changes_nothing_else(tmp_path: Path) -> None:
    with_it, records = run(tmp_path / "with")
    without, others = run(tmp_path / "without", general=False)
    np.testing.assert_array_equal(with_it.learner.logits, without.learner.logits)  # type: ignore[attr-defined]
    assert plain(others) == [{k: v for k, v in record.items() if k not in NAMES} for record in plain(records)]
    summary = summarize(without, config=CONFIG, model="m", status="finished", num_train_rows=20, num_val_rows=6)
    assert summary["general_loss"] is None and summary["base_general_loss"] is None


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="general loss after step 3"):
        run(tmp_path / "run", learner=Fallible(replay_fails_at=3))


def test_where_it_is_shown(tmp_path: Path) -> None:
    _, records = run(tmp_path / "run")
    last = records[-1]
    line = record_line(last, total_steps=8)
    assert f"general {last['general_loss']:.3f} (100.0 % flipped)" in line
    assert "general" not in record_line(
        {name: value for name, value in last.items() if name not in NAMES}, total_steps=8
    )
    screen = "\n".join(str(line) for line in screen_lines(RunReader(tmp_path / "run").poll(), 100))
    assert f"general  {last['general_loss']:.3f}  100.0 % flipped" in screen
    header, *rows = (tmp_path / "run" / "training_metrics.csv").read_text().splitlines()
    assert set(NAMES) <= set(COLUMNS) and header.split(",")[COLUMNS.index("general_loss")] == "general_loss"
    assert float(rows[-1].split(",")[COLUMNS.index("general_flipped")]) == 1.0


def test_their_prefixes_are_stored_with_the_runs(tmp_path: Path) -> None:
    """Where frozen layers are left out of memory, these rows must not need them at every evaluation."""
    data = FakeData()
    before = plan_prefixes(CONFIG, data)
    data.general_rows = [np.arange(16), np.arange(7)]
    after = plan_prefixes(CONFIG, data)
    assert after.num_uses == before.num_uses + (16 + 7) * 4  # at steps 0, 3, 6 and 8
    assert after.num_positions > before.num_positions
