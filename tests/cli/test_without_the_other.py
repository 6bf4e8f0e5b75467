"""Each backend trains where nothing of the other is installed: a Mac needs no torch, a CUDA machine no MLX.

A folder with links to every installed package but the other backend's stands in for such a machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = ("torch", "functorch", "torchgen", "peft", "bitsandbytes", "accelerate", "trl")
MLX = ("mlx", "mkl")


def packages_without(left_out: tuple[str, ...], folder: Path) -> Path:
    """A folder of links to the installed packages, apart from those whose name starts with one of `left_out`."""
    folder.mkdir()
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if not item.name.lower().startswith(left_out) and item.suffix != ".pth":
            (folder / item.name).symlink_to(item)
    return folder


@pytest.mark.parametrize(("backend", "left_out", "gone"), [("mlx", TORCH, "torch"), ("cuda", MLX, "mlx")])
def test_trains_without_the_other_backends_packages(
    model: Path, rows: Path, tmp_path: Path, backend: str, left_out: tuple[str, ...], gone: str
) -> None:
    packages = packages_without(left_out, tmp_path / "packages")
    command = [
        *(sys.executable, "-S", "cli.py", "train", "--backend", backend, "--device", "cpu", "--bits", "16"),
        *("--model", str(model), "--data", str(rows), "--max-tokens", "96", "--max-steps", "2", "--eval-every", "2"),
        *("--output", str(tmp_path / "run")),
    ]
    environment = os.environ | {"PYTHONPATH": str(packages)}
    missing = subprocess.run(
        [sys.executable, "-S", "-c", f"import {gone}"], env=environment, cwd=ROOT, capture_output=True, check=False
    )
    assert missing.returncode != 0, "the other backend must be out of reach, or this test shows nothing"
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Train/val loss difference" in ran.stdout or "No better than" in ran.stdout


def test_the_missing_backend_says_what_to_install(model: Path, rows: Path, tmp_path: Path) -> None:
    packages = packages_without(MLX, tmp_path / "packages")
    ran = subprocess.run(
        [sys.executable, "-S", "cli.py", "train", "--backend", "mlx", "--model", str(model), "--data", str(rows)],
        env=os.environ | {"PYTHONPATH": str(packages)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "pip install" in ran.stderr and "mlx" in ran.stderr and "Traceback" not in ran.stderr
