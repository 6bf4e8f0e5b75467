"""Does an adapter do at its other end what it did where it comes from?

An adapter that loads but does nothing (wrong names, silently skipped) looks like a healthy base model. So whenever an
adapter changes hands (saved, converted, taken to another backend, merged), held-out rows are put through both ends,
and through the base model: what did the loss do, would the two say the same tokens, and does the adapter do anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.adapter import LORA_B, Adapter
from core.adapter_files import read_saved
from core.protocols import IGNORE, Batch, FloatArray, IntArray, Learner, Replay, RowLosses, TrainState

NUM_BATCHES = 4
TOLERANCE = 1e-3
"""Largest difference of a row's mean loss, in nats, that counts as the same adapter on the same base."""


@dataclass(frozen=True, slots=True)
class HandoffReport:
    """What replaying the same rows through both ends showed, or through one and what was measured at the other."""

    num_rows: int
    num_targets: int
    source_loss: float
    """Nats per target where the adapter comes from."""
    target_loss: float
    """Nats per target at its new end."""
    max_difference: float
    """Largest difference of a row's mean loss between the ends, in nats."""
    max_effect: float
    """Largest difference of a loss to the base model's at the new end, of a target's, or of a row's mean where only
    those are known: 0 for an adapter that does nothing."""
    greedy_agreement: float | None = None
    """Share of the targets at which both ends find the same token most likely; None where one end is known by its
    losses alone."""
    has_effect: bool = True
    """Whether the adapter is one that changes the base model: a first one, with B zero, does not."""

    @property
    def loss_difference(self) -> float:
        return self.target_loss - self.source_loss

    @property
    def is_same(self) -> bool:
        return self.max_difference <= TOLERANCE

    @property
    def moves_output(self) -> bool:
        return self.max_effect > 0.0

    @property
    def does_nothing(self) -> bool:
        """Whether an adapter that should change the base model's losses leaves them as they are."""
        return self.has_effect and not self.moves_output

    def problem(self, *, exact: bool = True) -> str | None:
        """One line when something is wrong. `exact` for ends that share a base and compute alike."""
        if self.does_nothing:
            return "the adapter does not change the output of the base model"
        if exact and not self.is_same:
            return (
                f"a row's loss differs by {self.max_difference:.2g} nats from the one where the adapter comes from, "
                f"more than {TOLERANCE:g}"
            )
        return None


def compare_ends(source: Replay, target: Replay, *, base: Replay) -> HandoffReport:
    """Compares two ends on the same rows; `base` is the new end without the adapter."""
    for other in (target, base):
        assert np.array_equal(source.row_ids, other.row_ids), "the ends saw other rows"
        assert np.array_equal(source.num_targets, other.num_targets), "the ends saw other targets"
    return HandoffReport(
        num_rows=len(source.row_ids),
        num_targets=len(source.nll),
        source_loss=float(source.nll.mean()),
        target_loss=float(target.nll.mean()),
        max_difference=_largest(target.row_means - source.row_means),
        greedy_agreement=float(np.mean(source.greedy == target.greedy)),
        max_effect=_largest(target.nll - base.nll),
    )


def check_saved(
    folder: Path,
    adapter: Adapter,
    *,
    learner: Learner,
    batches: Sequence[Batch],
    trained: RowLosses | None = None,
    base: RowLosses | None = None,
) -> HandoffReport:
    """Loads the saved adapter into `learner` and replays the first batches of the validation split.

    Args:
        adapter: the adapter that was saved.
        trained: validation losses as measured in training, at the step that `adapter` is of; where given, they are
            what the rows' losses are compared with.
        base: the base model's, as measured here; with both known, the saved adapter alone is run.
    """
    if trained is not None and base is not None:
        report = check_rows(learner, read_saved(folder, adapter), batches, trained, base=base)
        return replace(report, has_effect=not adapter.does_nothing)
    some = list(islice(batches, NUM_BATCHES))
    source = replay_with(learner, adapter, some)
    plain = replay_with(learner, without_effect(adapter), some)
    target = replay_with(learner, read_saved(folder, adapter), some)
    report = compare_ends(source, target, base=plain)
    if trained is None:
        return report
    drift = _largest(target.row_means - _means_of(trained, target))
    return replace(report, max_difference=max(report.max_difference, drift))


def check_rows(
    learner: Learner,
    adapter: Adapter,
    batches: Sequence[Batch],
    measured: RowLosses,
    *,
    base: RowLosses | None = None,
) -> HandoffReport:
    """Puts the adapter into `learner` and holds the first rows of `batches` against what was measured of them before.

    Args:
        measured: losses of every row of `batches`, as measured elsewhere with the same adapter.
        base: the base model's here; measured if it is not known.
    """
    some = list(islice(batches, NUM_BATCHES))
    before = _losses_with(learner, without_effect(adapter), some) if base is None else base
    here = _losses_with(learner, adapter, some)
    before = _rows_of(before, here.row_ids)
    there = _rows_of(measured, here.row_ids)
    assert np.array_equal(there.num_targets, here.num_targets), "the ends saw other targets"
    return HandoffReport(
        num_rows=len(here.row_ids),
        num_targets=int(here.num_targets.sum()),
        source_loss=there.mean,
        target_loss=here.mean,
        max_difference=_largest((here.nll - there.nll) / here.num_targets),
        max_effect=_largest((here.nll - before.nll) / here.num_targets),
        has_effect=not adapter.does_nothing,
    )


def _losses_with(learner: Learner, adapter: Adapter, batches: Sequence[Batch]) -> RowLosses:
    learner.import_state(TrainState(adapter=adapter.tensors, optimizer={}))
    return learner.evaluate(batches)


def _rows_of(losses: RowLosses, row_ids: IntArray) -> RowLosses:
    """The losses of these rows, in this order."""
    place = {int(row): index for index, row in enumerate(losses.row_ids)}
    chosen = [place[int(row)] for row in row_ids]
    return RowLosses(losses.row_ids[chosen], losses.nll[chosen], losses.num_targets[chosen])


def replay_with(learner: Learner, adapter: Adapter, batches: Sequence[Batch]) -> Replay:
    """Puts the adapter's values into the learner, with a fresh optimiser, and replays the rows."""
    learner.import_state(TrainState(adapter=adapter.tensors, optimizer={}))
    return learner.replay(batches)


def without_effect(adapter: Adapter) -> Adapter:
    """The adapter with every B zero: the base model."""
    return adapter.with_tensors(
        {name: np.zeros_like(tensor) if name.endswith(LORA_B) else tensor for name, tensor in adapter.tensors.items()}
    )


def replay_of_logits(batches: Sequence[Batch], logits: Sequence[npt.NDArray[np.float32]]) -> Replay:
    """The replay that a peer library's logits amount to.

    Args:
        logits: for each batch, float32 [targets, vocabulary], in the order of the flattened batch.
    """
    nll, greedy = [], []
    for batch, found in zip(batches, logits, strict=True):
        wide = found.astype(np.float64)
        top = wide.max(axis=1)
        log_sum = np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top
        nll.append(log_sum - wide[np.arange(len(wide)), batch.targets[batch.targets != IGNORE]])
        greedy.append(wide.argmax(axis=1))
    return Replay.gather(batches, nll, greedy)


def _means_of(all_rows: RowLosses, some_rows: Replay) -> FloatArray:
    """Mean loss in nats of the rows of `some_rows`, as `all_rows` has them."""
    chosen = _rows_of(all_rows, some_rows.row_ids)
    means: FloatArray = chosen.nll / chosen.num_targets
    return means


def _largest(differences: FloatArray) -> float:
    return float(np.abs(differences).max())
