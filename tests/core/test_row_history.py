"""Memorised or learned, row by row, on histories in which it was planted, and on ones in which it was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.config import GuardConfig
from core.protocols import FloatArray, IntArray, RowLosses
from core.row_history import RowHistory, SplitHistory, _rise, describe_rows, judge_rows, read_history
from core.row_losses import write_row_losses
from core.row_statistics import FallLine, Tail, false_discoveries, row_noise, sign_test, stands_out, t_tail
from core.run import STATE, write_split

NUM_EVALUATIONS = 6


def split(means: FloatArray, num_targets: IntArray, name: str) -> SplitHistory:
    """Of losses per token [E, N]."""
    rows = np.arange(means.shape[1])
    return SplitHistory(rows, num_targets, means * num_targets, tuple(f"{name}.jsonl:{row + 1}" for row in rows))


def learned(seed: int, num_rows: int, *, shift: float = 0.0) -> tuple[FloatArray, IntArray]:
    """Rows that learn: a third of the loss above 1.5 goes, unevenly, and short rows are noisier.

    `shift`: how much harder the rows are.
    """
    rng = np.random.default_rng(seed)
    num_targets = rng.integers(5, 60, num_rows)
    start = 3.0 + shift + rng.normal(0, 0.5, num_rows) + rng.normal(0, 1.5, num_rows) / np.sqrt(num_targets)
    share = np.linspace(0, 1, NUM_EVALUATIONS)[:, None]
    fall = 0.33 * (start - 1.5) + rng.normal(0, 0.1, num_rows) + rng.normal(0, 0.6, num_rows) / np.sqrt(num_targets)
    fall = np.maximum(fall, 0.05)  # none gets worse of itself
    noise = rng.normal(0, 0.05, (NUM_EVALUATIONS, num_rows)) / np.sqrt(num_targets)
    noise[0] = 0.0
    return np.maximum(start - share * fall + noise, 0.01), num_targets


def history(
    *, seed: int = 0, num_val: int = 60, num_probe: int = 120, shift: float = 0.0, best: int = NUM_EVALUATIONS - 1
) -> tuple[RowHistory, FloatArray, FloatArray]:
    """Nothing planted; and the two splits' losses per token, to plant in, as views of the history's arrays."""
    val, val_targets = learned(seed, num_val, shift=shift)
    probe, probe_targets = learned(seed + 1, num_probe)
    made = RowHistory(
        steps=tuple(range(0, 10 * NUM_EVALUATIONS, 10)),
        best=best,
        probe=split(probe, probe_targets, "train"),
        validation=split(val, val_targets, "held"),
    )
    return made, val, probe


def planted(made: RowHistory, val: FloatArray, probe: FloatArray) -> RowHistory:
    assert made.validation is not None
    return RowHistory(
        made.steps,
        made.best,
        split(probe, made.probe.num_targets, "train"),
        split(val, made.validation.num_targets, "held"),
    )


# --- memorised


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_where_nothing_was_memorised_hardly_a_row_is_named(shift: float) -> None:
    """Of 40 runs with 120 rows each; held-out rows that are harder throughout are no sign of memory."""
    named = [len(judge_rows(history(seed=2 * run, shift=shift)[0]).memorised) for run in range(40)]
    assert sum(named) <= 6 and max(named) <= 2


@pytest.mark.parametrize(("num_val", "most"), [(10, 4), (20, 4), (60, 4)])
def test_rare_rows_of_a_heavy_tail_are_not_memorised(num_val: int, most: int) -> None:
    """Both splits' falls scatter as Student's t with 3 degrees of freedom, in 30 runs; taken for normal, half of the
    runs would name a row."""
    with_names = 0
    for run in range(30):
        made, *sides = history(seed=2 * run, num_val=num_val)
        rng = np.random.default_rng(run)
        for losses in sides:
            start = losses[0]
            losses[-1] = start - (0.33 * (start - 1.5) + 0.15 * rng.standard_t(3, len(start)))
        with_names += bool(judge_rows(planted(made, *sides)).memorised)
    assert with_names <= most


def test_tails_by_hand() -> None:
    """Of many distances the tail is what they were drawn from; of few it may be heavier, never lighter."""
    rng = np.random.default_rng(0)
    normal, heavy = np.abs(rng.normal(0, 2, 4000)), np.abs(2 * rng.standard_t(3, 4000))
    assert Tail.fit(normal).degrees >= 15 and Tail.fit(normal).scale == pytest.approx(2, rel=0.1)
    assert Tail.fit(heavy).degrees in (2.5, 3) and Tail.fit(heavy).scale == pytest.approx(2, rel=0.1)
    assert Tail.fit(normal[:20]).degrees < 10
    # 3 degrees of freedom: 1 % of both sides lies beyond 5.841
    np.testing.assert_allclose(Tail(3, 2.0).beyond(np.array([2 * 5.841, 0.0])), [0.005, 0.5], rtol=1e-3)
    assert Tail.fit(np.zeros(10)).beyond(np.array([1.0]))[0] < 1e-6


def test_planted_rows_are_found_and_easy_ones_are_not() -> None:
    made, val, probe = history()
    for row in (7, 30, 99):
        probe[-1, row] = 0.05
    probe[:, 50] = 0.05  # easy from the first
    verdict = judge_rows(planted(made, val, probe))
    assert {fate.row for fate in verdict.memorised} == {7, 30, 99}
    assert verdict.num_memorised_last == 3
    first = verdict.memorised[0]
    assert first.kind == "memorised" and first.split == "train" and first.origin == f"train.jsonl:{first.row + 1}"
    assert first.best == pytest.approx(0.05) and first.start == probe[0, first.row]
    # the others, that began alike, fell by about a third of what is above 1.5
    assert first.amount == pytest.approx(first.start - 0.05 - 0.33 * (first.start - 1.5), abs=0.1)
    assert first.score is not None and first.score > 4
    assert "3 of 120 training rows" in verdict.lines[0] and first.origin in verdict.lines[0]


def test_all_of_them_memorised_after_the_best_step() -> None:
    made, val, probe = history(best=2)
    probe[3:] = 0.1
    val[3:] = val[2] + 0.4
    verdict = judge_rows(planted(made, val, probe))
    assert not verdict.memorised and verdict.num_memorised_last > 110
    assert "by step 50" in verdict.lines[0]


def test_a_small_difference_is_none_whatever_its_significance() -> None:
    """Rows that fall on a line to the last digit have no scatter; what counts is an excess of GOOD's bound."""
    made, val, probe = history()
    for losses in (val, probe):
        losses[-1] = 0.5 * losses[0]
    probe[-1, 4] -= 0.10
    probe[-1, 5] -= 0.20
    assert [fate.row for fate in judge_rows(planted(made, val, probe)).memorised] == [5]
    strict = GuardConfig(grades=(0.01, 0.05, 0.3))
    assert {fate.row for fate in judge_rows(planted(made, val, probe), strict).memorised} == {4, 5}


def test_a_short_row_must_fall_further_than_a_long_one() -> None:
    rng = np.random.default_rng(3)
    num_targets = np.array([4, 400] * 40)
    start = 3.0 + rng.normal(0, 0.3, 80)
    fall = 1.0 + rng.normal(0, 1.0, 80) / np.sqrt(num_targets)
    line = FallLine.fit(start, fall, num_targets)
    short, long = line.scatter(np.array([3.0, 3.0]), np.array([4, 400]))
    assert short == pytest.approx(0.5, rel=0.3) and long == pytest.approx(0.05, rel=0.5)
    assert line.at(np.array([3.0]))[0] == pytest.approx(1.0, abs=0.05)


# --- worse


def test_rows_that_rose_while_the_mean_fell() -> None:
    made, val, probe = history()
    for row, rise in ((3, 0.9), (11, 0.4)):
        val[:, row] = 2.0 + np.linspace(0, rise, NUM_EVALUATIONS)
    val[-1, 20] = val[0, 20] + 0.01  # up, but by nothing that matters
    verdict = judge_rows(planted(made, val, probe))
    assert [fate.row for fate in verdict.worse] == [3, 11]
    assert [fate.amount for fate in verdict.worse] == pytest.approx([0.9, 0.4])
    assert all(fate.kind == "worse" and fate.split == "validation" for fate in verdict.worse)
    assert verdict.val_fall is not None and verdict.val_fall > 0.2
    assert "held.jsonl:4 +0.90" in verdict.lines[1]


def test_a_noisy_row_is_not_worse() -> None:
    made, val, probe = history()
    val[1:, 3] = val[0, 3] + np.array([0.8, -0.8, 0.8, -0.8, 0.4])
    val[1:, 4] = val[0, 4] + 0.4
    assert [fate.row for fate in judge_rows(planted(made, val, probe)).worse] == [4]


def test_noise_by_hand() -> None:
    """Two rows of a token each; the mean stays at 2, and the first row's distance to it is 0, 0, d, 0."""
    d = 0.6
    means = np.array([[2, 2], [2, 2], [2, 2], [2 + d, 2 - d], [2, 2]], np.float64)
    # after the first step the distances 0, 0, d, 0 have the second differences d and -2 d: (d² + 4 d²) / 6, of two
    own = 5 * d**2 / 6
    expected = np.sqrt((own + 2 * own / 2) / 4)  # the rows are alike, so what is mixed in is the same
    np.testing.assert_allclose(row_noise(means, np.array([1, 1])), [expected, expected])
    steady = np.linspace(3, 1, 6)[:, None] + np.linspace(0, 1, 6)[:, None] * [1.0, -1.0]
    np.testing.assert_allclose(row_noise(steady, np.array([1, 1])), 0.0, atol=1e-7)
    assert row_noise(means[:3], np.array([1, 1])) is None


# --- rising


def rising(changes: list[float]) -> Any:
    made, val, _ = history(num_val=len(changes), best=3)
    val[3:] = val[3]
    val[-1] += np.array(changes)
    assert made.validation is not None
    even = RowHistory(
        made.steps, 3, made.probe, split(val, np.full(len(changes), 10), "held")
    )  # alike in length, so that shares are plain
    return judge_rows(even)


def test_all_rows_rise() -> None:
    found = rising([0.1] * 18 + [-0.05] * 2).rise
    assert found.kind == "all" and (found.num_up, found.num_down) == (18, 2)
    assert found.amount == pytest.approx((18 * 0.1 - 2 * 0.05) / 20)
    assert (found.from_step, found.to_step) == (30, 50)
    # 20 coins, 18 or more of a side: 2 (190 + 20 + 1) / 2^20
    assert found.p_value == pytest.approx(2 * (190 + 20 + 1) / 2**20)


def test_a_few_rows_rise() -> None:
    verdict = rising([0.0] * 5 + [3.0, 1.5] + [-0.1, 0.1] * 7 + [-0.1] * 9)
    found = verdict.rise
    assert found.kind == "few" and found.num_needed == 2
    # without rows 6 and 7 (4.5) there is no rise: -0.9 from the others
    assert found.amount == pytest.approx((4.5 - 0.9) / 30)
    assert found.top[:2] == ("held.jsonl:6", "held.jsonl:7")
    assert "2 rows make up all of it (held.jsonl:6, held.jsonl:7)" in verdict.lines[-1]


@pytest.mark.parametrize(("num_rows", "num_evaluations"), [(30, 3), (100, 6), (400, 6)])
def test_noise_is_no_few_rows(num_rows: int, num_evaluations: int) -> None:
    """Of 200 histories of noise half rise, and the rows that rose most, by chance, always make up the rise."""
    rng = np.random.default_rng(num_rows + num_evaluations)
    kinds = []
    for _ in range(200):
        means = 2 + 0.1 * rng.normal(size=(num_evaluations, num_rows))
        held = split(means, np.full(num_rows, 10), "held")
        rise = _rise(RowHistory(tuple(range(num_evaluations)), num_evaluations - 2, held, held), held)
        kinds += [] if rise is None else [rise.kind]
    assert len(kinds) > 70 and kinds.count("few") <= 0.12 * len(kinds)


def test_standing_out_by_hand() -> None:
    # the median is 0, the median distance to it 0.1: a standard deviation of 0.148
    rises = np.array([-0.1, 0.0, 0.1, 0.1, -0.1, 0.44, 0.45])[[0, 1, 1, 2, 4, 5, 6]]
    ones = np.ones(7, np.int64)
    assert stands_out(rises, ones, None, times=3).tolist() == [False] * 5 + [False, True]
    assert not stands_out(rises, ones, np.full(7, 0.2), times=3).any()
    # four times the tokens, half the noise: half of that is enough
    assert stands_out(rises / 2, 4 * ones, np.full(7, 0.01), times=3).tolist() == [False] * 6 + [True]


def test_neither_all_nor_a_few() -> None:
    assert rising([0.4] * 11 + [-0.3] * 9).rise.kind == "unclear"


def test_none_rises() -> None:
    verdict = rising([-0.1] * 20)
    assert verdict.rise is None and "did not rise" in verdict.lines[-1]
    assert judge_rows(history()[0]).rise is None


# --- statistics


def test_statistics_by_hand() -> None:
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(3, 3) == 1.0 and sign_test(0, 0) == 1.0
    # t with 1 degree of freedom is Cauchy's: P(t > 1) = 1/4; with 2: P(t > sqrt 2) = (1 - sqrt 2 / 2) / 2
    np.testing.assert_allclose(t_tail(np.array([1.0, 0.0]), 1), [0.25, 0.5])
    np.testing.assert_allclose(t_tail(np.array([np.sqrt(2)]), 2), (1 - np.sqrt(0.5)) / 2)
    # at 5 % of 4: bounds 0.0125, 0.025, 0.0375, 0.05; the third passes, and takes the second along
    chosen = false_discoveries(np.array([0.9, 0.03, 0.001, 0.036]), share=0.05)
    assert chosen.tolist() == [False, True, True, True]
    assert not false_discoveries(np.array([0.02, 0.9, 0.9]), share=0.05).any()


# --- run folders


def write_run(folder: Path, made: RowHistory, *, with_validation: bool = True, leftover: bool = False) -> Path:
    folder.mkdir()
    for index, step in enumerate(made.steps):
        sides = {
            name: RowLosses(side.row_ids, side.nll[index], side.num_targets)
            for name, side in (("validation", made.validation), ("probe", made.probe))
            if side is not None
        }
        validation = sides["validation"] if with_validation else None
        write_row_losses(folder, step, validation=validation, probe=sides["probe"])
    steps = made.steps[:-1] if leftover else made.steps
    records = [{"step": step, "probe_loss": 1.0} for step in steps] + [{"step": 999, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [("train", row, f"rows.jsonl:{row + 1}") for row in range(len(made.probe))]
    rows += [("validation", row, f"rows.jsonl:{row + 500}") for row in range(60)]
    write_split(folder, rows)
    (folder / "training_summary.json").write_text(json.dumps({"best_step": 30, "moves": []}))
    return folder


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    made, _, probe = history(best=3)
    probe[3:, 7] = 0.02
    assert made.validation is not None
    made = planted(made, made.validation.means, probe)
    folder = write_run(tmp_path / "run", made)
    found = read_history(folder)
    assert found is not None and found.validation is not None
    assert found.steps == made.steps and found.best == 3
    np.testing.assert_array_equal(found.probe.nll, made.probe.nll)
    assert found.validation.origins[2] == "rows.jsonl:502"
    verdict = judge_rows(found)
    assert [fate.origin for fate in verdict.memorised] == ["rows.jsonl:8"]
    json.dumps(verdict.to_dict(), allow_nan=False)
    said = describe_rows(folder)
    assert 1 <= len(said) <= 2 and "rows.jsonl:8" in said[0]


def test_a_damaged_step_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", history(best=3)[0])
    path = folder / "row_losses" / "step40.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    found = read_history(folder)
    assert found is not None and found.steps == (0, 10, 20, 30, 50) and found.best == 3
    assert "the losses at step 40 can't be read" in judge_rows(found).lines[-1]
    assert describe_rows(folder)


def test_a_remark_never_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made when the run has already finished."""
    folder = write_run(tmp_path / "run", history(best=3)[0])
    monkeypatch.setattr("core.row_history.judge_rows", lambda *_: 1 / 0)
    assert describe_rows(folder) == []
    assert "single rows were not judged: ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("status", "best"), [("running", 4), ("starting", 4), ("interrupted", 3), ("failed", 3), ("finished", 3)]
)
def test_a_run_that_goes_on_has_the_summary_of_its_interruption(tmp_path: Path, status: str, best: int) -> None:
    made, val, probe = history()
    val[1:] = val[1] + np.array([0.3, 0.2, 0.1, 0.0, 0.4])[:, None]
    folder = write_run(tmp_path / "run", planted(made, val, probe))
    (folder / STATE).write_text(json.dumps({"status": status}))
    found = read_history(folder)
    assert found is not None and found.best == best


def test_what_a_killed_process_left_behind_does_not_count(tmp_path: Path) -> None:
    found = read_history(write_run(tmp_path / "run", history(best=3)[0], leftover=True))
    assert found is not None and found.steps == (0, 10, 20, 30, 40)


def test_runs_that_cannot_be_judged(tmp_path: Path) -> None:
    made = history(best=3)[0]
    assert read_history(tmp_path) is None and describe_rows(tmp_path) == []
    unjudged = write_run(tmp_path / "all", made, with_validation=False)
    found = read_history(unjudged)
    assert found is not None and found.validation is None
    assert "nothing was held out" in judge_rows(found).lines[0] and describe_rows(unjudged) == []
    one = RowHistory(
        (0,),
        0,
        SplitHistory(made.probe.row_ids, made.probe.num_targets, made.probe.nll[:1], made.probe.origins),
        made.validation and SplitHistory(*(made.validation.row_ids, made.validation.num_targets), *first(made)),
    )
    assert "one evaluation only" in judge_rows(one).lines[0]
    few = history(num_val=9)[0]
    assert "9 validation rows are too few" in judge_rows(few).lines[0]


def first(made: RowHistory) -> tuple[FloatArray, tuple[str, ...]]:
    assert made.validation is not None
    return made.validation.nll[:1], made.validation.origins


def test_rows_of_changing_selections_and_without_targets(tmp_path: Path) -> None:
    """Those that every evaluation has are compared; a row without a target has no loss per token."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step, rows in ((0, [0, 1, 2, 3]), (5, [3, 1, 0])):
        counts = np.array([0 if row == 3 else row + 1 for row in rows])
        losses = RowLosses(np.array(rows), counts * (2.0 if step else 3.0) + np.array(rows), counts)
        write_row_losses(folder, step, validation=losses, probe=losses)
    found = read_history(folder)
    assert found is not None
    assert found.probe.row_ids.tolist() == [1, 0] and found.probe.num_targets.tolist() == [2, 1]
    np.testing.assert_array_equal(found.probe.nll, [[7.0, 3.0], [5.0, 2.0]])
    assert found.probe.origins == ("row 1", "row 0")
