"""The one training loop.

The order is fixed: step, log, evaluate, decide, record, checkpoint, stop or go on; before the first step the base model
is evaluated the same way. Everything that decides is here and in the small objects it calls by name (schedule, early
stopping, gap, journal, checkpointer); everything that computes is behind `Learner`.

A checkpoint is taken between "record" and "stop", and holds all that the loop knows, the open log window included. So a
run that was killed anywhere continues from its checkpoint and leaves the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from core.checkpoint import Checkpoint, Checkpointer
from core.config import RunConfig
from core.early_stopping import EarlyStopping
from core.errors import NonFiniteLossError
from core.general import GeneralLoss, look_at_general
from core.journal import Journal
from core.overfitting import Gap, measure_gap
from core.progress import Progress, Window
from core.protocols import Batch, IntArray, Learner, RowLosses, StepOutput, Tensors
from core.routing import Routing, RoutingReport
from core.row_losses import write_row_losses
from core.schedule import SCHEDULE_STEPS, lr_at, plan_steps

Status = Literal["finished", "early_stopped", "interrupted"]
HEARTBEAT_SECONDS = 1.0
"""How often the state file is refreshed between records."""


class TrainingData(Protocol):
    """Rows as batches; `core.workflow` makes it from the data package."""

    @property
    def batches_per_epoch(self) -> int: ...

    def epoch(self, epoch: int) -> Sequence[Batch]:
        """Micro-batches of epoch `epoch`, which counts from 0; each row once; a function of (seed, epoch)."""
        ...

    @property
    def validation(self) -> Sequence[Batch]:
        """Empty when nothing is held out: then nothing is judged."""
        ...

    @property
    def probe(self) -> Sequence[Batch]: ...

    @property
    def general(self) -> Sequence[Batch]:
        """General texts, for what is forgotten; empty where they are not measured (`eval.general`)."""
        ...

    def name_rows(self, row_ids: IntArray) -> str:
        """Where these training rows come from, for a person: `train.jsonl:17, train.jsonl:40`."""
        ...


class Screen(Protocol):
    """What the loop shows while it runs; `core.screen` has one for a terminal and one for plain lines."""

    def show_step(self, *, step: int, epoch: float) -> None: ...
    def show_record(self, record: Mapping[str, Any]) -> None: ...
    def show_evaluation(self, gap: Gap, *, step: int, is_best: bool, patience_left: int | None) -> None: ...
    def show_unjudged(self, loss: float, *, step: int) -> None: ...
    def show_routing(self, report: RoutingReport, *, step: int) -> None: ...
    def show_phase(self, phase: str) -> None: ...


class StepSource:
    """What each optimiser step trains on, and at which rate: a function of configuration, data and step alone."""

    def __init__(self, config: RunConfig, data: TrainingData, *, schedule_steps: int | None = None) -> None:
        """`schedule_steps`: as of `core.schedule.Plan`."""
        self._config = config
        self._data = data
        self.plan = plan_steps(config, batches_per_epoch=data.batches_per_epoch, schedule_steps=schedule_steps)
        self._batches: Sequence[Batch] = ()
        self._batches_epoch = -1

    def lr(self, step: int) -> float:
        return lr_at(
            step,
            peak=self._config.optim.lr,
            schedule=self._config.schedule,
            total_steps=self.plan.schedule_steps or self.plan.total_steps,
        )

    def microbatches(self, step: int) -> list[Batch]:
        epoch, group = divmod(step - 1, self.plan.steps_per_epoch)
        if epoch != self._batches_epoch:
            self._batches, self._batches_epoch = self._data.epoch(epoch), epoch
        size = self._config.train.accumulation
        return list(self._batches[group * size : (group + 1) * size])


@dataclass(frozen=True, slots=True)
class _PendingStep:
    """A step whose loss is still on the device."""

    step: int
    output: StepOutput
    row_ids: IntArray
    num_tokens: int


class Trainer:
    """Runs the loop over one learner and one run folder."""

    def __init__(
        self,
        *,
        config: RunConfig,
        learner: Learner,
        data: TrainingData,
        folder: Path,
        journal: Journal,
        checkpointer: Checkpointer,
        screen: Screen,
        save_best: Callable[[Tensors], object],
        heartbeat: Callable[[Mapping[str, Any]], None],
        should_interrupt: Callable[[], bool] = lambda: False,
        identity: Mapping[str, str] | None = None,
        origin: Mapping[str, Any] | None = None,
        seconds_before: float = 0.0,
        schedule_steps: int | None = None,
    ) -> None:
        """Kept in every checkpoint are `identity`, what the run is bound to, and `origin`, what else it came from.

        Args:
            seconds_before: that this process worked for the run before the loop.
            schedule_steps: as of `core.schedule.Plan`; kept in every checkpoint too.
        """
        self._config = config
        self.learner = learner
        self._data = data
        self._folder = folder
        self._journal = journal
        self._checkpointer = checkpointer
        self._screen = screen
        self._save_best = save_best
        self._heartbeat = heartbeat
        self._should_interrupt = should_interrupt
        self._identity = dict(identity or {})
        self._origin = dict(origin or {})
        self._source = StepSource(config, data, schedule_steps=schedule_steps)
        self.plan = self._source.plan
        self.stopping = EarlyStopping(config.guard.patience, config.guard.min_delta)
        self.progress = Progress()
        self._pending: list[_PendingStep] = []
        self._started = time.perf_counter() - seconds_before
        self._last_beat = -math.inf
        self._last_checkpoint: int | None = None

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self, resume_from: Checkpoint | None = None) -> Status:
        """Trains to the end, to an early stop or to an interruption.

        Raises:
            NonFiniteLossError: a loss became NaN or infinite; the last good checkpoint stands.
        """
        if resume_from is None:
            self._visit(step=0, lr=None)
        else:
            self._restore(resume_from)
        while not self.is_complete:
            if self._should_interrupt():
                self._checkpoint_once()
                self._beat(force=True)
                return "interrupted"
            step = self.progress.step + 1
            lr = self._source.lr(step)
            self._train_step(step, lr)
            self._visit(step, lr)
        return "early_stopped" if self._stopped_early else "finished"

    @property
    def is_judged(self) -> bool:
        """Whether rows are held out. If not, there is no gap, no grade and no early stop; the last adapter stays."""
        return bool(self._data.validation)

    @property
    def best_step(self) -> int:
        """Step of the adapter that the run is for; 0 before there is one."""
        if self.is_judged:
            return self.stopping.best_step
        return self.progress.step if self.is_complete else 0

    def _visit(self, step: int, lr: float | None) -> None:
        """Everything that happens at a step boundary, in its fixed order."""
        evaluates, checkpoints = self._should_evaluate(step), self._should_checkpoint(step)
        logs = evaluates or step % self._config.log.every == 0
        grad_norm = self._drain() if logs or checkpoints else None
        if logs:
            record = self._record(step, lr=lr, grad_norm=grad_norm)
            is_best = evaluates and self._evaluate(step, record)
            if evaluates and self._data.general:
                self._look_at_general(step, record, is_best=is_best)
            self._journal.append(record)
            self._screen.show_record(record)
            checkpoints = checkpoints or is_best
        if checkpoints and step > 0:
            self._checkpoint_once()
        self._screen.show_step(step=step, epoch=step / self.plan.steps_per_epoch)
        self._beat(force=evaluates)

    @property
    def is_complete(self) -> bool:
        return self._stopped_early or self.progress.step >= self.plan.total_steps

    @property
    def _stopped_early(self) -> bool:
        return self.stopping.should_stop and self.progress.step < self.plan.total_steps

    def _should_evaluate(self, step: int) -> bool:
        return step % self._config.eval.every == 0 or step == self.plan.total_steps

    def _should_checkpoint(self, step: int) -> bool:
        return step % self._config.checkpoint.every == 0 or step == self.plan.total_steps

    # --- one step -------------------------------------------------------------------------------------------------

    def _train_step(self, step: int, lr: float) -> None:
        began = time.perf_counter()
        microbatches = self._source.microbatches(step)
        output = self.learner.train_step(microbatches, step=step, lr=lr)
        row_ids = np.concatenate([batch.row_ids for batch in microbatches])
        window, tokens = self.progress.window, sum(batch.num_real_tokens for batch in microbatches)
        self._pending.append(_PendingStep(step, output, row_ids, tokens))
        window.num_tokens += tokens
        self.progress.num_tokens += tokens
        self.progress.num_target_tokens += output.num_targets
        self.progress.step = step
        self._count_seconds(began)

    def _drain(self) -> float | None:
        """Reads the losses of the steps since the last call: the expensive device-to-host synchronisation.

        Returns the last step's gradient norm. A checkpoint drains too, so no contaminated weights are ever saved.
        """
        began = time.perf_counter()
        grad_norm: float | None = None
        for pending in self._pending:
            loss, grad_norm = float(pending.output.loss), float(pending.output.grad_norm)
            aux_loss = None if pending.output.aux_loss is None else float(pending.output.aux_loss)
            values = {"loss": loss, "load-balancing loss": aux_loss or 0.0, "gradient norm": grad_norm}
            for name, value in values.items():
                if not math.isfinite(value):
                    raise self._non_finite(pending, name, value)
            window = self.progress.window
            window.loss_sum += loss * pending.output.num_targets
            window.num_targets += pending.output.num_targets
            if aux_loss is not None:
                window.aux_sum = (window.aux_sum or 0.0) + aux_loss * pending.num_tokens
        self._pending.clear()
        self._count_seconds(began)
        return grad_norm

    def _non_finite(self, pending: _PendingStep, name: str, value: float) -> NonFiniteLossError:
        rows = self._data.name_rows(pending.row_ids)
        return NonFiniteLossError(
            f"step {pending.step}: the {name} became {value} on rows {rows}",
            hint=f"look at those rows; then try a lower rate: --lr {self._config.optim.lr / 3:.1g}",
        )

    def _count_seconds(self, began: float) -> None:
        seconds = time.perf_counter() - began
        self.progress.window.seconds += seconds
        self.progress.train_seconds += seconds

    # --- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(self, step: int, record: dict[str, Any]) -> bool:
        """Measures the gap, decides, and adds both to `record`; returns whether this is the best adapter so far."""
        self._screen.show_phase("evaluating")
        self._beat(force=True, phase="evaluating")
        if not self.is_judged:
            return self._look_at_training_rows(step, record)
        validation = self.learner.evaluate(self._data.validation)
        probe = self.learner.evaluate(self._data.probe)
        self._refuse_non_finite(step, validation=validation, probe=probe)
        write_row_losses(self._folder, step, validation=validation, probe=probe)
        gap = measure_gap(validation, probe, guard=self._config.guard, seed=self._config.train.seed)
        is_best = self._decide(step, gap)
        record |= {
            "val_loss": gap.val_loss,
            "probe_loss": gap.probe_loss,
            "gap": gap.value,
            "gap_low": gap.low,
            "gap_high": gap.high,
            "grade": gap.grade,
            "best_step": self.stopping.best_step if step else None,
            "best_val_loss": self.stopping.best_loss if step else None,
            "time": self.elapsed_seconds,
        }
        self._screen.show_evaluation(gap, step=step, is_best=is_best, patience_left=self.stopping.patience_left)
        if validation.expert_tokens is not None:
            record["routing"] = self._judge_routing(
                step, validation.expert_tokens, batches=self._data.validation, is_best=is_best
            )
        self._screen.show_phase("training")
        return is_best

    def _look_at_training_rows(self, step: int, record: dict[str, Any]) -> bool:
        """Shows the probe's loss, from which nothing follows; the adapter after the last step is the one to keep."""
        probe = self.learner.evaluate(self._data.probe)
        self._refuse_non_finite(step, probe=probe)
        write_row_losses(self._folder, step, validation=None, probe=probe)
        is_kept = step > 0 and self.best_step == step
        if is_kept:
            self._save_best(self.learner.export_state().adapter)
        record |= {"probe_loss": probe.mean, "time": self.elapsed_seconds}
        self._screen.show_unjudged(probe.mean, step=step)
        if probe.expert_tokens is not None:
            record["routing"] = self._judge_routing(
                step, probe.expert_tokens, batches=self._data.probe, is_best=is_kept
            )
        self._screen.show_phase("training")
        return is_kept

    def _look_at_general(self, step: int, record: dict[str, Any], *, is_best: bool) -> None:
        """What training does to everything else, held against what was before the first step."""
        self._screen.show_phase("evaluating")
        found, self.progress.general_start = look_at_general(
            self.learner, self._data.general, self.progress.general_start
        )
        self._refuse_non_finite(step, general=found)
        if is_best:
            self.progress.best_general = found
        record |= {"general_loss": found.loss, "general_flipped": found.flipped, "time": self.elapsed_seconds}
        self._screen.show_phase("training")

    def _judge_routing(
        self, step: int, expert_tokens: IntArray, *, batches: Sequence[Batch], is_best: bool
    ) -> dict[str, Any]:
        """Says where the tokens of evaluated rows went; returns it for the record."""
        num_tokens = sum(batch.num_real_tokens for batch in batches)
        routing = Routing.measure(expert_tokens, num_tokens=num_tokens)
        if self.progress.base_routing is None:  # at step 0; a checkpoint of an older version has none
            self.progress.base_routing = routing
        report = RoutingReport(routing, base=self.progress.base_routing)
        if is_best:
            self.progress.best_routing = report.summary
        self._screen.show_routing(report, step=step)
        return report.to_record()

    def _decide(self, step: int, gap: Gap) -> bool:
        self.progress.last_gap = gap
        if step == 0:  # the base model: what training has to beat, but not an adapter to keep
            self.progress.base_val_loss = gap.val_loss
            return False
        decision = self.stopping.update(gap.val_loss, step=step)
        if decision.is_best:
            self.progress.best_gap = gap
            self._save_best(self.learner.export_state().adapter)
        return decision.is_best

    def _refuse_non_finite(self, step: int, **evaluated: RowLosses | GeneralLoss) -> None:
        for name, losses in evaluated.items():
            if not math.isfinite(losses.mean):
                when = f"after step {step}" if step else "of the base model"
                raise NonFiniteLossError(
                    f"the {name} loss {when} is {losses.mean}",
                    hint=f"try a lower rate: --lr {self._config.optim.lr / 3:.1g}"
                    if step
                    else "try another compute type: --set model.dtype=float32",
                )

    # --- records and checkpoints ----------------------------------------------------------------------------------

    def _record(self, step: int, *, lr: float | None, grad_norm: float | None) -> dict[str, Any]:
        window, memory = self.progress.window, self.learner.memory()
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, memory.peak_bytes)
        self.progress.window = Window()
        aux_loss = {} if window.aux_sum is None else {"aux_loss": window.aux_sum / window.num_tokens}
        return {
            "step": step,
            "epoch": round(step / self.plan.steps_per_epoch, 4),
            "loss": window.loss_sum / window.num_targets if window.num_targets else None,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": window.num_tokens / window.seconds if window.seconds else None,
            "memory_gb": memory.current_bytes / 1e9,
            "time": self.elapsed_seconds,
            **aux_loss,
        }

    def _checkpoint_once(self) -> None:
        """Saves a checkpoint of this step, unless there is one."""
        step = self.progress.step
        if step == 0 or step == self._last_checkpoint:
            return
        self._drain()
        self._screen.show_phase("saving")
        self._journal.sync()
        self._checkpointer.save(
            self.learner.export_state(),
            self._trainer_state(),
            step=step,
            epoch=self.plan.epoch_of(step),
            best_step=self.best_step or None,
        )
        self._last_checkpoint = step
        self._screen.show_phase("training")

    def _trainer_state(self) -> dict[str, Any]:
        self.progress.elapsed_seconds = self.elapsed_seconds
        self._started = time.perf_counter()
        return {
            "progress": asdict(self.progress),
            "early_stopping": self.stopping.state_dict(),
            "journal_bytes": self._journal.num_bytes,
            "total_steps": self.plan.total_steps,
            SCHEDULE_STEPS: self.plan.schedule_steps,
            "identity": self._identity,
            **self._origin,
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.learner.import_state(checkpoint.state)
        self.progress = Progress.from_dict(checkpoint.trainer["progress"])
        self.stopping.load_state_dict(checkpoint.trainer["early_stopping"])
        self._last_checkpoint = checkpoint.step
        self._screen.show_step(step=checkpoint.step, epoch=checkpoint.step / self.plan.steps_per_epoch)

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of training over all processes of this run."""
        return self.progress.elapsed_seconds + time.perf_counter() - self._started

    def _beat(self, *, force: bool = False, phase: str = "training") -> None:
        now = time.monotonic()
        if not force and now - self._last_beat < HEARTBEAT_SECONDS:
            return
        self._last_beat = now
        self._heartbeat(
            {
                "phase": phase,
                "step": self.progress.step,
                "epoch": round(self.progress.step / self.plan.steps_per_epoch, 4),
                "best_step": self.best_step or None,
                "best_val_loss": self.stopping.best_loss if self.stopping.best_step else None,
                "base_val_loss": self.progress.base_val_loss,
                "patience_left": self.stopping.patience_left,
                "last_checkpoint_step": self._last_checkpoint,
                "elapsed_seconds": self.elapsed_seconds,
            }
        )
