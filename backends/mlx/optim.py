"""Optimisers for the adapter: float32, functional, the same formulas as the PyTorch backend's.

An optimiser is a frozen object with two methods. `coefficients` works out what depends on the rate and the step, in
Python's double precision as torch does (a bias correction in float32 would be off by 3e-5 at the first step), and
crosses to the device as one small array, so that a compiled update never recompiles. `update` is the formula.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from core.config import OptimConfig

Slots = dict[str, mx.array]
"""State of one parameter by slot name, as in `core.protocols.TrainState`."""
Arrays = Mapping[str, mx.array]


class Optimizer(Protocol):
    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Slots of a parameter of this shape; all start at zero."""
        ...

    def coefficients(self, lr: float, step: int) -> list[float]:
        """What `update` needs of the learning rate and the step, which counts from 1."""
        ...

    def update(self, parameter: mx.array, gradient: mx.array, slots: Slots, c: mx.array) -> tuple[mx.array, Slots]:
        """New parameter and slots; `c` holds `coefficients` as float32."""
        ...


@dataclass(frozen=True, slots=True)
class AdamW:
    """Decoupled weight decay (arXiv:1711.05101) with bias correction, in torch.optim.AdamW's order."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"exp_avg": shape, "exp_avg_sq": shape}

    def coefficients(self, lr: float, step: int) -> list[float]:
        beta1, beta2 = self.betas
        return [
            1 - lr * self.weight_decay,
            lr / (1 - beta1**step),
            math.sqrt(1 - beta2**step),
        ]

    def update(self, parameter: mx.array, gradient: mx.array, slots: Slots, c: mx.array) -> tuple[mx.array, Slots]:
        decay, step_size, root_correction = c[0], c[1], c[2]
        beta1, beta2 = self.betas
        mean = slots["exp_avg"] + (1 - beta1) * (gradient - slots["exp_avg"])
        square = beta2 * slots["exp_avg_sq"] + (1 - beta2) * gradient * gradient
        denominator = mx.sqrt(square) / root_correction + self.eps
        updated = decay * parameter - step_size * (mean / denominator)
        return updated, {"exp_avg": mean, "exp_avg_sq": square}


@dataclass(frozen=True, slots=True)
class Lion:
    """Sign of an interpolated momentum (arXiv:2302.06675, program 1)."""

    betas: tuple[float, float]
    weight_decay: float

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"exp_avg": shape}

    def coefficients(self, lr: float, step: int) -> list[float]:
        return [1 - lr * self.weight_decay, lr]

    def update(self, parameter: mx.array, gradient: mx.array, slots: Slots, c: mx.array) -> tuple[mx.array, Slots]:
        beta1, beta2 = self.betas
        mean = slots["exp_avg"]
        direction = mx.sign(beta1 * mean + (1 - beta1) * gradient)
        return c[0] * parameter - c[1] * direction, {"exp_avg": beta2 * mean + (1 - beta2) * gradient}


@dataclass(frozen=True, slots=True)
class SGD:
    """Plain or with heavy-ball momentum, without dampening; the weight decay is decoupled."""

    momentum: float
    weight_decay: float

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"momentum": shape} if self.momentum else {}

    def coefficients(self, lr: float, step: int) -> list[float]:
        return [1 - lr * self.weight_decay, lr]

    def update(self, parameter: mx.array, gradient: mx.array, slots: Slots, c: mx.array) -> tuple[mx.array, Slots]:
        if not self.momentum:
            return c[0] * parameter - c[1] * gradient, {}
        velocity = self.momentum * slots["momentum"] + gradient
        return c[0] * parameter - c[1] * velocity, {"momentum": velocity}


@dataclass(frozen=True, slots=True)
class Adafactor:
    """Factored second moments (arXiv:1804.04235, algorithm 4) at a given rate.

    No first moment, no relative step, no scaling by the parameter; epsilon 1e-30, decay 1 - t^-0.8, updates clipped
    to a root mean square of 1.
    """

    weight_decay: float

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"row_var": shape[:-1], "col_var": (*shape[:-2], shape[-1])}

    def coefficients(self, lr: float, step: int) -> list[float]:
        rest = step**-0.8
        return [1 - lr * self.weight_decay, lr, 1 - rest, rest]

    def update(self, parameter: mx.array, gradient: mx.array, slots: Slots, c: mx.array) -> tuple[mx.array, Slots]:
        decay, lr, beta, rest = c[0], c[1], c[2], c[3]
        square = gradient * gradient + 1e-30
        row = beta * slots["row_var"] + rest * square.mean(axis=-1)
        column = beta * slots["col_var"] + rest * square.mean(axis=-2)
        scale = mx.rsqrt(row / row.mean(axis=-1, keepdims=True))[..., None] * mx.rsqrt(column)[..., None, :]
        change = gradient * scale
        rms = mx.sqrt((change * change).mean())
        change = change / mx.maximum(rms, 1.0)
        return decay * parameter - lr * change, {"row_var": row, "col_var": column}


def make_optimizer(config: OptimConfig) -> Optimizer:
    match config.name:
        case "adamw":
            return AdamW(config.betas, config.eps, config.weight_decay)
        case "lion":
            return Lion(config.betas, config.weight_decay)
        case "sgd":
            return SGD(config.momentum, config.weight_decay)
        case "adafactor":
            return Adafactor(config.weight_decay)


def initial_slots(optimizer: Optimizer, parameters: Arrays) -> dict[str, Slots]:
    """Zeros for every slot of every parameter: `{parameter name: {slot: array}}`."""
    return {
        name: {slot: mx.zeros(shape) for slot, shape in optimizer.slot_shapes(array.shape).items()}
        for name, array in parameters.items()
    }


def global_norm(gradients: Arrays) -> mx.array:
    """L2 norm over all gradients together, a float32 scalar."""
    squares = [(gradient * gradient).sum() for gradient in gradients.values()]
    return mx.sqrt(mx.stack(squares).sum())


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """torch's clip_grad_norm_: min(1, max_norm / (norm + 1e-6))."""
    return mx.minimum(1.0, max_norm / (norm + 1e-6))
