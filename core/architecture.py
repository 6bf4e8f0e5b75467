"""What a model looks like, read from its `config.json` alone: layers, linear modules, shapes, bytes.

The core plans adapters and memory from this, before any weight is read. Module names are those of transformers 5:
`model.layers.<i>.self_attn.q_proj`, and of a mixture `mlp.gate` (the router) and `mlp.experts.gate_proj`, where
transformers fuses gate and up into one tensor and we, like mlx-lm and the checkpoints, do not.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
ROUTER = "mlp.gate"
SUPPORTED_TYPES = ("llama", "mistral", "mixtral")


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a Llama-family decoder."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    num_experts: int
    """0 for a dense model."""
    max_positions: int
    """Longest sequence the model was made for; 0 when the folder does not say."""
    mlx_bits: int | None
    """Bits of an MLX-quantised folder; None for ordinary weights."""

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """What an adapter can sit on in one layer, in the model's order: name in the layer -> shape of its weight.

        (out, in) features; (experts, out, in) for the experts of a mixture, which share a name.
        """
        hidden, wide = self.hidden_size, self.intermediate_size
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = [(query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]
        shapes: dict[str, tuple[int, ...]] = dict(zip(ATTENTION, attention, strict=True))
        mlp = [(wide, hidden), (wide, hidden), (hidden, wide)]
        if not self.is_moe:
            return shapes | dict(zip(MLP, mlp, strict=True))
        shapes[ROUTER] = (self.num_experts, hidden)
        return shapes | {key: (self.num_experts, *shape) for key, shape in zip(EXPERTS, mlp, strict=True)}

    @property
    def num_parameters(self) -> int:
        """Weights of the base model: embeddings (once if tied), layers, experts, router and norms."""
        layer = sum(math.prod(shape) for shape in self.module_shapes().values()) + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * layer + self.hidden_size


def read_architecture(folder: Path) -> Architecture:
    """Reads `config.json` of a model folder.

    Raises:
        UserError: no or damaged config.json, a missing value, or a family that no backend knows.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json", hint="give a folder in Hugging Face layout") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})", hint="download or export the model again") from None
    return _from_raw(raw if isinstance(raw, dict) else {}, path)


def _from_raw(raw: dict[str, Any], path: Path) -> Architecture:
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_TYPES:
        raise UserError(
            f"{path}: model_type {model_type!r} is not supported",
            hint=f"supported families: {', '.join(SUPPORTED_TYPES)}",
        )

    def number(name: str, default: int | None = None) -> int:
        value = raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int):
            raise UserError(
                f"{path}: {name} is missing or not a whole number",
                hint="download or export the model again",
            )
        return value

    num_heads = number("num_attention_heads")
    hidden_size = number("hidden_size")
    quantization = raw.get("quantization")
    return Architecture(
        model_type=model_type,
        num_layers=number("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=number("num_key_value_heads", num_heads),
        head_dim=raw.get("head_dim") or hidden_size // num_heads,
        vocab_size=number("vocab_size"),
        # transformers' defaults: tied for none of the three families
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        num_experts=number("num_local_experts", 8) if model_type == "mixtral" else 0,
        max_positions=int(raw.get("max_position_embeddings") or 0),
        mlx_bits=quantization.get("bits") if isinstance(quantization, dict) else None,
    )
