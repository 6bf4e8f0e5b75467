"""Does the saved adapter do what the trained one did?

An adapter that loads but does nothing (wrong names, silently skipped) looks like a healthy base model. So the files are
read back, compared with the weights in training, and put through held-out rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from core.adapter import Adapter
from core.adapter_files import MLX_WEIGHTS, PEFT_WEIGHTS, mlx_weights, peft_weights
from core.protocols import Batch, Learner, RowLosses, TrainState

NUM_BATCHES = 4
TOLERANCE = 1e-3
"""Largest difference of a row's mean loss, in nats, that counts as the same adapter."""


@dataclass(frozen=True, slots=True)
class HandoffReport:
    """What replaying held-out rows through the saved adapter showed."""

    num_rows: int
    max_difference: float
    """Largest difference of a row's mean loss to the one measured in training, in nats."""
    max_effect: float
    """Largest difference to the base model's, in nats: 0 for an adapter that does nothing."""

    @property
    def is_same(self) -> bool:
        return self.max_difference <= TOLERANCE

    @property
    def moves_output(self) -> bool:
        return self.max_effect > 0.0

    @property
    def problem(self) -> str | None:
        """One line when something is wrong."""
        if not self.moves_output:
            return "the saved adapter does not change the output of the base model"
        if not self.is_same:
            return f"the saved adapter's loss differs by {self.max_difference:.2g} nats from the one in training"
        return None


def read_saved(folder: Path, adapter: Adapter) -> Adapter:
    """The adapter as its PEFT file holds it, after checking that the MLX file holds the same.

    Raises:
        AssertionError: a tensor is missing, or the files disagree: a bug of ours.
    """
    from safetensors.numpy import load_file

    tensors = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): tensor
        for name, tensor in load_file(folder / PEFT_WEIGHTS).items()
    }
    saved = adapter.with_tensors(tensors)
    other = load_file(folder / MLX_WEIGHTS)
    expected = mlx_weights(saved)
    assert other.keys() == expected.keys()
    assert all(np.array_equal(other[name], expected[name]) for name in expected)
    assert peft_weights(saved).keys() == peft_weights(adapter).keys()
    return saved


def check_saved(
    folder: Path,
    adapter: Adapter,
    *,
    learner: Learner,
    batches: Sequence[Batch],
    trained: RowLosses,
    base: RowLosses,
) -> HandoffReport:
    """Loads the saved adapter into `learner` and replays the first batches of the validation split.

    Args:
        trained: validation losses at the step the adapter was saved.
        base: validation losses of the base model.
    """
    saved = read_saved(folder, adapter)
    learner.import_state(TrainState(adapter=saved.tensors, optimizer={}))
    losses = learner.evaluate(islice(batches, NUM_BATCHES))
    replayed = losses.nll / losses.num_targets
    return HandoffReport(
        num_rows=len(replayed),
        max_difference=_largest(replayed - _means_of(trained, losses)),
        max_effect=_largest(replayed - _means_of(base, losses)),
    )


def _means_of(all_rows: RowLosses, some_rows: RowLosses) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Mean loss in nats of the rows of `some_rows`, as `all_rows` has them."""
    place = {int(row): index for index, row in enumerate(all_rows.row_ids)}
    chosen = [place[int(row)] for row in some_rows.row_ids]
    means: np.ndarray[tuple[int], np.dtype[np.float64]] = all_rows.nll[chosen] / all_rows.num_targets[chosen]
    return means


def _largest(differences: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(np.abs(differences).max())
