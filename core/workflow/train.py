"""A run, new or continued, to its verdict.

Both first find everything that can be wrong (backend, model, data, settings) and only then touch the disk: a user's
mistake leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from core.errors import UserError
from core.init_adapter import COPY
from core.run import COMPLETE, RunLock, claim_run_folder, new_run_folder, read_state
from core.screen import logging_to
from core.session import Session
from core.settings import Settings
from core.workflow.after import config_here
from core.workflow.job import opened, prepare
from core.workflow.prefix import with_prefixes

_log = logging.getLogger("twinkeel")


def train(settings: Settings, *, console: Console, schedule_steps: int | None = None) -> int:
    """A new run, to its end. Returns the exit code.

    Args:
        schedule_steps: as of `core.schedule.Plan`; None: the run's own.

    Raises:
        UserError: something in the settings, the model, the data or the machine; the run folder is not written, or
            says why the run failed.
    """
    with logging_to(console):
        config = settings.config
        data_name = Path(config.data.path).name
        new_run_folder(config.output, data_name=data_name)  # before anything is loaded: is --output free?
        job = prepare(config, choose_bits="model.bits" not in settings.sources, sources=settings.sources)
        with opened(job) as learner:
            prepared = with_prefixes(job, learner, console=console)
            folder, lock = claim_run_folder(config.output, data_name=data_name)
            with lock:
                session = Session(
                    job,
                    prepared.learner,
                    folder,
                    console=console,
                    prefix=prepared.report,
                    schedule_steps=schedule_steps,
                )
                return session.begin()


def resume(
    folder: Path,
    *,
    flags: Mapping[str, tuple[str, Any]] | None = None,
    assignments: Sequence[str] = (),
    console: Console,
) -> int:
    """Continues a run from its newest good checkpoint, as if it had never stopped. Returns the exit code.

    Args:
        flags, assignments: as of `core.settings.resolve`: where things are now, and `core.config.FREE_ON_RESUME`.

    Raises:
        UserError: the run is complete, another process trains in it, or its model, data or settings have changed.
    """
    with logging_to(console):
        state = read_state(folder)
        if state.get("status") in COMPLETE:
            raise UserError(
                f"{folder}: already {state['status'].replace('_', ' ')}; nothing to resume",
                hint=f"its verdict: python cli.py monitor {folder} --once; to train its adapter on, in a new run: "
                f"python cli.py train --init-adapter {folder}",
            )
        with RunLock(folder):  # before the model is loaded: somebody may be training here, somebody may be watching
            job = prepare(config_here(folder, flags or {}, assignments), choose_bits=False, init_adapter=folder / COPY)
            with opened(job) as learner:
                prepared = with_prefixes(job, learner, console=console)
                return Session(job, prepared.learner, folder, console=console, prefix=prepared.report).resume()
