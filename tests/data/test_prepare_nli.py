"""`data prepare nli`: the same prompts and answers as training on the table itself, and which rows are left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from data.formats import survey
from data.prepare.common import Record, write_prepared
from data.prepare.nli import make_kind
from data.sources import BadRows, Row

ROWS: list[dict[str, Any]] = [
    {"premise": "A man sleeps.", "hypothesis": "He is awake.", "label": "Contradiction", "explanation": "Asleep."},
    {"premise": "A man sleeps.", "hypothesis": "He rests.", "label": 0, "explanation": ""},
    {"premise": "Two dogs run.", "hypothesis": "They race.", "label": "1", "explanation": "Perhaps."},
]


def prepare(path: Path, fields: str | None = None) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """Rows, and where there is something: left out."""
    record = Record()
    samples = make_kind({"fields": fields}).samples(path, record)
    return [{**sample.values, "source": sample.source} for sample in samples], record.left_out.to_json()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompt_and_answer_are_those_of_training_on_the_table(tmp_path: Path) -> None:
    rows, left_out = prepare(write_jsonl(tmp_path / "a.jsonl", ROWS))
    given = [Row(row, "a.jsonl", number) for number, row in enumerate(ROWS, start=1)]
    examples, _ = survey(given, name="a", fields={}).parse(given, BadRows(skip=False))
    assert [[row["prompt"], row["completion"]] for row in rows] == [
        [turn.content for turn in example.messages] for example in examples
    ]
    assert rows[0]["prompt"] == (
        "Does the premise entail the hypothesis, contradict it, or neither?\n\n"
        "Premise: A man sleeps.\nHypothesis: He is awake.\n\n"
        'Answer with a JSON object that has "thought_process" (the reason, in a sentence) and '
        '"predicted_label" (0 for entailment, 1 for neutral, 2 for contradiction).'
    )
    assert json.loads(rows[0]["completion"]) == {"thought_process": "Asleep.", "predicted_label": 2}
    assert json.loads(rows[1]["completion"]) == {"predicted_label": 0}
    assert [row["label"] for row in rows] == ["contradiction", "entailment", "neutral"]
    assert [row["premise"] for row in rows] == ["A man sleeps.", "A man sleeps.", "Two dogs run."]
    assert {row["source"] for row in rows} == {"a.jsonl"}
    assert left_out == {}


@pytest.mark.parametrize(("ending", "sign"), [("csv", ","), ("tsv", "\t")])
def test_tables_with_other_names(tmp_path: Path, ending: str, sign: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(sign.join(["text", "claim", "gold"]) + "\n" + sign.join(["A man sleeps.", "He rests.", "0"]) + "\n")
    rows, _ = prepare(path, "premise=text, hypothesis=claim,label=gold")
    assert [(row["premise"], row["label"]) for row in rows] == [("A man sleeps.", "entailment")]


def test_the_names_of_snli_and_esnli_need_no_fields(tmp_path: Path) -> None:
    row = {"sentence1": "P.", "sentence2": "H.", "gold_label": "neutral", "label": 7, "Explanation_1": "Because."}
    rows, _ = prepare(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert json.loads(rows[0]["completion"]) == {"thought_process": "Because.", "predicted_label": 1}


def test_what_is_left_out(tmp_path: Path) -> None:
    base = {"premise": "P.", "hypothesis": "H."}
    labels: list[Any] = [0, -1, "-", "", None, "-1", "perhaps", 0]
    rows: list[dict[str, Any]] = [{**base, "label": label} for label in labels]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"premise": "P.", "hypothesis": " ", "label": 1}])
    with open(path, "a") as file:
        file.write("not json\n")
    (tmp_path / "notes.txt").write_text("x")
    made, left_out = prepare(tmp_path)
    assert len(made) == 1
    assert {reason: entry["number"] for reason, entry in left_out.items()} == {
        "files that are no tables": 1,
        "rows that can't be read": 3,
        "rows that repeat another": 1,
        "rows without a gold label": 5,
    }
    assert left_out["rows without a gold label"]["named"] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    named = " ".join(left_out["rows that can't be read"]["named"])
    assert "line 7: label is 'perhaps', not 0, 1, 2" in named
    assert "line 9: hypothesis is empty" in named
    assert "line 10: not JSON" in named


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    for name in ("one", "two"):
        kind, record = make_kind({}), Record()
        manifest = write_prepared(kind.samples(path, record), tmp_path / name, kind=kind, record=record)
        assert manifest.group == "premise"
    for file in ("rows.jsonl", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("premise", "'premise' is not ROLE=COLUMN"),
        ("premise=", "is not ROLE=COLUMN"),
        ("question=a", "'question' is not a role"),
        ("premise=nowhere", "no column 'nowhere' for the premise .its columns: premise, hypothesis, label"),
    ],
)
def test_mistakes_in_fields(tmp_path: Path, fields: str, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=message):
        prepare(path, fields)


def test_files_that_are_no_such_table(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match=r"a\.jsonl: no column for the premise \(its columns: text\)"):
        prepare(path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="not a format that can be read"):
        prepare(tmp_path / "a.txt")
    with pytest.raises(UserError, match="no such file"):
        prepare(tmp_path / "none.csv")
