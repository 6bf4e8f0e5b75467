"""What a moved run compares with, measured again where its losses would be others.

Best step, patience and verdict compare losses of different steps. When a run goes on with other weights under its
adapter (MLX's 4-bit form and NF4), or in another compute type, those from before were measured on something else. So
the adapter that it started from and the best one so far are evaluated here before the next step, and the run goes on
with these numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from core.adapter import Adapter
from core.checkpoint import Checkpoint
from core.config import RunConfig
from core.early_stopping import EarlyStopping
from core.errors import NonFiniteLossError
from core.general import look_at_general
from core.overfitting import Gap, measure_gap
from core.progress import Progress
from core.protocols import Learner, RowLosses, TrainState
from core.routing import Routing, RoutingReport
from core.trainer import TrainingData

_log = logging.getLogger("twinkeel")


@dataclass(frozen=True, slots=True)
class Remeasured:
    """A checkpoint to go on from."""

    checkpoint: Checkpoint
    """With the base loss, the best loss and its gap, the loss that patience counts from, and a mixture's routing as
    they are here; all else as it was."""
    lines: tuple[str, ...]
    warnings: tuple[str, ...]


def remeasure(
    checkpoint: Checkpoint,
    *,
    read_best: Callable[[int], Checkpoint | None],
    initial: Adapter,
    learner: Learner,
    data: TrainingData,
    config: RunConfig,
) -> Remeasured:
    """Evaluates the initial adapter and the best one; the learner holds any state afterwards.

    Args:
        read_best: the checkpoint of a step, None where it is gone: then what was measured of it before stays.

    Raises:
        NonFiniteLossError: a loss is not finite here.
    """
    progress = Progress.from_dict(checkpoint.trainer["progress"])
    stopping = EarlyStopping(patience=None)
    stopping.load_state_dict(checkpoint.trainer["early_stopping"])
    measure = _Measure(learner, data, config)
    said = []
    if progress.base_val_loss is not None:
        said.append(_start(progress, measure, initial))
    best = read_best(stopping.best_step) if stopping.best_step else None
    warnings = []
    if best is not None:
        tensors: Any = best.state.adapter
        said.append(_best(progress, stopping, measure, initial.with_tensors(tensors)))
    elif stopping.best_step:
        warnings.append(
            f"the best validation loss {stopping.best_loss:.3f} (step {stopping.best_step}, whose checkpoint is gone) "
            "was measured on other weights: best step, patience and verdict compare with it all the same"
        )
    trainer = {**checkpoint.trainer, "progress": asdict(progress), "early_stopping": stopping.state_dict()}
    lines = (f"measured {', '.join(said)}: what was before was on other weights",) if said else ()
    return Remeasured(replace(checkpoint, trainer=trainer), lines, tuple(warnings))


class _Measure:
    """Evaluates adapters as the trainer does."""

    def __init__(self, learner: Learner, data: TrainingData, config: RunConfig) -> None:
        self.learner = learner
        self.general = data.general
        self._data = data
        self._config = config
        self.start = config.start

    def validation(self, adapter: Adapter, name: str) -> RowLosses:
        _log.info("measuring the %s on the weights here", name)
        self.learner.import_state(TrainState(adapter=adapter.tensors, optimizer={}))
        losses = self.learner.evaluate(self._data.validation)
        self._refuse_non_finite(losses, name)
        return losses

    def gap(self, validation: RowLosses, name: str) -> Gap:
        """With the probe at the weights of the last call of `validation`."""
        probe = self.learner.evaluate(self._data.probe)
        self._refuse_non_finite(probe, name)
        return measure_gap(validation, probe, guard=self._config.guard, seed=self._config.train.seed)

    def routing(self, validation: RowLosses) -> Routing | None:
        if validation.expert_tokens is None:
            return None
        num_tokens = sum(batch.num_real_tokens for batch in self._data.validation)
        return Routing.measure(validation.expert_tokens, num_tokens=num_tokens)

    def _refuse_non_finite(self, losses: RowLosses, name: str) -> None:
        if not math.isfinite(losses.mean):
            raise NonFiniteLossError(
                f"the loss of the {name} is {losses.mean} here", hint="go on where the run was: --backend, --device"
            )


def _start(progress: Progress, measure: _Measure, initial: Adapter) -> str:
    before = progress.base_val_loss
    losses = measure.validation(initial, measure.start)
    if measure.general:
        progress.general_start = look_at_general(measure.learner, measure.general, None)[1]
    progress.base_val_loss, progress.base_routing = losses.mean, measure.routing(losses)
    return f"{measure.start} {losses.mean:.3f} here ({before:.3f} before)"


def _best(progress: Progress, stopping: EarlyStopping, measure: _Measure, adapter: Adapter) -> str:
    before, name = stopping.best_loss, "best adapter"
    losses = measure.validation(adapter, name)
    progress.best_gap = measure.gap(losses, name)
    if measure.general:
        progress.best_general, _ = look_at_general(measure.learner, measure.general, progress.general_start)
    stopping.rebase(losses.mean)
    routing = measure.routing(losses)
    if routing is not None and progress.base_routing is not None:
        progress.best_routing = RoutingReport(routing, base=progress.base_routing).summary
    return f"{name}, of step {stopping.best_step}, {losses.mean:.3f} ({before:.3f})"
