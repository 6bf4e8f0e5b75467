"""The learning rate as a pure function of the optimiser step."""

from __future__ import annotations

import math

from core.config import ScheduleConfig


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
