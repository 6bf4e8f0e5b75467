"""The LoRA adapter, apart from any backend: which modules, which shapes, which first values.

Neutral form: for each adapted module `<module>.lora_A` float32 (rank, in) and `<module>.lora_B` float32 (out, rank), in
PEFT's orientation; the module adds `scale * B @ A @ x` (Hu et al. 2021, arXiv:2106.09685). Module names are those of
transformers and mlx-lm: `model.layers.<i>.self_attn.q_proj`. `core.adapter_files` writes it for both worlds.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.architecture import ATTENTION, MLP, Architecture
from core.config import LoraConfig
from core.errors import UserError
from core.seeding import generator

LORA_A = "lora_A"
LORA_B = "lora_B"


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA matrices with what is needed to apply them."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    num_layers: int
    """Layers of the base model."""
    first_layer: int
    """Layers below this one have no adapter."""
    modules: tuple[str, ...]
    """Full names of the adapted modules, in order."""
    tensors: Mapping[str, npt.NDArray[np.float32]]

    @property
    def scale(self) -> float:
        """Factor of `B @ A @ x`: alpha / rank; with rsLoRA alpha / sqrt(rank) (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def layer_keys(self) -> tuple[str, ...]:
        """Names within a layer of the adapted modules: `self_attn.q_proj`."""
        return tuple(dict.fromkeys(name.split(".", 3)[3] for name in self.modules))

    @property
    def num_parameters(self) -> int:
        return sum(int(tensor.size) for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Adapter:
        """The same adapter with other values; the names and shapes must be the same."""
        assert tensors.keys() == self.tensors.keys()
        return Adapter(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rslora=self.rslora,
            num_layers=self.num_layers,
            first_layer=self.first_layer,
            modules=self.modules,
            tensors=tensors,
        )


def plan_adapter(lora: LoraConfig, architecture: Architecture, *, seed: int) -> Adapter:
    """Chooses the modules and draws the first values: A uniform in +-1/sqrt(in), as in PEFT and mlx-lm; B zero.

    Raises:
        UserError: targets that match nothing, or that this version has no adapter for.
    """
    keys = target_keys(lora.targets, architecture)
    shapes = architecture.linear_shapes()
    first_layer = min(int(lora.frozen_fraction * architecture.num_layers + 1e-9), architecture.num_layers - 1)
    modules: list[str] = []
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for layer in range(first_layer, architecture.num_layers):
        for key in keys:
            name = f"model.layers.{layer}.{key}"
            out_features, in_features = shapes[key]
            modules.append(name)
            tensors[f"{name}.{LORA_A}"] = _first_a(name, lora.rank, in_features, seed=seed)
            tensors[f"{name}.{LORA_B}"] = np.zeros((out_features, lora.rank), np.float32)
    return Adapter(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        rslora=lora.rslora,
        num_layers=architecture.num_layers,
        first_layer=first_layer,
        modules=tuple(modules),
        tensors=tensors,
    )


def _first_a(name: str, rank: int, in_features: int, *, seed: int) -> npt.NDArray[np.float32]:
    bound = 1.0 / math.sqrt(in_features)
    draw = generator(seed, "adapter", name).uniform(-bound, bound, (rank, in_features))
    return draw.astype(np.float32)


def target_keys(targets: str | list[str], architecture: Architecture) -> tuple[str, ...]:
    """Names within a layer of the modules that `lora.targets` means, in the model's order.

    Raises:
        UserError: a name that matches no linear module of a layer.
    """
    known = tuple(architecture.linear_shapes())
    if targets == "attention":
        return ATTENTION
    if targets == "all-linear":
        _refuse_experts(architecture, "all-linear")
        return known
    if not targets:
        raise UserError("lora.targets is empty", hint="use attention, all-linear, or module names")
    chosen: set[str] = set()
    for target in targets:
        matches = [key for key in known if key == target or key.endswith("." + target)]
        if not matches:
            _refuse(target, architecture, known)
        chosen.update(matches)
    return tuple(key for key in known if key in chosen)


def _refuse(target: str, architecture: Architecture, known: tuple[str, ...]) -> None:
    if architecture.is_moe and any(key.endswith(target) for key in MLP):
        _refuse_experts(architecture, target)
    names = [key.rsplit(".", 1)[-1] for key in known]
    near = difflib.get_close_matches(target.rsplit(".", 1)[-1], names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"lora.targets: {target!r} matches no linear module of this {architecture.model_type} model",
        hint=f"{hint}modules: {', '.join(names)}",
    )


def _refuse_experts(architecture: Architecture, target: str) -> None:
    if architecture.is_moe:
        raise UserError(
            f"lora.targets: {target} means the experts of this {architecture.model_type} model, "
            "and this version has no adapters for experts",
            hint="use --set lora.targets=attention",
        )
