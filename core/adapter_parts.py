"""From the tensors that a file holds to an `Adapter`: each checked against the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.adapter import HEAD, LORA_A, LORA_B, Adapter, LoraModule
from core.architecture import Architecture
from core.errors import UserError

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Part:
    """An adapted module as read: A (..., rank, in), B (..., out, rank), with the experts first where there are any."""

    name: str
    a: Array
    b: Array
    rank: int
    alpha: float


def assemble(parts: Sequence[Part], architecture: Architecture, *, dropout: float, rslora: bool, where: str) -> Adapter:
    """Puts the parts together in the model's order.

    Raises:
        UserError: a module that this model lacks, or one of another shape.
    """
    by_name = {part.name: part for part in parts}
    names = [name for name in _shapes(architecture) if name in by_name]
    if unknown := [name for name in by_name if name not in names]:
        raise UserError(
            f"{where}: {unknown[0]} is no module of this {architecture.model_type} model that can be adapted"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""),
            hint="give the base model that it was made for with --model",
        )
    for name in names:
        _check_shape(by_name[name], _shapes(architecture)[name], where)
    tensors = {}
    for name in names:
        tensors[f"{name}.{LORA_A}"] = np.ascontiguousarray(by_name[name].a, np.float32)
        tensors[f"{name}.{LORA_B}"] = np.ascontiguousarray(by_name[name].b, np.float32)
    adapter = Adapter(
        modules={name: LoraModule(by_name[name].rank, by_name[name].alpha) for name in names},
        tensors=tensors,
        num_layers=architecture.num_layers,
        dropout=dropout,
        rslora=rslora,
    )
    if adapter.does_nothing:
        raise UserError(
            f"{where}: the adapter does nothing: A, B or scale of every module is zero",
            hint="it was saved before its first training step, or saved wrongly",
        )
    return adapter


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Full name -> shape of the weight, in the model's order."""
    shapes = {
        f"model.layers.{layer}.{key}": shape
        for layer in range(architecture.num_layers)
        for key, shape in architecture.module_shapes().items()
    }
    return shapes | {HEAD: (architecture.vocab_size, architecture.hidden_size)}


def _check_shape(part: Part, shape: tuple[int, ...], where: str) -> None:
    *experts, out_features, in_features = shape
    expected = ((*experts, part.rank, in_features), (*experts, out_features, part.rank))
    if (part.a.shape, part.b.shape) != expected:
        raise UserError(
            f"{where}: {part.name} has A {part.a.shape} and B {part.b.shape}; this model needs {expected[0]} and "
            f"{expected[1]}",
            hint="give the base model that it was made for with --model",
        )
