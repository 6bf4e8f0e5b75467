"""`compare` and `report` on two runs that were trained here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

import cli
from core.report.report import read_report
from core.workflow.report import find_run_data, texts_of
from tests.cli.conftest import Result, write_rows
from tests.core.pages import Page

RunCli = Callable[..., Result]


class HubRows(list[Any]):
    """Rows as `datasets` has them."""

    _fingerprint = "of-the-rows"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with the runs `slow` and `fast`, and their data."""
    folder = tmp_path_factory.mktemp("compared")
    write_rows(folder / "colours.jsonl", 40)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name, rate in (("slow", "1e-5"), ("fast", "2e-2")):
            arguments = [
                *("train", "--model", str(model), "--data", "colours.jsonl", "--bits", "16", "--device", "cpu"),
                *("--batch-size", "4", "--accumulation", "1", "--max-steps", "12", "--eval-every", "4"),
                *("--set", "data.validation=0.4", "--lr", rate, "--output", name),
            ]
            assert cli.main(arguments) == 0
    return folder


@pytest.fixture
def here(workplace: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> RunCli:
    """Commands where the runs are."""
    monkeypatch.chdir(workplace)
    return run_cli


@pytest.mark.usefixtures("drawn")
def test_compare_says_what_differs_and_which_is_better(here: RunCli, tmp_path: Path) -> None:
    result = here("compare", "slow", "fast", "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert re.search(r"optim\.lr +1e-05 +0\.02\n", result.out)
    assert re.search(r"best validation loss +\d\.\d{3} +\d\.\d{3}\*", result.out)
    assert "fast is better than slow: its validation loss is lower by" in result.out
    assert "validation rows" in result.out and "lora.rank" not in result.out
    assert sorted(os.listdir(tmp_path / "out")) == ["compare.csv", "compare.json", "compare.png"]


def test_compare_as_json_has_the_summaries_figures(here: RunCli, workplace: Path) -> None:
    before = sorted(os.listdir())
    result = here("compare", "slow", "fast", "--json")
    found: dict[str, Any] = json.loads(result.out)
    for run in found["runs"]:
        summary = json.loads((workplace / run["name"] / "training_summary.json").read_text())
        for name in ("base_val_loss", "best_val_loss", "gap", "gap_low", "best_step", "num_target_tokens"):
            assert run[name] == summary[name]
    pair = found["pairs"][0]
    losses = [run["best_val_loss"] for run in found["runs"]]
    assert pair["value"] == pytest.approx(losses[0] - losses[1], abs=1e-9) and pair["is_all"]
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "slow"], "nothing to be compared with"),
        (["compare", "slow", "slow/"], "the same run twice"),
        (["compare", "slow", "nowhere"], "nowhere: not a run folder"),
        (["compare", "slow", "fast", "--output", "slow"], "slow is not empty"),
        (["compare", "slow", "fast", "--output", "colours.jsonl"], "is a file"),
        (["report", "nowhere"], "nowhere: not a run folder"),
        (["report", "slow", "--output", "colours.jsonl"], "exists and is no report"),
        (["report", "slow", "--output", "fast"], "is a folder"),
        (["report", "slow", "--output", "colours.jsonl/page.html"], "can't be written"),
    ],
)
def test_a_mistake_ends_in_one_line_and_changes_nothing(here: RunCli, arguments: list[str], words: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    result = here(*arguments)
    assert result.code == 2 and words in result.err and "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) == 2  # what, and what to do
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_the_report_shows_the_run_with_its_data(here: RunCli, workplace: Path) -> None:
    result = here("report", "fast")
    assert result.code == 0, result.err
    page = Page((workplace / "fast" / "report.html").read_text())
    summary = json.loads((workplace / "fast" / "training_summary.json").read_text())
    verdict = page.section("verdict")
    assert verdict.all("p")[0].words in result.out
    assert f"{summary['base_val_loss']:.3f} → {summary['best_val_loss']:.3f}" in verdict.words
    rows = {row.children[0].words: row.children[1].words for row in page.section("data").all("tr")[1:]}
    assert rows == {"train": str(summary["num_train_rows"]), "validation": str(summary["num_val_rows"])}
    assert page.section("settings").all("tr")[1].children[0].words == "backend"
    assert here("report", "fast").code == 0  # over its own page


def test_a_report_says_that_the_data_changed_or_are_gone(here: RunCli, workplace: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copied"
    shutil.copytree(workplace / "fast", copy)
    data = workplace / "colours.jsonl"
    kept = data.read_text()
    try:
        data.write_text(kept.replace("red", "rot"))
        assert "The data changed since the run" in here("report", copy).out
        data.unlink()
        assert "The data are not here any more" in here("report", copy).out
    finally:
        data.write_text(kept)
    page = Page((copy / "report.html").read_text())
    assert "not here any more" in page.section("data").words


def test_data_of_the_hub_are_looked_at_where_they_are_cached(
    here: RunCli, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for `datasets`, whose cache has the rows or not; it is asked offline."""
    rows = [json.loads(line) for line in (workplace / "colours.jsonl").read_text().splitlines()]
    cached, asked = True, []

    def load_dataset(name: str, config: str | None) -> dict[str, Any]:
        asked.append((name, constants.HF_HUB_OFFLINE, fake.config.HF_HUB_OFFLINE))
        if not cached:
            raise ConnectionError("offline")
        return {"train": HubRows(rows)}

    fake = SimpleNamespace(
        load_dataset=load_dataset,
        exceptions=SimpleNamespace(DatasetsError=OSError),
        config=SimpleNamespace(HF_HUB_OFFLINE=False),
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    copy = tmp_path / "copied"
    shutil.copytree(workplace / "fast", copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("path: colours.jsonl", "path: owner/colours"))
    found = find_run_data(read_report(copy))
    assert found.report is not None and not found.missing
    assert set(asked) == {("owner/colours", True, True)}
    assert not constants.HF_HUB_OFFLINE and not fake.config.HF_HUB_OFFLINE
    cached = False
    missing = find_run_data(read_report(copy)).missing
    assert missing == "The data are on the hub: python cli.py data check --data owner/colours"


def test_rows_are_shown_as_text_without_markup_and_secrets(
    here: RunCli, workplace: Path, tmp_path: Path, model: Path
) -> None:
    data, key = tmp_path / "evil.jsonl", "ghp_" + "a1B2c3D4e5" * 3 + "f6G7h8"
    rows = [(f"<script>alert(1)</script> {number}", key if number % 2 else f"<b>{number}</b>") for number in range(40)]
    data.write_text("\n".join(json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows))
    run = tmp_path / "evil"
    trained = here(
        *("train", "--model", model, "--data", data, "--bits", 16, "--device", "cpu", "--output", run),
        *("--max-steps", 2, "--eval-every", 1, "--set", "data.validation=0.4", "--set", "data.near_duplicates=null"),
    )
    assert trained.code == 0, trained.err
    found = read_report(run)
    there = find_run_data(found)
    assert not there.missing
    texts = list(texts_of(found.config, there, [("train", number) for number in range(20)]).values())
    plain = [
        text for text in texts if re.fullmatch(r"user <script>alert\(1\)</script> \d+ assistant → <b>\d+</b>", text)
    ]
    hidden = [text for text in texts if "••••" in text]
    assert len(texts) == 20 == len(plain) + len(hidden) and plain and hidden
    assert not any("a1B2" in text for text in texts)
    assert here("report", run).code == 0
    source = (run / "report.html").read_text()
    assert "<script" not in source and key not in source
