from __future__ import annotations

import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from core.errors import UserError
from data.sources import BadRows, Row, open_source

ROWS = [{"prompt": "2+2?", "completion": "4"}, {"prompt": "Ü, \u2028 and\nmore", "completion": "“yes”"}]


@dataclass
class Read:
    """A source whose rows were gone over once and then read."""

    name: str
    splits: dict[str, list[Row]]
    bad: BadRows


def read(path: object, *, skip: bool = False) -> Read:
    source, bad = open_source(str(path)), BadRows(skip=skip)
    num_rows = sum(1 for _ in source.read(bad))
    splits = {split: list(rows.read(BadRows(skip=True))) for split, rows in source.splits.items()}
    assert num_rows == sum(map(len, splits.values()))  # every time the same
    return Read(source.name, splits, bad)


def values(source: Read, split: str = "train") -> list[dict[str, Any]]:
    return [dict(row.values) for row in source.splits[split]]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(delimiter: str) -> bytes:
    quoted = '"Ü, \u2028 and\nmore"'
    return f"prompt{delimiter}completion\n2+2?{delimiter}4\n\n{quoted}{delimiter}“yes”\n".encode()


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", lines(ROWS), [1, 2]),
        ("a.ndjson", b"\n  \n" + lines(ROWS).replace(b"\n", b"\r\n"), [3, 4]),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(ROWS), [1, 2]),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0), [1, 2]),
        ("list.json", json.dumps(ROWS, indent=2).encode(), [1, 2]),
        ("wrapped.json", json.dumps({"version": 1, "data": ROWS}).encode(), [1, 2]),
        ("really_lines.json", lines(ROWS), [1, 2]),
        ("a.csv", b"\xef\xbb\xbf" + as_csv(","), [2, 4]),
        ("a.tsv", as_csv("\t"), [2, 4]),
    ],
)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, name: str, content: bytes, numbers: list[int]) -> None:
    (tmp_path / name).write_bytes(content)
    source = read(tmp_path / name)
    assert values(source) == ROWS
    assert [row.number for row in source.splits["train"]] == numbers
    assert [row.origin for row in source.splits["train"]] == [f"{name}:{number}" for number in numbers]
    assert source.name == name


def test_parquet_keeps_text_nulls_and_nested_messages(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}], None]
    pd.DataFrame({"messages": messages, "label": pd.array([1, None], dtype="Int64")}).to_parquet(tmp_path / "a.parquet")
    source = read(tmp_path / "a.parquet")
    assert values(source) == [{"messages": messages[0], "label": 1}, {"messages": None, "label": None}]
    assert source.splits["train"][1].place.endswith("a.parquet, row 2")


def test_csv_with_semicolons(tmp_path: Path) -> None:
    """As Excel writes it where the comma is for decimals; a file with commas in its head stays one with commas."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt;completion\r\nHow, then?;0,5\r\n"Here; there";x\r\n')
    rows = list(open_source(str(path)).read(BadRows(skip=False)))
    assert [dict(row.values) for row in rows] == [
        {"prompt": "How, then?", "completion": "0,5"},
        {"prompt": "Here; there", "completion": "x"},
    ]
    path.write_text("prompt,completion;b\nHow?,so;so\n")
    rows = list(open_source(str(path)).read(BadRows(skip=False)))
    assert [dict(row.values) for row in rows] == [{"prompt": "How?", "completion;b": "so;so"}]


def test_long_csv_cell(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(values(read(tmp_path / "a.csv"))[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b\n', "line 3: not JSON (unterminated string starting at column 10)"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: a list, not an object with fields"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: not UTF-8 (byte 0xe9 at byte 11 of the line)"),
        ("a.csv", b"text,label\na,1\nb\n", "line 3: 1 cell for 2 columns"),
        ("a.json", b'[{"text": "a"}, 7]', "row 2: a number (7), not an object with fields"),
    ],
)
def test_bad_row_is_named_or_left_out(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.what == f"{path}, {message}"
    assert caught.value.hint is not None
    assert "data.skip_bad=true" in caught.value.hint

    source = read(path, skip=True)
    assert [row["text"] for row in values(source)] == ["a"]
    assert source.bad.findings() == [f"1 bad row left out: {path}, {message}"]


def test_only_the_first_three_bad_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "oops\n" * 5)
    (finding,) = read(tmp_path / "a.jsonl", skip=True).bad.findings()
    assert finding.startswith("5 bad rows left out: ")
    assert finding.count("not JSON") == 3
    assert finding.endswith("; and 2 more")
    assert "line 5" not in finding


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), ["is UTF-16", "iconv"]),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), ["is UTF-16"]),
        ("a.csv", b"text\nok\n\xff\xe9\n", ["line 3: not UTF-8"]),
        ("a.csv", b'text\nok\n"open\nmore\n', ["line 3: not CSV"]),
        ("a.json", b'{"a": [], "b": []}', ["exactly one list"]),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', ["line 2: not JSON (expecting ':' delimiter at column 9)"]),
        ("a.jsonl.gz", b"plain", ["not a whole gzip file"]),
        ("a.parquet", b"PAR1 no", ["not Parquet"]),
        ("a.xlsx", b"PK", [".xlsx is not a format", "Parquet"]),
        ("empty.jsonl", b"", ["no rows"]),
        ("empty.csv", b"text\n", ["no rows"]),
        ("blank.json", b" \n", ["no rows"]),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, skip=True)
    assert name in caught.value.what
    for part in parts:
        assert part in str(caught.value)


def test_folder_brings_its_splits(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "dev.csv").write_bytes(as_csv(","))
    (tmp_path / "test.json").write_text(json.dumps(ROWS[:1]))
    (tmp_path / "notes.txt").write_text("nothing")
    source = read(tmp_path)
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 2, "validation": 2, "test": 1}
    assert source.splits["validation"][1].origin == "dev.csv:4"
    assert source.name == tmp_path.name


def test_folder_without_train_file_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(UserError, match=r"no train file in this folder \(it holds valid\.jsonl\)"):
        read(tmp_path)


def test_two_files_for_one_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
    for name in ("val.jsonl", "valid.csv"):
        (tmp_path / name).write_bytes(lines(ROWS))
    with pytest.raises(UserError, match=r"val\.jsonl and valid\.csv are both validation files"):
        read(tmp_path)


def test_what_looks_like_a_path_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))  # has no load_dataset
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "expert.jsonl").write_bytes(lines(ROWS))
    for path in ("expert.jsonl", "./expert", "sets/expert", "a/b/c", "~/no/such", "a\\b", "C:/x"):
        with pytest.raises(UserError, match="does not exist"):
            read(path)
    with pytest.raises(UserError, match=r"did you mean sets/expert\.jsonl\?"):
        read("sets/expert.json")


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None) -> dict[str, list[dict[str, Any]]]:
        asked.append((name, config))
        return {"train": ROWS, "dev": ROWS[:1], "extra": []}

    class DatasetsError(Exception):
        pass

    fake = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = read("owner/name:main")
    assert asked == [("owner/name", "main")]
    assert values(source) == ROWS
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 2, "validation": 1}
    assert source.splits["train"][1].place == "owner/name/train, row 2"


def test_unreachable_hub_data_set() -> None:
    with pytest.raises(UserError, match="no file or folder here, and the hub gave no data set") as caught:
        read("no-such-owner/no-such-set")
    assert "network" in str(caught.value.hint)


def test_a_home_folder_of_nobody_is_a_name() -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source("~nobody-of-this-name/rows.jsonl")
