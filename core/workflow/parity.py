"""One side of `parity`: a training on one backend, written down."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import backends
from core.errors import UserError
from core.files import free_name
from core.float32 import use_whole_float32
from core.parity_commands import compare_command, record_command
from core.parity_record import (
    CPU_TOKEN_BUDGET,
    Record,
    certified,
    record_four_bits,
    record_training,
    without_four_bits,
    write_record,
)
from core.run import NewFolder, new_run_folder
from core.screen import logging_to
from core.settings import Settings
from core.workflow.job import Job, changed, opened, prepare

_log = logging.getLogger("twinkeel")


def record_parity(
    settings: Settings, *, steps: int, four_bits: bool, console: Console, typed: Sequence[str] | None = None
) -> int:
    """Writes one side of `parity`: `steps` optimiser steps on the backend of the settings. Returns the exit code.

    Args:
        typed: the settings as they were typed, for the commands that follow; None where nobody types them.

    Raises:
        UserError: as `train`, or a loss that became NaN or infinite; no record is written.
    """
    with logging_to(console):
        use_whole_float32()
        config, overridden = certified(settings, steps=steps)
        if overridden:
            _log.info("for parity: %s", ", ".join(overridden))
        folder = new_run_folder(config.output, data_name=f"parity-{Path(config.data.path).name}")
        job = prepare(config, choose_bits=False)
        with opened(job) as learner:
            record = record_training(job, learner)
        record = _add_four_bits(job, record) if four_bits else record
        with NewFolder(folder) as new:
            write_record(folder, record)
            new.keep()
        _log.info("%s: recorded in %s", job.backend.name, folder)
        if typed is not None:
            # `auto` may mean another model on the other backend
            model = [] if settings.config.model.path != "auto" else ["--model", record.model]
            _say_what_follows(record, folder, typed=[*typed, *model], four_bits=four_bits)
    return 0


def _say_what_follows(record: Record, folder: Path, *, typed: Sequence[str], four_bits: bool) -> None:
    other = next(name for name in backends.names() if name != record.backend)
    output = free_name(f"parity-{other}")
    command = record_command(typed, backend=other, steps=len(record.steps), output=output, four_bits=four_bits)
    _log.info("next, where %s can train: %s", other, command)
    _log.info("and with both folders: %s", compare_command(folder, output))


def _add_four_bits(job: Job, record: Record) -> Record:
    """Tries base and final adapter on 4-bit weights. What stands against it is a line in the record, no failure."""
    if job.architecture.mlx_bits is not None:
        return without_four_bits(record, f"the model folder holds {job.architecture.mlx_bits}-bit weights already")
    narrow = replace(job, config=changed(job.config, model=job.config.model.model_copy(update={"bits": 4})))
    try:
        job.backend.check(narrow.config)
        with opened(narrow) as learner:
            budget = None if job.device.accelerator else CPU_TOKEN_BUDGET
            return record_four_bits(record, learner, job.data.validation, budget=budget)
    except UserError as error:
        _log.warning("4 bits left out: %s", error.what)
        return without_four_bits(record, f"{job.backend.name}: {error.what}")
