"""When to stop, and which step was the best: a small pure object on floats."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Decision:
    """What one evaluation means."""

    is_best: bool
    """The lowest validation loss so far, by however little."""
    should_stop: bool


@dataclass(slots=True)
class EarlyStopping:
    """Counts evaluations without a real improvement.

    `best_loss` follows every fall of the loss, so that the best adapter is the best adapter. The patience is only
    renewed by a fall of more than `min_delta` below `reference_loss`, the loss of the last renewal; small falls that
    add up renew it too.
    """

    patience: int | None
    min_delta: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    reference_loss: float = math.inf
    num_bad: int = 0
    """Evaluations since the patience was renewed."""

    def update(self, loss: float, *, step: int) -> Decision:
        """Takes the validation loss after `step` optimiser steps; a loss that is not finite is never an improvement."""
        if not math.isfinite(loss):
            self.num_bad += 1
            return Decision(False, self.should_stop)
        is_best = loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step = loss, step
        if loss < self.reference_loss - self.min_delta:
            self.reference_loss, self.num_bad = loss, 0
        else:
            self.num_bad += 1
        return Decision(is_best, self.should_stop)

    def rebase(self, best_loss: float) -> None:
        """Goes on with the best step's loss as measured anew, on other weights.

        The loss of the last renewal moves by as much; evaluations that were counted stay counted.
        """
        self.reference_loss += best_loss - self.best_loss
        self.best_loss = best_loss

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self.num_bad >= self.patience

    @property
    def patience_left(self) -> int | None:
        return None if self.patience is None else max(self.patience - self.num_bad, 0)

    def state_dict(self) -> dict[str, Any]:
        """The counters, as JSON can hold them (infinity before the first evaluation becomes null)."""
        state = {k: v for k, v in asdict(self).items() if k not in ("patience", "min_delta")}
        return {k: None if v == math.inf else v for k, v in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, math.inf if value is None else value)
