"""`data prepare chat`: exports of several programs -> conversations that can be trained on."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from data.formats import survey
from data.prepare.chat import make_kind
from data.prepare.common import Record, write_prepared
from data.sources import BadRows, Row


def prepare(path: Path, **options: Any) -> tuple[list[dict[str, Any]], Record]:
    record = Record()
    samples = make_kind(options).samples(path, record)
    return [{**sample.values, "source": sample.source} for sample in samples], record


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def spoken(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Each row as `u: text`, `a: text`, …"""
    return [[f"{turn['role'][0]}: {turn['content']}" for turn in row["messages"]] for row in rows]


# --- ChatGPT ----------------------------------------------------------------------------------------------------------


def node(parent: str | None, role: str, *parts: Any, **message: Any) -> dict[str, Any]:
    content = {"content_type": "text", "parts": list(parts)}
    return {"parent": parent, "children": [], "message": {"author": {"role": role}, "content": content, **message}}


CHATGPT: dict[str, Any] = {
    "title": "not used",
    "conversation_id": "c-1",
    "current_node": "a3",
    "mapping": {
        "root": {"message": None, "parent": None, "children": ["s"]},
        "s": node("root", "system", "", metadata={"is_visually_hidden_from_conversation": True}),
        "u1": node("s", "user", "Old wording"),
        "a1": node("u1", "assistant", "Old answer"),
        "u2": node("s", "user", "What is\ntwo and two?"),
        "think": {
            "parent": "u2",
            "message": {"author": {"role": "assistant"}, "content": {"content_type": "thoughts", "thoughts": []}},
        },
        "call": node("think", "assistant", "2+2", recipient="python"),
        "tool": node("call", "tool", "4"),
        "a2": node("tool", "assistant", "Four\ue200cite\ue202turn0\ue201.", recipient="all"),
        "u3": node("a2", "user", "Sure?"),
        "a3": node("u3", "assistant", "Yes."),
        "a4": node("u3", "assistant", "Another answer, not chosen."),
    },
}


def test_chatgpt_follows_the_path_that_was_shown(tmp_path: Path) -> None:
    rows, record = prepare(write(tmp_path / "conversations.json", [CHATGPT]))
    assert spoken(rows) == [["u: What is\ntwo and two?", "a: Four.", "u: Sure?", "a: Yes."]]
    assert rows[0]["conversation"] == "c-1"
    assert rows[0]["source"] == "conversations.json"
    assert len(record.left_out) == 0


def test_chatgpt_without_a_current_node_ends_at_the_last_leaf(tmp_path: Path) -> None:
    rows, _ = prepare(write(tmp_path / "a.json", [{**CHATGPT, "current_node": None}]))
    assert spoken(rows)[0][-1] == "a: Another answer, not chosen."


def test_a_circle_in_the_tree_ends(tmp_path: Path) -> None:
    mapping = {"a": node("b", "user", "Hi"), "b": node("a", "assistant", "Ho")}
    rows, _ = prepare(write(tmp_path / "a.json", [{"mapping": mapping, "current_node": "b"}]))
    assert spoken(rows) == [["u: Hi", "a: Ho"]]


def test_chatgpts_custom_instructions_are_the_system_message(tmp_path: Path) -> None:
    content = {
        "content_type": "user_editable_context",
        "user_profile": "I am a cook.",
        "user_instructions": "Be brief.",
    }
    message = {
        "author": {"role": "user"},
        "content": content,
        "metadata": {"is_visually_hidden_from_conversation": True},
    }
    mapping = {
        "s": {"parent": None, "message": message},
        "u": node("s", "user", "Hi"),
        "a": node("u", "assistant", "Ho"),
    }
    path = write(tmp_path / "a.json", [{"mapping": mapping, "current_node": "a"}])
    assert spoken(prepare(path)[0]) == [["s: I am a cook.\n\nBe brief.", "u: Hi", "a: Ho"]]
    assert spoken(prepare(path, system="drop")[0]) == [["u: Hi", "a: Ho"]]


def test_a_conversation_ends_before_the_first_image(tmp_path: Path) -> None:
    mapping = {
        "u1": node(None, "user", "Hi"),
        "a1": node("u1", "assistant", "Ho"),
        "u2": node("a1", "user", {"content_type": "image_asset_pointer"}, "What is this?"),
        "a2": node("u2", "assistant", "A cat."),
    }
    mapping["u2"]["message"]["content"]["content_type"] = "multimodal_text"
    rows, record = prepare(write(tmp_path / "a.json", [{"mapping": mapping, "current_node": "a2"}]))
    assert spoken(rows) == [["u: Hi", "a: Ho"]]
    assert record.noted["conversations cut before an image or a file"] == 1


# --- the others -------------------------------------------------------------------------------------------------------


def test_claude(tmp_path: Path) -> None:
    messages = [
        {"sender": "human", "text": "Sum it up.", "attachments": [{"extracted_content": "A long text."}], "files": []},
        {
            "sender": "assistant",
            "text": "flat",
            "content": [
                {"type": "thinking", "thinking": "Hm."},
                {"type": "text", "text": "Here:"},
                {"type": "tool_use", "name": "x"},
                {"type": "text", "text": "It is long."},
            ],
        },
        {"sender": "human", "text": "Thanks.", "content": []},
        {"sender": "assistant", "text": "```\nThis block is not supported on your current device yet.\n```\nWelcome."},
    ]
    rows, _ = prepare(write(tmp_path / "a.json", [{"uuid": "u-1", "name": "n", "chat_messages": messages}]))
    assert spoken(rows) == [["u: A long text.\n\nSum it up.", "a: Here:\n\nIt is long.", "u: Thanks.", "a: Welcome."]]
    assert rows[0]["conversation"] == "u-1"


def test_claude_with_branches(tmp_path: Path) -> None:
    names = [("1", "0", "human", "Hi"), ("2", "1", "assistant", "No"), ("3", "1", "assistant", "Ho")]
    messages = [{"uuid": a, "parent_message_uuid": b, "sender": c, "text": d} for a, b, c, d in names]
    record = {"uuid": "u", "chat_messages": messages, "current_leaf_message_uuid": "2"}
    assert spoken(prepare(write(tmp_path / "a.json", record))[0]) == [["u: Hi", "a: No"]]


SHAREGPT = {"id": "s", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
OPENAI = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]}]
}


@pytest.mark.parametrize(
    "value", [SHAREGPT, [SHAREGPT], OPENAI, OPENAI["messages"], [OPENAI], {"conversations": [OPENAI]}]
)
def test_the_plain_formats(tmp_path: Path, value: object) -> None:
    assert spoken(prepare(write(tmp_path / "a.json", value))[0]) == [["u: Hi", "a: Ho"]]


def test_jsonl_names_conversations_without_an_id_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(SHAREGPT) + "\n\n" + json.dumps(OPENAI).replace("Hi", "Hello") + "\n")
    rows, _ = prepare(tmp_path / "a.jsonl")
    assert [row["conversation"] for row in rows] == ["s", "a.jsonl:2"]


def test_an_archive_as_it_was_sent(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("user.json", "{}")
        archive.writestr("conversations.json", json.dumps([CHATGPT]))
    rows, _ = prepare(tmp_path / "export.zip")
    assert [row["source"] for row in rows] == ["export.zip"]


# --- turns ------------------------------------------------------------------------------------------------------------


def chat(*turns: str) -> dict[str, Any]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["u: 1", "u: 2", "a: 3", "a: 4"], ["u: 1\n\n2", "a: 3\n\n4"]),
        (["a: Hello!", "u: 1", "a: 2", "u: 3"], ["u: 1", "a: 2"]),
        (["u: 1", "a:  ", "u: 2", "a: 3"], ["u: 1\n\n2", "a: 3"]),
        (["u: 1", "t: x", "a: 2"], ["u: 1", "a: 2"]),
        (["s: A", "s: B", "u: 1", "a: 2", "s: late", "u: 3", "a: 4"], ["s: A\n\nB", "u: 1", "a: 2", "u: 3", "a: 4"]),
    ],
)
def test_turns_are_tidied(tmp_path: Path, turns: list[str], expected: list[str]) -> None:
    rows, _ = prepare(write(tmp_path / "a.json", chat(*turns)))
    assert spoken(rows) == [expected]
    # and the data pipeline takes them as they are
    given = [Row(rows[0], "a", 1)]
    (parsed,), num_trimmed = survey(given, name="a", fields={}, group="conversation").parse(given, BadRows(skip=False))
    assert [f"{turn.role[0]}: {turn.content}" for turn in parsed.messages] == expected
    assert num_trimmed == 0


def test_windows_of_turns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", chat("s: S", *(f"{role}: {n}" for n in range(1, 6) for role in "ua")))
    assert len(prepare(path)[0]) == 1
    rows, _ = prepare(path, turns=2, overlap=1)
    assert [[text[3:] for text in row if text[0] == "u"] for row in spoken(rows)] == [
        ["1", "2"], ["2", "3"], ["3", "4"], ["4", "5"]
    ]  # fmt: skip
    assert all(row[0] == "s: S" for row in spoken(rows))
    rows, _ = prepare(path, turns=3, overlap=0)
    assert [[text[3:] for text in row if text[0] == "u"] for row in spoken(rows)] == [["1", "2", "3"], ["4", "5"]]
    assert len({row["conversation"] for row in rows}) == 1


# --- what is left out -------------------------------------------------------------------------------------------------


def test_what_is_left_out(tmp_path: Path) -> None:
    damaged = {"mapping": {"a": "x"}, "current_node": "a"}
    write(tmp_path / "a.json", [OPENAI, OPENAI, chat("u: only asked"), {"id": 1}, 5, damaged])
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.jsonl").write_text("nonsense\n")
    (tmp_path / "d.html").write_text("<p>")
    (tmp_path / "e.zip").write_bytes(b"PK")
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        archive.writestr("user.json", "{}")
    rows, record = prepare(tmp_path)
    assert len(rows) == 1
    numbers: Mapping[str, int] = {reason: entry["number"] for reason, entry in record.left_out.to_json().items()}
    assert numbers == {
        "archives that can't be read": 1,
        "archives without conversations.json": 1,
        "conversations that repeat another": 1,
        "conversations without an answer": 1,
        "damaged conversations": 1,
        "files that are no exports": 1,
        "files that are not JSON": 1,
        "lines that are not JSON": 1,
        "records that are no conversations": 2,
    }


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "conversations.json", [CHATGPT, SHAREGPT])
    for name in ("one", "two"):
        kind, record = make_kind({"turns": 1, "overlap": 0}), Record()
        manifest = write_prepared(kind.samples(path, record), tmp_path / name, kind=kind, record=record)
        assert manifest.num_rows == 3
    for file in ("rows.jsonl", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_mistakes_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--overlap 2 leaves nothing new in rows of --turns 2"):
        make_kind({"turns": 2, "overlap": 2})
    (tmp_path / "a.html").write_text("<p>")
    with pytest.raises(UserError, match="no kind of export"):
        prepare(tmp_path / "a.html")
    with pytest.raises(UserError, match="no such file"):
        prepare(tmp_path / "none.json")
