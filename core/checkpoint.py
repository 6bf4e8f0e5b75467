"""The only writer and reader of checkpoints.

A checkpoint is a folder `checkpoints/epoch<E>_step<S>/` with `adapter.safetensors` and `optimizer.safetensors` (neutral
names, so either backend can read it), `trainer.json` (where the loop stands, and which step was the best) and
`manifest.json` (sizes and SHA-256 of the others). It is built under a temporary name, synchronised to the disk and
renamed: it is whole or not there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.files import disk_errors, fsync_folder, read_json, sha256_of, to_json
from core.protocols import Tensors, TrainState

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"

_NAME = re.compile(r"epoch(\d+)_step(\d+)")
_LEFTOVER = re.compile(r"\.(epoch\d+_step\d+)\.(tmp|old)")
_log = logging.getLogger("twinkeel")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and whose checksums hold."""

    path: Path
    step: int
    state: TrainState
    trainer: dict[str, Any]
    """The trainer's own state: counters, open log window, journal size."""


class Checkpointer:
    """Saves, finds and prunes the checkpoints of one run."""

    def __init__(self, run_folder: Path, *, keep: int) -> None:
        self._folder = run_folder / FOLDER
        self._keep = keep
        with disk_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
        self._clean_up()

    def save(
        self,
        state: TrainState,
        trainer: Mapping[str, Any],
        *,
        step: int,
        epoch: int,
        best_step: int | None,
    ) -> Path:
        """Writes a checkpoint, then removes those beyond the `keep` newest and the best ones that these count on.

        Raises:
            UserError: the disk is full; the checkpoints that were there are untouched.
        """
        path = self._folder / f"epoch{epoch}_step{step}"
        building = self._folder / f".{path.name}.tmp"
        if building.exists():
            shutil.rmtree(building)
        try:
            with disk_errors(path):
                building.mkdir()
                _write_files(building, state, trainer, best_step)
                old = self._set_aside(path)
                os.rename(building, path)
                fsync_folder(self._folder)
                shutil.rmtree(old, ignore_errors=True)
        except UserError:
            shutil.rmtree(building, ignore_errors=True)
            raise
        self._prune()
        return path

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, rising; not yet checked."""
        return sorted(_step_of(path) for path in self._paths())

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose checksums hold, and those of the best one that it counts on.

        Damaged ones are set aside, as `<name>.damaged`, with a warning.
        """
        for path in sorted(self._paths(), key=_step_of, reverse=True):
            problem = damage(path) or self._damage_of_best(path)
            if problem is None:
                return _read(path)
            _log.warning("checkpoint %s is damaged (%s): using the one before", path.name, problem)
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
        return None

    def read(self, step: int) -> Checkpoint | None:
        """The checkpoint of one step, or None when it is missing or damaged."""
        for path in self._paths():
            if _step_of(path) == step and damage(path) is None:
                return _read(path)
        return None

    def _damage_of_best(self, path: Path) -> str | None:
        best_step = _best_step_of(path)
        if best_step in (None, _step_of(path)) or self.read(best_step) is not None:
            return None
        return f"the best one, of step {best_step}, is"

    def _paths(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]

    def _prune(self) -> None:
        newest_first = sorted(self._paths(), key=_step_of, reverse=True)
        needed = {_best_step_of(path) for path in newest_first[: self._keep]}
        for path in newest_first[self._keep :]:
            if _step_of(path) not in needed:
                self._retire(path)

    def _retire(self, path: Path) -> None:
        """Removes a checkpoint so that a kill in between leaves no half folder under its name."""
        shutil.rmtree(self._set_aside(path))

    def _set_aside(self, path: Path) -> Path:
        """Renames a checkpoint, if there is one, to what the next process cleans up; returns the new name."""
        old = self._folder / f".{path.name}.old"
        if path.exists():
            os.rename(path, old)
        return old

    def _clean_up(self) -> None:
        """Removes what a killed process left, but brings back a checkpoint that was about to be replaced."""
        for leftover in self._folder.iterdir():
            match = _LEFTOVER.fullmatch(leftover.name)
            if match is None:
                continue
            path = self._folder / match[1]
            if match[2] == "old" and not path.exists() and damage(leftover) is None:
                os.rename(leftover, path)
            else:
                shutil.rmtree(leftover)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: a missing file, another size, another checksum."""
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is missing or damaged"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')}, expected {FORMAT}"
    files = manifest.get("files")
    if not isinstance(files, dict) or files.keys() != {ADAPTER, OPTIMIZER, TRAINER}:
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if expected != {"bytes": file.stat().st_size, "sha256": sha256_of(file)}:
            return f"{name} has changed"
    return None


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[2])


def _best_step_of(path: Path) -> int | None:
    trainer = read_json(path / TRAINER)
    return trainer.get("best_step") if isinstance(trainer, dict) else None


def _write_files(folder: Path, state: TrainState, trainer: Mapping[str, Any], best_step: int | None) -> None:
    from safetensors.numpy import save

    contents = {
        ADAPTER: save(_arrays(state.adapter)),
        OPTIMIZER: save(_arrays(state.optimizer)),
        TRAINER: to_json({**trainer, "optimizer_steps": state.optimizer_steps, "best_step": best_step}).encode(),
    }
    files = {}
    for name, content in contents.items():
        _write_durably(folder / name, content)
        # of the bytes in memory: a disk that stored others must not be believed
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": FORMAT, "files": files}
    _write_durably(folder / MANIFEST, to_json(manifest).encode())
    fsync_folder(folder)


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _arrays(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    # safetensors writes the memory as it lies: a transposed view would be saved wrongly
    return {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}


def _read(path: Path) -> Checkpoint:
    from safetensors.numpy import load_file

    trainer = read_json(path / TRAINER)
    del trainer["best_step"]
    state = TrainState(
        adapter=load_file(path / ADAPTER),
        optimizer=load_file(path / OPTIMIZER),
        optimizer_steps=trainer.pop("optimizer_steps"),
    )
    return Checkpoint(path=path, step=_step_of(path), state=state, trainer=trainer)
