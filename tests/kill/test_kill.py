"""A run killed at any moment and resumed leaves the bits of one that was never killed. See `tests.kill.campaign`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import write_rows
from tests.kill.campaign import KINDS
from tests.tiny import make_model

NUM_POINTS = 7
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_killed_at_any_moment_and_resumed(tmp_path: Path, backend: str) -> None:
    pytest.importorskip("mlx.core" if backend == "mlx" else "torch")
    model, data = make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    command = [sys.executable, "-m", "tests.kill.campaign", backend, model, data, tmp_path, str(NUM_POINTS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ran = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = json.loads(ran.stdout)
    assert len(results) >= 12
    different = [result for result in results if result["differences"]]
    assert not different, different
    events = " ".join(result["event"] for result in results)
    assert [kind for kind in KINDS if kind not in events] == []
