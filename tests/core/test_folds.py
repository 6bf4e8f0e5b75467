"""The statistics over folds, worked out by hand; what a parent folder says; the table, the plot, the monitor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from core import monitor
from core.adapter_files import find_adapter
from core.config import GuardConfig, RunConfig, to_plain
from core.errors import UserError
from core.folds import (
    FOLDS_PLOT,
    FoldResult,
    FoldsVerdict,
    Spread,
    damaged,
    is_folds,
    judge,
    judged_by,
    luck,
    read_folds,
    run_with_adapter,
    t_quantile,
)
from core.folds_plot import curves, write_folds_plot
from core.folds_screen import final_steps, mixed_rows, table_lines, verdict_lines
from core.overfitting import grade_of
from core.protocols import RowLosses
from core.row_losses import write_row_losses
from core.run import RunLock, newest_run

GUARD = GuardConfig()


def fold(number: int, gap: float, *, half: float = 0.0979982, step: int = 40, **values: Any) -> FoldResult:
    """A finished fold; its interval is `gap` and as much on each side, by default that of a deviation of 0.05."""
    plain: dict[str, Any] = {
        "status": "finished",
        "gap": gap,
        "gap_low": gap - half,
        "gap_high": gap + half,
        "grade": grade_of(gap, GUARD.grades),
        "base_val_loss": 2.5,
        "best_val_loss": 2.0 + gap,
        "best_step": step,
        "num_train_rows": 80,
        "num_val_rows": 20,
    }
    return FoldResult(number, **(plain | values))


def judged(*results: FoldResult) -> FoldsVerdict:
    verdict = judge(results, GUARD)
    assert verdict is not None
    return verdict


# two-sided 95 % and 99 %: tables of Student's t, as in any textbook
@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [
        (0.975, 1, 12.706205),
        (0.975, 2, 4.302653),
        (0.975, 3, 3.182446),
        (0.975, 4, 2.776445),
        (0.975, 9, 2.262157),
        (0.975, 30, 2.042272),
        (0.995, 4, 4.604095),
        (0.995, 5, 4.032143),
        (0.90, 7, 1.414924),
        (0.5, 4, 0.0),
    ],
)
def test_quantiles_of_students_t(probability: float, degrees: int, value: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(value, abs=2e-6)


def test_spread_by_hand() -> None:
    # mean 0.06; squares of the differences 9 + 1 + 0 + 1 + 9 = 20 (e-4), over 4: 5e-4
    spread = Spread.of([0.03, 0.05, 0.06, 0.07, 0.09], confidence=0.95)
    assert spread.mean == pytest.approx(0.06) and (spread.min, spread.max) == (0.03, 0.09)
    assert spread.sd == pytest.approx(math.sqrt(5e-4))
    half = 2.776445 * math.sqrt(5e-4) / math.sqrt(5)
    assert spread.low == pytest.approx(0.06 - half, abs=1e-7) and spread.high == pytest.approx(0.06 + half, abs=1e-7)
    assert Spread.of([0.03, 0.05], confidence=0.8).high == pytest.approx(0.04 + 3.077684 * 0.01, abs=1e-7)
    alone = Spread.of([0.03], confidence=0.95)
    assert (alone.sd, alone.low, alone.high) == (None, None, None)


def test_the_verdict_is_the_means_and_names_who_disagrees() -> None:
    verdict = judged(fold(1, 0.02, step=10), fold(2, 0.10, step=20), fold(3, 0.12, step=90), fold(4, 0.20, step=30))
    assert verdict.gap.mean == pytest.approx(0.11) and verdict.grade == "GOOD"
    assert [(other.fold, other.grade) for other in verdict.disagreeing] == [(1, "EXCELLENT"), (4, "MODERATE")]
    assert verdict.median_best_step == 25
    assert verdict.own_sd == pytest.approx(0.05, abs=1e-6)
    # 0.11 lies within 0.098 of each
    assert verdict.num_covering == 4
    assert judged(fold(1, 0.02, half=0.01), fold(2, 0.10)).num_covering == 1
    text = "\n".join(verdict_lines(Path("runs/x"), verdict, failed=[], has_final=False, start="base model"))
    assert text.startswith("Good generalization, over 4 folds. Train/val loss difference: 0.11 ± 0.07")
    assert "disagree  fold 1 EXCELLENT (0.020), fold 4 MODERATE (0.200)" in text
    assert "anything from EXCELLENT (0.020, fold 1) to MODERATE (0.200, fold 4)" in text
    # the interval of the mean: 0.11 -+ 3.182 * 0.0739 / 2
    assert "the interval reaches from EXCELLENT to MODERATE" in text
    assert "of 25 steps (the folds' median best step): python cli.py train --resume runs/x --final" in text


def test_the_pooled_loss_counts_each_token_once() -> None:
    # (2.5 * 100 + 1.0 * 20 + 1.0 * 30) / 150 = 2; the best losses are 2.1, 2.2 and 2.3: (210 + 44 + 69) / 150
    verdict = judged(
        fold(1, 0.1, num_val_targets=100),
        fold(2, 0.2, num_val_targets=20, base_val_loss=1.0),
        fold(3, 0.3, num_val_targets=30, base_val_loss=1.0),
    )
    assert verdict.pooled is not None and verdict.pooled.num_targets == 150
    assert verdict.pooled.base == pytest.approx(2.0) and verdict.pooled.best == pytest.approx(323 / 150)
    assert verdict.best_val_loss.mean == pytest.approx(2.2), "the fold mean is another"
    assert verdict.to_dict()["pooled_val_loss"] == {
        "base": pytest.approx(2.0),
        "best": pytest.approx(323 / 150),
        "num_targets": 150,
    }
    text = "\n".join(verdict_lines(Path("x"), verdict, failed=[], has_final=True, start="base model"))
    assert "pooled    validation loss 2.000 → 2.153, each of 150 target tokens counted once" in text
    mean, _, pooled = (line.plain.split() for line in table_lines(verdict.results, verdict)[4:])
    assert mean[:4] == ["fold", "mean", "1.500", "2.200"] and pooled == ["pooled", "60", "rows", "2.000", "2.153"]
    assert max(len(line.plain) for line in table_lines(verdict.results, verdict)) <= 80
    unknown = judged(fold(1, 0.1, num_val_targets=100), fold(2, 0.2))
    assert unknown.pooled is None and unknown.to_dict()["pooled_val_loss"] is None
    assert "pooled" not in "\n".join(line.plain for line in table_lines(unknown.results, unknown))


def test_the_run_on_all_rows_stops_within_the_folds_schedule() -> None:
    verdict = judged(
        fold(1, 0.1, step=20, total_steps=66), fold(2, 0.1, step=33, total_steps=66), fold(3, 0.1, total_steps=69)
    )
    assert (verdict.median_best_step, verdict.schedule_steps) == (33, 66)
    assert final_steps(verdict) == "to step 33 of the folds' 66 (their median best step, at their learning rates)"
    assert judged(fold(1, 0.1, total_steps=66), fold(2, 0.1)).schedule_steps is None


def test_own_intervals_are_averaged_as_variances() -> None:
    # deviations of 0.03 and 0.04: sqrt((9 + 16) / 2) = 3.5355
    verdict = judged(fold(1, 0.1, half=0.03 * 1.959964), fold(2, 0.1, half=0.04 * 1.959964))
    assert verdict.own_sd == pytest.approx(0.0353553, abs=1e-6)


@pytest.mark.parametrize(
    ("half", "words"),
    [(0.02, "promises too much"), (0.1134, "about as much"), (0.4, "more than the folds differ by")],
)
def test_how_much_was_luck(half: float, words: str) -> None:
    """The folds' deviation is 0.058."""
    text = luck(judged(fold(1, 0.06, half=half), fold(2, 0.10, half=half), fold(3, 0.1745, half=half)))
    assert text is not None and "moves by 0.058" in text and words in text
    assert luck(judged(fold(1, 0.06))) is None


def test_folds_that_agree_are_not_called_anything() -> None:
    text = luck(judged(fold(1, 0.06), fold(2, 0.10)))
    assert text is not None and "GOOD in each, from 0.060 (fold 1) to 0.100 (fold 2)" in text


def test_a_failed_fold_is_left_out_and_said() -> None:
    failed = FoldResult(2, "failed", step=7, error="step 8: the loss became nan")
    verdict = judged(fold(1, 0.04), failed, fold(3, 0.08))
    assert verdict.gap.mean == pytest.approx(0.06) and len(verdict.done) == 2
    lines = verdict_lines(Path("runs/x"), verdict, failed=["fold-2"], has_final=False, start="base model")
    assert "over 2 folds of 3" in lines[0]
    assert "  failed    fold-2" in lines and lines[-1].endswith("try again: python cli.py train --resume runs/x")
    assert "failed, step 7" in table_lines(verdict.results, verdict)[2].plain
    assert judge([failed], GUARD) is None


def test_no_better_than_before() -> None:
    verdict = judged(fold(1, 0.6), fold(2, 0.8))
    text = verdict_lines(Path("x"), verdict, failed=[], has_final=True, start="initial adapter")[0]
    assert text == "No better than the initial adapter, over 2 folds: mean validation loss 2.500 → 2.700."


def test_folds_of_other_rows_are_noticed() -> None:
    def sizes(*pairs: tuple[int, int]) -> str | None:
        return mixed_rows([fold(i, 0.1, num_train_rows=a, num_val_rows=b) for i, (a, b) in enumerate(pairs, 1)])

    assert sizes((6, 4), (7, 3), (7, 3)) is None
    assert "not the same rows" in (sizes((6, 4), (7, 3), (8, 3)) or "")
    assert "not every row" in (sizes((6, 4), (7, 3)) or "")


# --- folders ----------------------------------------------------------------------------------------------------------


def write_run(folder: Path, gap: float, *, status: str = "finished", step: int = 40) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(to_plain(RunConfig(backend="cuda"))))
    state = {
        "status": status,
        "step": step,
        "num_train_rows": 80,
        "num_val_rows": 20,
        "started": 5.0,
        "total_steps": 60,
    }
    (folder / "training_state.json").write_text(json.dumps(state))
    summary = {"gap": gap, "gap_low": gap - 0.1, "gap_high": gap + 0.1, "grade": grade_of(gap, GUARD.grades)}
    summary |= {"base_val_loss": 2.5, "best_val_loss": 2.0, "best_step": step}
    (folder / "training_summary.json").write_text(json.dumps(summary))
    records = [{"step": at, "loss": 2.0, "val_loss": 2.5 - at / 80, "probe_loss": 2.4 - at / 80} for at in (0, step)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """Three folds: one done, one being trained, one to come."""
    folder = tmp_path / "runs" / "rows-folds"
    write_run(folder / "fold-1", 0.1)
    write_run(folder / "fold-2", 0.1, status="running", step=20)
    (folder / "config.yaml").write_text(json.dumps(to_plain(RunConfig(backend="cuda"))))
    plan = {"format": 1, "folds": 3, "final": False, "status": "running", "current": "fold-2", "started": 9.0}
    (folder / "folds.json").write_text(json.dumps(plan | {"errors": {}, "host": "elsewhere"}))
    return folder


def test_reading_a_parent_folder(parent: Path) -> None:
    assert is_folds(parent) and not is_folds(parent / "fold-1")
    one, two, three = read_folds(parent)
    assert one.is_done and (one.gap, one.best_step, one.num_val_rows) == (0.1, 40, 20)
    assert two.status == "interrupted" and two.gap is None, "nobody holds its lock"
    assert three == FoldResult(3, "pending")
    with RunLock(parent / "fold-2"):
        assert read_folds(parent)[1].status == "running"
    assert newest_run(parent.parent) == parent


def test_the_adapter_of_folds_is_that_of_all_rows(parent: Path) -> None:
    with pytest.raises(UserError, match="these are folds"):
        run_with_adapter(parent)
    assert run_with_adapter(parent / "fold-1") == parent / "fold-1"
    write_run(parent / "final", 0.0)
    assert run_with_adapter(parent) == parent / "final"


def test_an_adapter_looked_for_in_folds_is_that_of_all_rows(parent: Path) -> None:
    with pytest.raises(UserError, match="each with an adapter of its own") as refused:
        find_adapter(parent)
    assert f"--resume {parent} --final" in str(refused.value) and f"{parent}/fold-1" in str(refused.value)
    write_run(parent / "final", 0.0)
    for name in ("fold-1", "final"):
        (parent / name / "adapters").mkdir()
        (parent / name / "adapters/adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": f"org/{name}"})
        )
        (parent / name / "adapters/adapter_model.safetensors").touch()
    found = find_adapter(parent)
    assert found.path == parent / "final/adapters" and found.base_model == "org/final"
    assert find_adapter(parent / "fold-1").base_model == "org/fold-1"


@pytest.mark.parametrize("name", ["gap", "gap_low", "gap_high", "grade", "base_val_loss", "best_val_loss", "best_step"])
@pytest.mark.parametrize("value", [None, "x"])
def test_a_damaged_summary_is_said_and_its_fold_left_out(parent: Path, name: str, value: object) -> None:
    write_run(parent / "fold-3", 0.2)
    path = parent / "fold-3/training_summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    plan = json.loads((parent / "folds.json").read_text())
    (parent / "folds.json").write_text(json.dumps(plan | {"status": "finished", "current": None}))
    results = read_folds(parent)
    assert [result.is_done for result in results] == [True, False, False] and damaged(results) == ["fold-3"]
    assert judged(*results).gap.mean == pytest.approx(0.1)
    text = " ".join(shown(parent, width=300).split())
    assert "finished, training_summary.json damaged" in text
    assert f"to train again, remove {parent}/fold-3, then: python cli.py train --resume {parent}" in text


def test_row_losses_that_are_damaged_leave_no_pooled_loss(parent: Path) -> None:
    losses = RowLosses(np.arange(2), np.array([3.0, 5.0]), np.array([3, 4]))
    write_row_losses(parent / "fold-1", 40, validation=losses, probe=losses)
    assert read_folds(parent)[0].num_val_targets == 7
    (parent / "fold-1/row_losses/step40.safetensors").write_bytes(b"no tensors")
    assert read_folds(parent)[0].num_val_targets is None


def test_what_a_final_run_says_of_the_folds(parent: Path) -> None:
    assert judged_by(parent / "final") is None
    summary = {"gap": {"mean": 0.0812, "sd": 0.0241}, "grade": "GOOD", "num_done": 5}
    (parent / "folds_summary.json").write_text(json.dumps(summary))
    assert judged_by(parent / "final") == "gap 0.081 ± 0.024, GOOD (5 folds)"


def shown(parent: Path, *, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(monitor.render(monitor.snapshot(parent), width))
    return console.export_text()


def test_the_monitor_shows_the_fold_that_is_trained_and_the_table(parent: Path) -> None:
    with RunLock(parent / "fold-2"):
        found = monitor.snapshot(parent)
        text = shown(parent)
    assert found.folder == parent / "fold-2" and not found.has_ended
    assert "step 20/60" in text and "fold 1  80 + 20" in text and "running, step 20" in text and "pending" in text
    assert monitor.to_json(found)["folds"]["status"] == "running"
    assert monitor.to_json(monitor.snapshot(parent / "fold-1")).get("folds") is None


def test_the_monitor_goes_on_from_fold_to_fold(parent: Path) -> None:
    reader = monitor.reader_of(parent)
    assert reader.poll().folder.name == "fold-2"
    write_run(parent / "fold-3", 0.2, status="running", step=5)
    plan = json.loads((parent / "folds.json").read_text())
    (parent / "folds.json").write_text(json.dumps(plan | {"current": "fold-3"}))
    found = reader.poll()
    assert found.folder.name == "fold-3" and found.step == 5 and not found.has_ended


def test_the_monitor_ends_with_the_last_fold(parent: Path) -> None:
    write_run(parent / "fold-3", 0.2)
    state = json.loads((parent / "fold-2/training_state.json").read_text())
    (parent / "fold-2/training_state.json").write_text(json.dumps(state | {"status": "early_stopped"}))
    plan = json.loads((parent / "folds.json").read_text())
    (parent / "folds.json").write_text(json.dumps(plan | {"status": "finished", "current": None}))
    found = monitor.snapshot(parent)
    assert found.has_ended and found.exit_code == 0 and found.folder.name == "fold-3"
    text = shown(parent)
    assert (
        "over 3 folds" in text
        and "mean" in text
        and f"--resume {parent} --final" in " ".join(shown(parent, width=300).split())
    )
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_monitor_sees_that_the_process_died(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    found = monitor.snapshot(parent)
    assert found.has_ended and found.exit_code == 1
    assert f"continue with: python cli.py train --resume {parent}" in " ".join(shown(parent, width=200).split())
    with RunLock(parent):
        assert not monitor.snapshot(parent).has_ended


def test_the_plot(parent: Path) -> None:
    results = read_folds(parent)
    write_folds_plot(parent, judged(*results))
    assert (parent / FOLDS_PLOT).read_bytes().startswith(b"\x89PNG")
    assert curves(parent / "fold-1") == ([0, 40], [2.5, 2.0], [2.4, 1.9])
