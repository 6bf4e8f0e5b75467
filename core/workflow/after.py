"""A trained run, opened again for what comes after training: base model and adapter, here and now.

The settings are the run's own. Where things are (backend, device, model, data) may be told anew; a backend that is not
installed here gives way to the one that is, as when a run is resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backends
from core.adapter import Adapter
from core.adapter_files import MLX_WEIGHTS, PEFT_WEIGHTS, find_adapter
from core.architecture import Architecture, read_architecture
from core.config import RunConfig
from core.errors import UserError
from core.folds import run_with_adapter
from core.handoff import without_effect
from core.models import ResolvedModel
from core.moves import choose_backend
from core.protocols import Backend, DeviceReport, Learner, TrainState
from core.run import ADAPTERS, CONFIG
from core.settings import load_config, resolve
from core.sides import SIDES as SIDES  # also for those that open runs
from core.sides import Side as Side
from core.workflow.job import changed, find_backend, find_model, with_all_layers
from data.tokenize import load_tokenizer

_log = logging.getLogger("twinkeel")

Flags = Mapping[str, tuple[str, Any]]
"""Dotted name of a setting -> flag and value, as typed."""


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A run with an adapter, found and checked; nothing is loaded yet."""

    folder: Path
    config: RunConfig
    """The run's, for this machine, with all layers in memory."""
    backend: Backend
    device: DeviceReport
    model: ResolvedModel
    architecture: Architecture
    adapter: Adapter
    """The best one, from `adapters/`."""


class OpenedRun:
    """A trained run's model on its device, with the adapter or as the base model."""

    def __init__(self, run: TrainedRun, learner: Learner, tokenizer: Any) -> None:
        self.run = run
        self.learner = learner
        self.tokenizer = tokenizer
        self._side: Side = "adapter"

    def use(self, side: Side) -> Learner:
        """The learner with the adapter, or with one that does nothing: the base model."""
        if side != self._side:
            adapter = self.run.adapter if side == "adapter" else without_effect(self.run.adapter)
            self.learner.import_state(TrainState(adapter=adapter.tensors, optimizer={}))
            self._side = side
        return self.learner


def config_here(folder: Path, flags: Flags, assignments: Sequence[str] = ()) -> RunConfig:
    """A run's settings, with what was typed, for a backend that is there."""
    written = load_config(folder / CONFIG)
    config = resolve(files=[folder / CONFIG], assignments=assignments, flags=flags).config
    if "model.path" in flags:  # another model folder has no commit of the one before
        config = changed(config, model=config.model.model_copy(update={"revision": None}))
    config, notes = choose_backend(
        config,
        written=written.backend,
        typed=flags.keys(),
        probe=lambda name, device: backends.get(name).probe(device),
        names=backends.names(),
    )
    for note in notes:
        _log.info(note)
    return config


def find_trained(folder: Path, *, flags: Flags | None = None) -> TrainedRun:
    """The run with its adapter; of folds, the run on all rows.

    Raises:
        UserError: no adapter yet, no such model, or no backend that could run it.
    """
    folder = run_with_adapter(folder)
    if not all((folder / ADAPTERS / name).is_file() for name in (PEFT_WEIGHTS, MLX_WEIGHTS)):
        raise UserError(
            f"{folder}: no adapter yet",
            hint=f"train it to the first evaluation: python cli.py train --resume {folder}",
        )
    config = with_all_layers(config_here(folder, flags or {}))
    backend, device = find_backend(config)
    model = find_model(config, device)
    architecture = read_architecture(model.path)
    adapter = find_adapter(folder / ADAPTERS).read(architecture)
    return TrainedRun(folder, config, backend, device, model, architecture, adapter)


@contextmanager
def opened_run(run: TrainedRun) -> Iterator[OpenedRun]:
    """Loads the model with the adapter and the tokenizer; both are gone when the context ends.

    Raises:
        UserError: the model can't be loaded, or does not fit.
    """
    _log.info("loading %s", run.model.name)
    tokenizer = load_tokenizer(run.model.path, trust_remote_code=run.config.model.trust_remote_code)
    learner = run.backend.open(run.config, run.model, run.adapter)
    try:
        yield OpenedRun(run, learner, tokenizer)
    finally:
        learner.close()
