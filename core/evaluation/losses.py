"""The losses of base model and adapter on the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import NonFiniteLossError
from core.evaluation.bootstrap import Difference, Verdict, resamples
from core.protocols import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class PairedLosses:
    """Losses in nats per target token; the gain is how far the adapter's lies below the base model's."""

    base_loss: float
    adapter_loss: float
    difference: Difference
    row_differences: FloatArray
    """float64 [N]: the adapter's mean loss of each row less the base model's; above 0 the row got worse."""
    num_targets: int

    @property
    def gain(self) -> float:
        return self.difference.value

    @property
    def gain_low(self) -> float:
        return self.difference.low

    @property
    def gain_high(self) -> float:
        return self.difference.high

    @property
    def p_value(self) -> float:
        return self.difference.p_value

    @property
    def verdict(self) -> Verdict:
        return self.difference.verdict

    @property
    def num_rows(self) -> int:
        return len(self.row_differences)

    @property
    def num_worse(self) -> int:
        """Rows whose loss rose."""
        return int(np.count_nonzero(self.row_differences > 0))

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": {"loss": self.base_loss, "perplexity": perplexity(self.base_loss)},
            "adapter": {"loss": self.adapter_loss, "perplexity": perplexity(self.adapter_loss)},
            "gain": self.gain,
            "gain_low": self.gain_low,
            "gain_high": self.gain_high,
            "p_value": self.p_value,
            "confidence": self.difference.confidence,
            "verdict": self.verdict,
            "num_rows": self.num_rows,
            "num_targets": self.num_targets,
            "num_rows_worse": self.num_worse,
        }


def perplexity(loss: float) -> float | None:
    """exp(loss); None where that is more than a float can hold."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def pair_losses(
    base: FloatArray, adapter: FloatArray, num_targets: IntArray, *, seed: int, confidence: float
) -> PairedLosses:
    """Compares the sides; the mean is over target tokens, the bootstrap over rows.

    Args:
        base, adapter: float64 [N]: each row's loss, summed over its targets, in nats.
        num_targets: int64 [N]: at least 1 each.

    Raises:
        NonFiniteLossError: a loss is not a finite number.
    """
    assert len(base) == len(adapter) == len(num_targets) > 0
    for side, losses in (("base model", base), ("adapter", adapter)):
        if not np.isfinite(losses).all():
            raise NonFiniteLossError(
                f"the loss of the {side} is not a number on {int((~np.isfinite(losses)).sum())} of {len(losses)} rows",
                hint="the weights or the compute type are at fault; try --device cpu, or model.dtype float32",
            )
    draws = [
        weights @ (base - adapter) / (weights @ num_targets.astype(np.float64))
        for weights in resamples(len(base), seed=seed)
    ]
    total = num_targets.sum()
    difference = Difference.between(
        float((base - adapter).sum() / total),
        np.concatenate(draws),
        num_unlike=int(np.count_nonzero(base != adapter)),
        confidence=confidence,
    )
    return PairedLosses(
        base_loss=float(base.sum() / total),
        adapter_loss=float(adapter.sum() / total),
        difference=difference,
        row_differences=(adapter - base) / num_targets,
        num_targets=int(total),
    )
