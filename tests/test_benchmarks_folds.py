"""The benchmark of folds, with the training left out: its table and its file of results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import folds as benchmark
from core.config import GuardConfig
from core.folds import FoldResult, judge


def test_the_table_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [
        FoldResult(1, "finished", 9, 0.04, -0.02, 0.10, "EXCELLENT", 2.5, 2.0, 9, 80, 20, num_val_targets=300),
        FoldResult(2, "finished", 9, 0.16, 0.10, 0.22, "MODERATE", 2.5, 2.2, 9, 80, 20, num_val_targets=100),
    ]
    verdict = judge(results, GuardConfig())
    assert verdict is not None
    monkeypatch.setattr(benchmark, "run_folds", lambda parent, args: verdict.to_dict())
    benchmark.main(["--model", "/somewhere/tiny", "--folds", "2", "--output", str(tmp_path / "found.json")])
    out = capsys.readouterr().out
    assert "| 2 | 80 + 20 | 2.500 → 2.200 | 0.160 | [0.100, 0.220] | MODERATE |" in out
    # means 0.1 and 2.1; deviations 0.12 / sqrt(2) and 0.06 / 1.96
    assert "| fold mean | | 2.100 | 0.100 |" in out and "| standard deviation | | 0.141 | 0.085 | 0.031 | |" in out
    # (2.0 * 300 + 2.2 * 100) / 400
    assert "| pooled, 400 tokens | | 2.500 → 2.050 |" in out
    assert "promises too much" in out
    found = json.loads((tmp_path / "found.json").read_text())["tiny, 2 folds"]
    assert found["settings"]["model"] == "tiny" and found["grade"] == "GOOD" and "somewhere" not in str(found)


def test_evaluations_are_as_frequent_however_many_the_folds_are() -> None:
    # 219 rows, of which 175 and 197 train: 21 and 24 steps of 8 rows
    assert benchmark._eval_every(5) == 10 and benchmark._eval_every(10) == 12
