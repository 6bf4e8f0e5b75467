"""The summary and the verdict: the answer first, in words that fit how the run ended."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.config import GuardConfig, RunConfig
from core.early_stopping import EarlyStopping
from core.overfitting import Gap, grade_of
from core.progress import Progress
from core.schedule import Plan
from core.verdict import next_command, summarize, verdict_lines

# as others read it
SUMMARY_FIELDS = {
    "backend",
    "model",
    "status",
    "steps",
    "epochs",
    "base_val_loss",
    "best_val_loss",
    "best_step",
    "best_epoch",
    "probe_loss",
    "gap",
    "gap_low",
    "gap_high",
    "grade",
    "num_train_rows",
    "num_val_rows",
    "num_target_tokens",
    "tokens_per_second",
    "peak_memory_gb",
    "wall_seconds",
}

BEST = Gap(val_loss=1.05, probe_loss=1.0, low=0.01, high=0.09, grade="GOOD")
LAST = Gap(val_loss=1.5, probe_loss=0.9, low=0.5, high=0.7, grade="CRITICAL")


def summary_of(status: str = "finished", **progress: Any) -> dict[str, Any]:
    plan = Plan(steps_per_epoch=20, total_steps=60)
    values: dict[str, Any] = {
        "step": 50,
        "base_val_loss": 2.5,
        "best_gap": BEST,
        "last_gap": LAST,
        "num_target_tokens": 12_345,
        "num_tokens": 40_000,
        "train_seconds": 20.0,
        "elapsed_seconds": 60.0,  # at the last checkpoint
        "peak_memory_bytes": 3_500_000_000,
    }
    stopping = EarlyStopping(3, best_loss=1.05, best_step=30)
    if progress.get("best_gap", BEST) is None:
        stopping = EarlyStopping(3)
    trainer: Any = SimpleNamespace(
        progress=Progress(**(values | progress)),
        plan=plan,
        best_step=stopping.best_step,
        is_judged=True,
        elapsed_seconds=83.0,
    )
    config = RunConfig(backend="cuda")
    return summarize(trainer, config=config, model="tiny", status=status, num_train_rows=80, num_val_rows=20)


def lines_of(status: str, *, gap: Gap | None = BEST, base_gap: float | None = None, **progress: Any) -> list[str]:
    return verdict_lines(
        summary_of(status, best_gap=gap, **progress) | {"base_gap": base_gap},
        gap=gap,
        guard=GuardConfig(),
        folder=Path("runs/x"),
        next_command="python cli.py generate runs/x",
    )


def test_the_summary() -> None:
    summary = summary_of("early_stopped")
    assert set(summary) >= SUMMARY_FIELDS
    json.dumps(summary, allow_nan=False)
    expected = {
        "backend": "cuda",
        "model": "tiny",
        "status": "early_stopped",
        "steps": 50,
        "epochs": 2.5,
        "base_val_loss": 2.5,
        "best_val_loss": 1.05,
        "best_step": 30,
        "best_epoch": 2,  # steps 21 to 40
        "probe_loss": 1.0,
        "gap_low": 0.01,
        "gap_high": 0.09,
        "grade": "GOOD",
        "final_val_loss": 1.5,
        "num_train_rows": 80,
        "num_val_rows": 20,
        "num_target_tokens": 12_345,
        "tokens_per_second": 2000.0,
        "peak_memory_gb": 3.5,
        "wall_seconds": 83.0,
    }
    assert {name: summary[name] for name in expected} == expected
    assert summary["gap"] == pytest.approx(0.05)
    assert summary["final_gap"] == pytest.approx(0.6)


def test_the_summary_of_a_run_without_an_evaluation() -> None:
    summary = summary_of("failed", best_gap=None, last_gap=None, base_val_loss=None, train_seconds=0.0, step=0)
    for name in ("base_val_loss", "best_val_loss", "best_step", "best_epoch", "gap", "grade", "tokens_per_second"):
        assert summary[name] is None
    json.dumps(summary, allow_nan=False)


def test_a_finished_run() -> None:
    assert lines_of("finished", step=60) == [
        "Good generalization. Train/val loss difference: 0.05",
        "  validation loss   2.500 → 1.050   (best at epoch 2, step 30)",
        "  gap               0.050 [0.010, 0.090]   GOOD",
        "  100 rows (80 + 20), 12.3 k target tokens, 1:23, 2,000 tok/s, 3.5 GB",
        "",
        "  adapter   runs/x/adapters   (PEFT and mlx-lm)",
        "  next      python cli.py generate runs/x",
    ]


def test_an_early_stop_says_when() -> None:
    lines = lines_of("early_stopped")
    assert lines[0] == "Good generalization. Train/val loss difference: 0.05"
    assert "(best at epoch 2, step 30; stopped early at 50)" in lines[1]
    assert lines[-1].startswith("  next ")


def test_an_interrupted_run_says_how_to_go_on() -> None:
    lines = lines_of("interrupted")
    assert "interrupted at 50 of 60" in lines[1]
    assert lines[-1] == "  continue  python cli.py train --resume runs/x"


def test_commands_can_be_typed_whatever_the_folder_is_called() -> None:
    folder = Path("runs/my run")
    assert next_command(folder, is_judged=True) == "python cli.py evaluate 'runs/my run'"
    assert next_command(folder, is_judged=False) == "python cli.py generate 'runs/my run' --prompt \"…\""
    go_on = "  continue  python cli.py train --resume 'runs/my run'"
    for gap in (BEST, None):
        stopped = summary_of("interrupted", best_gap=gap) | {"base_gap": None}
        for summary in (stopped, stopped | {"not_judged": "every row was trained on"}):
            assert verdict_lines(summary, gap=gap, guard=GuardConfig(), folder=folder, next_command="")[-1] == go_on


def test_interrupted_before_the_first_evaluation() -> None:
    lines = lines_of("interrupted", gap=None)
    assert lines == [
        "Stopped before the first evaluation of a trained adapter.",
        "  continue  python cli.py train --resume runs/x",
    ]


@pytest.mark.parametrize("val_loss", [2.5, 2.6])
def test_no_better_than_the_base_comes_first(val_loss: float) -> None:
    """A small gap is no merit of an adapter that is worse than none."""
    lines = lines_of("finished", gap=Gap(val_loss, val_loss - 0.01, 0.0, 0.02, "EXCELLENT"))
    assert lines[0].startswith(f"No better than the base model: validation loss 2.500 → {val_loss:.3f}")
    assert "generalization" not in "".join(lines)


def test_overfitting_comes_first() -> None:
    lines = lines_of("finished", gap=Gap(2.0, 1.6, 0.35, 0.45, "CRITICAL"))
    assert lines[0].startswith("Potential overfitting detected! Train/val loss difference: 0.40 (CRITICAL")
    assert lines[1] == "  note              validation loss is 25% above the training rows' (guard.relative_gap is 10%)"


def test_an_interval_that_reaches_another_grade_is_said() -> None:
    lines = lines_of("finished", gap=Gap(1.1, 1.0, low=-0.1, high=0.35, grade="GOOD"))
    assert any("the interval reaches into CRITICAL: 20 validation rows" in line for line in lines)


@pytest.mark.parametrize(("before", "is_harder"), [(0.62, True), (0.5, False), (0.0, False), (-0.1, False)])
def test_a_gap_that_was_there_before_is_no_overfitting(before: float, is_harder: bool) -> None:
    lines = lines_of("finished", gap=LAST, base_gap=before)
    harder = f"The held-out rows are harder: their loss was {before:.2f} above the training rows' before training"
    assert lines[0].startswith(harder if is_harder else "Potential overfitting detected!")
    assert any(f"CRITICAL   ({before:.3f} before training)" in line for line in lines)


@pytest.mark.parametrize(
    ("low", "value", "high", "said"),
    [
        (0.01, 0.02, 0.04, None),
        (-0.3, 0.02, 0.2, "into MODERATE"),
        (-0.3, 0.4, 0.6, "into EXCELLENT"),
        (-0.3, 0.1, 0.6, "into CRITICAL"),
        (-0.3, 0.2, 0.6, "from EXCELLENT to CRITICAL"),
    ],
)
def test_grades_that_the_interval_reaches(low: float, value: float, high: float, said: str | None) -> None:
    gap = Gap(1.0 + value, 1.0, low, high, grade_of(value, GuardConfig().grades))
    told = [line for line in lines_of("finished", gap=gap) if "the interval reaches" in line]
    assert [line.split("reaches ")[1].split(":")[0] for line in told] == ([] if said is None else [said])


@pytest.mark.parametrize("status", ["finished", "early_stopped", "interrupted"])
def test_the_verdict_fits_a_terminal(status: str) -> None:
    assert all(len(line) <= 100 for line in lines_of(status))
