"""`data prepare` from the command line: what it says and writes, and a user's mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Result
from tests.cli.test_bad_input import assert_refused

Run = Callable[..., Result]
ROOT = Path(__file__).parents[2]
KINDS = ("code", "documents", "nli", "chat")

RUST = """\
/// Doubles a number, which is kept.
pub fn twice(number: u32) -> u32 {
    number + number
}

/// Halves a number, rounding down.
pub fn half(number: u32) -> u32 {
    number / 2
}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "my crate"
    folder.mkdir()
    (folder / "lib.rs").write_text(RUST)
    (folder / "LICENSE").write_text("MIT")
    return folder


def test_says_how_many_rows_what_was_left_out_and_what_to_type_next(run_cli: Run, source: Path) -> None:
    result = run_cli("data", "prepare", "code", source, "--level", "item")
    assert result.code == 0, result.err
    rows = Path("prepared/my crate/rows.jsonl").read_text()
    assert [json.loads(line)["name"] for line in rows.splitlines()] == ["twice", "half"]
    lines = result.out.splitlines()
    assert lines[0] == f"  2 rows of 1 file, {len(rows)} bytes"
    assert lines[1] == "  left out  licence files: 1 (LICENSE)"
    data = "--data 'prepared/my crate/rows.jsonl' --set data.group=source"
    assert lines[-2:] == [
        f"  next      python cli.py data check {data}",
        f"            python cli.py train {data}",
    ]


def test_output_and_force(run_cli: Run, source: Path) -> None:
    arguments = ("data", "prepare", "code", source, "--output", "out", "--as", "instruction")
    assert run_cli(*arguments).code == 0
    before = Path("out/rows.jsonl").read_bytes()
    (source / "more.rs").write_text(RUST.replace("twice", "double"))
    assert_refused(run_cli(*arguments), "out: holds prepared rows already", "--force")
    assert Path("out/rows.jsonl").read_bytes() == before
    assert run_cli(*arguments, "--force").code == 0
    assert len(Path("out/rows.jsonl").read_text().splitlines()) == 3
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("x")
    result = run_cli("data", "prepare", "code", source, "--output", "mine", "--force")
    assert_refused(result, "mine: exists already", "--output")


def test_the_name_of_the_folder_one_stands_in(run_cli: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    assert run_cli("data", "prepare", "code", ".").code == 0
    assert (source / "prepared" / "my crate" / "rows.jsonl").exists()
    # what was prepared there is no source the next time
    before = (source / "prepared" / "my crate" / "manifest.json").read_bytes()
    assert run_cli("data", "prepare", "code", ".", "--force").code == 0
    assert (source / "prepared" / "my crate" / "manifest.json").read_bytes() == before


def test_infill_with_markers_of_a_model(run_cli: Run, source: Path) -> None:
    markers = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    result = run_cli(
        "data", "prepare", "code", source / "lib.rs", "--as", "infill", "--infill-markers", *markers, "--output", "out"
    )
    assert result.code == 0, result.err
    for line in Path("out/rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        before, _, rest = row["prompt"].removeprefix(markers[0]).partition(markers[1])
        assert before + row["completion"] + rest.removesuffix(markers[2]) in RUST


@pytest.mark.parametrize("kind", KINDS)
def test_no_such_source(kind: str, run_cli: Run, tmp_path: Path) -> None:
    assert_refused(
        run_cli("data", "prepare", kind, "nowhere"), "nowhere: no such file or folder", folder=tmp_path / "prepared"
    )


def test_no_code(run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("hello")
    result = run_cli("data", "prepare", "code", "docs")
    assert_refused(result, "docs: no code found", "files of other kinds 1", folder=tmp_path / "prepared")


def test_an_unknown_language(run_cli: Run, source: Path, tmp_path: Path) -> None:
    result = run_cli("data", "prepare", "code", source, "--languages", "ruts")
    assert_refused(result, "'ruts' is not a known language", "did you mean rust?", folder=tmp_path / "prepared")


def test_nothing_fits(run_cli: Run, source: Path) -> None:
    result = run_cli("data", "prepare", "code", source, "--min-chars", 5000, "--level", "item")
    assert_refused(result, "no row came out of it", "items shorter than 5,000 characters 2")


def test_instructions_of_files(run_cli: Run, source: Path) -> None:
    result = run_cli("data", "prepare", "code", source, "--as", "instruction", "--level", "file")
    assert_refused(result, "--as instruction --level file")


@pytest.mark.parametrize("command", [(), *((kind,) for kind in KINDS)])
def test_help_loads_no_parser(command: tuple[str, ...]) -> None:
    code = (
        "import runpy, sys\nsys.argv = ['cli.py', 'data', 'prepare', *sys.argv[1:], '--help']\n"
        "try:\n    runpy.run_path('cli.py', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "print('LOADED', *{name.split('.')[0] for name in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    text, _, loaded = result.stdout.rpartition("LOADED")
    assert "usage: python cli.py data prepare" in text
    assert set(loaded.split()) & {"tree_sitter", "transformers", "numpy", "rich", "data", "pydantic", "bs4"} == set()


def test_prepared_rows_are_trained_on_with_a_file_on_one_side(train: Run, run_cli: Run, tmp_path: Path) -> None:
    source = tmp_path / "crate"
    source.mkdir()
    for number in range(8):
        text = RUST.replace("twice", f"times_{number}").replace("half", f"part_{number}").replace("/ 2", f"/ {number}")
        (source / f"m{number}.rs").write_text(text)
    assert run_cli("data", "prepare", "code", source, "--level", "item", "--output", "rows").code == 0
    result = train("--data", "rows/rows.jsonl", "--set", "data.group=source", "--set", "data.validation=0.4")
    assert result.code == 0, result.err
    assert Path("run/adapters").is_dir()


def test_help_names_the_languages_there_are() -> None:
    from core import prepare_arguments
    from data.prepare.code_languages import LANGUAGES

    assert tuple(LANGUAGES) == prepare_arguments.LANGUAGES
