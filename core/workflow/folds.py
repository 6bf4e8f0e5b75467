"""`train --folds`: each fold a run of its own under one parent folder, the verdict over them, perhaps one run more.

That last run trains on all rows, for the median of the folds' best steps, at the learning rates that the folds had
there: it stops in the middle of their schedule, as their best adapters did, and does not decay to its end by that step.
What is alike is the step, so the number of updates and the rate of each. An epoch of all rows has more steps than one
of the folds, so the run has seen each row a little less often. Nothing is held out there, so it has no gap, no grade
and no early stop: the folds have judged it.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from core.checkpoint import FOLDER as CHECKPOINTS
from core.config import DataConfig, RunConfig, to_plain
from core.errors import UserError
from core.files import read_json, to_json, write_atomic
from core.folds import (
    FINAL,
    FOLDS_SUMMARY,
    FoldsVerdict,
    damaged,
    fold_name,
    judge,
    read_folds,
    read_plan,
)
from core.folds_plot import write_folds_plot
from core.folds_screen import final_steps, heading, show_error, show_interrupted, show_verdict
from core.run import COMPLETE, CONFIG, FOLDS, LOCK, STATE, SUMMARY, RunLock, claim_run_folder, read_state
from core.screen import LOGGER
from core.settings import Settings, load_config, resolve
from core.workflow.train import resume, train

FAILED = 1
"""Exit code when a fold failed and the others went on."""


def train_folds(settings: Settings, *, folds: int, final: bool, console: Console) -> int:
    """`folds` runs, one after the other, and with `final` one on all rows. Returns the exit code.

    0: all finished; 1: a fold failed; 128 + the signal's number: stopped, to go on with `resume_folds`.

    Raises:
        UserError: the first fold can't begin, for a reason that is every fold's; nothing is left behind.
    """
    if folds < 2:
        raise UserError(f"--folds {folds}: one fold is no split", hint="give 2 or more, such as --folds 5")
    config = settings.config
    made = [path for path in [Path(config.output)] if not path.exists()] if config.output is not None else None
    folder, lock = claim_run_folder(config.output, data_name=Path(config.data.path).name)
    with lock:
        runs = _FoldRuns(folder, console=console)
        runs.write(settings, folds=folds, final=final)
        try:
            return runs.run()
        except BaseException:
            if not runs.have_begun:
                _discard(folder, with_folder=made is None or bool(made))
            raise


def resume_folds(
    folder: Path,
    *,
    final: bool = False,
    flags: Mapping[str, tuple[str, Any]] | None = None,
    assignments: Sequence[str] = (),
    console: Console,
) -> int:
    """Goes on where `train_folds` was stopped: what is finished stays, what began is resumed, the rest begins.

    Args:
        final: asks for the run on all rows, if it was not asked for at first.
        flags, assignments: as of `core.workflow.train.resume`.

    Raises:
        UserError: all is done, or another process trains here.
    """
    runs = _FoldRuns(folder, console=console, flags=flags or {}, assignments=assignments)
    with RunLock(folder):
        runs.read()
        if runs.are_complete(final=final):
            raise UserError(
                f"{folder}: all folds are finished; nothing to resume",
                hint=f"their table: python cli.py monitor {folder} --once",
            )
        return runs.run(final=final)


def _discard(folder: Path, *, with_folder: bool) -> None:
    """Takes away what a command has written that came to nothing."""
    for name in (FOLDS, CONFIG, LOCK):
        (folder / name).unlink(missing_ok=True)
    if with_folder:
        with suppress(OSError):  # somebody has put something there
            folder.rmdir()


@contextmanager
def _warned_once() -> Iterator[None]:
    """While the context lasts, the terminal gets each warning once: what is wrong with the rows is so in every fold."""
    said: set[str] = set()

    def passes(record: logging.LogRecord) -> bool:
        # once a run's own log is open it gets all, whatever other runs have said
        if record.levelno != logging.WARNING or any(isinstance(to, logging.FileHandler) for to in LOGGER.handlers):
            return True
        is_new = (text := record.getMessage()) not in said
        said.add(text)
        return is_new

    LOGGER.addFilter(passes)
    try:
        yield
    finally:
        LOGGER.removeFilter(passes)


class _FoldRuns:
    """The runs of one parent folder, which the caller has locked."""

    def __init__(
        self,
        folder: Path,
        *,
        console: Console,
        flags: Mapping[str, tuple[str, Any]] | None = None,
        assignments: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._console = console
        self._flags = flags or {}
        self._assignments = assignments
        self._plan: dict[str, Any] = {}

    # --- the plan -----------------------------------------------------------------------------------------------------

    def write(self, settings: Settings, *, folds: int, final: bool) -> None:
        """Begins the folder: the settings that all folds share, and the plan."""
        import yaml

        data = settings.config.data.model_copy(update={"folds": folds, "fold": 1})
        self._config = settings.config.model_copy(update={"output": None, "data": data})
        self._sources = dict(settings.sources)
        head = f"# The settings that these folds share. Repeat: python cli.py train --config FILE --folds {folds}\n"
        write_atomic(self._folder / CONFIG, head + yaml.safe_dump(to_plain(self._config), sort_keys=False))
        self._plan = {"format": 1, "folds": folds, "final": final, "started": time.time(), "sources": self._sources}
        self._update(status="running", current=None, errors={})

    def read(self) -> None:
        """Raises: UserError: the plan is damaged."""
        self._plan = read_plan(self._folder)
        if not isinstance(self._plan.get("folds"), int):
            raise UserError(
                f"{self._folder / FOLDS}: damaged",
                hint=f"each fold can be resumed alone: --resume {self._folder}/fold-1",
            )
        self._config = load_config(self._folder / CONFIG)
        self._sources = dict(self._plan.get("sources") or {})

    def _update(self, **values: Any) -> None:
        self._plan |= values | {"pid": os.getpid(), "host": socket.gethostname(), "updated": time.time()}
        write_atomic(self._folder / FOLDS, to_json(self._plan))

    @property
    def _names(self) -> list[str]:
        return [fold_name(fold) for fold in range(1, self._plan["folds"] + 1)]

    @property
    def have_begun(self) -> bool:
        """Whether any fold's run folder is there."""
        return any((self._folder / name / CONFIG).is_file() for name in self._names)

    def _is_complete(self, name: str) -> bool:
        return read_state(self._folder / name).get("status") in COMPLETE

    def are_complete(self, *, final: bool) -> bool:
        wanted = [*self._names, *([FINAL] if final or self._plan["final"] else [])]
        is_judged = self._plan.get("status") == "finished" and (self._folder / FOLDS_SUMMARY).is_file()
        return is_judged and all(map(self._is_complete, wanted))

    # --- the runs -----------------------------------------------------------------------------------------------------

    def run(self, *, final: bool = False) -> int:
        """What is not finished yet, in turn, to the verdict; returns the exit code."""
        self._update(status="running", final=final or self._plan["final"])
        try:
            with _warned_once():
                if code := self._run_all():
                    return self._stopped(code)
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._update(status=status, current=None)
            raise
        return self._finish()

    def _run_all(self) -> int:
        """Returns the exit code of a run that was stopped, else 0."""
        for number, name in enumerate(self._names, start=1):
            if not self._is_complete(name):
                title = f"fold {number} of {len(self._names)}"
                if code := self._run_one(name, title, partial(self._settings_of, number)):
                    return code
        verdict = self._judge()
        if verdict is None or not self._may_be_final(verdict) or self._is_complete(FINAL):
            return 0
        steps, schedule = verdict.median_best_step, verdict.schedule_steps
        self._update(final_run={"steps": steps, "schedule_steps": schedule})
        title = f"final run, on all rows, {final_steps(verdict)}"
        return self._run_one(FINAL, title, partial(self._settings_of_final, steps), schedule_steps=schedule)

    def _run_one(
        self, name: str, title: str, settings: Callable[[], Settings], *, schedule_steps: int | None = None
    ) -> int:
        """Returns the exit code of a run that was stopped; 0 when it ended, a recorded failure included."""
        folder = self._folder / name
        self._console.print(heading(title, folder))
        errors = {other: error for other, error in self._plan["errors"].items() if other != name}
        self._update(current=name, errors=errors)
        try:
            has_begun = (folder / STATE).is_file() or any(folder.glob(f"{CHECKPOINTS}/*"))
            if has_begun and (folder / CONFIG).is_file():
                return resume(folder, flags=self._flags, assignments=self._assignments, console=self._console)
            shutil.rmtree(folder, ignore_errors=True)  # a process that was killed before it wrote anything of use
            return train(settings(), console=self._console, schedule_steps=schedule_steps)
        except UserError as error:
            has_folder = (folder / CONFIG).is_file()
            # what stands against the first run, or against going on at all, stands against the others too
            if not self.have_begun or (has_folder and read_state(folder).get("status") != "failed"):
                raise
            self._update(errors={**errors, name: error.what})
            show_error(self._console, error)
            return 0

    def _settings_of(self, number: int) -> Settings:
        """A fold's: those of a fold that has begun, in which nothing is `auto` any more, or as they were typed."""
        known = [self._folder / name / CONFIG for name in self._names if (self._folder / name / CONFIG).is_file()]
        if known:
            found = resolve(files=known[:1], flags=self._flags, assignments=self._assignments)
            settings = Settings(found.config, {"model.bits": fold_name(number)})
        else:
            found = resolve(files=[self._folder / CONFIG], flags=self._flags, assignments=self._assignments)
            settings = Settings(found.config, self._sources)
        data = settings.config.data
        # nobody means to hold nothing out in a fold; the share itself has no effect there
        share = data.validation or DataConfig().validation
        data = data.model_copy(update={"folds": self._plan["folds"], "fold": number, "validation": share})
        return self._placed(settings, fold_name(number), data=data)

    def _settings_of_final(self, steps: int) -> Settings:
        settings = self._settings_of(1)
        config = settings.config
        return self._placed(
            settings,
            FINAL,
            data=config.data.model_copy(update={"validation": 0.0}),
            train=config.train.model_copy(update={"max_steps": steps}),
            guard=config.guard.model_copy(update={"patience": None}),
        )

    def _placed(self, settings: Settings, name: str, **sections: Any) -> Settings:
        values = {"output": str(self._folder / name), **sections}
        config: RunConfig = settings.config.model_copy(update=values)
        return Settings(config, settings.sources)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _stopped(self, code: int) -> int:
        self._update(status="interrupted", current=None)
        show_interrupted(self._console, self._folder)
        return code

    def _may_be_final(self, verdict: FoldsVerdict) -> bool:
        """Only after every fold: the median of some would be another one."""
        return bool(self._plan["final"]) and len(verdict.done) == len(self._names)

    def _judge(self) -> FoldsVerdict | None:
        """Writes `folds_summary.json` of the folds that are done."""
        verdict = judge(read_folds(self._folder), self._config.guard)
        done = 0 if verdict is None else len(verdict.done)
        values = {} if verdict is None else verdict.to_dict()
        final = read_json(self._folder / FINAL / SUMMARY)
        summary = {
            "format": 1,
            "folds": self._plan["folds"],
            "num_done": done,
            "errors": self._plan["errors"],
            **values,
            "final": final if isinstance(final, dict) else None,
        }
        write_atomic(self._folder / FOLDS_SUMMARY, to_json(summary))
        return verdict

    def _finish(self) -> int:
        verdict = self._judge()
        failed = [name for name in self._names if not self._is_complete(name)] + [
            name for name in self._plan["errors"] if name == FINAL
        ]
        is_good = not failed and not damaged(read_folds(self._folder))
        if verdict is not None:
            write_folds_plot(self._folder, verdict)
        self._update(status="finished" if is_good else "failed", current=None)
        show_verdict(
            self._console,
            self._folder,
            verdict,
            failed=failed,
            has_final=self._is_complete(FINAL),
            start=self._config.start,
        )
        return 0 if is_good else FAILED
