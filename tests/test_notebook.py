"""The notebook under docs/ runs from top to bottom on both backends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.models.wheel import cache_folder

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
MODEL = "SmolLM2-135M-Instruct"


@pytest.mark.timeout(900)
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.delenv("TWINKEEL_CACHE", raising=False)  # the user's, where the model is
    if not (cache_folder() / "models" / MODEL).is_dir():
        pytest.skip(f"{MODEL} was never used here: `make train` brings it")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # it leaves its runs in a folder there
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}
    ).execute()
    shown = ["".join(_texts(cell)) for cell in notebook.cells if cell.cell_type == "code"]
    assert any("best_val_loss" in text and "mlx" in text and "cuda" in text for text in shown)
    assert any("twinkeel evaluate" in text and "Better than the base model" in text for text in shown)
    assert any("twinkeel compare" in text and "validation losses differ by" in text for text in shown)


def _texts(cell: dict) -> list[str]:  # type: ignore[type-arg]
    """What a cell printed and returned."""
    return [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"]]
