"""The frozen base model from a folder: read by mlx-lm, with what it would misread put right, and quantised."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from backends.mlx.memory import is_out_of_memory, translate_out_of_memory
from core.architecture import Architecture, read_architecture
from core.errors import UserError

if TYPE_CHECKING:
    from core.models import ResolvedModel

logger = logging.getLogger("twinkeel")

GROUP_SIZE = 64
_ROPE_TYPES = (None, "default", "linear", "llama3", "yarn")
_YARN_KEYS = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
"""What mlx-lm's YaRN reads the way that transformers does."""
_DEFAULT_THETA = {"llama": 1e4, "mistral": 1e4, "mixtral": 1e6}
"""transformers' defaults, by model_type."""


@dataclass(frozen=True, slots=True)
class Base:
    """mlx-lm's model as loaded, and what mlx-lm does not keep."""

    module: nn.Module
    window: int | None
    """Positions that attention looks back over, the present one included; None for all."""
    tied: bool
    num_parameters: int
    end_tokens: frozenset[int]
    """Of the model's generation settings."""
    weights: str
    """For people: `16-bit weights`, `4-bit weights (affine, group 64)`."""
    read_again: Callable[[], nn.Module] | None = None
    """The whole model again, nothing of it read yet; set if some layers have no weights here."""
    streams: bool = False
    """Whether the layers with adapters are among these."""


def load_base(
    model: ResolvedModel,
    *,
    bits: int,
    dtype: mx.Dtype,
    trust_remote_code: bool = False,
    num_absent: int = 0,
    stream: bool = False,
) -> Base:
    """Loads a folder in Hugging Face or MLX layout, in `dtype`, and quantises it when `bits` is 4.

    Quantised as `mlx_lm.convert -q` does it: every linear layer, expert, router and embedding (tied ones, too) whose
    input width is a multiple of 64. Scales have the compute type, which on a CPU makes it usable. A folder that is
    MLX-quantised already is taken as it is.

    Args:
        num_absent: of so many layers from the lowest no weights are read.
        stream: read no weights of the other layers either, which are described and there to be filled.

    Raises:
        UserError: weights that are missing, damaged or of another shape, or a feature that mlx-lm would misread.
        OutOfMemoryError: it doesn't fit.
    """
    from mlx_lm.utils import get_total_parameters

    folder = Path(model.path)
    architecture = read_architecture(folder)
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check_quantization(model.name, raw, bits)
    settings = _mlx_settings(model.name, raw, architecture)

    def read(*, again: bool = False) -> tuple[nn.Module, dict[str, Any], int]:
        """The model as it is to be, but lazily; what mlx-lm reads of its settings; its parameters."""
        module, found = _read_weights(model, folder, settings, trust_remote_code)
        if architecture.model_type == "mixtral" and settings["rope_scaling"]:
            _scale_rope(module, architecture, settings)
        num_parameters = int(get_total_parameters(module))
        module.set_dtype(dtype)
        if bits == 4 and architecture.mlx_bits is None:
            _quantize(module, say=not again)
        module.freeze()
        module.eval()
        return module, found, num_parameters

    with translate_out_of_memory(f"loading {model.name}"):
        module, found, num_parameters = read()
        for number in range(num_absent):
            module.layers[number] = nn.Module()
        _materialise(module, model.name, layers=not stream)
    return Base(
        module=module,
        window=_window(raw),
        tied=architecture.tied_embeddings,
        num_parameters=num_parameters,
        end_tokens=_end_tokens(found.get("eos_token_id")),
        weights=_describe_weights(architecture, bits, dtype),
        read_again=(lambda: read(again=True)[0]) if num_absent or stream else None,
        streams=stream,
    )


def _describe_weights(architecture: Architecture, bits: int, dtype: mx.Dtype) -> str:
    if architecture.mlx_bits is not None:
        return f"{architecture.mlx_bits}-bit weights (as in the folder)"
    if bits == 4:
        return f"4-bit weights (affine, group {GROUP_SIZE})"
    return "32-bit weights" if dtype == mx.float32 else "16-bit weights"


def _check_quantization(name: str, raw: dict[str, Any], bits: int) -> None:
    if "quantization" in raw:
        if bits == 16:
            raise UserError(f"{name} is quantised already, and model.bits is 16", hint="set model.bits=4")
        return
    if foreign := raw.get("quantization_config"):
        method = foreign.get("quant_method") if isinstance(foreign, dict) else foreign
        raise UserError(
            f"{name} is quantised with {method}, which the mlx backend does not read",
            hint="give the 16-bit model, or an MLX folder made by mlx_lm.convert",
        )


def mlx_settings(folder: Path) -> dict[str, Any]:
    """What mlx-lm's loading has to be told of a model folder (`model_config`), so that it reads it as it is meant.

    Raises:
        UserError: a setting that mlx-lm does not know.
    """
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _mlx_settings(folder.name, raw, read_architecture(folder))


def _mlx_settings(name: str, raw: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """What mlx-lm would misread in a config.json, in the names that it knows.

    transformers 5 saves `rope_parameters`; mlx-lm reads `rope_theta` and `rope_scaling` and falls back to theta 10000
    in silence. Its default for `tie_word_embeddings` is the opposite of transformers'.
    """
    scaling = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    theta = scaling.pop("rope_theta", None) or raw.get("rope_theta") or _DEFAULT_THETA[architecture.model_type]
    old_name = scaling.pop("type", None)
    scaling.setdefault("rope_type", old_name)
    if unsupported := _unsupported(raw, scaling, architecture):
        field, value = unsupported
        raise UserError(
            f"{name}: {field} {value!r} is not supported by the mlx backend",
            hint="use --backend cuda (it runs on a CPU, too) or another model",
        )
    if architecture.max_positions:
        scaling.setdefault("original_max_position_embeddings", architecture.max_positions)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling if scaling["rope_type"] not in (None, "default") else None,
        "tie_word_embeddings": architecture.tied_embeddings,
        "layer_types": None,
    }


def _unsupported(raw: dict[str, Any], scaling: dict[str, Any], architecture: Architecture) -> tuple[str, object] | None:
    """The first setting that mlx-lm's three families don't know and would pass over."""
    natural_head_dim = architecture.hidden_size // architecture.num_heads
    if architecture.is_moe and architecture.head_dim != natural_head_dim:
        return "head_dim", architecture.head_dim
    if raw.get("hidden_act", "silu") != "silu":
        return "hidden_act", raw["hidden_act"]
    for values in (raw, scaling):
        if values.get("partial_rotary_factor") not in (None, 1.0):
            return "partial_rotary_factor", values["partial_rotary_factor"]
    if scaling["rope_type"] not in _ROPE_TYPES:
        return "rope_type", scaling["rope_type"]
    if scaling["rope_type"] == "yarn":
        for key in scaling.keys() - _YARN_KEYS:
            if scaling[key] is not None and (key, scaling[key]) != ("truncate", True):
                return f"rope_parameters.{key}", scaling[key]
    return None


def _window(raw: dict[str, Any]) -> int | None:
    """Sliding window as transformers reads it: Mistral's default is 4096, Mixtral's none, Llama has no such thing."""
    match raw["model_type"]:
        case "mistral":
            return raw.get("sliding_window", 4096)
        case "mixtral":
            return raw.get("sliding_window")
    return None


def _read_weights(
    model: ResolvedModel, folder: Path, settings: dict[str, Any], trust_remote_code: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model and the configuration as it reads it, generation settings included."""
    from mlx_lm.utils import load_model

    try:
        module, read = load_model(
            folder, lazy=True, strict=True, model_config=settings, trust_remote_code=trust_remote_code
        )
    except (FileNotFoundError, ValueError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise _damaged(model.name, error) from error
    return module, read


def _end_tokens(value: int | list[int] | None) -> frozenset[int]:
    listed = value if isinstance(value, list) else [value]
    return frozenset(int(token) for token in listed if token is not None)


def _damaged(name: str, error: Exception) -> UserError:
    text = "missing " * isinstance(error, KeyError) + " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:300] + "…"
    return UserError(
        f"{name}: the weights can't be loaded: {text}",
        hint="download the model again; it needs complete safetensors files that fit its config.json",
    )


def _scale_rope(module: nn.Module, architecture: Architecture, settings: dict[str, Any]) -> None:
    """mlx-lm's Mixtral knows no scaled rotary embedding."""
    from mlx_lm.models.rope_utils import initialize_rope

    for layer in module.layers:
        layer.self_attn.rope = initialize_rope(
            architecture.head_dim,
            settings["rope_theta"],
            False,
            settings["rope_scaling"],
            architecture.max_positions,
        )


def _quantize(module: nn.Module, *, say: bool) -> None:
    left: list[str] = []

    def fits(path: str, leaf: nn.Module) -> bool:
        if not hasattr(leaf, "to_quantized"):
            return False
        if leaf.weight.shape[-1] % GROUP_SIZE:
            left.append(path)
            return False
        return True

    nn.quantize(module, group_size=GROUP_SIZE, bits=4, class_predicate=fits)
    if left and say:
        logger.warning(
            "model.bits 4: %d modules stay in 16 bits, their input width is not a multiple of %d: %s",
            len(left),
            GROUP_SIZE,
            ", ".join(left[:4]) + (" …" if len(left) > 4 else ""),
        )


def _materialise(module: nn.Module, name: str, *, layers: bool = True) -> None:
    """Reads, casts and quantises layer by layer, so that the 16-bit model never exists whole in memory.

    Args:
        layers: False: only what is outside the layers.
    """
    try:
        for layer in module.layers if layers else ():
            mx.eval(layer.parameters())
        mx.eval(module.parameters() if layers else _outside_layers(module))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise _damaged(name, error) from error


def _outside_layers(module: nn.Module) -> list[mx.array]:
    return [array for name, array in tree_flatten(module.parameters()) if not name.startswith("model.layers.")]
