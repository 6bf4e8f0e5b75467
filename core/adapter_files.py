"""The adapter folder that loads unchanged in PEFT and in mlx-lm.

`adapter_model.safetensors` holds PEFT's names and orientation, `adapters.safetensors` mlx-lm's (the transposes), and
one `adapter_config.json` carries the keys of both: `peft.LoraConfig` (`r`, `lora_alpha`, `target_modules`,
`layers_to_transform`) and `mlx_lm.tuner` (`fine_tune_type`, `num_layers`, counted from the last layer, and
`lora_parameters` with `scale` and `keys`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.adapter import LORA_A, LORA_B, Adapter
from core.files import disk_errors, to_json, write_atomic

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
_PEFT_PREFIX = "base_model.model."

_Weights = dict[str, npt.NDArray[np.float32]]


def write_adapter(folder: Path, adapter: Adapter, *, base_model: str) -> None:
    """Writes the folder, each file in one step; `base_model` is a hub id or a path, for PEFT's AutoPeftModel."""
    from safetensors.numpy import save

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    write_atomic(folder / PEFT_WEIGHTS, save(peft_weights(adapter), metadata), durable=True)
    write_atomic(folder / MLX_WEIGHTS, save(mlx_weights(adapter), metadata), durable=True)
    write_atomic(folder / CONFIG, to_json(adapter_config(adapter, base_model=base_model)))


def peft_weights(adapter: Adapter) -> _Weights:
    """`base_model.model.<module>.lora_A.weight` (rank, in) and `.lora_B.weight` (out, rank)."""
    return {f"{_PEFT_PREFIX}{name}.weight": np.ascontiguousarray(tensor) for name, tensor in adapter.tensors.items()}


def mlx_weights(adapter: Adapter) -> _Weights:
    """`<module>.lora_a` (in, rank) and `<module>.lora_b` (rank, out)."""
    lower = {LORA_A: "lora_a", LORA_B: "lora_b"}
    weights: _Weights = {}
    for name, tensor in adapter.tensors.items():
        module, leaf = name.rsplit(".", 1)
        weights[f"{module}.{lower[leaf]}"] = np.ascontiguousarray(tensor.T)
    return weights


def adapter_config(adapter: Adapter, *, base_model: str) -> dict[str, Any]:
    """The keys of PEFT's LoraConfig and of mlx-lm's adapter configuration, side by side."""
    num_adapted = adapter.num_layers - adapter.first_layer
    layers = None if adapter.first_layer == 0 else list(range(adapter.first_layer, adapter.num_layers))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": [key.rsplit(".", 1)[-1] for key in adapter.layer_keys],
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else "layers",
        "fine_tune_type": "lora",
        "num_layers": num_adapted,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": adapter.dropout,
            "keys": list(adapter.layer_keys),
        },
    }
