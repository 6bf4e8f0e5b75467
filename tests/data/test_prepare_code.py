"""`data prepare code`: the items of eight languages as rows, character by character."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from data import workers
from data.prepare import code
from data.prepare.code import make_kind
from data.prepare.common import Record, write_prepared
from tests.data.code_repositories import FILES, OPTIONS, PYTHON, left_out, prepare, write


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write(tmp_path / "repository", FILES)


def one(rows: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (row,) = (row for row in rows if row["kind"] == kind and row["name"] == name)
    return row


# --- items, by hand ---------------------------------------------------------------------------------------------------


def test_a_rust_impl_block_with_doc_comment_and_attribute(repository: Path) -> None:
    rows, _ = prepare(repository, level="item", languages="rust")
    assert one(rows, "impl", "Point<T>") == {
        "prompt": (
            "/// What every point can do.\n#[allow(dead_code)]\n// unsure about the bounds\nimpl<T: Copy> Point<T> {"
        ),
        "completion": (
            "\n    /// The distance to the right,\n    /// as a copy of it.\n    #[must_use]\n"
            "    pub fn right(&self) -> T {\n        self.x\n    }\n}"
        ),
        "language": "rust",
        "kind": "impl",
        "name": "Point<T>",
        "line": 20,
        "source": "lib.rs",
    }


def test_a_rust_method_stands_under_its_impl(repository: Path) -> None:
    rows, _ = prepare(repository, level="item", languages="rust")
    assert one(rows, "method", "Point<T>::right") == {
        "prompt": (
            "impl<T: Copy> Point<T> {\n    /// The distance to the right,\n    /// as a copy of it.\n    #[must_use]\n"
            "    pub fn right(&self) -> T {"
        ),
        "completion": "\n        self.x\n    }",
        "language": "rust",
        "kind": "method",
        "name": "Point<T>::right",
        "line": 24,
        "source": "lib.rs",
    }


def test_a_decorated_python_method_with_docstring(repository: Path) -> None:
    rows, _ = prepare(repository, level="item", languages="python")
    method = one(rows, "method", "Box.doubled")
    assert method["prompt"] == (
        "class Box(object):\n    # computed once\n    @functools.cached_property\n    @staticmethod\n"
        '    def doubled(self) -> int:\n        """Twice the thing that is in it.\n\n        More:\n'
        '            indented\n        """'
    )
    assert method["completion"] == "\n        twice = self.thing * 2\n\n        return twice"
    assert PYTHON.splitlines()[method["line"] - 1] == "    def doubled(self) -> int:"
    function = one(rows, "function", "fetch")
    assert (function["prompt"], function["completion"]) == (
        "async def fetch(\n    url,\n):",
        "\n    return await get(url) or default",
    )
    assert one(rows, "class", "Box")["prompt"].endswith('one thing.\n    """')


def test_a_python_method_as_an_instruction(repository: Path) -> None:
    """The description goes to the prompt, the code comes back without it, at the margin."""
    rows, _ = prepare(repository, form="instruction", languages="py")
    method = one(rows, "method", "Box.doubled")
    assert method["prompt"] == (
        "Write a Python method of `class Box(object)`.\n\n"
        "Twice the thing that is in it.\n\nMore:\n    indented\n\n"
        "Signature:\n\n```python\ndef doubled(self) -> int:\n```"
    )
    assert method["completion"] == (
        "@functools.cached_property\n@staticmethod\ndef doubled(self) -> int:\n    twice = self.thing * 2\n\n"
        "    return twice"
    )


def test_rust_instructions(repository: Path) -> None:
    rows, _ = prepare(repository, form="instruction", languages="rust")
    struct = one(rows, "struct", "Point")
    assert struct["prompt"] == (
        "Write a Rust struct.\n\nA point in the plane.\n\nIt is small.\n\n"
        "Declaration:\n\n```rust\npub struct Point<T>\n```"
    )
    assert struct["completion"] == (
        "#[derive(Debug, Clone)]\npub struct Point<T> {\n    /// To the right.\n    x: T,\n}"
    )
    block = one(rows, "impl", "Point<T>")
    assert block["prompt"].startswith("Write a Rust impl block.\n\nWhat every point can do.\n\nDeclaration:")
    assert block["completion"].startswith("#[allow(dead_code)]\nimpl<T: Copy> Point<T> {\n    /// The distance")
    assert [row["name"] for row in rows] == ["Point", "Point<T>", "Point<T>::right", "sum"]


def test_a_signature_of_several_lines_loses_the_indentation(tmp_path: Path) -> None:
    text = (
        "impl Fsm {\n    /// Does one more step.\n    fn step(\n        &self,\n        at: usize,\n    ) -> bool {\n"
        "        at > self.end\n    }\n}\n"
    )
    rows, _ = prepare(write(tmp_path, {"a.rs": text}), form="instruction")
    assert rows[0]["prompt"] == (
        "Write a Rust method of `impl Fsm`.\n\nDoes one more step.\n\n"
        "Signature:\n\n```rust\nfn step(\n    &self,\n    at: usize,\n) -> bool\n```"
    )
    assert rows[0]["completion"] == "fn step(\n    &self,\n    at: usize,\n) -> bool {\n    at > self.end\n}"


EXPECTED = {
    "lib.rs": [
        ("struct", "Point", 12),
        ("impl", "Point<T>", 20),
        ("method", "Point<T>::right", 24),
        ("impl", "fmt::Display for Point<i32>", 29),
        ("method", "Point<i32>::fmt", 30),
        ("macro", "sum", 36),
        ("function", "is_right", 47),
    ],
    "box.py": [
        ("class", "Box", 9),
        ("method", "Box.__init__", 14),
        ("method", "Box.doubled", 20),
        ("function", "fetch", 31),
    ],
    "store.ts": [
        ("class", "Store", 3),
        ("method", "Store.find", 9),
        ("function", "add", 15),
        ("interface", "Options", 20),
        ("function", "hidden", 25),
    ],
    "queue.js": [("function", "exports.double", 4), ("class", "Queue", 8), ("method", "Queue.next", 10)],
    "stack.go": [("struct", "Stack", 4), ("method", "Stack.Push", 10), ("function", "max", 14)],
    "Point.java": [
        ("class", "Point", 4),
        ("method", "Point.twice", 11),
        ("enum", "Point.Side", 17),
        ("method", "Point.Side.number", 20),
    ],
    "list.h": [("struct", "list", 5), ("struct", "size_type", 10), ("function", "push", 15)],
    "shapes.cpp": [("class", "Circle", 5), ("method", "Circle::area", 10), ("method", "Count::all", 16)],
}


@pytest.mark.parametrize("name", FILES)
def test_the_items_of_each_language(name: str, repository: Path) -> None:
    rows, _ = prepare(repository, level="item")
    found = [(row["kind"], row["name"], row["line"]) for row in rows if row["source"] == name]
    assert found == EXPECTED[name]
    assert {row["language"] for row in rows if row["source"] == name} == {code.language_of(name, b"").name}  # type: ignore[union-attr]


PROMPTS = {
    "exports.double": "/** Doubles the given number. */\nexports.double = function (x) {",
    "Store.find": (
        "export class Store<T> extends Base {\n  /**\n   * Finds a value by its name.\n   * @param name its name\n"
        "   */\n  @logged()\n  find(name: string): T | undefined {"
    ),
    "add": ("/** Adds two numbers together. */\nexport const add = async (a: number, b: number): Promise<number> => {"),
    "Stack.Push": "// Push puts a value on top.\n// It never fails.\nfunc (s *Stack[T]) Push(value T) {",
    "max": "func max(a, b int) int {",
    "Point.Side.number": "public final class Point {\n  enum Side {\n    int number() {",
    "push": ("/*\n * Adds a number at the front.\n */\nstatic struct list *\npush(struct list *list, int number)\n{"),
    "size_type": "/* How large a thing is. */\ntypedef struct {",
    "Circle::area": (
        "template <typename T>\nclass Circle : public Shape {\n  /// The area of it all.\n  T area() const override {"
    ),
}


def test_prompts_hold_the_signature_with_all_that_belongs_to_it(repository: Path) -> None:
    rows, _ = prepare(repository, level="item")
    assert {row["name"]: row["prompt"] for row in rows if row["name"] in PROMPTS} == PROMPTS


DESCRIPTIONS = {
    "Store.find": "Finds a value by its name.\n@param name its name",
    "exports.double": "Doubles the given number.",
    "Stack.Push": "Push puts a value on top.\nIt never fails.",
    "Point.twice": "Gives the number back, doubled.\n\n@return twice of it",
    "push": "Adds a number at the front.",
    "Circle::area": "The area of it all.",
    "Count::all": "Counts the shapes in a list.",
}
ANSWERS = {
    "Point.twice": "@Override\n@Deprecated\npublic int twice() {\n  return 2 * x;\n}",
    "Store.find": "@logged()\nfind(name: string): T | undefined {\n  return this.values.get(name);\n}",
    "push": (
        "static struct list *\npush(struct list *list, int number)\n{\n    list->head = number;\n    return list;\n}"
    ),
    "list": "struct list {\n    int head;\n};",
}


def test_instructions_of_each_language(repository: Path) -> None:
    rows, record = prepare(repository, form="instruction")
    described = {row["name"]: row["prompt"].partition("\n\n")[2].rpartition("\n\nSignature:")[0] for row in rows}
    assert {name: described[name] for name in DESCRIPTIONS} == DESCRIPTIONS
    assert one(rows, "struct", "size_type")["prompt"] == (
        "Write a C struct `size_type`.\n\nHow large a thing is.\n\nDeclaration:\n\n```c\ntypedef struct\n```"
    )
    answers = {row["name"]: row["completion"] for row in rows}
    assert {name: answers[name] for name in ANSWERS} == ANSWERS
    assert record.left_out["items without a doc comment"] == 11
    assert left_out(record)["items with an empty body"] == ["box.py:37"]


# --- what holds for every row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_prompt_and_completion_are_the_source(name: str, repository: Path) -> None:
    rows, _ = prepare(repository)
    texts, _ = prepare(repository, form="text")
    keys = [(row["kind"], row["name"]) for row in texts]
    mine = [row for row in rows if row["source"] == name]
    assert mine
    for row in mine:
        joined = row["prompt"] + row["completion"]
        assert joined == texts[keys.index((row["kind"], row["name"]))]["text"]
        assert row["completion"][0].isspace() and not row["prompt"][-1].isspace()
        if row["kind"] == "file":
            header = "# Copyright (c) 2021 Ada Example. All rights reserved.\n\n"
            assert FILES[name].replace(header, "").rstrip().endswith(joined)
        elif "." not in row["name"] and row["kind"] != "method":
            assert joined in FILES[name]


@pytest.mark.parametrize("markers", [("<PREFIX>", "<SUFFIX>", "<MIDDLE>"), ("<|a|>", "<|b|>", "<|c|>")])
def test_infill_pieces_assemble_again(markers: tuple[str, str, str], repository: Path) -> None:
    rows, _ = prepare(repository, form="infill", infill_markers=markers, min_chars=10)
    texts = {row["text"] for row in prepare(repository, form="text", min_chars=10)[0]}
    assert {row["language"] for row in rows} == set(code.LANGUAGES)
    for row in rows:
        before, _, rest = row["prompt"].removeprefix(markers[0]).partition(markers[1])
        assert row["prompt"].startswith(markers[0]) and rest.endswith(markers[2])
        behind = rest.removesuffix(markers[2])
        middle = row["completion"]
        assert before + middle + behind in texts
        assert 20 <= len(middle) <= (len(before + middle + behind)) / 2
        assert middle == middle.strip()
        assert before.rpartition("\n")[2].strip() == "" and behind[:1] in ("", "\n"), "whole lines"


def test_only_whole_statements_are_cut_out(tmp_path: Path) -> None:
    body = "    first_value = compute(1)\n    second_value = compute(2)\n    third_value = compute(3)\n"
    source = write(
        tmp_path, {"a.py": f"def run(compute):\n{body}    return first_value + second_value * third_value\n"}
    )
    rows, _ = prepare(source, form="infill", level="item")
    assert rows[0]["completion"] in {
        *(line.strip() for line in body.splitlines()),
        "first_value = compute(1)\n    second_value = compute(2)",
        "second_value = compute(2)\n    third_value = compute(3)",
        "return first_value + second_value * third_value",
    }


MANY = {f"pkg{n % 7}/m{n}.py": f"def f{n % 150}(a):\n    return a + {n % 150} * a\n" for n in range(200)}
"""Enough files for the workers to be started, with duplicates across them."""


def test_the_same_bytes_twice_and_in_worker_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", MANY)
    outputs = []
    for number, num_cores in enumerate((1, 1, 2)):
        monkeypatch.setattr(workers, "num_cores", lambda num=num_cores: num)
        record = Record()
        kind = make_kind(OPTIONS)
        output = tmp_path / f"out{number}"
        manifest = write_prepared(kind.samples(source, record), output, kind=kind, record=record)
        assert manifest.num_rows == 150
        assert manifest.left_out["exact duplicates"]["number"] == 250
        outputs.append([(output / name).read_bytes() for name in ("rows.jsonl", "manifest.json")])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_worker_that_dies_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", MANY)
    monkeypatch.setattr(workers, "num_cores", lambda: 2)
    monkeypatch.setattr(code, "_read_batch", _end)
    record = Record()
    with pytest.raises(UserError, match="worker process that prepares the data ended unexpectedly"):
        write_prepared(
            make_kind(OPTIONS).samples(source, record), tmp_path / "out", kind=make_kind(OPTIONS), record=record
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _end(files: object, settings: object) -> None:
    os._exit(1)


def test_the_manifest_names_sources_settings_and_grammars(repository: Path, tmp_path: Path) -> None:
    write(repository, {"README.md": "hello"})
    record = Record()
    kind = make_kind({**OPTIONS, "languages": "go,rust", "form": "infill"})
    output = tmp_path / "out"
    write_prepared(kind.samples(repository, record), output, kind=kind, record=record)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["rows"]["sha256"] == hashlib.sha256((output / "rows.jsonl").read_bytes()).hexdigest()
    assert [entry["path"] for entry in manifest["sources"]] == ["lib.rs", "stack.go"]
    for entry in manifest["sources"]:
        content = (repository / entry["path"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert entry["rows"] > 0
    assert manifest["settings"] == {
        "as": "infill",
        "infill_markers": ["<PREFIX>", "<SUFFIX>", "<MIDDLE>"],
        "level": "both",
        "languages": ["rust", "go"],
        "tests": True,
        "max_chars": 6000,
        "min_chars": 20,
    }
    assert set(manifest["tools"]) == {"tree-sitter", "tree-sitter-rust", "tree-sitter-go"}
    assert manifest["group"] == "source"
    assert str(tmp_path) not in (output / "manifest.json").read_text() + (output / "rows.jsonl").read_text()
