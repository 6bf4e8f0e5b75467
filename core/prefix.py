"""The frozen part of a run, computed once: whether that pays, filling the store, batches that bring their states along.

Below the first adapter a row gives the same states in every epoch and at every evaluation. They are kept in a
`PrefixStore` and put on each batch just before the learner gets it, so neither the loop nor the data know of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from core.config import RunConfig
from core.prefix_store import PrefixStore
from core.protocols import (
    Batch,
    Learner,
    MemoryStats,
    Prefix,
    Replay,
    RowLosses,
    StepOutput,
    TokenArray,
    TrainState,
    Weight,
)
from core.schedule import plan_steps
from core.trainer import TrainingData

PAYS_FROM = 0.1
"""Share of the frozen layers' work that must be spared before `auto` keeps anything; the next run spares the rest."""


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """What storing would cost and spare, in positions without padding."""

    rows: Sequence[TokenArray]
    """Inputs of every distinct row of the run, without padding."""
    num_uses: int
    """Positions that the run takes through the frozen layers if nothing is kept."""

    @property
    def num_positions(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def spared(self) -> float:
        """Share of the frozen layers' work that is not done again, if the store is empty at first."""
        return max(1.0 - self.num_positions / self.num_uses, 0.0)


def plan_prefixes(config: RunConfig, data: TrainingData) -> PrefixPlan:
    """A function of settings and rows alone: a run that is resumed decides as it did before."""
    plan = plan_steps(config, batches_per_epoch=data.batches_per_epoch)
    num_evaluations = 1 + math.ceil(plan.total_steps / config.eval.every)
    training = _positions(data.epoch(0)) * plan.total_steps / plan.steps_per_epoch
    evaluating = (_positions(data.validation) + _positions(data.probe) + _positions(data.general)) * num_evaluations
    return PrefixPlan(distinct_rows([*data.epoch(0), *data.validation, *data.general]), int(training + evaluating))


def distinct_rows(batches: Iterable[Batch]) -> list[TokenArray]:
    """The inputs of each row, without padding; rows of the same tokens once."""
    found: dict[bytes, TokenArray] = {}
    for batch in batches:
        for row in rows_of(batch):
            if len(row):
                found.setdefault(row.tobytes(), row)
    return list(found.values())


def rows_of(batch: Batch) -> list[TokenArray]:
    """int32 [T] of each row of a batch: its inputs up to the last target; empty for a filler."""
    lengths = batch.is_token.sum(axis=1)
    return [inputs[:length] for inputs, length in zip(batch.inputs, lengths, strict=True)]


def _positions(batches: Iterable[Batch]) -> int:
    return sum(batch.num_real_tokens for batch in batches)


@dataclass(frozen=True, slots=True)
class PrefixReport:
    """What the store did for a run; in its summary."""

    layers: int
    rows: int
    computed_rows: int
    """The others were there from an earlier run."""
    bytes: int
    spared: float
    """Share of the frozen layers' work that this run is spared, its own filling counted."""
    seconds: float
    """For checking what is there and computing the rest."""


class PrefixedLearner:
    """A `Learner` whose batches begin above the frozen layers."""

    def __init__(self, learner: Learner, store: PrefixStore) -> None:
        self._learner = learner
        self._store = store

    def train_step(self, microbatches: Sequence[Batch], *, step: int, lr: float) -> StepOutput:
        return self._learner.train_step([self._with_prefix(batch) for batch in microbatches], step=step, lr=lr)

    def evaluate(self, batches: Iterable[Batch]) -> RowLosses:
        return self._learner.evaluate(self._with_prefix(batch) for batch in batches)

    def replay(self, batches: Iterable[Batch]) -> Replay:
        return self._learner.replay(self._with_prefix(batch) for batch in batches)

    def target_logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        return self._learner.target_logits(self._with_prefix(batch))

    def _with_prefix(self, batch: Batch) -> Batch:
        found = [self._prefix_of(row) if len(row) else None for row in rows_of(batch)]
        known = [prefix for prefix in found if prefix is not None]
        if not known:
            return batch
        shape = (*batch.inputs.shape, known[0].states.shape[-1])
        states: np.ndarray[Any, np.dtype[Any]] = np.zeros(shape, known[0].states.dtype)
        for position, prefix in enumerate(found):
            if prefix is not None:
                states[position, : len(prefix.states)] = prefix.states
        routed = [prefix.routed for prefix in known if prefix.routed is not None]
        return replace(batch, prefix=Prefix(states, np.sum(routed, axis=0, dtype=np.float32) if routed else None))

    def _prefix_of(self, row: TokenArray) -> Prefix:
        try:
            return self._store.get(row)
        except KeyError:  # a row that is not the run's own
            return next(iter(self._learner.prefixes([row])))

    # --- as the learner has it

    @property
    def num_parameters(self) -> int:
        return self._learner.num_parameters

    @property
    def num_trainable(self) -> int:
        return self._learner.num_trainable

    @property
    def description(self) -> str:
        return self._learner.description

    @property
    def state_bits(self) -> Literal[8, 32]:
        return self._learner.state_bits

    @property
    def num_prefix_layers(self) -> int:
        return self._learner.num_prefix_layers

    def prefixes(self, rows: Sequence[TokenArray]) -> Iterator[Prefix]:
        return self._learner.prefixes(rows)

    def export_state(self) -> TrainState:
        return self._learner.export_state()

    def import_state(self, state: TrainState) -> None:
        self._learner.import_state(state)

    def weights(self) -> Sequence[Weight]:
        return self._learner.weights()

    def memory(self) -> MemoryStats:
        return self._learner.memory()

    def close(self) -> None:
        self._learner.close()
