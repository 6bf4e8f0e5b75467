"""mlx-lm's form of an adapter: `adapter_config.json` and `adapters.safetensors`, in both directions.

A module is `<module>.lora_a` (in, rank) and `<module>.lora_b` (rank, out): the transposes of PEFT's. The experts of a
layer are `block_sparse_moe.switch_mlp.<gate|up|down>_proj` with `lora_a` (experts, rank, in) and `lora_b` (experts,
out, rank), not transposed; the router is `block_sparse_moe.gate`. There is one rank and one scale for all modules:
smaller ranks are filled up with zeros and other scales go into `lora_b`, which leaves the product as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from core.adapter import Adapter, split_name
from core.adapter_parts import Part, assemble
from core.architecture import EXPERTS, ROUTER, Architecture
from core.errors import UserError

WEIGHTS = "adapters.safetensors"

Array = npt.NDArray[np.float32]

_NAMES = (
    (f".{ROUTER}", ".block_sparse_moe.gate"),
    *((f".{key}", f".block_sparse_moe.switch_mlp.{key.rsplit('.', 1)[-1]}") for key in EXPERTS),
)
"""How names end: ours and mlx-lm's."""
_MERGE = "fuse it into its base model with mlx_lm.fuse and train a new LoRA on that"


def module_name(name: str) -> str:
    """Our name of a module -> mlx-lm's."""
    for ours, theirs in _NAMES:
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def _our_name(name: str) -> str:
    for ours, theirs in _NAMES:
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name


# --- writing ----------------------------------------------------------------------------------------------------------


def weights(adapter: Adapter) -> dict[str, Array]:
    """Tensors by mlx-lm's names."""
    rank, scale = adapter.ranks[-1], _scale(adapter)
    found: dict[str, Array] = {}
    for name in adapter.modules:
        a, b = adapter.matrices(name)
        if (factor := adapter.scale_of(name) / scale) != 1.0:
            b = b * np.float32(factor)
        a, b = _filled(a, rank, axis=-2), _filled(b, rank, axis=-1)
        if a.ndim == 2:
            a, b = a.T, b.T
        found[f"{module_name(name)}.lora_a"] = np.ascontiguousarray(a)
        found[f"{module_name(name)}.lora_b"] = np.ascontiguousarray(b)
    return found


def config(adapter: Adapter) -> dict[str, Any]:
    """The keys that mlx-lm reads: modules by their names in a layer, or by full names where the layers differ."""
    num_layers = adapter.num_layers - adapter.layers[0] if adapter.layers else adapter.num_layers
    if adapter.is_regular and len(adapter.layers) == num_layers:
        keys = [module_name(f"layer.{key}").removeprefix("layer.") for key in adapter.layer_keys]
    else:
        keys = [module_name(name) for name in adapter.modules]
    return {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": adapter.ranks[-1],
            "scale": _scale(adapter),
            "dropout": adapter.dropout,
            "keys": keys,
        },
    }


def _scale(adapter: Adapter) -> float:
    """The one scale of all modules: of the first that has one."""
    return next((scale for name in adapter.modules if (scale := adapter.scale_of(name))), 1.0)


def _filled(matrix: Array, rank: int, *, axis: int) -> Array:
    missing = rank - matrix.shape[axis]
    if missing == 0:
        return matrix
    width = [(0, 0)] * matrix.ndim
    width[axis] = (0, missing)
    return np.pad(matrix, width)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(raw: Mapping[str, Any], tensors: Mapping[str, Array], architecture: Architecture, *, where: str) -> Adapter:
    """An adapter from mlx-lm's configuration and tensors.

    Args:
        where: the folder, for messages.

    Raises:
        UserError: a kind that can't be carried (named), or tensors that don't fit the configuration or the model.
    """
    kind = raw.get("fine_tune_type", "lora")
    if kind != "lora":
        what = {"dora": "a DoRA adapter", "full": "a full fine-tuning"}.get(kind, f"a {kind} adapter")
        raise UserError(f"{where}: {what} (fine_tune_type {kind}) can't be carried", hint=_MERGE)
    lora = raw.get("lora_parameters")
    if not isinstance(lora, dict) or not isinstance(lora.get("scale"), int | float):
        raise UserError(f"{where}: adapter_config.json has no lora_parameters.scale", hint="copy the adapter again")
    scale, rank = float(lora["scale"]), lora.get("rank")
    pairs = _pairs(tensors, where)
    _refuse_untargeted(raw, lora.get("keys"), pairs, architecture.num_layers, where)
    parts = []
    for name, (a, b) in pairs.items():
        if a.ndim == 2:
            a, b = a.T, b.T
        if a.shape[-2] != rank:
            raise UserError(
                f"{where}: {name} has rank {a.shape[-2]}, but adapter_config.json says {rank}",
                hint="the two files belong to different adapters; copy both again",
            )
        parts.append(Part(_our_name(name), a, b, a.shape[-2], scale * a.shape[-2]))
    return assemble(parts, architecture, dropout=float(lora.get("dropout") or 0.0), rslora=False, where=where)


def _refuse_untargeted(
    raw: Mapping[str, Any], keys: Collection[str] | None, modules: Iterable[str], num_layers: int, where: str
) -> None:
    """mlx-lm puts LoRA where its configuration says and passes over other tensors of the file, without a word."""
    count = raw.get("num_layers")
    # both 0 and negative numbers mean all layers to it
    first = num_layers - count if isinstance(count, int) and count > 0 else 0
    for name in sorted(modules):
        if keys is not None and name in keys:
            continue
        layer, key = split_name(name) if name.startswith("model.layers.") else (num_layers, name)
        in_layers = layer < num_layers and layer >= first
        if not (in_layers and (keys is None or key in keys)):
            raise UserError(
                f"{where}: the file has an adapter for {name}, which adapter_config.json does not adapt "
                f"(num_layers {count}, keys {'all' if keys is None else ' '.join(keys)})",
                hint="the two files belong to different adapters; copy both again",
            )


def _pairs(tensors: Mapping[str, Array], where: str) -> dict[str, tuple[Array, Array]]:
    """Module, by mlx-lm's name -> lora_a and lora_b."""
    found: dict[str, dict[str, Array]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf not in ("lora_a", "lora_b"):
            what = "DoRA magnitudes" if leaf == "m" else "no LoRA tensor"
            raise UserError(f"{where}: {key} is {what}, which can't be carried", hint=_MERGE)
        found.setdefault(module, {})[leaf] = tensor
    for module, leaves in found.items():
        if "embed_tokens" in module:
            raise UserError(f"{where}: {module}: an adapter on the embedding can't be carried", hint=_MERGE)
        if len(leaves) < 2:
            missing = "lora_b" if "lora_a" in leaves else "lora_a"
            raise UserError(f"{where}: {module} has no {missing}", hint="copy the adapter again, whole")
    if not found:
        raise UserError(f"{where}: no LoRA tensors in {WEIGHTS}", hint="a silent no-op; look at how it was saved")
    return {module: (leaves["lora_a"], leaves["lora_b"]) for module, leaves in found.items()}
