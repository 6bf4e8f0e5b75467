"""Every finding, triggered by a small file made for it; and files that trigger none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from core.config import DataConfig, RunConfig
from data.check.collect import check_rows, read_rows
from data.check.findings import Finding, of_rows
from data.check.inspection import Inspection
from data.check.report import Report, stops
from data.dataset import tokenize_data
from data.formats import Example
from data.tokenize import Tokenizer
from tests.data.conftest import MakeTokenizer
from tests.data.made_rows import clean_pairs, clean_rows
from tests.tiny import CHAT_TEMPLATE

ROOT = Path(__file__).parents[2]
Write = Callable[..., str]


def report_of(path: str, tokenizer: Tokenizer, *, num_parameters: int | None = None, **data: Any) -> Report:
    config = RunConfig(data=DataConfig(path=path, **data))
    rows = read_rows(config, lambda some: tokenize_data(some, tokenizer))
    return check_rows(rows, config, num_parameters=num_parameters)


def only(report: Report, kind: str) -> Finding:
    """The finding of this kind, which is the only one of all."""
    assert [finding.kind for finding in report.findings] == [kind]
    return report.findings[0]


def of_kind(report: Report, kind: str) -> Finding:
    return next(finding for finding in report.findings if finding.kind == kind)


def origins(finding: Finding) -> list[str]:
    return [row.origin for row in finding.rows]


# Nothing


@pytest.mark.parametrize("make_rows", [clean_rows, clean_pairs])
def test_a_clean_file_triggers_none(write: Write, chatml: Tokenizer, make_rows: Callable[[], list[Any]]) -> None:
    report = report_of(write(make_rows()), chatml)
    assert report.findings == ()
    assert stops(report) == []


def test_clean_chats_texts_and_files_of_their_own_trigger_none(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(160)
    chats = [
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows
    ]
    folder = Path(write(chats[:130], "set/train.jsonl")).parent
    write(chats[130:], "set/valid.jsonl")
    report = report_of(str(folder), chatml)
    assert report.findings == ()
    assert report.facts.splits["validation"].is_given
    assert report_of(write([{"text": row["prompt"]} for row in rows], "texts.jsonl"), chatml).findings == ()


@pytest.mark.parametrize("name", ["expert.jsonl", "nli.jsonl"])
def test_the_samples_have_no_problem_and_no_warning(chatml: Tokenizer, name: str) -> None:
    assert stops(report_of(str(ROOT / "data" / "samples" / name), chatml)) == []


# Rows


def test_rows_that_cant_be_read_are_each_named(write: Write, chatml: Tokenizer, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in clean_rows(100)]
    lines[3] = '{"prompt": "cut'
    lines[20] = json.dumps({"prompt": "a", "completion": " \n"})
    lines[21] = json.dumps({"prompt": 5, "completion": "b"})
    lines[40] = json.dumps({"prompt": "a"})
    lines[41] = "[1]"
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    finding = only(report_of(str(path), chatml), "bad-rows")
    assert (finding.level, finding.num_rows) == ("problem", 5)
    assert sorted((row.origin.rpartition("/")[2], row.detail) for row in finding.rows) == [
        ("bad.jsonl, line 21", "completion is empty"),
        ("bad.jsonl, line 22", "prompt is a number (5), not text"),
        ("bad.jsonl, line 4", "not JSON (unterminated string starting at column 12)"),
        ("bad.jsonl, line 41", "completion is missing"),
        ("bad.jsonl, line 42", "a list, not an object with fields"),
    ]


def test_answers_that_are_cut_off_are_named_the_worst_first(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(100)
    rows[10]["completion"] *= 8
    rows[11]["completion"] *= 6
    path = write(rows)
    lengths = tokenize_data(DataConfig(path=path), chatml).split("train").rows.lengths
    bound = int(sorted(lengths)[-3])
    report = report_of(path, chatml, max_tokens=bound)
    finding = of_kind(report, "truncated")
    assert (finding.level, finding.num_rows) == ("warning", 2)
    assert origins(finding) == ["rows.jsonl:11", "rows.jsonl:12"]
    assert finding.rows[0].detail.startswith(f"{int(lengths[10]) - bound} of ")
    assert f"data.max_tokens={int(lengths[10])} " in finding.hint
    assert report.facts.share_cut == pytest.approx(0.02)


def test_the_longest_row_is_exact(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(40)
    rows[10]["completion"] = "ab " * 1600  # 3 tokens each
    path = write(rows)
    longest = max(tokenize_data(DataConfig(path=path, max_tokens=8192), chatml).split("train").rows.lengths)
    rows[10]["completion"] += "a" * (5001 - int(longest))
    report = report_of(write(rows), chatml, max_tokens=100)
    assert "data.max_tokens=5001 " in of_kind(report, "truncated").hint
    assert report.facts.quantiles["longest"] == 5001


def test_a_row_that_loses_its_whole_answer_is_named(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(100)
    rows[7]["prompt"] *= 9
    path = write(rows)
    bound = int(sorted(tokenize_data(DataConfig(path=path), chatml).split("train").rows.lengths)[-2])
    finding = of_kind(report_of(path, chatml, max_tokens=bound), "answer-lost")
    assert (finding.level, finding.num_rows, origins(finding)) == ("problem", 1, ["rows.jsonl:8"])


def test_rows_without_a_target_and_without_an_end() -> None:
    inspection = Inspection()
    for number, num_targets in enumerate([5, 0, 5], start=1):
        row = Example(f"f, line {number}", f"f:{number}", text="Some text.")
        inspection.add(row, num_tokens=9, num_targets=num_targets, lost_targets=0, has_end=number == 3)
    found = {finding.kind: finding for finding in of_rows({"train": inspection}, 64)}
    assert found.keys() == {"no-targets", "no-end"}
    assert origins(found["no-targets"]) == ["f:2"]
    assert origins(found["no-end"]) == ["f:1"]
    assert {finding.level for finding in found.values()} == {"problem"}


def test_a_tokenizer_without_an_end_token(write: Write, make: MakeTokenizer) -> None:
    template = CHAT_TEMPLATE.replace("<|im_end|>", "")
    finding = only(report_of(write(clean_rows(100)), make(template, eos_token=None)), "no-end")
    assert (finding.level, finding.num_rows) == ("problem", 100)


@pytest.mark.parametrize(
    ("row", "kind", "level"),
    [
        ({"completion": "\u200b"}, "empty-answer", "warning"),
        ({"completion": "A caf\ufffd by the lake has many tables and a lamp."}, "undecodable", "warning"),
        ({"completion": "A cafÃ© by the lake that doesnâ€™t have tables."}, "mojibake", "warning"),
        ({"completion": "A bell \x07 that rings at every hour of the day."}, "control-characters", "warning"),
        ({"completion": "An arrow \ue0b0 that is in no other font than one."}, "private-use", "warning"),
        ({"prompt": "Write to the office at a.person@uni-x.de and ask?"}, "email", "note"),
        ({"completion": "The key is AKIA" + "Q3Z7M2K9P4X8W6TR and it opens the store."}, "secret", "problem"),
    ],
)
def test_what_is_in_a_text(write: Write, chatml: Tokenizer, row: dict[str, str], kind: str, level: str) -> None:
    rows = clean_rows(100)
    rows[4] |= row
    report = report_of(write(rows), chatml)
    finding = of_kind(report, kind)
    assert {one.kind for one in report.findings} <= {kind, "few-targets"}
    assert (finding.level, finding.num_rows, origins(finding)) == (level, 1, ["rows.jsonl:5"])
    assert finding.hint


def test_a_secret_is_nowhere_in_the_report(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(100)
    secret = "ghp_" + "a1B2c3D4e5F6g7H8i9J0" + "k1L2m3N4o5P6q7R8"
    rows[4]["prompt"] = f"Log in with {secret} and a.person@uni-x.de, please, and say what you see there."
    text = json.dumps(report_of(write(rows), chatml).to_json())
    assert "GitHub Token" in text
    assert secret[:8] not in text
    assert "a.person" not in text


def test_rows_that_are_not_like_the_others(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(100)
    rows[30]["prompt"] *= 40
    rows[31]["completion"] = "B"
    report = report_of(write(rows), chatml, max_tokens=8192)
    found = {finding.kind: origins(finding) for finding in report.findings}
    assert found == {"very-long": ["rows.jsonl:31"], "few-targets": ["rows.jsonl:32"]}
    assert stops(report) == []
    texts = [{"text": row["prompt"] + row["completion"]} for row in rows[:30]] + [{"text": "Hm."}]
    assert origins(only(report_of(write(texts, "texts.jsonl"), chatml), "very-short")) == ["texts.jsonl:31"]


def test_short_answers_are_fine_where_all_are_short(write: Write, chatml: Tokenizer) -> None:
    rows = [row | {"completion": "yes" if index % 2 else "no"} for index, row in enumerate(clean_rows(100))]
    assert report_of(write(rows), chatml).findings == ()


# Templates


def test_a_prompt_that_is_no_prefix(write: Write, make: MakeTokenizer) -> None:
    template = CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    finding = only(report_of(write(clean_rows(100)), make(template)), "template-prompt")
    assert (finding.level, finding.num_rows) == ("warning", 100)


def test_a_template_that_changes_answers(write: Write, make: MakeTokenizer) -> None:
    shouted = CHAT_TEMPLATE.replace(
        "message['content']",
        "(message['content'] | upper if message['role'] == 'user' else message['content'] | upper)",
    )
    template = shouted.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    rows = clean_rows(100)
    rows[0] = {"prompt": "12 + 3 = ?", "completion": "15"}  # the same in capitals
    report = report_of(write(rows), make(template), validation=0.2)
    finding = of_kind(report, "answer-not-found")
    assert (finding.level, finding.num_rows) == ("problem", 99)


def test_notes_on_templates(write: Write, make: MakeTokenizer) -> None:
    rows = clean_rows(100)
    assert only(report_of(write(rows), make(None)), "no-template").level == "note"
    dated = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    assert only(report_of(write(rows), make(dated)), "fixed-date").level == "note"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    chats = [
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
                {"role": "user", "content": "And?"},
            ][: 4 if index == 9 else 3]
        }
        for index, row in enumerate(rows)
    ]
    report = report_of(write(chats), make(refusing))
    assert {finding.kind: finding.num_rows for finding in report.findings} == {"last-question": 1, "system-merged": 100}


# Labels


def test_labels_that_are_uneven(write: Write, chatml: Tokenizer) -> None:
    rows = [row | {"label": "neutral"} if index % 30 else row for index, row in enumerate(clean_pairs(120))]
    report = report_of(write(rows), chatml)
    assert report.facts.labels == {"neutral": 116, "entailment": 4}
    finding = only(report, "uneven-labels")
    assert (finding.level, finding.text) == ("warning", "Labels are uneven: entailment 3.3%, against neutral 96.7%.")


def test_a_single_label_and_labels_only_in_validation(write: Write, chatml: Tokenizer) -> None:
    rows = clean_pairs(150)
    folder = Path(write([row | {"label": "neutral"} for row in rows[:120]], "set/train.jsonl")).parent
    write([row | {"label": "entailment"} for row in rows[120:]], "set/valid.jsonl")
    report = report_of(str(folder), chatml)
    assert {finding.kind: finding.level for finding in report.findings} == {
        "one-label": "warning",
        "unseen-labels": "warning",
    }
    assert "entailment" in of_kind(report, "unseen-labels").text


@pytest.mark.parametrize("explained", [(), range(120), (3,), (90,)], ids=["none", "all", "one", "the other"])
def test_labels_that_contradict_each_other(write: Write, chatml: Tokenizer, explained: Sequence[int]) -> None:
    rows = clean_pairs(120)
    rows[90] = rows[3] | {"label": "neutral" if rows[3]["label"] != "neutral" else "entailment"}
    rows[91] = copy.copy(rows[4])
    for index in explained:
        rows[index] = rows[index] | {"explanation": f"Because of number {index}.\n\nAnd so."}
    report = report_of(write(rows), chatml)
    finding = of_kind(report, "contradictory-labels")
    assert (finding.level, finding.num_rows, origins(finding)) == ("warning", 1, ["rows.jsonl:4 and rows.jsonl:91"])


def test_a_column_of_many_values_is_no_label(write: Write, chatml: Tokenizer) -> None:
    rows = [{"prompt": f"Say {index}?", "completion": f"{index}.", "id": f"n{index}"} for index in range(1200)]
    report = report_of(write(rows), chatml, stratify="id", near_duplicates=None)
    assert of_kind(report, "no-label").level == "note"
    assert report.facts.labels == {}
    assert "\\u0000" not in json.dumps(report.to_json())


def test_labels_as_plain_answers_contradict_each_other_too(write: Write, chatml: Tokenizer) -> None:
    rows = [row | {"completion": "yes" if index % 2 else "no"} for index, row in enumerate(clean_rows(100))]
    rows[50] = rows[5] | {"completion": "no"}
    assert origins(of_kind(report_of(write(rows), chatml), "contradictory-labels")) == [
        "rows.jsonl:6 and rows.jsonl:51"
    ]


def test_several_answers_to_a_question_are_a_note(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(100)
    rows[50]["prompt"] = rows[5]["prompt"]
    report = report_of(write(rows), chatml)
    finding = of_kind(report, "several-answers")
    assert (finding.level, finding.num_rows, origins(finding)) == ("note", 1, ["rows.jsonl:6 and rows.jsonl:51"])


# Copies


def near_copy(row: dict[str, str]) -> dict[str, str]:
    """The same but for the question's last word."""
    return row | {"prompt": row["prompt"].rpartition(" ")[0] + " zuzu?"}


def test_exact_copies(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(100)
    rows[60] = rows[70] = rows[6]
    finding = only(report_of(write(rows), chatml), "exact-copies")
    assert (finding.level, finding.num_rows) == ("note", 2)
    assert origins(finding) == ["rows.jsonl:61 and rows.jsonl:7", "rows.jsonl:71 and rows.jsonl:7"]


def test_a_file_whose_name_says_and(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(100)
    rows[60] = rows[6]
    finding = only(report_of(write(rows, "salt and pepper: all.jsonl"), chatml), "exact-copies")
    assert finding.rows[0].names == ("salt and pepper: all.jsonl:61", "salt and pepper: all.jsonl:7")
    rows[5] = {"prompt": "a", "completion": ""}
    finding = of_kind(report_of(write(rows, "salt and pepper: all.jsonl"), chatml), "bad-rows")
    assert (finding.rows[0].names, finding.rows[0].detail) == ((), "completion is empty")
    assert finding.rows[0].origin.endswith("salt and pepper: all.jsonl, line 6")


def test_near_copies_and_what_they_would_do_to_the_gap(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(100)
    rows += [near_copy(row) for row in rows[:40]]
    path = write(rows)
    report = report_of(path, chatml)
    finding = of_kind(report, "near-copies")
    assert (finding.level, finding.num_rows) == ("note", 40)
    assert finding.rows[0].origin == "rows.jsonl:101 and rows.jsonl:1"
    # by hand: a validation row of the naive split has its twin in training unless both are held out
    keys = tokenize_data(DataConfig(path=path), chatml).split("train").keys(seed=0)
    held_out = [int(position) < 0.2 * 2**64 for position in keys.position]
    twin = {index: index + 100 for index in range(40)} | {index + 100: index for index in range(40)}
    leaked = sum(held and index in twin and not held_out[twin[index]] for index, held in enumerate(held_out))
    assert leaked > 0
    assert f"cut off row by row, {leaked} of {sum(held_out)} validation rows" in finding.text
    assert of_kind(report_of(path, chatml, near_duplicates=None), "near-copies").level == "warning"


def test_copies_across_files(write: Write, chatml: Tokenizer) -> None:
    rows = clean_rows(120)
    valid = [*rows[100:], rows[3], near_copy(rows[4]), near_copy(rows[5])]
    folder = Path(write(rows[:100], "set/train.jsonl")).parent
    write(valid, "set/valid.jsonl")
    report = report_of(str(folder), chatml)
    assert {finding.kind: (finding.level, origins(finding)) for finding in report.findings} == {
        "copies-across": ("warning", ["valid.jsonl:21 and train.jsonl:4"]),
        "near-copies-across": (
            "warning",
            ["valid.jsonl:22 and train.jsonl:5", "valid.jsonl:23 and train.jsonl:6"],
        ),
    }
    assert of_kind(report, "near-copies-across").text.startswith("2 of 23 validation rows (9%) have a near copy")


def test_rows_that_cant_be_split(write: Write, chatml: Tokenizer) -> None:
    row = clean_rows(1)[0]
    report = report_of(write([row, row, row]), chatml)
    assert {finding.kind: finding.level for finding in report.findings} == {
        "no-split": "problem",
        "exact-copies": "note",
    }
    assert report.facts.splits["train"].rows == 3
