from __future__ import annotations

import json
from typing import Any

import pytest

from core.errors import UserError
from data.formats import Example, survey, trimmed_findings
from data.sources import BadRows, Row

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
SYSTEM = {"role": "system", "content": "Be brief"}


def parse(*rows: dict[str, Any], skip: bool = False, **fields: str) -> tuple[list[Example], list[str], BadRows]:
    bad = BadRows(skip=skip)
    numbered = [Row(values, "data/rows.jsonl", number) for number, values in enumerate(rows, start=1)]
    examples, num_trimmed = survey(numbered, name="rows.jsonl", fields=fields).parse(numbered, bad)
    return examples, trimmed_findings(num_trimmed), bad


def turns(example: Example) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in example.messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, [("system", "Be brief"), ("user", "Hi"), ("assistant", "Ho")]),
        ({"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, [("user", "Hi"), ("assistant", "Ho")]),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            [("user", "Hi"), ("assistant", "Ho")],
        ),
        ({"prompt": "Hi", "completion": " Ho", "id": 7}, [("user", "Hi"), ("assistant", " Ho")]),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, [("user", "Add\n\n1 2"), ("assistant", "3")]),
        ({"instruction": "Add", "input": "", "output": "3"}, [("user", "Add"), ("assistant", "3")]),
        ({"instruction": "Add", "input": None, "output": "3"}, [("user", "Add"), ("assistant", "3")]),
        ({"instruction": "Add", "output": "3"}, [("user", "Add"), ("assistant", "3")]),
    ],
)
def test_formats(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    (example,), findings, _ = parse(row)
    assert turns(example) == expected
    assert example.text is None
    assert example.is_pair == ("messages" not in row and "conversations" not in row)
    assert findings == []


def test_text() -> None:
    (example,), _, _ = parse({"text": "Once upon a time", "label": 3})
    assert example.text == "Once upon a time"
    assert example.messages == ()
    assert example.origin == "rows.jsonl:1"


@pytest.mark.parametrize(
    ("label", "number"), [("entailment", 0), ("Neutral", 1), ("contradiction", 2), (2, 2), ("1", 1)]
)
def test_nli_asks_for_json(label: object, number: int) -> None:
    row = {"premise": "A dog runs.", "hypothesis": "It moves.", "label": label}
    (example,), _, _ = parse(row | {"explanation": ["", "Running is moving.", "Another."]})
    prompt, answer = (turn.content for turn in example.messages)
    assert json.loads(answer) == {"thought_process": "Running is moving.", "predicted_label": number}
    for part in ("A dog runs.", "It moves.", "thought_process", "predicted_label"):
        assert part in prompt
    (bare,), _, _ = parse(row)
    assert json.loads(bare.messages[1].content) == {"predicted_label": number}
    assert "thought_process" not in bare.messages[0].content


def test_fields_name_columns_and_paths() -> None:
    row = {"question": "Hi", "answers": [{"text": "Ho"}], "text": "not this"}
    (example,), _, _ = parse(row, prompt="question", completion="answers.0.text")
    assert turns(example) == [("user", "Hi"), ("assistant", "Ho")]
    (other,), _, _ = parse({"text": "Hi", "summary": "Ho"}, prompt="text", completion="summary")
    assert turns(other) == [("user", "Hi"), ("assistant", "Ho")]


@pytest.mark.parametrize(
    ("fields", "what", "hint"),
    [
        ({"promt": "question"}, "'promt' is not a role", "did you mean prompt?"),
        ({"prompt": "q"}, "in column 'q', which no row of rows.jsonl has", "columns: question, answer"),
        ({"prompt": "question", "output": "answer"}, "no format has all of prompt, output", "prompt, completion"),
        ({"prompt": "question"}, "columns (question, answer) are of no known format", "data.fields="),
        ({}, "columns (question, answer) are of no known format", "data.fields="),
    ],
)
def test_wrong_fields(fields: dict[str, str], what: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse({"question": "Hi", "answer": "Ho"}, **fields)
    assert what in caught.value.what
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi"}, "completion is missing"),
        ({"prompt": "Hi", "completion": None}, "completion is null, not text"),
        ({"prompt": "Hi", "completion": 4}, "completion is a number (4), not text"),
        ({"prompt": "Hi", "completion": " \n"}, "completion is empty"),
        ({"prompt": ["Hi"], "completion": "Ho"}, "prompt is a list, not text"),
        ({"prompt": "Hi", "completion": "\ud83d"}, "completion holds half a character (\\ud83d)"),
    ],
)
def test_bad_pairs(row: dict[str, Any], message: str) -> None:
    good = {"prompt": "Hi", "completion": "Ho"}
    with pytest.raises(UserError) as caught:
        parse(good, row)
    assert caught.value.what == f"data/rows.jsonl, line 2: {message}"
    assert "data.skip_bad=true" in str(caught.value.hint)
    examples, _, bad = parse(good, row, skip=True)
    assert len(examples) == 1
    assert bad.findings() == [f"1 bad row left out: data/rows.jsonl, line 2: {message}"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("Hi", "messages is text, not a list of messages"),
        ([USER], "messages: no answer (no message of assistant)"),
        ([SYSTEM], "messages: no answer (no message of assistant)"),
        ([ANSWER], "messages: message 1 is of assistant, where user is due"),
        ([USER, USER, ANSWER], "messages: message 2 is of user, where assistant is due"),
        ([USER, ANSWER, SYSTEM], "messages: message 3 is of system, where user is due"),
        ([USER, {"role": "tool", "content": "4"}], "messages[1]: role 'tool' is not supported"),
        ([USER, ANSWER | {"tool_calls": [{}]}], "messages[1]: tool_calls is not supported"),
        ([USER, {"role": "assistant"}], "messages[1] has no content"),
        ([USER, {"role": "assistant", "content": ""}], "messages[1].content is empty"),
        ([USER, "Ho"], "messages[1] is text, not an object with role and content"),
    ],
)
def test_bad_messages(messages: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse({"messages": [USER, ANSWER]}, {"messages": messages})
    assert caught.value.what.startswith(f"data/rows.jsonl, line 2: {message}")


def test_bad_field_names_its_column() -> None:
    with pytest.raises(UserError, match=r"line 2: completion \(column answer\) is empty"):
        parse({"q": "Hi", "answer": "Ho"}, {"q": "Hi", "answer": ""}, prompt="q", completion="answer")


@pytest.mark.parametrize("label", [3, -1, True, None, "maybe", 0.5])
def test_bad_label(label: object) -> None:
    with pytest.raises(UserError, match=r"line 1: label is .* not 0, 1, 2 or entailment"):
        parse({"premise": "A", "hypothesis": "B", "label": label})


def test_last_question_is_left_out_and_counted() -> None:
    examples, findings, _ = parse({"messages": [USER, ANSWER, USER]}, {"messages": [USER, ANSWER]})
    assert [turns(example)[-1] for example in examples] == [("assistant", "Ho")] * 2
    assert findings == ["1 conversation ended with a question, which was left out"]


def test_mixed_formats_name_the_first_row_that_differs() -> None:
    pair, text = {"prompt": "Hi", "completion": "Ho"}, {"text": "Once"}
    with pytest.raises(UserError, match=r"line 3: has text, where the other rows have prompt and completion"):
        parse(pair, pair, text, pair, text, skip=True)


def test_a_bad_first_row_does_not_decide_the_format() -> None:
    full = {"prompt": "Hi", "completion": "Ho", "text": "HiHo"}
    with pytest.raises(UserError, match="line 1: completion is missing"):
        parse({"prompt": "Hi", "text": "Hi"}, full, full)


def test_a_stray_row_with_more_columns_does_not_decide_the_format() -> None:
    texts = [{"text": f"Once {number}"} for number in range(3)]
    examples, _, _ = parse({"text": "Twice", "prompt": "Hi", "completion": "Ho"}, *texts)
    assert [example.text for example in examples] == ["Twice", "Once 0", "Once 1", "Once 2"]
