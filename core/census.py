"""Where a loaded model's bytes are: parameters and bytes by kind of module and by type of number.

"4 bits" says little while nobody counts: the usual way to load Mixtral in 4 bits leaves 96 % of it in 16. So every run
counts what lies on its device, says it, and refuses to go on when a 4-bit run's weights are not in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.errors import UserError
from core.protocols import Weight

KINDS = ("experts", "attention", "mlp", "router", "embeddings", "norms", "adapters", "other")
LINEAR = ("experts", "attention", "mlp")
"""The kinds that 4 bits are for."""
WIDE = ("float32", "float16", "bfloat16")
_ALLOWED_WIDE = 0.1
"""Share of the linear weights that may stay wide, such as a layer whose width does not divide by a block of 64."""


@dataclass(frozen=True, slots=True)
class Group:
    """All weights of one kind in one type."""

    kind: str
    dtype: str
    """`float32`, `bfloat16`, `nf4`, `affine 4-bit` …"""
    parameters: int
    bytes: int


def kind_of(name: str) -> str:
    """What a tensor of transformers' or mlx-lm's name belongs to; one of `KINDS`."""
    if ".lora_" in name:
        return "adapters"
    if ".experts." in name or ".switch_mlp." in name:
        return "experts"
    if name.removesuffix(".weight").endswith((".mlp.gate", ".block_sparse_moe.gate")):
        return "router"
    if "norm" in name.removesuffix(".weight").rsplit(".", 1)[-1]:
        return "norms"
    if ".self_attn." in name:
        return "attention"
    if ".mlp." in name:
        return "mlp"
    if "embed_tokens" in name or name.startswith("lm_head"):
        return "embeddings"
    return "other"


def census(weights: Iterable[Weight]) -> tuple[Group, ...]:
    """The weights by kind and type, in the order of `KINDS`, the most bytes first within a kind."""
    sums: dict[tuple[str, str], list[int]] = {}
    for weight in weights:
        entry = sums.setdefault((kind_of(weight.name), weight.dtype), [0, 0])
        entry[0] += weight.parameters
        entry[1] += weight.bytes
    groups = [Group(kind, dtype, *counts) for (kind, dtype), counts in sums.items()]
    return tuple(sorted(groups, key=lambda group: (KINDS.index(group.kind), -group.bytes)))


def refuse_wide(groups: Sequence[Group], *, bits: int) -> None:
    """Raises: UserError: `model.bits` is 4 and a good part of the linear weights is not."""
    if bits != 4:
        return
    linear = [group for group in groups if group.kind in LINEAR]
    wide = [group for group in linear if group.dtype in WIDE]
    share = sum(group.parameters for group in wide) / max(sum(group.parameters for group in linear), 1)
    if share > _ALLOWED_WIDE:
        where = ", ".join(f"{group.kind} {size(group.bytes)} in {group.dtype}" for group in wide)
        raise UserError(
            f"model.bits 4, but {share:.0%} of the linear weights are not in 4 bits: {where}",
            hint="set model.bits=16, or use a model whose widths are multiples of 64",
        )


def line(groups: Sequence[Group]) -> str:
    """`24.6 GB: experts 23.3 nf4, attention 0.7 nf4, embeddings 0.5 bfloat16, …`: one line, the largest first."""
    unit, name = _unit(max((group.bytes for group in groups), default=0))
    ordered = sorted(groups, key=lambda group: -group.bytes)
    large = [group for group in ordered if group.bytes >= 0.05 * unit]
    parts = [f"{group.kind} {group.bytes / unit:.1f} {group.dtype}" for group in large]
    if rest := sum(group.bytes for group in ordered[len(large) :]):
        parts.append(f"the rest {rest / unit:.2f}")
    return f"{sum(group.bytes for group in groups) / unit:.1f} {name}: {', '.join(parts)}"


def size(num_bytes: int) -> str:
    """`23.3 GB` or `412.0 MB` (10^9, 10^6 bytes)."""
    unit, name = _unit(num_bytes)
    return f"{num_bytes / unit:.1f} {name}"


def to_plain(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """For `training_summary.json`."""
    return [asdict(group) for group in groups]


def _unit(num_bytes: int) -> tuple[float, str]:
    return (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB")
