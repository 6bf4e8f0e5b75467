"""`evaluate` on a tiny model: both sides on held-out rows, resumed, gated, refused."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import backends
import cli
from core.evaluation.report import REPORT, ROWS_CSV, SUMMARY_CSV, read_evaluation_of
from core.workflow import answering
from core.workflow import evaluate as command
from tests.cli.conftest import Result
from tests.tiny import make_model

Cli = Callable[..., Result]
NUM_ROWS = 40


def write_moods(path: Path, num_rows: int = NUM_ROWS, *, start: int = 0) -> Path:
    rows = [
        {"prompt": f"Which is {number}?", "completion": "ABC"[number % 3]} for number in range(start, start + num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows and a run of each backend."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_model(folder / "model", num_layers=1)
    data = write_moods(folder / "moods.jsonl")
    arguments = ["--model", folder / "model", "--data", data, "--bits", 16, "--device", "cpu", "--lr", 0.02]
    arguments += ["--batch-size", 4, "--accumulation", 1, "--max-steps", 30, "--eval-every", 15, "--max-tokens", 96]
    arguments += ["--set", "data.test=0.3", "--set", "data.near_duplicates=null", "--backend", "cuda"]
    assert cli.main([str(part) for part in ["train", *arguments, "--output", folder / "run"]]) == 0
    return folder


@pytest.fixture
def run(shared: Path, tmp_path: Path) -> Path:
    """A copy of the run, as long as one test needs it."""
    return Path(shutil.copytree(shared / "run", tmp_path / "run"))


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / REPORT).read_text())
    return found


@pytest.mark.usefixtures("drawn")
def test_both_sides_on_the_test_split(run_cli: Cli, run: Path) -> None:
    result = run_cli("evaluate", run, "--max-tokens", 24)
    assert result.code == 0, result.err
    folder = run / "evaluation"
    report = report_of(folder)
    num_rows = report["losses"]["num_rows"]
    assert (report["split"], report["data"], report["backend"]) == ("test", "moods.jsonl", "cuda")
    assert num_rows == sum(line.startswith("test,") for line in (run / "split.csv").read_text().splitlines()) > 5
    assert report["losses"]["gain"] > 1.0 and report["losses"]["verdict"] == "better than the base model"
    assert report["losses"]["gain"] == pytest.approx(
        report["losses"]["base"]["loss"] - report["losses"]["adapter"]["loss"]
    )
    scores = report["classification"]
    assert scores["labels"] == ["A", "B", "C"]
    assert scores["base"]["unreadable"] > 0.8 and scores["base"]["strict"] == 0.0  # random weights say nothing
    assert scores["adapter"]["strict"] > 0.5, "the form is learned"
    with open(folder / ROWS_CSV, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == num_rows
    right = sum(row["label"] == row["adapter_label"] for row in rows)
    assert scores["adapter"]["accuracy"] == pytest.approx(right / num_rows)
    worst = max(rows, key=lambda row: float(row["difference"]))
    assert report["rows"]["worst"][0]["origin"] == worst["origin"]
    with open(folder / SUMMARY_CSV, newline="") as file:
        sides = {row["side"]: row for row in csv.DictReader(file)}
    assert float(sides["adapter"]["loss"]) == report["losses"]["adapter"]["loss"]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "confusion.png",
        "f1.png",
        "loss_differences.png",
    ]
    assert "F1 (macro)" in result.out and "counted as wrong" in result.out


def test_a_report_says_of_which_adapter_it_is(run_cli: Cli, run: Path) -> None:
    assert run_cli("evaluate", run, "--no-generate").code == 0
    weights = run / "adapters" / "adapter_model.safetensors"
    assert report_of(run / "evaluation")["adapter_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert read_evaluation_of(run).report == report_of(run / "evaluation")


def test_losses_are_the_learners(run_cli: Cli, run: Path) -> None:
    """The base model's validation loss is that of training's first evaluation, the adapter's that of the best step."""
    result = run_cli("evaluate", run, "--split", "validation", "--no-generate")
    summary = json.loads((run / "training_summary.json").read_text())
    report = report_of(run / "evaluation-validation")
    assert report["losses"]["base"]["loss"] == pytest.approx(summary["base_val_loss"], abs=1e-5)
    assert report["losses"]["adapter"]["loss"] == pytest.approx(summary["best_val_loss"], abs=1e-5)
    assert report["classification"] is None and report["answers"] is None
    assert "chose the best step" in result.out
    assert not (run / "evaluation" / "plots" / "f1.png").exists()


def test_both_backends_say_the_same(run_cli: Cli, run: Path) -> None:
    reports = []
    for name in backends.names():
        assert run_cli("evaluate", run, "--backend", name, "--max-tokens", 24, "--output", f"on-{name}").code == 0
        reports.append(report_of(Path(f"on-{name}")))
    one, other = reports
    assert one["backend"] != other["backend"]
    assert one["verdict"] == other["verdict"]
    for side in ("base", "adapter"):
        assert one["losses"][side]["loss"] == pytest.approx(other["losses"][side]["loss"], abs=1e-4)
        assert one["classification"][side] == other["classification"][side]


class Killed(BaseException):
    """As SIGKILL: nobody catches it."""


@contextmanager
def ended_after(calls: int, error: type[BaseException]) -> Iterator[None]:
    """Ends the command when so many batches are measured and written down."""
    left, append = calls, answering.RowJournal.append

    def counted(self: Any, records: Any) -> None:
        nonlocal left
        append(self, records)
        left -= 1
        if left == 0:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering.RowJournal, "append", counted)
        yield


def test_a_killed_evaluation_goes_on_to_the_same_report(run_cli: Cli, run: Path) -> None:
    arguments = ("evaluate", run, "--max-tokens", 8, "--batch-size", 3)
    assert run_cli(*arguments, "--output", "whole").code == 0
    for calls in (1, 4, 8):  # in the base model's losses, in the adapter's, in the answers
        parts = Path(f"killed-{calls}")
        with ended_after(calls, Killed), pytest.raises(Killed):
            run_cli(*arguments, "--output", parts)
        assert not (parts / REPORT).exists()
        (journal,) = parts.glob("losses-*.jsonl")
        before = journal.read_bytes()
        result = run_cli(*arguments, "--output", parts)
        assert result.code == 0 and "going on: " in result.out
        assert journal.read_bytes().startswith(before)
        for name in (REPORT, ROWS_CSV, SUMMARY_CSV):
            assert (parts / name).read_bytes() == (Path("whole") / name).read_bytes()


def test_what_is_done_is_not_done_again(run_cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli("evaluate", run, "--max-tokens", 8).code == 0
    first = (run / "evaluation" / REPORT).read_bytes()
    loads: list[str] = []
    opened = command.opened_run
    monkeypatch.setattr(command, "opened_run", lambda trained: loads.append("loaded") or opened(trained))
    assert run_cli("evaluate", run, "--max-tokens", 8).code == 0
    assert not loads and (run / "evaluation" / REPORT).read_bytes() == first
    assert run_cli("evaluate", run, "--max-tokens", 9).code == 0  # other answers, the same losses
    assert len(loads) == 1
    assert run_cli("evaluate", run, "--max-tokens", 8).code == 0
    assert len(loads) == 1 and (run / "evaluation" / REPORT).read_bytes() == first
    assert run_cli("evaluate", run, "--max-tokens", 9, "--anew").code == 0
    assert len(loads) == 2
    assert len(list((run / "evaluation").glob("answers-*.jsonl"))) == 1


def test_a_quick_look_takes_nothing_away(run_cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("evaluate", run, "--no-generate")
    assert run_cli(*arguments, "--gate").code in (0, 3)
    whole = report_of(run / "evaluation")
    assert run_cli(*arguments, "--max-samples", 3).code == 0
    quick = report_of(run / "evaluation-3-rows")
    assert quick["losses"]["num_rows"] == 3
    assert report_of(run / "evaluation") == whole, "what compare, report and push read"
    monkeypatch.setattr(command, "opened_run", None)
    result = run_cli(*arguments)
    assert result.code == 0, result.err
    after = report_of(run / "evaluation")
    assert (after["general"], after["gate"]) == (whole["general"], whole["gate"])


def test_anew_that_was_stopped_is_anew_all_the_same(run_cli: Cli, run: Path) -> None:
    arguments = ("evaluate", run, "--no-generate")
    assert run_cli(*arguments).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "opened_run", lambda trained: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = run_cli(*arguments, "--anew")
    assert stopped.code == 130 and "--anew" not in stopped.out.splitlines()[-1]
    again = run_cli(*arguments)
    assert again.code == 0 and "loading" in again.out


def test_a_few_rows_have_the_labels_of_all(run_cli: Cli, run: Path) -> None:
    assert run_cli("evaluate", run, "--max-tokens", 8, "--max-samples", 2).code == 0
    report = report_of(run / "evaluation-2-rows")
    assert report["losses"]["num_rows"] == 2
    assert report["classification"]["labels"] == ["A", "B", "C"]
    assert len(report["classification"]["base"]["per_class"]) <= 2, "averages are over the labels that are there"


def test_ctrl_c_says_how_to_go_on(run_cli: Cli, run: Path) -> None:
    with ended_after(2, KeyboardInterrupt):
        result = run_cli("evaluate", run, "--max-samples", 6, "--text-scores", "--device", "cpu")
    assert result.code == 130
    last = result.out.strip().splitlines()[-1]
    assert last.endswith(f"python cli.py evaluate {run} --max-samples 6 --text-scores --device cpu")


def test_a_selection_is_the_same_each_time(run_cli: Cli, run: Path) -> None:
    origins = []
    for output in ("one", "two"):
        assert run_cli("evaluate", run, "--max-samples", 4, "--no-generate", "--output", output).code == 0
        report = report_of(Path(output))
        assert report["losses"]["num_rows"] == 4 < report["num_available_rows"]
        origins.append([row["origin"] for row in report["rows"]["worst"]])
    assert origins[0] == origins[1]


def test_text_scores(run_cli: Cli, run: Path) -> None:
    result = run_cli("evaluate", run, "--max-tokens", 24, "--text-scores", "--max-samples", 8)
    report = report_of(run / "evaluation-8-rows")
    assert report["text"]["base"]["exact_match"] == 0.0
    assert report["text"]["adapter"]["rouge_l"] > report["text"]["base"]["rouge_l"]
    assert "ROUGE-L" in result.out


def test_other_rows(run_cli: Cli, run: Path, tmp_path: Path) -> None:
    other = write_moods(tmp_path / "others.jsonl", 12, start=100)
    assert run_cli("evaluate", run, "--data", other, "--no-generate").code == 0
    report = report_of(run / "evaluation-others")
    assert (report["data"], report["split"], report["losses"]["num_rows"]) == ("others.jsonl", "all", 12)
    assert report["notes"] == []


def test_other_rows_have_columns_of_their_own(run_cli: Cli, run: Path, tmp_path: Path) -> None:
    """A run's `data.fields` are for its own data; `--set` says how others are read."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  fields: {}", "  fields: {prompt: question, completion: answer}"))
    other = write_moods(tmp_path / "others.jsonl", 4, start=100)
    assert run_cli("evaluate", run, "--data", other, "--no-generate").code == 0
    assert report_of(run / "evaluation-others")["losses"]["num_rows"] == 4
    named = tmp_path / "named.jsonl"
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    named.write_text("".join(json.dumps({"q": row["prompt"], "a": row["completion"]}) + "\n" for row in rows))
    refused(run_cli("evaluate", run, "--data", named, "--no-generate"), "named.jsonl")
    fields = "data.fields={prompt: q, completion: a}"
    result = run_cli("evaluate", run, "--data", named, "--set", fields, "--no-generate")
    assert result.code == 0, result.err
    ours, same = (report_of(run / f"evaluation-{name}")["losses"]["base"] for name in ("others", "named"))
    assert ours == same
    refused(run_cli("evaluate", run, "--set", fields), "there is no --data")
    refused(run_cli("evaluate", run, "--data", named, "--set", "optim.lr=1"), "only data.", "optim.lr")


def test_a_limit_of_the_gate_is_a_question(run_cli: Cli, run: Path) -> None:
    result = run_cli("evaluate", run, "--no-generate", "--min-gain", 100)
    assert result.code == 3 and "Don't keep it" in result.out


def test_the_runs_own_data_from_another_place_is_split_as_before(
    run_cli: Cli, run: Path, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(shared / "moods.jsonl", tmp_path / "moved" / "moods.jsonl")
    assert run_cli("evaluate", run, "--data", moved, "--no-generate").code == 0
    report = report_of(run / "evaluation")
    assert report["split"] == "test" and report["losses"]["num_rows"] < NUM_ROWS / 2


def test_rows_that_were_trained_on_are_said(run_cli: Cli, run: Path, shared: Path, tmp_path: Path) -> None:
    lines = (shared / "moods.jsonl").read_text().splitlines()
    trained = [
        int(line.rpartition(":")[2]) - 1
        for line in (run / "split.csv").read_text().splitlines()
        if line.startswith("train,")
    ]
    mixed = tmp_path / "mixed.jsonl"
    new = json.dumps({"prompt": "Which is new?", "completion": "none"})
    mixed.write_text("\n".join([new, *(lines[row] for row in trained[:3])]) + "\n")
    result = run_cli("evaluate", run, "--data", mixed, "--no-generate")
    assert report_of(run / "evaluation-mixed")["notes"] == ["3 rows of these 4 were trained on"]
    assert "warning: 3 rows of these 4 were trained on" in result.out
    gated = run_cli("evaluate", run, "--data", mixed, "--no-generate", "--gate", "--max-forgotten", 100, "--max-gap", 1)
    gate = report_of(run / "evaluation-mixed")["gate"]
    assert gated.code == 3 and gate["reasons"][0].startswith("3 rows were trained on")


def test_changed_data_is_said(run_cli: Cli, run: Path, tmp_path: Path) -> None:
    data = write_moods(tmp_path / "moods.jsonl", NUM_ROWS + 5)
    config = (run / "config.yaml").read_text()
    line = next(line for line in config.splitlines() if "moods.jsonl" in line)
    (run / "config.yaml").write_text(config.replace(line, f"  path: {data}"))
    assert run_cli("evaluate", run, "--no-generate").code == 0
    (note,) = report_of(run / "evaluation")["notes"]
    assert "has changed since the run" in note


def test_the_gate(run_cli: Cli, run: Path) -> None:
    """Random weights know nothing of general texts, so there is nothing to forget up to a bound that is wide enough."""
    arguments = ("evaluate", run, "--gate", "--no-generate")
    kept = run_cli(*arguments, "--max-forgotten", 100, "--max-gap", 1)
    report = report_of(run / "evaluation")
    assert kept.code == 0 and report["gate"]["keep"] is True and report["gate"]["reasons"] == []
    assert report["gate"]["line"] in kept.out and report["general"]["num_rows"] > 50
    assert kept.out.splitlines()[-1].split() == ["next", *f"python cli.py merge {run}".split()]
    refused_one = run_cli(*arguments, "--max-forgotten", 100, "--max-gap", 1, "--min-gain", 1000)
    report = report_of(run / "evaluation")
    assert refused_one.code == 3 and report["gate"]["keep"] is False and len(report["gate"]["reasons"]) == 1
    assert report["gate"]["line"] in refused_one.out
    assert refused_one.out.splitlines()[-1].split() == ["next", *f"python cli.py report {run}".split()]
    ungated = run_cli("evaluate", run, "--no-generate")
    assert ungated.out.splitlines()[-1].endswith(f"evaluate {run} --gate")


def test_the_gate_takes_no_rows_that_were_trained_on(run_cli: Cli, run: Path) -> None:
    result = run_cli("evaluate", run, "--split", "train", "--gate", "--no-generate")
    refused(result, "--gate needs rows that were not trained on", "leave out --split train")
    assert not (run / "evaluation").exists()


# --- mistakes ---------------------------------------------------------------------------------------------------------


def refused(result: Result, *parts: str) -> None:
    assert result.code == 2
    assert len(result.err.strip().splitlines()) <= 2 and "Traceback" not in result.err
    for part in parts:
        assert part in result.err


def test_no_adapter(run_cli: Cli, run: Path) -> None:
    shutil.rmtree(run / "adapters")
    refused(run_cli("evaluate", run), "no adapter yet", "train --resume")


def test_an_unknown_split(run_cli: Cli, run: Path) -> None:
    result = run_cli("evaluate", run, "--split", "exam")
    assert result.code == 2 and "invalid choice: 'exam'" in result.err


def test_a_split_that_is_not_there(run_cli: Cli, run: Path, tmp_path: Path) -> None:
    other = write_moods(tmp_path / "others.jsonl", 12, start=100)
    refused(
        run_cli("evaluate", run, "--data", other, "--split", "test"), "no test rows of its own", "leave --split out"
    )
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  test: 0.3", "  test: 0.0"))
    refused(run_cli("evaluate", run, "--split", "test"), "no test rows", "--set data.test=0.1")


def test_a_run_on_all_rows(run_cli: Cli, run: Path) -> None:
    """As the run after the folds: what is kept for testing judges it, and without that nothing does."""
    config = (run / "config.yaml").read_text().replace("  folds: null", "  folds: 2")
    config = config.replace("  validation: 0.2", "  validation: 0.0")
    (run / "config.yaml").write_text(config)
    assert run_cli("evaluate", run, "--no-generate").code == 0
    assert report_of(run / "evaluation")["split"] == "test"
    (run / "config.yaml").write_text(config.replace("  test: 0.3", "  test: 0.0"))
    refused(run_cli("evaluate", run), "was trained on: none is left to judge by", "--data")
    assert run_cli("evaluate", run, "--split", "train", "--no-generate").code == 0
    report = report_of(run / "evaluation-train")
    assert report["losses"]["num_rows"] == NUM_ROWS and "these rows were trained on" in report["notes"][-1]


def test_data_that_can_not_be_read(run_cli: Cli, run: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"foo": 1}\n')
    refused(run_cli("evaluate", run, "--data", tmp_path / "other.jsonl"), "other.jsonl")
    refused(run_cli("evaluate", run, "--data", tmp_path / "none.jsonl"), "does not exist")
    (tmp_path / "empty.jsonl").write_text("")
    refused(run_cli("evaluate", run, "--data", tmp_path / "empty.jsonl"), "no rows")
    assert not (run / "evaluation").exists()


@pytest.mark.parametrize("flag", ["--generate", "--text-scores"])
def test_plain_text_has_no_answers(flag: str, run_cli: Cli, run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Once upon a time {n}."}) + "\n" for n in range(6)))
    refused(run_cli("evaluate", run, "--data", rows, flag), "plain text", "leave out")
    assert not (run / "evaluation-texts").exists()
    assert run_cli("evaluate", run, "--data", rows).code == 0  # losses all the same
    assert report_of(run / "evaluation-texts")["answers"] is None


def test_outputs_that_are_something_else(run_cli: Cli, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(run_cli("evaluate", run, "--output", "file"), "is a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    refused(run_cli("evaluate", run, "--output", "full"), "holds other things (thesis.tex)")
    refused(run_cli("evaluate", run, "--output", "file/evaluation"), "cannot write here")
    refused(run_cli("evaluate", run, "--text-scores", "--no-generate"), "--text-scores needs answers")
