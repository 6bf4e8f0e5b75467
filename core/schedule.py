"""How many optimiser steps a run has, and the learning rate of each: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.config import RunConfig, ScheduleConfig

SCHEDULE_STEPS = "schedule_steps"
"""In the state and in every checkpoint of a run: `Plan.schedule_steps`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How many steps there are."""

    steps_per_epoch: int
    total_steps: int
    schedule_steps: int | None = None
    """Steps that the learning rate is laid out for, where they are not the run's: it ends before its schedule does."""

    def epoch_of(self, step: int) -> int:
        """Epoch that step `step` belongs to, counting from 1; 0 before the first step."""
        return math.ceil(step / self.steps_per_epoch)


def plan_steps(config: RunConfig, *, batches_per_epoch: int, schedule_steps: int | None = None) -> Plan:
    """Optimiser steps of the run: the last group of an epoch may be short, no step spans two epochs."""
    steps_per_epoch = math.ceil(batches_per_epoch / config.train.accumulation)
    total = config.train.max_steps
    if total is None:
        total = math.ceil(config.train.epochs * steps_per_epoch - 1e-9)  # 1.1 x 50 is a little more than 55
    return Plan(steps_per_epoch=steps_per_epoch, total_steps=max(total, 1), schedule_steps=schedule_steps)


def num_warmup_steps(schedule: ScheduleConfig, *, total_steps: int) -> int:
    """Steps below the peak rate at the start."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    # 0.07 * 100 is a hair above 7: what binary fractions add must not become a step
    return math.ceil(schedule.warmup_ratio * total_steps - 1e-9)


def lr_at(step: int, *, peak: float, schedule: ScheduleConfig, total_steps: int) -> float:
    """Learning rate of optimiser step `step`, which counts from 1 to `total_steps`.

    The warm-up rises linearly and no step is spent at rate 0: with `w` warm-up steps, step `s <= w` has
    `peak * s / (w + 1)` and step `w + 1` has the peak. A decay that ends at `min_lr` would reach it one step after the
    last, as transformers' schedules do. Cosine: SGDR (Loshchilov and Hutter 2016, arXiv:1608.03983).
    """
    warmup = num_warmup_steps(schedule, total_steps=total_steps)
    if step <= warmup:
        return peak * step / (warmup + 1)
    progress = (step - 1 - warmup) / max(total_steps - warmup, 1)
    return schedule.min_lr + (peak - schedule.min_lr) * _remaining(schedule, progress)


def _remaining(schedule: ScheduleConfig, progress: float) -> float:
    """Share of the way from `min_lr` to the peak, at `progress` in [0, 1) after the warm-up."""
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "linear":
        return 1.0 - progress
    if schedule.name == "cosine_restarts":
        progress = progress * (schedule.restarts + 1) % 1.0
    return 0.5 * (1.0 + math.cos(math.pi * progress))
