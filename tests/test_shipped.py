"""What ships beside the code is what it says: samples, settings page, README commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli import build_parser
from core.settings import resolve

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "data" / "samples"


def read_rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


def test_expert_questions() -> None:
    rows = read_rows("expert.jsonl")
    assert len(rows) == 219
    assert len({row["prompt"] for row in rows}) == 219
    assert all(row.keys() == {"prompt", "completion"} for row in rows)


def test_nli_rows_hold_readable_answers_with_balanced_labels() -> None:
    rows = read_rows("nli.jsonl")
    assert len(rows) == 400
    answers = [json.loads(str(row["completion"])) for row in rows]
    assert all(answer.keys() == {"thought_process", "predicted_label"} for answer in answers)
    assert [answer["predicted_label"] for answer in answers] == [row["label"] for row in rows]
    counts = [sum(row["label"] == label for row in rows) for label in (0, 1, 2)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("script", ["data/samples/make_nli.py", "docs/make_settings.py"])
def test_generated_files_are_what_their_scripts_make(script: str) -> None:
    subprocess.run([sys.executable, ROOT / script, "--check"], check=True, cwd=ROOT)


@pytest.mark.parametrize("page", ["README.md", "docs/runs.md", "docs/data.md", "docs/parity.md"])
def test_commands_on_the_pages_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"^python cli\.py (\w[^#\n]*)", text, flags=re.MULTILINE)
    assert commands or page != "README.md"
    for command in commands:
        arguments = [part.strip("\"'") for part in command.split() if part != "…"]
        build_parser().parse_args(arguments)


def test_quickstart_is_small_enough_for_two_cores() -> None:
    config = resolve(presets=["quickstart"]).config
    assert config.model.bits == 16 and config.data.max_tokens <= 256 and config.train.epochs <= 3
