"""The loss of every row at every evaluation: `row_losses/step<S>.safetensors`.

Which rows were memorised, which got worse while the mean fell: both are read from these. Per split (`val`, `probe`):
`<split>.row_ids` int64 [N], `<split>.nll` float64 [N] in nats, summed over the row's targets, `<split>.num_targets`
int64 [N]. A run that holds nothing out has no `val`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from core.files import disk_errors, write_atomic
from core.protocols import FloatArray, IntArray, RowLosses
from core.run import ROW_LOSSES, SPLIT

_SPLITS = ("val", "probe")


def write_row_losses(run_folder: Path, step: int, *, validation: RowLosses | None, probe: RowLosses) -> None:
    """Writes one evaluation; the same evaluation again gives the same bytes."""
    from safetensors.numpy import save

    folder = run_folder / ROW_LOSSES
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    tensors: dict[str, IntArray | FloatArray] = {}
    for split, losses in zip(_SPLITS, (validation, probe), strict=True):
        if losses is None:
            continue
        # safetensors writes the memory as it lies: a view would be saved wrongly
        tensors[f"{split}.row_ids"] = np.ascontiguousarray(losses.row_ids)
        tensors[f"{split}.nll"] = np.ascontiguousarray(losses.nll)
        tensors[f"{split}.num_targets"] = np.ascontiguousarray(losses.num_targets)
    write_atomic(_path(run_folder, step), save(tensors))


def read_row_losses(run_folder: Path, step: int) -> tuple[RowLosses, RowLosses] | None:
    """Validation and probe losses at `step`; None when there was no evaluation, it is damaged, or nothing held out."""
    splits = read_splits(run_folder, step)
    return (splits[_SPLITS[0]], splits[_SPLITS[1]]) if _SPLITS[0] in splits else None


def read_splits(run_folder: Path, step: int) -> dict[str, RowLosses]:
    """The losses at `step` by split, `val` and `probe`; empty when there was no evaluation, or its file is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = _path(run_folder, step)
    if not path.is_file():
        return {}
    try:
        tensors = load_file(path)
        return {
            split: RowLosses(
                row_ids=tensors[f"{split}.row_ids"],
                nll=tensors[f"{split}.nll"],
                num_targets=tensors[f"{split}.num_targets"],
            )
            for split in _SPLITS
            if f"{split}.nll" in tensors
        }
    except (SafetensorError, KeyError, ValueError, OSError):
        return {}


def read_origins(run_folder: Path) -> dict[str, dict[int, str]]:
    """Split -> row number -> `file:line`; empty when the file is gone."""
    found: dict[str, dict[int, str]] = {}
    try:
        with open(run_folder / SPLIT, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["split"], {})[int(row["row"])] = row["origin"]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return {}
    return found


def evaluated_steps(run_folder: Path) -> list[int]:
    """The steps that there are losses of, rising."""
    names = (path.stem.removeprefix("step") for path in (run_folder / ROW_LOSSES).glob("step*.safetensors"))
    return sorted(int(name) for name in names if name.isdecimal())


def _path(run_folder: Path, step: int) -> Path:
    return run_folder / ROW_LOSSES / f"step{step}.safetensors"
