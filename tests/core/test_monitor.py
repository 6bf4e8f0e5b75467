"""Watching a run: what the files say, who is alive, and that length costs nothing."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from core import chart, monitor
from core.config import GuardConfig
from core.journal import JOURNAL, Journal
from core.run import write_summary
from tests.core.monitored import FakeRun, text

# --- what the files say -----------------------------------------------------------------------------------------------


def test_json_has_state_records_and_what_follows(run: FakeRun) -> None:
    run.until_60()
    found = monitor.to_json(monitor.snapshot(run.folder))
    assert found["status"] == "running"
    assert (found["step"], found["total_steps"], found["model"]) == (60, 120, "org/Mistral-7B")
    assert found["newest_record"]["step"] == 60
    assert found["newest_evaluation"]["val_loss"] == 1.9
    assert found["tokens_per_second"] == 1234.5
    assert found["next_eval_step"] == 100
    assert found["patience_left"] == 3
    assert found["trend"]["val_loss"] == pytest.approx(-0.7)
    assert found["trend"]["gap"] == pytest.approx(0.08)
    json.dumps(found, allow_nan=False)


def test_time_left_counts_steps_and_evaluations(run: FakeRun) -> None:
    run.until_60()  # 60 steps to go at 2 s; evaluations at 100 and at the end, 120, at 10 s
    eta = monitor.snapshot(run.folder).eta_seconds
    assert eta == pytest.approx(60 * 2 + 2 * 10, abs=0.5)


def test_time_left_before_the_second_evaluation_uses_the_first(run: FakeRun) -> None:
    run.evaluation(0, 2.6, 2.58)
    run.record(10)  # 110 steps and the evaluations at 50, 100 and 120
    assert monitor.snapshot(run.folder).eta_seconds == pytest.approx(110 * 2 + 3 * 10, abs=0.5)


def test_time_left_when_every_record_is_an_evaluation(run: FakeRun) -> None:
    run.state.update(eval_every=10)
    for step in (0, 10, 20):
        run.evaluation(step, 2.0, 1.9)  # 30 s per 10 steps
    assert monitor.snapshot(run.folder).eta_seconds == pytest.approx(100 * 3, abs=0.5)


def test_reads_only_what_is_new(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.until_60()
    reader = monitor.RunReader(run.folder)
    reader.poll()
    decoded: list[str] = []
    real = monitor._DECODER.decode

    class Counting:
        def decode(self, line: str) -> Any:
            decoded.append(line)
            return real(line)

    monkeypatch.setattr(monitor, "_DECODER", Counting())
    assert reader.poll().newest["step"] == 60
    run.record(70)
    assert reader.poll().newest["step"] == 70
    assert [json.loads(line)["step"] for line in decoded] == [70]


def test_a_torn_line_is_left_for_later(run: FakeRun) -> None:
    run.until_60()
    reader = monitor.RunReader(run.folder)
    line = json.dumps({"step": 70, "loss": 1.5, "time": 200.0})
    with open(run.folder / JOURNAL, "a") as file:
        file.write(line[:20])
        file.flush()
        torn = reader.poll()
        file.write(line[20:] + "\n")
        file.flush()
    assert torn.newest["step"] == 60
    assert torn.problems == ()
    assert reader.poll().newest == {"step": 70, "loss": 1.5, "time": 200.0}


def test_a_resumed_run_that_grew_past_the_old_end_is_read_anew(run: FakeRun) -> None:
    run.until_60()
    reader = monitor.RunReader(run.folder)
    reader.poll()
    lines = (run.folder / JOURNAL).read_bytes().splitlines(keepends=True)
    run.journal.close()
    run.journal = Journal(run.folder, keep_bytes=sum(map(len, lines[:3])))  # steps 0, 10, 20
    run.time = 1000.0
    run.record(30, loss=9.0)
    run.evaluation(40, 3.0, 1.0, "CRITICAL")
    for step in (50, 60, 70):
        run.record(step)
    assert run.journal.num_bytes > sum(map(len, lines))
    found = reader.poll()
    assert [record["step"] for record in found.evaluations] == [0, 40]
    assert (30, 9.0) in found.loss
    assert [step for step, _ in found.loss] == [10, 20, 30, 40, 50, 60, 70]


def test_a_truncated_journal_is_read_anew(run: FakeRun) -> None:
    run.until_60()
    reader = monitor.RunReader(run.folder)
    reader.poll()
    run.journal.close()
    run.journal = Journal(run.folder)
    found = reader.poll()
    assert found.newest == {}
    assert found.loss == ()


def test_missing_and_damaged_files_are_said_in_a_line_each(run: FakeRun, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert monitor.snapshot(nothing).problems == (f"{nothing}: no such folder",)
    run.until_60()
    (run.folder / "training_state.json").write_text('{"step": 3')
    (run.folder / "config.yaml").write_text("a: [")
    with open(run.folder / JOURNAL, "ab") as file:
        file.write(b'nonsense\n\x00\xff\n5\n{"step": 70, "loss": NaN}\n')
    found = monitor.snapshot(run.folder)
    assert found.status == "unknown"
    state, journal, config = found.problems
    assert state.startswith("training_state.json: damaged")
    assert journal == "metrics.jsonl: 3 damaged lines left out"
    assert config.startswith("config.yaml: missing or damaged")
    assert found.guard == GuardConfig()
    assert found.newest == {"step": 70, "loss": None}
    json.dumps(monitor.to_json(found), allow_nan=False)
    assert "damaged" in text(found, 80)


def test_warns_of_a_model_that_got_worse_and_of_a_relative_gap(run: FakeRun) -> None:
    run.evaluation(0, 2.0, 1.95)
    run.evaluation(50, 2.1, 1.5, "CRITICAL")
    run.state.update(base_val_loss=2.0)
    worse, relative = monitor.snapshot(run.folder).warnings
    assert worse == "validation loss is 0.100 above what it was before training"
    assert "40%" in relative


# --- dead or alive ----------------------------------------------------------------------------------------------------


def test_a_run_that_nobody_holds_has_died(run: FakeRun) -> None:
    run.until_60()
    assert monitor.snapshot(run.folder).status == "running"
    run.die()
    found = monitor.snapshot(run.folder)
    assert (found.status, found.exit_code, found.has_ended) == ("died", 1, True)
    assert found.eta_seconds is None
    shown = text(found, 100)
    # a long path is broken where it has to be
    assert f"pythoncli.pytrain--resume{run.folder}" in "".join(shown.split())
    assert "fromstep50" in "".join(shown.split())


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("early_stopped", 0), ("interrupted", 0), ("failed", 1)])
def test_an_ended_run_is_not_dead(run: FakeRun, status: str, code: int) -> None:
    run.until_60()
    run.die()
    run.state.update(status=status, error="the loss became nan" if status == "failed" else None)
    found = monitor.snapshot(run.folder)
    assert (found.status, found.exit_code, found.next_eval_step) == (status, code, None)
    assert ("the loss became nan" in text(found, 80)) == (status == "failed")


def test_a_resumed_run_counts_as_starting_before_its_first_step(run: FakeRun) -> None:
    run.until_60()
    run.state.update(status="interrupted")  # as the first process left it; the second one holds the lock
    found = monitor.snapshot(run.folder)
    assert (found.status, found.has_ended) == ("starting", False)
    assert found.elapsed_seconds == run.time  # the pause between the two does not count


def test_the_verdict_is_the_best_adapters(run: FakeRun) -> None:
    run.until_60()
    run.state.update(status="finished")
    gap = {"probe_loss": 1.5, "gap_low": 0.4, "gap_high": 0.6, "gap": 0.5, "grade": "CRITICAL"}
    write_summary(run.folder, {"base_val_loss": 2.6, "best_val_loss": 2.0, **gap})
    verdict = monitor.snapshot(run.folder).verdict
    assert verdict is not None
    assert verdict.startswith("Potential overfitting detected! Train/val loss difference: 0.50")
    write_summary(run.folder, {"base_val_loss": 1.9, "best_val_loss": 2.0, **gap})
    expected = "No better than the base model: validation loss 1.900 before, 2.000 at best"
    assert monitor.snapshot(run.folder).verdict == expected
    run.state.update(status="failed")
    assert monitor.snapshot(run.folder).verdict is None


def test_another_machine_is_judged_by_its_silence(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.until_60()
    run.die()
    run.state.update(host="elsewhere")
    assert monitor.snapshot(run.folder).status == "running"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 125)
    found = monitor.snapshot(run.folder)
    assert (found.status, found.has_ended) == ("silent", False)
    assert found.silent_seconds == pytest.approx(125, abs=2)
    assert "no sign of life from elsewhere for 2:0" in text(found, 100)


def test_a_clock_that_differs_does_not_kill_a_living_run(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.until_60()
    run.die()
    run.state.update(host="elsewhere")
    reader = monitor.RunReader(run.folder)
    reader.poll()
    now = time.time()
    monkeypatch.setattr("core.run.time.time", lambda: now - 500)  # its clock is 500 s behind ours
    run.state.update(step=61)
    monkeypatch.undo()
    assert reader.poll().status == "running"


# --- watching ---------------------------------------------------------------------------------------------------------


def test_watch_into_a_pipe_writes_evaluations_and_the_last_screen(run: FakeRun) -> None:
    run.until_60()

    def go_on() -> None:
        time.sleep(0.3)
        run.evaluation(100, 1.7, 1.6)
        time.sleep(0.3)
        gap = {"gap_low": 0.05, "gap_high": 0.15, "gap": 0.1}
        write_summary(run.folder, {"best_val_loss": 1.7, "probe_loss": 1.6, "grade": "GOOD", **gap})
        run.state.update(status="early_stopped")

    thread = threading.Thread(target=go_on)
    thread.start()
    output = io.StringIO()
    code = monitor.watch(run.folder, refresh=0.05, console=Console(file=output, width=80))
    thread.join()
    assert code == 0
    first, second, *screen = output.getvalue().splitlines()
    assert first.startswith("step 50/120  val 1.900  probe 1.800  gap 0.100  GOOD")
    assert second.startswith("step 100/120  val 1.700")
    shown = "\n".join(screen)
    assert "early stopped" in shown
    assert "Good generalization. Train/val loss difference: 0.10" in shown
    assert f"pythoncli.pyevaluate{run.folder}" in "".join(shown.split())


def test_watch_in_a_terminal_leaves_the_last_screen_and_fails_with_the_run(run: FakeRun) -> None:
    run.until_60()
    run.die()
    output = io.StringIO()
    console = Console(file=output, width=80, height=24, force_terminal=True)
    assert monitor.watch(run.folder, refresh=0.05, console=console) == 1
    shown = output.getvalue()
    left, entered = shown.rindex("\x1b[?1049l"), shown.index("\x1b[?1049h")
    assert entered < left
    assert "1.900" in shown[left:]


def test_ctrl_c_ends_the_watch_and_not_the_run(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.until_60()

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    output = io.StringIO()
    assert monitor.watch(run.folder, refresh=5, console=Console(file=output, width=80)) == 0
    assert "running" in output.getvalue()


# --- length costs nothing ---------------------------------------------------------------------------------------------


def test_curve_is_exact_when_short_and_bounded_when_long() -> None:
    short = chart.Curve()
    for step in range(0, 50, 5):
        short.add(step, step * 2.0)
    assert short.points == tuple((float(step), step * 2.0) for step in range(0, 50, 5))
    long = chart.Curve()
    for step in range(100_001):
        long.add(step, 3.0 * step)
    assert chart.MAX_POINTS / 4 <= len(long.points) <= chart.MAX_POINTS
    assert all(value == pytest.approx(3 * step) for step, value in long.points)
    assert long.points[-1][0] > 99_000


def test_a_refresh_costs_the_same_after_many_steps(tmp_path: Path) -> None:
    def refresh_seconds(name: str, num_records: int) -> float:
        fake = FakeRun(tmp_path / name)
        with open(fake.folder / JOURNAL, "a") as file:
            for step in range(num_records):
                values = {"val_loss": 2.0, "probe_loss": 1.9} if step % 50 == 0 else {}
                file.write(json.dumps({"step": step, "loss": 2.0, "time": step * 2.0, **values}) + "\n")
            file.flush()
            reader = monitor.RunReader(fake.folder)
            reader.poll()
            seconds = []
            for step in range(num_records, num_records + 15):
                file.write(json.dumps({"step": step, "loss": 1.0, "time": step * 2.0}) + "\n")
                file.flush()
                began = time.perf_counter()
                assert reader.poll().newest["step"] == step
                seconds.append(time.perf_counter() - began)
        fake.die()
        return min(seconds)

    few, many = refresh_seconds("few", 2_000), refresh_seconds("many", 30_000)
    assert many < 3 * few + 0.002


def test_the_chart_shows_the_fall_and_ignores_one_spike() -> None:
    loss = [(float(step), 2.0 - step / 100) for step in range(1, 100)]
    loss[50] = (51.0, 500.0)
    lines = chart.draw(loss, [(0.0, 2.1), (50.0, 1.5), (99.0, 1.1)], [], width=50, height=12)
    assert lines is not None
    assert len(lines) == 12
    rows = [line.plain for line in lines]
    marks = [(row.index(chart.VAL_MARK), number) for number, row in enumerate(rows) if chart.VAL_MARK in row]
    assert len(marks) == 3
    assert [column for column, _ in marks] == sorted(column for column, _ in marks)
    assert marks[1][1] - marks[0][1] >= 3  # the fall is spread over the rows, not squashed by the spike
    assert {1.0, 2.0} <= {float(row.split("┤")[0]) for row in rows if "┤" in row}


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 340, ["0", "100", "200", "300"]),
        (1.71, 2.62, ["1.8", "2.0", "2.2", "2.4", "2.6"]),
        (0, 100_000, ["0", "20k", "40k", "60k", "80k", "100k"]),
        (2.0, 2.0, ["2"]),
    ],
)
def test_ticks_are_round(low: float, high: float, labels: list[str]) -> None:
    assert chart._labels(chart._ticks(low, high, 4)) == labels
