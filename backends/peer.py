"""An adapter as the library runs it that the folder is for: PEFT or mlx-lm, not our own forward pass.

A converted adapter is only as good as what others make of it. Each library runs in a process of its own, so that
neither meets the other's numerical libraries. The process reads a job from its argument, and leaves logits in a file.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from core.adapter_files import Form
from core.convert import LIBRARIES, PeerLogits
from core.errors import UserError
from core.float32 import WHOLE_FLOAT32
from core.protocols import IGNORE, Batch

_MARK = "peer error: "
_ROOT = Path(__file__).resolve().parent.parent
BACKENDS: Mapping[Form, str] = {"peft": "cuda", "mlx": "mlx"}
"""Whose packages run an adapter of a form."""
_PACKAGES: Mapping[Form, tuple[str, ...]] = {"peft": ("torch", "transformers", "peft"), "mlx": ("mlx", "mlx_lm")}


def is_installed(form: Form) -> bool:
    """Whether the library that an adapter of this form is for is on this machine."""
    return all(importlib.util.find_spec(package) is not None for package in _PACKAGES[form])


def peer_logits(
    form: Form, *, model: Path, adapters: Sequence[Path], batches: Sequence[Batch], dtype: str
) -> list[PeerLogits]:
    """Runs the library of `form` on the base model, and on it with each of the adapter folders.

    Args:
        dtype: `float32` or `bfloat16`, the type of the base and of the arithmetic.

    Raises:
        UserError: the library refuses a folder, or passes over part of it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rows, out = Path(scratch) / "rows.npz", Path(scratch) / "logits.npz"
        np.savez(
            rows,
            allow_pickle=False,
            **{f"{name}.{i}": getattr(b, name) for i, b in enumerate(batches) for name in ("inputs", "targets")},
        )
        job = {
            "backend": BACKENDS[form],
            "model": str(model.resolve()),
            "adapters": [str(adapter.resolve()) for adapter in adapters],
            "rows": str(rows),
            "out": str(out),
            "dtype": dtype,
        }
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(job)],
            cwd=_ROOT,
            env=os.environ | WHOLE_FLOAT32,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise _failure(form, done)
        with np.load(out) as found:
            ends = [[found[f"{end}.{batch}"] for batch in range(len(batches))] for end in range(len(adapters) + 1)]
        return [PeerLogits(ends[0], adapted) for adapted in ends[1:]]


def _failure(form: Form, done: subprocess.CompletedProcess[str]) -> UserError:
    if done.returncode < 0:
        return UserError(
            f"{LIBRARIES[form]} was stopped while it ran the base model (signal {-done.returncode})",
            hint="most likely memory ran out; convert on a larger machine",
        )
    said = [line.removeprefix(_MARK) for line in done.stderr.splitlines() if line.startswith(_MARK)]
    return UserError(
        f"{LIBRARIES[form]} can't run {said[0] if said else f'the model: exit code {done.returncode}'}",
        hint="check that the base model is the one that the adapter was made for",
    )


def main(argument: str) -> None:
    """The process: runs one job. End 0 is the base model, those after it are the adapters."""
    job = json.loads(argument)
    library = importlib.import_module(f"backends.{job['backend']}.peer")
    with np.load(job["rows"]) as rows:
        count = len(rows.files) // 2
        inputs = [rows[f"inputs.{index}"] for index in range(count)]
        places = [np.nonzero(rows[f"targets.{index}"] != IGNORE) for index in range(count)]
    found = {}
    for end, adapter in enumerate([None, *job["adapters"]]):
        try:
            module = library.load(Path(job["model"]), adapter, dtype=job["dtype"])
            for index, (one, (row, column)) in enumerate(zip(library.logits(module, inputs), places, strict=True)):
                found[f"{end}.{index}"] = one[row, column]
        except Exception as error:  # whatever a library thinks of a folder that is not its own
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            print(f"{_MARK}{adapter or job['model']}: {reason}", file=sys.stderr)
            sys.exit(1)
        del module
    np.savez(job["out"], allow_pickle=False, **found)


if __name__ == "__main__":
    main(sys.argv[1])
