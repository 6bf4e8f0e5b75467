"""One run of a prepared job in its folder: the trainer put together, failures written down, the verdict said."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from core import census, init_adapter
from core.adapter import Adapter, trains_router
from core.adapter_files import write_adapter
from core.architecture import ROUTER
from core.checkpoint import FOLDER as CHECKPOINTS
from core.checkpoint import Checkpoint, Checkpointer
from core.config import BASE_MODEL, to_plain
from core.errors import OutOfMemoryError, UserError
from core.expert_plot import write_expert_plot
from core.files import write_atomic
from core.handoff import check_saved
from core.journal import Journal
from core.moves import (
    MOVES,
    PLACE,
    Arrival,
    Place,
    arrive,
    is_other_rounding,
    moved_to,
    other_traits,
    place_of,
    plain,
    replay_last_evaluation,
)
from core.plots import write_training_curves
from core.prefix import PrefixReport
from core.protocols import Learner, RowLosses, Tensors
from core.records import whole
from core.remeasure import remeasure
from core.row_history import describe_rows
from core.row_losses import read_row_losses
from core.run import ADAPTERS, CONFIG, LOG, RUNS, RunState, read_state, write_split, write_summary
from core.schedule import SCHEDULE_STEPS, plan_steps
from core.screen import TrainScreen, count, logging_to_file
from core.signals import InterruptFlag
from core.trackers.process import tracking
from core.trainer import Trainer
from core.verdict import NOT_JUDGED, next_command, not_judged, summarize, verdict_lines

if TYPE_CHECKING:
    from core.workflow.job import Job

_log = logging.getLogger("twinkeel")


class Session:
    """Holds what a run needs while it runs. The caller has locked the folder and closes the learner."""

    def __init__(
        self,
        job: Job,
        learner: Learner,
        folder: Path,
        *,
        console: Console,
        prefix: PrefixReport | None = None,
        schedule_steps: int | None = None,
    ) -> None:
        """Of a new run.

        Args:
            prefix: what the learner was spared; it was done before this.
            schedule_steps: as of `core.schedule.Plan`; a run that is resumed has its own.
        """
        self._job = job
        self._prefix = prefix
        self._config = job.config
        self._learner = learner
        self._folder = folder
        self._console = console
        self._plan = plan_steps(job.config, batches_per_epoch=job.data.batches_per_epoch, schedule_steps=schedule_steps)
        self._census = census.census(learner.weights())
        self._place = Place.of(job.config, job.device, job.architecture, folder=job.model.path)
        self._arrival = Arrival(moved_to((), self._place, from_step=0))

    def begin(self) -> int:
        """Runs from the first step; returns the exit code."""
        if self._config.lora.init_adapter is not None:
            init_adapter.keep(self._folder / init_adapter.COPY, self._job.adapter)
        write_split(self._folder, self._job.data.split_rows())
        self._write_config()
        return self._run(Checkpointer(self._folder, keep=self._config.checkpoint.keep), None)

    def resume(self) -> int:
        """Goes on from the newest good checkpoint, or from the first step when there is none.

        Raises:
            UserError: the checkpoint belongs to another model, other data or other settings.
        """
        checkpointer = Checkpointer(self._folder, keep=self._config.checkpoint.keep)
        checkpoint = checkpointer.latest()
        kept = read_state(self._folder) if checkpoint is None else checkpoint.trainer
        self._plan = replace(self._plan, schedule_steps=whole(kept.get(SCHEDULE_STEPS)))
        if checkpoint is None:
            self._refuse_if_all_damaged()
            _log.info("no checkpoint yet: starting from the first step")
        else:
            self._refuse_changes(checkpoint)
            self._arrival = self._arrive(checkpoint, checkpointer)
            if self._arrival.is_other_base:
                checkpoint = self._remeasured(checkpoint, checkpointer)
        return self._run(checkpointer, checkpoint)

    def _arrive(self, checkpoint: Checkpoint, checkpointer: Checkpointer) -> Arrival:
        return arrive(
            checkpoint,
            self._place,
            state=read_state(self._folder),
            config=self._config,
            learner=self._learner,
            verify=lambda: replay_last_evaluation(
                checkpoint,
                run_folder=self._folder,
                checkpointer=checkpointer,
                learner=self._learner,
                initial=self._job.adapter,
                validation=self._job.data.validation,
            ),
        )

    def _remeasured(self, checkpoint: Checkpoint, checkpointer: Checkpointer) -> Checkpoint:
        found = remeasure(
            checkpoint,
            read_best=checkpointer.read,
            initial=self._job.adapter,
            learner=self._learner,
            data=self._job.data,
            config=self._config,
        )
        arrival = self._arrival
        self._arrival = replace(
            arrival, lines=(*arrival.lines, *found.lines), warnings=(*arrival.warnings, *found.warnings)
        )
        return found.checkpoint

    # --- the run ------------------------------------------------------------------------------------------------------

    def _run(self, checkpointer: Checkpointer, checkpoint: Checkpoint | None) -> int:
        with ExitStack() as stack:
            self._checkpointer = checkpointer
            # the journal first: if it is refused, the state file stays as it was
            journal = Journal(self._folder, keep_bytes=checkpoint.trainer["journal_bytes"] if checkpoint else 0)
            stack.callback(journal.close)
            self._write_config()  # of a run that moved: only now that nothing stands against it
            self._state = RunState(self._folder, self._facts(checkpoint))
            self._state.update()
            stack.enter_context(logging_to_file(self._folder / LOG))
            flag = stack.enter_context(InterruptFlag())
            self._announce(checkpoint)
            stack.enter_context(tracking(self._folder, self._config.log.trackers, should_stop=flag))
            screen = TrainScreen(
                total_steps=self._plan.total_steps,
                console=self._console,
                guard=self._config.guard,
                start=self._config.start,
                base_gap=self._base_gap() if checkpoint else None,
            )
            self._trainer = self._make_trainer(journal, screen, flag)
            with self._failures_recorded():
                with screen.live(first_step=checkpoint.step if checkpoint else 0):
                    status = self._trainer.run(checkpoint)
                return self._finish(status, flag)

    def _write_config(self) -> None:
        """Leaves a file that says the same alone."""
        import yaml

        plain = to_plain(self._config.model_copy(update={"output": None}))
        head = "# The settings of this run, fully resolved. Repeat it with: python cli.py train --config FILE\n"
        if (steps := self._plan.schedule_steps) is not None:
            head += f"# (That would lay the learning rate out for train.max_steps; here it is for {steps} steps.)\n"
        path, text = self._folder / CONFIG, head + yaml.safe_dump(plain, sort_keys=False)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)

    def _make_trainer(self, journal: Journal, screen: TrainScreen, flag: InterruptFlag) -> Trainer:
        return Trainer(
            config=self._config,
            learner=self._learner,
            data=self._job.data,
            folder=self._folder,
            journal=journal,
            checkpointer=self._checkpointer,
            screen=screen,
            save_best=self._write_adapters,
            heartbeat=lambda values: self._state.update(status="running", **values),
            should_interrupt=flag,
            identity=self._job.identity,
            origin={PLACE: self._place.to_dict(self._arrival.moves)},
            seconds_before=0.0 if self._prefix is None else self._prefix.seconds,
            schedule_steps=self._plan.schedule_steps,
        )

    @contextmanager
    def _failures_recorded(self) -> Iterator[None]:
        """Whatever ends the run badly, in the loop or after it, is written down before it is raised again."""
        try:
            yield
        except OutOfMemoryError as error:
            mended = OutOfMemoryError(error.what, hint=self._memory_hint())
            self._record_failure(mended)
            raise mended from error
        except BaseException as error:
            self._record_failure(error)
            raise

    def _record_failure(self, error: BaseException) -> None:
        reason = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        _log_to_file_only(f"{status}: {reason}")
        try:
            self._state.update(status=status, error=reason)
            write_summary(self._folder, self._summary(status, error=reason))
        except (UserError, OSError):
            # the disk may be what failed; the reason is on its way to the user anyway
            return

    # --- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, status: str, flag: InterruptFlag) -> int:
        """Restores and checks the best adapter, writes summary and plot, and says the verdict."""
        self._state.update(phase="saving")
        if status != "interrupted":
            self._restore_best()
        summary = self._summary(status)
        write_summary(self._folder, summary)
        write_training_curves(self._folder)
        write_expert_plot(self._folder)
        rows = describe_rows(self._folder)
        # last of all that touches a file: a run that says it is over has nothing left to do
        self._state.update(status=status, phase="ended", elapsed_seconds=summary["wall_seconds"])
        lines = verdict_lines(
            summary,
            gap=self._trainer.progress.best_gap,
            guard=self._config.guard,
            folder=self._folder,
            next_command=next_command(self._folder, is_judged=self._trainer.is_judged),
            rows=rows,
        )
        for line in ["", *lines]:
            _log.info(line)
        return flag.exit_code if status == "interrupted" else 0

    def _restore_best(self) -> None:
        """Leaves the best adapter in the learner and in `adapters/`, and checks what was saved on held-out rows."""
        best_step = self._trainer.best_step
        best = self._checkpointer.read(best_step)
        if best is None:
            _log.warning("the checkpoint of step %d is damaged; its adapter is in %s", best_step, ADAPTERS)
            return
        adapter = self._write_adapters(best.state.adapter)
        # another backend's losses were held against this one's when the run moved
        measured = read_row_losses(self._folder, best_step) if self._arrival.is_measured_here(best_step) else None
        report = check_saved(
            self._folder / ADAPTERS,
            adapter,
            learner=self._learner,
            batches=self._job.data.validation or self._job.data.probe,
            trained=None if measured is None else measured[0],
            base=self._base_losses(),
        )
        if (problem := report.problem()) is not None:
            _log.warning("%s: %s", self._folder / ADAPTERS, problem)

    def _base_losses(self) -> RowLosses | None:
        """Validation losses of the base model, if the run began with it, here."""
        if self._config.start != BASE_MODEL or not self._arrival.is_measured_here(0):
            return None
        measured = read_row_losses(self._folder, 0)
        return None if measured is None else measured[0]

    def _base_gap(self) -> float | None:
        """Gap before the first step: how much harder the held-out rows are, whatever training does."""
        measured = read_row_losses(self._folder, 0)
        return None if measured is None else measured[0].mean - measured[1].mean

    def _write_adapters(self, tensors: Tensors) -> Adapter:
        adapter = self._job.adapter.with_tensors(
            {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
        )
        write_adapter(self._folder / ADAPTERS, adapter, base_model=self._job.model.name)
        return adapter

    def _summary(self, status: str, *, error: str | None = None) -> dict[str, Any]:
        summary = summarize(
            self._trainer,
            config=self._config,
            model=self._job.model.name,
            status=status,
            num_train_rows=self._job.data.num_train_rows,
            num_val_rows=self._job.data.num_val_rows,
            error=error,
        )
        return {
            **summary,
            "base_gap": self._base_gap(),
            "weights": census.to_plain(self._census),
            "prefix_store": None if self._prefix is None else asdict(self._prefix),
            MOVES: plain(self._arrival.moves),
        }

    # --- what it says -------------------------------------------------------------------------------------------------

    def _refuse_changes(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.trainer["identity"]
        changed = [name for name, value in self._job.identity.items() if saved.get(name) != value]
        before = place_of(checkpoint)
        if "model" in changed and before is not None and is_other_rounding(before, self._place):
            if others := other_traits(before, self._place):
                raise UserError(
                    f"{self._config.model.path}: not another rounding of the run's model: {'; '.join(others)}",
                    hint=f"give the run's own model ({read_state(self._folder).get('model')}) with --model",
                )
            _log.warning(
                "%s: other files than before, accepted as another rounding of the model", self._config.model.path
            )
            changed.remove("model")
        if not changed:
            return
        where = {
            "model": f"model.path {self._config.model.path}",
            "data": f"data.path {self._config.data.path}",
            "settings": f"{self._folder / CONFIG}",
            "init_adapter": f"{self._folder / init_adapter.COPY}",
        }
        raise UserError(
            f"{self._folder}: the {' and the '.join(changed)} changed since step {checkpoint.step} "
            f"({', '.join(where[name] for name in changed)})",
            hint="put it back, or start a new run with: python cli.py train",
        )

    def _refuse_if_all_damaged(self) -> None:
        """Starting over would erase the journal of a run that got further than this."""
        num_damaged = len(list((self._folder / CHECKPOINTS).glob("*.damaged")))
        if num_damaged:
            raise UserError(
                f"{self._folder}: all {num_damaged} checkpoints are damaged",
                hint="its metrics and adapter are untouched; start a new run with: python cli.py train --config "
                f"{self._folder / CONFIG}",
            )

    def _facts(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """What `monitor` shows of a run and the loop does not change."""
        config, job, started = self._config, self._job, read_state(self._folder).get("started")
        facts: dict[str, Any] = {
            "backend": config.backend,
            "model": job.model.name,
            "data": job.data.name,
            "bits": config.model.bits,
            "precision": self._learner.description,
            "rank": config.lora.rank,
            "start": config.start,
            "device": job.device.device,
            "versions": {"python": platform.python_version(), **job.device.packages},
            MOVES: plain(self._arrival.moves),
            "num_train_rows": job.data.num_train_rows,
            "num_val_rows": job.data.num_val_rows,
            "num_parameters": self._learner.num_parameters,
            "num_trainable": self._learner.num_trainable,
            "steps_per_epoch": self._plan.steps_per_epoch,
            "total_steps": self._plan.total_steps,
            SCHEDULE_STEPS: self._plan.schedule_steps,
            "epochs": config.train.epochs,
            "eval_every": config.eval.every,
            "patience": config.guard.patience,
            "memory_total_gb": self._learner.memory().total_bytes / 1e9,
            NOT_JUDGED: None if job.data.validation else not_judged(config),
            "phase": "loading",
            "step": checkpoint.step if checkpoint else 0,
            "last_checkpoint_step": checkpoint.step if checkpoint else None,
        }
        return facts if started is None else facts | {"started": started}

    def _announce(self, checkpoint: Checkpoint | None) -> None:
        """What will be trained on what."""
        config, data, adapter = self._config, self._job.data, self._job.adapter
        names = " ".join("router" if key == ROUTER else key.rsplit(".", 1)[-1] for key in adapter.layer_keys)
        layers = f"{len(adapter.layers)} of {adapter.num_layers} layers"
        ranks = " and ".join(str(rank) for rank in adapter.ranks)
        lines = [
            f"twinkeel · {self._folder}",
            f"  model    {self._job.model.name} · {config.backend} · {self._learner.description}",
            f"  adapter  rank {ranks} on {names} in {layers} · "
            f"{count(self._learner.num_trainable)} of {count(self._learner.num_parameters)} parameters",
            f"  weights  {census.line(self._census)}",
            *self._prefix_lines(),
            f"  data     {data.name} · {data.num_train_rows} + {data.num_val_rows} rows{self._test_rows()} · "
            f"{count(data.num_targets)} target tokens an epoch · {100 * data.padding:.1f} % padding",
            f"  plan     {self._plan.total_steps} steps of {self._step_size()}, "
            f"{self._epochs()}{self._schedule()} · watch it with: python cli.py monitor{self._named()}",
        ]
        if checkpoint is not None:
            lines.append(f"  resumed  after step {checkpoint.step}, from {checkpoint.path}")
        for line in [*lines, *(f"  {line}" for line in self._arrival.lines)]:
            _log.info(line)
        for warning in self._arrival.warnings:
            _log.warning(warning)
        if checkpoint is None:
            self._warn_of_rare_evaluations()

    def _step_size(self) -> str:
        train = self._config.train
        if train.batch_tokens is None:
            return f"{train.batch_size * train.accumulation} rows"
        rows = self._job.data.num_train_rows / self._plan.steps_per_epoch
        return f"{train.accumulation} x up to {train.batch_tokens} positions (about {rows:.0f} rows)"

    def _prefix_lines(self) -> list[str]:
        if (prefix := self._prefix) is None:
            return []
        return [
            f"  frozen   {prefix.layers} of {self._job.adapter.num_layers} layers computed once for {prefix.rows} rows "
            f"({_size(prefix.bytes)}): {100 * prefix.spared:.0f} % of their work spared"
        ]

    def _test_rows(self) -> str:
        return f", {num} for testing" if (num := self._job.data.num_test_rows) else ""

    def _epochs(self) -> str:
        epochs = self._plan.total_steps / self._plan.steps_per_epoch
        return f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"

    def _schedule(self) -> str:
        steps = self._plan.schedule_steps
        return "" if steps in (None, self._plan.total_steps) else f", at the learning rates of a run of {steps}"

    def _named(self) -> str:
        """` FOLDER` where commands without it would look at another run."""
        return "" if self._folder.parent == RUNS else f" {self._folder}"

    def _warn_of_rare_evaluations(self) -> None:
        patience, every, total = self._config.guard.patience, self._config.eval.every, self._plan.total_steps
        num_evaluations = -(-total // every)
        if patience is not None and num_evaluations <= patience:
            better = max(total // (2 * (patience + 1)), 1)
            _log.warning(
                "early stopping can't act: %d evaluation%s in %d steps, patience %d; try --eval-every %d",
                num_evaluations,
                "" if num_evaluations == 1 else "s",
                total,
                patience,
                better,
            )

    def _memory_hint(self) -> str:
        """Which setting to lower, and by what."""
        train = self._config.train
        if train.batch_tokens is not None and self._job.data.largest_batch[0] > 1:
            return (
                "same training in less memory, about: "
                f"--set train.batch_tokens={train.batch_tokens // 2} --accumulation {train.accumulation * 2}"
            )
        if train.batch_tokens is None and train.batch_size > 1:
            half = train.batch_size // 2
            accumulation = train.accumulation * train.batch_size // half
            return f"same training in less memory: --batch-size {half} --accumulation {accumulation}"
        streams = self._config.model.stream_layers
        if train.gradient_checkpointing is not True and not streams:
            return "same training in less memory: --set train.gradient_checkpointing=true"
        if self._config.model.bits == 16:
            return "hold the base in 4 bits: --bits 4"
        may_leave_out = not streams and (train.prefix_store is not False or not self._learner.num_prefix_layers)
        if may_leave_out and self._learner.num_prefix_layers and not self._config.model.low_memory:
            return "the same training without the frozen layers in memory: --set model.low_memory=true"
        if may_leave_out and not trains_router(self._job.adapter.modules):
            return "the same training, a layer at a time (slower): --set model.stream_layers=true"
        return f"shorter rows: --max-tokens {max(self._job.data.longest_row // 2, 8)}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _log_to_file_only(line: str) -> None:
    for handler in _log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(_log.makeRecord("twinkeel", logging.ERROR, "", 0, line, (), None))
