"""The facts of the check, what to expect, and what the start of a run says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.config import DataConfig, RunConfig
from data.check.collect import check_prepared
from data.check.report import Report, brief, stops
from data.dataset import Prepared, load_data, split_data, tokenize_data
from data.tokenize import Tokenizer
from tests.data.made_rows import clean_rows
from tests.data.test_check_findings import Write, near_copy, of_kind, only, origins, report_of


def start_of(path: str, tokenizer: Tokenizer, **data: Any) -> tuple[Prepared, Report]:
    """What a run has, and what its start sees."""
    config = RunConfig(data=DataConfig(path=path, **data))
    tokenised = tokenize_data(config.data, tokenizer)
    prepared = split_data(tokenised, config.data, seed=config.train.seed)
    return prepared, check_prepared(tokenised, prepared, config, num_parameters=None)


def test_the_facts_are_those_of_the_rows(write: Write, chatml: Tokenizer) -> None:
    path = write(clean_rows(100))
    facts = report_of(path, chatml).facts
    prepared = load_data(DataConfig(path=path), chatml, seed=0)
    assert (facts.name, facts.format) == ("rows.jsonl", "prompt and completion")
    for split, rows in (("train", prepared.train), ("validation", prepared.validation)):
        some = facts.splits[split]
        assert (some.rows, some.tokens, some.targets) == (len(rows), rows.num_tokens, rows.num_targets)
        assert not some.is_given
    lengths = sorted([*prepared.train.lengths, *prepared.validation.lengths])
    assert facts.quantiles == {
        "shortest": lengths[0],
        "median": lengths[49],
        "p95": lengths[94],
        "longest": lengths[99],
    }
    assert sum(rows for _, _, rows in facts.histogram) == 100


def test_expectations_weigh_parameters_against_targets(write: Write, chatml: Tokenizer) -> None:
    path = write(clean_rows(100))
    targets = load_data(DataConfig(path=path), chatml, seed=0).train.num_targets
    many = report_of(path, chatml, num_parameters=50 * targets).expectations
    assert f"{targets:,} target tokens, each seen 3 times, against {50 * targets:,} adapter parameters: 50 " in many[0]
    assert "by heart" in many[1]
    assert "lora.rank 4" in many[1]
    some = report_of(path, chatml, num_parameters=4 * targets).expectations
    assert "lora.rank 4 would have about one for each target token" in some[1]
    few = report_of(path, chatml, num_parameters=targets // 10).expectations
    assert "generalise" in few[1]
    assert "`train --folds 5`" in many[-1]


def test_few_steps_are_said(write: Write, chatml: Tokenizer) -> None:
    rows = write(clean_rows(30))
    num_train = len(load_data(DataConfig(path=rows), chatml, seed=0).train)
    num_steps = 3 * -(-num_train // 8)
    assert any(f"about {num_steps} optimiser steps" in line for line in report_of(rows, chatml).expectations)


def test_the_start_of_a_run_says_the_worst_in_a_handful_of_lines(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(120)
    rows[1]["completion"] = "The key is AKIA" + "Q3Z7M2K9P4X8W6TR and it opens the store."
    rows[2]["completion"] = "A cafÃ© by the lake that has tables."
    rows[3]["completion"] = "A bell \x07 that rings at every hour."
    rows[4]["completion"] = "A caf\ufffd by the lake that has tables."
    rows[5]["completion"] = "An arrow \ue0b0 that is in no other font."
    rows[60] = rows[6]
    prepared, report = start_of(write(rows), chatml)
    lines = brief(report, prepared.lines)
    assert len(lines) == 5
    assert lines[0].endswith("which a trained model can repeat (rows.jsonl:2)")
    assert lines[-1] == "and 1 more finding: python cli.py data check"
    assert not any("the same as" in line for line in lines)  # which the run says anyway
    assert stops(report)[0].kind == "secret"


def test_the_start_of_a_run_has_left_out_near_copies_in_a_file_of_its_own(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(120)
    folder = Path(write(rows[:100], "set/train.jsonl")).parent
    write([*rows[100:], near_copy(rows[4]), near_copy(rows[5])], "set/valid.jsonl")
    prepared, report = start_of(str(folder), chatml)
    assert len(prepared.train) == 98
    assert prepared.findings == (
        "2 training rows left out: the same rows, or near copies, are held out in another file",
    )
    finding = only(report, "near-copies-across")
    assert (finding.level, origins(finding)) == (
        "warning",
        ["valid.jsonl:21 and train.jsonl:5", "valid.jsonl:22 and train.jsonl:6"],
    )
    assert finding.text == (
        "2 of 22 validation rows (9%) have a near copy in the training file; training leaves such rows out."
    )
    assert brief(report, prepared.lines) == []  # the run has said it
    prepared, report = start_of(str(folder), chatml, near_duplicates=None)
    assert len(prepared.train) == 100
    assert brief(report, prepared.lines) == [
        "2 of 22 validation rows (9%) have a near copy in the training file: the gap will look too good "
        "(valid.jsonl:21 and train.jsonl:5, valid.jsonl:22 and train.jsonl:6)"
    ]


def test_the_start_of_a_run_stops_at_what_the_check_stops_at(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(120)
    bad = write([*rows, {"prompt": "a", "completion": ""}], "bad.jsonl")
    near = write([*rows, *map(near_copy, rows[:60])], "near.jsonl")
    train, valid = rows[:100], [*rows[100:], rows[3], near_copy(rows[4]), near_copy(rows[5])]
    folder = Path(write(train, "set/train.jsonl")).parent
    write(valid, "set/valid.jsonl")
    write([*clean_rows(20, seed=1), valid[0]], "set/test.jsonl")
    for path, settings, kinds in (
        (bad, {"skip_bad": True}, ["bad-rows"]),
        (near, {"near_duplicates": None}, ["near-copies"]),
        (near, {}, []),
        (str(folder), {}, ["copies-across", "near-copies-across", "held-out-twice"]),
        (str(folder), {"near_duplicates": None}, ["copies-across", "near-copies-across", "held-out-twice"]),
    ):
        checked = stops(report_of(path, chatml, **settings))  # type: ignore[arg-type]
        prepared, report = start_of(path, chatml, **settings)  # type: ignore[arg-type]
        assert [finding.kind for finding in checked] == kinds
        assert [(finding.kind, finding.num_rows) for finding in stops(report)] == [
            (finding.kind, finding.num_rows) for finding in checked
        ]
        lines = [*prepared.findings, *brief(report, prepared.lines)]
        assert len(lines) == len(set(lines)) >= len(kinds) - 1  # both kinds of copies in a line


def test_groups_in_two_files_and_strata_without_a_split(write: Write, chatml: Tokenizer) -> None:
    rows = [row | {"ward": str(index // 4)} for index, row in enumerate(clean_rows(120))]
    folder = Path(write(rows[:98], "set/train.jsonl")).parent
    write(rows[98:], "set/valid.jsonl")
    prepared, report = start_of(str(folder), chatml, group="ward", stratify="ward")
    assert {finding.kind: finding.level for finding in report.findings if "label" not in finding.kind} == {
        "groups-across": "warning",
        "stratify-unused": "note",
    }
    assert of_kind(report, "groups-across").num_rows == 2
    assert [line.kind for line in prepared.lines] == ["groups-across", "stratify-unused"]
    assert brief(report, prepared.lines)[0].startswith("Labels of validation rows")


def test_a_few_near_copies_across_files_are_a_note(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(150)
    folder = Path(write(rows[:100], "set/train.jsonl")).parent
    write([*rows[100:], near_copy(rows[4])], "set/valid.jsonl")
    finding = only(report_of(str(folder), chatml), "near-copies-across")
    assert finding.level == "note"
    assert finding.text == (
        "1 of 51 validation rows (2%) has a near copy in the training file; training leaves such rows out."
    )
    finding = only(report_of(str(folder), chatml, near_duplicates=None), "near-copies-across")
    assert (finding.level, finding.text) == (
        "note",
        "1 of 51 validation rows (2%) has a near copy in the training file: too few to move the gap much.",
    )


def test_a_cut_answer_is_not_a_short_one_too(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(100)
    path = write(rows)
    part = tokenize_data(DataConfig(path=path), chatml).split("train").rows
    prompts = [int((~part.is_target[index]).sum()) for index in range(100)]
    kinds = {finding.kind for finding in report_of(path, chatml, max_tokens=min(prompts) + 2).findings}
    assert kinds == {"truncated", "answer-lost"}
