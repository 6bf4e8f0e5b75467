"""What the training loop knows, apart from the learner's weights: counters, sums, what it compares with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.general import GeneralLoss, GeneralStart
from core.overfitting import Gap
from core.routing import Routing


@dataclass(slots=True)
class Window:
    """Sums since the last record; part of every checkpoint."""

    loss_sum: float = 0.0
    aux_sum: float | None = None
    """Load-balancing loss times the step's tokens; None when there is none."""
    num_targets: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Progress:
    """All that the loop knows, apart from the learner's weights: what `trainer.json` of a checkpoint holds."""

    step: int = 0
    base_val_loss: float | None = None
    best_gap: Gap | None = None
    last_gap: Gap | None = None
    base_routing: Routing | None = None
    """Of a mixture, before the first step."""
    best_routing: dict[str, Any] | None = None
    """`core.routing.SCALARS` of the best step."""
    general_start: GeneralStart | None = None
    """Of the general texts, where they are measured; likewise `best_general` at the best step."""
    best_general: GeneralLoss | None = None
    window: Window = field(default_factory=Window)
    num_target_tokens: int = 0
    num_tokens: int = 0
    train_seconds: float = 0.0
    elapsed_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        gaps = {name: None if values[name] is None else Gap(**values[name]) for name in ("best_gap", "last_gap")}
        routing, start, best = (values.get(name) for name in ("base_routing", "general_start", "best_general"))
        return cls(
            **{
                **values,
                **gaps,
                "base_routing": None if routing is None else Routing.from_dict(routing),
                "general_start": None if start is None else GeneralStart(**start),
                "best_general": None if best is None else GeneralLoss(**best),
                "window": Window(**values["window"]),
            }
        )
