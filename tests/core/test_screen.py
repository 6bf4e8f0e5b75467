"""What `train` shows: lines for records and evaluations, and a progress bar that stays on its line."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from core.overfitting import Gap
from core.routing import Routing, RoutingReport
from core.screen import (
    LOGGER,
    TrainScreen,
    count,
    duration,
    evaluation_line,
    logging_to,
    logging_to_file,
    make_console,
    record_line,
    wrapped,
)

GAP = Gap(val_loss=1.25, probe_loss=1.0, low=0.125, high=0.375, grade="MODERATE")


def record(**values: Any) -> dict[str, Any]:
    plain = {"step": 20, "epoch": 1.5, "loss": 1.2346, "lr": 2e-4, "grad_norm": 0.456, "tokens_per_second": 1234.5}
    return {**plain, "memory_gb": 3.25, **values}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (42.9, "0:42"),
        (60, "1:00"),
        (723, "12:03"),
        (3599.9, "59:59"),
        (4328, "1:12:08"),
        (360000, "100:00:00"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (980, "980"),
        (9999, "9,999"),
        (12_345, "12.3 k"),
        (3_100_000, "3.1 M"),
        (7_248_023_552, "7.2 B"),
        (1e9, "1.0 B"),
    ],
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text


def test_record_line() -> None:
    assert record_line(record(), total_steps=60) == (
        "step 20/60  epoch 1.50  loss 1.235  lr 2.00e-04  grad norm 0.46  1,234 tok/s  3.2 GB"
    )
    # before the first step there is nothing but the memory
    base = record(step=0, epoch=0.0, loss=None, lr=None, grad_norm=None, tokens_per_second=None)
    assert record_line(base, total_steps=60) == "step 0/60  epoch 0.00  3.2 GB"


def test_evaluation_line() -> None:
    numbers = "validation 1.250  probe 1.000  gap 0.250 [0.125, 0.375]  MODERATE"
    assert evaluation_line(GAP, step=0, is_best=False, patience_left=3) == f"base model: {numbers}"
    assert evaluation_line(GAP, step=9, is_best=True, patience_left=3) == f"step 9: {numbers}  best so far"
    line = evaluation_line(GAP, step=9, is_best=False, patience_left=2)
    assert line == f"step 9: {numbers}  no improvement, patience 2 left"
    assert evaluation_line(GAP, step=9, is_best=False, patience_left=None) == f"step 9: {numbers}"


# --- the bar ----------------------------------------------------------------------------------------------------------


def make_terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=25, legacy_windows=False)


def bar_lines(screen: TrainScreen, console: Console) -> list[str]:
    assert screen._bar is not None
    lines = console.render_lines(screen._bar.get_renderable(), pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("total_steps", [9, 1000, 99_999])
def test_the_bar_stays_on_one_line(width: int, total_steps: int) -> None:
    console = make_terminal(width)
    screen = TrainScreen(total_steps=total_steps, console=console)
    with logging_to(console), screen.live():
        for step in range(0, total_steps + 1, max(total_steps // 3, 1)):
            screen.show_phase("evaluating")
            screen.show_record(record(step=step, loss=12.3456, tokens_per_second=123_456.0, memory_gb=139.9))
            screen.show_evaluation(GAP, step=step, is_best=False, patience_left=3)
            screen.show_step(step=step, epoch=0.5)
            for phase in ("training", "evaluating", "saving"):
                screen.show_phase(phase)
                (line,) = bar_lines(screen, console)
                assert len(line.rstrip()) <= width
                assert phase in line
                assert f"{step}/{total_steps}" in line


def test_eighty_columns_have_room_for_grade_gap_and_validation() -> None:
    console = make_terminal(80)
    screen = TrainScreen(total_steps=1000, console=console)
    with screen.live(first_step=7):
        assert "7/1000" in bar_lines(screen, console)[0]
        screen.show_record(record())
        assert "loss 1.235" in bar_lines(screen, console)[0]
        screen.show_evaluation(GAP, step=20, is_best=True, patience_left=3)
        (line,) = bar_lines(screen, console)
        assert "MODERATE  gap 0.250  val 1.250" in line
    wide = TrainScreen(total_steps=1000, console=make_terminal(140))
    with wide.live():
        wide.show_record(record())
        wide.show_evaluation(GAP, step=20, is_best=True, patience_left=3)
        (line,) = bar_lines(wide, make_terminal(140))
        assert "MODERATE  gap 0.250  val 1.250  loss 1.235  1,234 tok/s  3.2 GB" in line


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_gap_that_was_there_before_is_not_called_overfitting(is_resumed: bool) -> None:
    """Seen at step 0, or known of a run that goes on."""
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    screen = TrainScreen(total_steps=60, console=console, base_gap=GAP.value if is_resumed else None)
    with logging_to(console), screen.live():
        if not is_resumed:
            screen.show_evaluation(GAP, step=0, is_best=False, patience_left=3)
        screen.show_evaluation(GAP, step=20, is_best=True, patience_left=3)
    assert "  The held-out rows are harder: their loss was 0.25 above" in stream.getvalue()
    assert "Potential overfitting" not in stream.getvalue()


def test_a_pipe_gets_plain_lines() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    screen = TrainScreen(total_steps=60, console=console)
    with logging_to(console), screen.live():
        screen.show_phase("evaluating")
        screen.show_record(record())
        screen.show_evaluation(GAP, step=20, is_best=True, patience_left=3)
        screen.show_step(step=20, epoch=1.5)
    assert stream.getvalue().splitlines() == [
        record_line(record(), total_steps=60),
        evaluation_line(GAP, step=20, is_best=True, patience_left=3),
        "  Potential overfitting detected! Train/val loss difference: 0.25 (MODERATE; GOOD is below 0.15)",
        "warning: validation loss is 25% above the training rows' (guard.relative_gap is 10%)",
    ]
    assert "\x1b" not in stream.getvalue()


# --- the log ----------------------------------------------------------------------------------------------------------


def test_warnings_stand_out_and_brackets_stay() -> None:
    stream = io.StringIO()
    with logging_to(Console(file=stream, width=40)):
        LOGGER.info("gap [0.1, 0.2] [red]not markup[/red] in a line that is much longer than the console is wide")
        LOGGER.warning("look here")
        LOGGER.debug("not shown")
    assert stream.getvalue().splitlines() == [
        "gap [0.1, 0.2] [red]not markup[/red] in a line that is much longer than the console is wide",
        "warning: look here",
    ]


def test_the_log_file_holds_the_same_lines_with_their_time(tmp_path: Path) -> None:
    stream, path = io.StringIO(), tmp_path / "training.log"
    with logging_to(Console(file=stream, width=200)):
        for text in ("größer", "second"):
            with logging_to_file(path):
                LOGGER.info(text)
        LOGGER.info("not in the file")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO größer", "INFO second"]
    assert stream.getvalue().splitlines() == ["größer", "second", "not in the file"]


def test_handlers_go_away(tmp_path: Path) -> None:
    before = list(LOGGER.handlers)
    with pytest.raises(ZeroDivisionError), logging_to(make_terminal(80)), logging_to_file(tmp_path / "log"):
        raise ZeroDivisionError
    assert LOGGER.handlers == before
    assert LOGGER.level == logging.INFO


@pytest.mark.parametrize(("columns", "width"), [(None, 200), ("", 200), ("0", 200), ("wide", 200), ("80", 80)])
def test_a_pipe_is_wide_enough_for_whole_lines_or_as_columns_says(
    columns: str | None, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    make_console().print("x" * 190)
    assert len(capsys.readouterr().out.splitlines()[0]) == min(width, 190)


def test_aux_loss_is_said_where_there_is_one() -> None:
    assert "loss 1.235  aux loss 2.047  lr" in record_line(record(aux_loss=2.0468), total_steps=60)
    assert "aux" not in record_line(record(), total_steps=60)


def routing_lines(now: list[list[int]], *, step: int) -> list[str]:
    """What is said of these counts, after even ones and a second layer that collapsed before training."""
    tokens = sum(now[0]) // 2
    base = Routing.measure(np.array([[tokens // 2] * 4, [tokens, tokens, 0, 0]]), num_tokens=tokens)
    report = RoutingReport(Routing.measure(np.array(now), num_tokens=tokens), base)
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    with logging_to(console):
        TrainScreen(total_steps=60, console=console).show_routing(report, step=step)
    return stream.getvalue().splitlines()


def test_routing_is_a_line_after_the_evaluation() -> None:
    assert routing_lines([[50, 50, 50, 50], [100, 100, 0, 0]], step=0) == [
        "  experts: entropy 0.75 (lowest 0.50, layer 1)",
        "  experts: unbalanced before training already: layer 1: expert 0 gets 100 % of its tokens",
    ]
    assert routing_lines([[60, 50, 50, 40], [100, 100, 0, 0]], step=20) == [
        "  experts: entropy 0.75 (lowest 0.50, layer 1), moved 0.05 from the base model (layer 0)",
    ]


def test_a_collapse_in_training_is_warned_of() -> None:
    assert routing_lines([[30, 40, 99, 31], [100, 100, 0, 0]], step=20)[1:] == [
        "warning: experts: the routing collapsed in training: layer 0: expert 2 gets 99 % of its tokens; "
        "try a lower optim.lr or, if the router is trained, a higher moe.aux_loss_weight",
    ]


def test_long_lines_break_between_words_under_their_second_column() -> None:
    line = "  model    /a/path/to/a/model · mlx · 16-bit weights, float32 compute"
    assert wrapped(line, 44).split("\n") == [
        "  model    /a/path/to/a/model · mlx · 16-bit",
        "           weights, float32 compute",
    ]
    assert wrapped(line, 200) == line
    assert wrapped("warning: one two three four", 20).split("\n") == ["warning: one two", "      three four"]
    assert wrapped("short\n/a/very/long/path/without/a/blank", 20) == "short\n/a/very/long/path/without/a/blank"


def test_a_terminal_gets_wrapped_lines_and_a_pipe_whole_ones() -> None:
    text = "step 20: validation 1.842  probe 1.801  gap 0.041  EXCELLENT  best so far, and on and on"
    found = {}
    for is_terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, width=60, force_terminal=is_terminal, color_system=None)
        with logging_to(console):
            LOGGER.info(text)
        found[is_terminal] = stream.getvalue().splitlines()
    assert found[False] == [text]
    assert len(found[True]) == 2 and max(map(len, found[True])) <= 60
    assert " ".join(found[True]).split() == text.split()


def test_a_line_that_is_too_long_goes_on_under_its_second_column() -> None:
    line = "  most likely       56.7 % of the tokens are others now"
    assert wrapped(line, 40).splitlines() == ["  most likely       56.7 % of the tokens", " " * 13 + "are others now"]
    assert wrapped("  gate    Keep it: held-out rows gained", 30).splitlines()[1] == " " * 10 + "rows gained"
    assert wrapped("step 5/44  epoch 0.23  loss 4.500", 24).splitlines()[1].startswith("loss")
