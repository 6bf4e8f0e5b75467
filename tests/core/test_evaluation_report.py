"""Excerpts, the files of an evaluation and its screen."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from core.evaluation.classification import classify
from core.evaluation.labels import LabelScheme
from core.evaluation.losses import pair_losses
from core.evaluation.plots import CONFUSION, F1, LOSS_DIFFERENCES, write_plots
from core.evaluation.report import (
    EVALUATION,
    PLOTS,
    REPORT,
    Answers,
    Evaluation,
    Row,
    earlier_findings,
    excerpt,
    read_evaluation_of,
    rows_csv,
    summary_csv,
    without_common,
    write_report,
)
from core.evaluation.screen import print_evaluation

SCHEME = LabelScheme(("yes", "no"), None)


def evaluation(*, has_answers: bool = True, num_rows: int = 8) -> Evaluation:
    """Every row gains but the first; the adapter answers all right, the base model says yes to all."""
    truth = ["yes", "no"] * (num_rows // 2)
    texts = {"base": ["yes"] * num_rows, "adapter": truth}
    answers = {
        side: Answers(some, [True] * num_rows, [SCHEME.read(text) for text in some]) for side, some in texts.items()
    }
    targets = np.full(num_rows, 4)
    base = np.linspace(8.0, 16.0, num_rows)
    adapter = base - 2.0
    adapter[0] = base[0] + 1.0
    options: dict[str, object] = {}
    if has_answers:
        readings = [answers[side].readings or [] for side in ("base", "adapter")]
        options["classification"] = classify(SCHEME, truth, *readings, seed=0, confidence=0.95)
        options["answers"] = answers
    return Evaluation(
        run="runs/moods",
        adapter_sha256="0" * 64,
        model="some/model",
        backend="mlx",
        device="CPU",
        precision="16-bit",
        data="moods.jsonl",
        split="test",
        notes=["a note"],
        rows=[Row(at, f"moods.jsonl:{at + 1}", f'Is it {at}, "so"?\n', truth[at], truth[at]) for at in range(num_rows)],
        num_available=20,
        base_nll=base,
        adapter_nll=adapter,
        num_targets=targets,
        losses=pair_losses(base, adapter, targets, seed=0, confidence=0.95),
        settings={"max_tokens": 8},
        **options,  # type: ignore[arg-type]
    )


def test_the_report_names_rows_from_either_end(tmp_path: Path) -> None:
    write_report(tmp_path, evaluation())
    report = json.loads((tmp_path / REPORT).read_text())
    worst, best = report["rows"]["worst"], report["rows"]["best"]
    assert worst[0]["origin"] == "moods.jsonl:1" and worst[0]["difference"] == pytest.approx(0.25)
    assert worst[0]["adapter_loss"] - worst[0]["base_loss"] == pytest.approx(0.25)
    assert best[0]["difference"] == pytest.approx(-0.5) and best[-1]["origin"] == "moods.jsonl:1"
    assert report["losses"]["num_rows_worse"] == 1
    # F1 of yes 2/3 and of no 0: the base model's macro F1 is 1/3
    assert report["classification"]["base"]["f1"] == pytest.approx(1 / 3)
    assert report["classification"]["f1_gain"] == pytest.approx(2 / 3)
    assert report["verdict"] == report["classification"]["verdict"]
    assert report["general"] is None and report["gate"] is None


def test_an_evaluation_is_of_one_adapter(tmp_path: Path) -> None:
    weights = tmp_path / "adapters" / "adapter_model.safetensors"
    assert (tmp_path / EVALUATION).parent.name == "evaluation"
    assert read_evaluation_of(tmp_path).report is None and read_evaluation_of(tmp_path).note is None
    for folder in ("adapters", "evaluation"):
        (tmp_path / folder).mkdir()
    weights.write_bytes(b"one")
    found = replace(evaluation(), adapter_sha256=hashlib.sha256(b"one").hexdigest())
    write_report(tmp_path / "evaluation", found)
    report = read_evaluation_of(tmp_path).report
    assert report is not None and report["losses"] == found.losses.to_dict()
    weights.write_bytes(b"two")
    later = read_evaluation_of(tmp_path)
    assert later.report is None and later.note is not None
    assert "earlier adapter" in later.note and later.note.endswith(f"python cli.py evaluate {tmp_path}")
    weights.unlink()
    assert read_evaluation_of(tmp_path).report == report


def test_tables_read_back() -> None:
    found = evaluation()
    rows = list(csv.DictReader(io.StringIO(rows_csv(found))))
    assert [row["adapter_label"] for row in rows] == ["yes", "no"] * 4
    assert [row["base_answer"] for row in rows] == ["yes"] * 8
    sides = list(csv.DictReader(io.StringIO(summary_csv(found))))
    assert [side["side"] for side in sides] == ["base", "adapter"]
    assert float(sides[0]["accuracy"]) == 0.5 and float(sides[1]["f1"]) == 1.0
    assert sides[1]["strict_json"] == "" and sides[1]["rouge_l"] == ""
    plain = list(csv.DictReader(io.StringIO(rows_csv(evaluation(has_answers=False)))))
    assert plain[0].keys() == {"row", "origin", "num_targets", "base_loss", "adapter_loss", "difference"}


@pytest.mark.parametrize("num_rows", [8, 1000])
def test_pictures_of_what_there_is(tmp_path: Path, num_rows: int) -> None:
    write_plots(tmp_path, evaluation(num_rows=num_rows))
    there = {path.name for path in (tmp_path / PLOTS).iterdir()}
    assert there == {LOSS_DIFFERENCES, CONFUSION, F1}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / PLOTS).iterdir())
    write_plots(tmp_path, evaluation(has_answers=False))  # those of an earlier evaluation go
    assert {path.name for path in (tmp_path / PLOTS).iterdir()} == {LOSS_DIFFERENCES}


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_says_the_verdict_first_and_fits(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    print_evaluation(
        evaluation(),
        console=console,
        folder="here",
        general=[],
        gate="Keep it: so",
        next_command="python cli.py merge x",
    )
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    assert lines[2] == "No difference that these rows could show: F1 0.333 → 1.000 on 8 test rows"  # 4 rows differ
    assert any("7 better, 1 worse" in line and "(8 of 20)" in line for line in lines)
    assert any(line.startswith("  got worst  moods.jsonl:1  +0.250  … 0,") for line in lines)
    assert lines[-1].endswith("python cli.py merge x") and any("Keep it: so" in line for line in lines)


def test_excerpts() -> None:
    assert excerpt("a\n  b", 10) == "a b"
    assert excerpt("abcdefgh", 5) == "abcd…"


def test_what_all_questions_repeat_is_left_out() -> None:
    texts = ["Premise: One dog. Answer with JSON.", "Premise: Two tall cats. Answer with JSON."]
    assert without_common(texts) == ["… One dog. …", "… Two tall cats. …"]
    assert without_common(["same words", "same words"]) == ["same words", "same words"]
    assert without_common(["a b", "a b c"]) == ["a b", "a b c"]
    assert without_common(["The dog is here", "The cat is here"]) == ["… dog …", "… cat …"]
    assert without_common([]) == [] and without_common(["one"]) == ["one"]


def test_the_screen_says_when_losses_and_answers_judge_otherwise() -> None:
    found = evaluation(num_rows=40)
    assert found.losses.verdict == "better than the base model"
    same = replace(
        found, classification=classify(SCHEME, ["yes"] * 9, *[[SCHEME.read("no")] * 9] * 2, seed=0, confidence=0.95)
    )
    out = io.StringIO()
    print_evaluation(same, console=Console(file=out, width=80), folder="here", general=[], gate=None, next_command="x")
    lines = out.getvalue().splitlines()
    assert lines[2].startswith("No difference") and lines[3] == "  by loss    better than the base model"
    out = io.StringIO()
    print_evaluation(
        evaluation(has_answers=False), console=Console(file=out), folder="here", general=[], gate=None, next_command="x"
    )
    assert "by loss" not in out.getvalue()


@pytest.mark.parametrize("cut_off", [True, False])
def test_answers_that_no_one_can_read_show_nothing(cut_off: bool) -> None:
    found = evaluation(num_rows=40)
    readings = [SCHEME.read("hm")] * 40
    answers = {side: Answers(["hm"] * 40, [not cut_off] * 40, readings) for side in ("base", "adapter")}
    scores = classify(SCHEME, ["yes", "no"] * 20, readings, readings, seed=0, confidence=0.95)
    found = replace(found, answers=answers, classification=scores)
    out = io.StringIO()
    print_evaluation(found, console=Console(file=out, width=80), folder="here", general=[], gate=None, next_command="x")
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    why = "most were cut off at --max-tokens 8; raise it" if cut_off else "none names a label; rows.csv has them"
    assert lines[2] == f"No answer could be read: {why}"
    assert lines[3].startswith("Better than the base model: loss ")
    assert found.to_dict()["verdict"] == found.losses.verdict
    assert any("--max-tokens 8 or model's length" in line for line in lines) is cut_off


def test_what_was_found_before_holds_for_the_same_adapter_and_rows(tmp_path: Path) -> None:
    first = replace(evaluation(), losses_key="one", general={"rise": 0.1}, gate={"keep": True})
    assert earlier_findings(tmp_path, first) == (None, None)
    write_report(tmp_path, first)
    now = replace(first, general=None, gate=None)
    assert earlier_findings(tmp_path, now) == (first.general, first.gate)
    assert earlier_findings(tmp_path, replace(now, losses_key="two")) == (first.general, None)
    assert earlier_findings(tmp_path, replace(now, precision="4-bit")) == (None, None)
    assert earlier_findings(tmp_path, replace(now, adapter_sha256="another")) == (None, None)
