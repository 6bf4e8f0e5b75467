"""The LoRA adapter, apart from any backend: which modules, which ranks and scales, which values.

Neutral form: for each adapted module `<module>.lora_A` float32 (rank, in) and `<module>.lora_B` float32 (out, rank), in
PEFT's orientation; the module adds `scale * B @ A @ x` (Hu et al. 2021, arXiv:2106.09685). The experts of a layer are
one module with a leading axis: (experts, rank, in) and (experts, out, rank). Module names are those of
`core.architecture`: `model.layers.<i>.self_attn.q_proj`. `core.adapter_files` reads and writes it for both worlds.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from core.architecture import ATTENTION, ROUTER, Architecture
from core.config import LoraConfig
from core.errors import UserError
from core.seeding import generator

LORA_A = "lora_A"
LORA_B = "lora_B"
HEAD = "lm_head"
"""The only module outside the layers that an adapter can be carried for; no backend trains it."""

AdapterTensors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class LoraModule:
    """What an adapted module has of its own."""

    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA matrices with what is needed to apply them."""

    modules: Mapping[str, LoraModule]
    """Full name -> rank and alpha of every adapted module, in the model's order."""
    tensors: AdapterTensors
    num_layers: int
    """Layers of the base model."""
    dropout: float = 0.0
    rslora: bool = False

    def scale_of(self, module: str) -> float:
        """Factor of `B @ A @ x`: alpha / rank; with rsLoRA alpha / sqrt(rank) (arXiv:2312.03732)."""
        lora = self.modules[module]
        return lora.alpha / (math.sqrt(lora.rank) if self.rslora else lora.rank)

    def matrices(self, module: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """A and B of a module."""
        return self.tensors[f"{module}.{LORA_A}"], self.tensors[f"{module}.{LORA_B}"]

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers with an adapter, rising."""
        return tuple(sorted({split_name(name)[0] for name in self.modules if name != HEAD}))

    @property
    def layer_keys(self) -> tuple[str, ...]:
        """Names within a layer of the adapted modules: `self_attn.q_proj`."""
        return tuple(dict.fromkeys(split_name(name)[1] for name in self.modules if name != HEAD))

    @property
    def is_regular(self) -> bool:
        """Whether every adapted layer has the same modules, and nothing outside the layers is adapted."""
        return len(self.modules) == len(self.layers) * len(self.layer_keys)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks, rising."""
        return tuple(sorted({lora.rank for lora in self.modules.values()}))

    @property
    def num_parameters(self) -> int:
        return sum(int(tensor.size) for tensor in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, scales and values."""
        digest = hashlib.sha256()
        for name in self.modules:
            digest.update(f"{name} {self.scale_of(name)!r}".encode())
            for matrix in self.matrices(name):
                digest.update(f"{matrix.shape}".encode())
                digest.update(np.ascontiguousarray(matrix, np.float32).tobytes())
        return digest.hexdigest()

    @property
    def does_nothing(self) -> bool:
        """Whether every module's A, B or scale is zero, so that the model is the base model."""
        return not any(
            self.scale_of(name) and all(np.any(matrix) for matrix in self.matrices(name)) for name in self.modules
        )

    def with_tensors(self, tensors: AdapterTensors) -> Adapter:
        """The same adapter with other values; the names and shapes must be the same."""
        assert tensors.keys() == self.tensors.keys()
        return replace(self, tensors=tensors)


def split_name(module: str) -> tuple[int, str]:
    """`model.layers.3.self_attn.q_proj` -> (3, `self_attn.q_proj`)."""
    _, _, layer, key = module.split(".", 3)
    return int(layer), key


def trains_router(modules: Iterable[str]) -> bool:
    """Whether a mixture's router is among these full names of modules."""
    return any(module.endswith(f".{ROUTER}") for module in modules)


def plan_adapter(lora: LoraConfig, architecture: Architecture, *, seed: int, router: bool = False) -> Adapter:
    """Chooses the modules and draws the first values: A uniform in +-1/sqrt(in), as in PEFT and mlx-lm; B zero.

    Args:
        router: adapt the router of a mixture as well.

    Raises:
        UserError: targets that match nothing.
    """
    keys = target_keys(lora.targets, architecture, router=router)
    shapes = architecture.module_shapes()
    layers = range(first_layer(lora, architecture), architecture.num_layers)
    names = [f"model.layers.{layer}.{key}" for layer in layers for key in keys]
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for name in names:
        *experts, out_features, in_features = shapes[split_name(name)[1]]
        tensors[f"{name}.{LORA_A}"] = _first_a(name, (*experts, lora.rank, in_features), seed=seed)
        tensors[f"{name}.{LORA_B}"] = np.zeros((*experts, out_features, lora.rank), np.float32)
    return Adapter(
        modules=dict.fromkeys(names, LoraModule(lora.rank, lora.alpha)),
        tensors=tensors,
        num_layers=architecture.num_layers,
        dropout=lora.dropout,
        rslora=lora.rslora,
    )


def first_layer(lora: LoraConfig, architecture: Architecture) -> int:
    """Number of the lowest layer with an adapter."""
    return min(int(lora.frozen_fraction * architecture.num_layers + 1e-9), architecture.num_layers - 1)


def _first_a(name: str, shape: tuple[int, ...], *, seed: int) -> npt.NDArray[np.float32]:
    bound = 1.0 / math.sqrt(shape[-1])
    return generator(seed, "adapter", name).uniform(-bound, bound, shape).astype(np.float32)


def target_keys(targets: str | list[str], architecture: Architecture, *, router: bool = False) -> tuple[str, ...]:
    """Names within a layer of the modules that `lora.targets` means, in the model's order.

    `all-linear` leaves the router out: it decides where tokens go, and is adapted only when it is asked for.

    Raises:
        UserError: a name that matches no linear module of a layer.
    """
    known = tuple(architecture.module_shapes())
    if targets == "attention":
        chosen = set(ATTENTION)
    elif targets == "all-linear":
        chosen = set(known) - {ROUTER}
    elif not targets:
        raise UserError("lora.targets is empty", hint="use attention, all-linear, or module names")
    else:
        chosen = {key for target in targets for key in _matches(target, architecture, known)}
    if router:
        chosen |= {ROUTER} & set(known)
    return tuple(key for key in known if key in chosen)


def _matches(target: str, architecture: Architecture, known: tuple[str, ...]) -> list[str]:
    matches = [key for key in known if key == target or key.endswith("." + target)]
    if matches:
        return matches
    names = [key.rsplit(".", 1)[-1] for key in known]
    near = difflib.get_close_matches(target.rsplit(".", 1)[-1], names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"lora.targets: {target!r} matches no linear module of this {architecture.model_type} model",
        hint=f"{hint}modules: {', '.join(names)}",
    )
