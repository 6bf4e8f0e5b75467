"""Which part of a checkpoint's tensor is which module of an adapter.

A dense layer's weight is a module. Of a mixture, Mixtral's folders name every expert (`block_sparse_moe.experts.3.w1`:
gate; `w3`: up; `w2`: down), transformers 5 may fuse them (`mlp.experts.gate_up_proj`, gate above up), and mlx-lm
stacks them (`switch_mlp.gate_proj`); the adapter has one module for all experts of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from core.architecture import EXPERTS, ROUTER, Architecture

_LAYER = r"(model\.layers\.\d+)\.(?:block_sparse_moe|mlp)\."
_ROUTER = re.compile(_LAYER + r"gate\.weight")
_EXPERT = re.compile(_LAYER + r"experts\.(\d+)\.(\w+)\.weight")
_FUSED = re.compile(_LAYER + r"experts\.(gate_up_proj|down_proj)(?:\.weight)?")
_STACKED = re.compile(_LAYER + r"switch_mlp\.(gate_proj|up_proj|down_proj)\.weight")
_GATE, _UP, _DOWN = EXPERTS
_EXPERT_KEYS = {"w1": _GATE, "w3": _UP, "w2": _DOWN, "gate_proj": _GATE, "up_proj": _UP, "down_proj": _DOWN}


@dataclass(frozen=True, slots=True)
class Place:
    """A module's matrix, of one expert where there are some, as rows of a tensor."""

    module: str
    """Full name, as of `core.adapter`."""
    expert: int | None
    first_row: int
    num_rows: int


def places(tensor: str, shape: tuple[int, ...], architecture: Architecture) -> Iterator[Place]:
    """The modules that a tensor holds, in the order of its rows; none for what no adapter sits on."""
    if not tensor.endswith(".weight") and not _FUSED.fullmatch(tensor):
        return
    rows = shape[-2] if len(shape) > 1 else 1
    if architecture.is_moe and (match := _ROUTER.fullmatch(tensor)):
        yield Place(f"{match[1]}.{ROUTER}", None, 0, rows)
    elif match := _EXPERT.fullmatch(tensor):
        if match[3] in _EXPERT_KEYS:
            yield Place(f"{match[1]}.{_EXPERT_KEYS[match[3]]}", int(match[2]), 0, rows)
    elif len(shape) == 3 and (match := _STACKED.fullmatch(tensor)):
        for expert in range(shape[0]):
            yield Place(f"{match[1]}.{_EXPERT_KEYS[match[2]]}", expert, expert * rows, rows)
    elif len(shape) == 3 and (match := _FUSED.fullmatch(tensor)):
        yield from _fused(match[1], match[2], shape[0], rows)
    elif len(shape) == 2:
        yield Place(tensor.removesuffix(".weight"), None, 0, rows)


def _fused(layer: str, leaf: str, num_experts: int, rows: int) -> Iterator[Place]:
    keys = (_GATE, _UP) if leaf == "gate_up_proj" else (_DOWN,)
    own = rows // len(keys)
    for expert in range(num_experts):
        for number, key in enumerate(keys):
            yield Place(f"{layer}.{key}", expert, expert * rows + number * own, own)
