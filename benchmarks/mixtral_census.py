"""Where the bytes of Mixtral-8x7B in 4 bits are, counted from its shape alone, beside what the naive load holds.

    python benchmarks/mixtral.py --census

No weight is read or made: transformers builds the model on torch's meta device. The naive load is
`from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True))`, which packs `nn.Linear` and leaves
the fused experts as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import write_config
from core.census import Group, census, size
from core.protocols import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shape_without_weights(shape: Mapping[str, Any]) -> PreTrainedModel:
    """The model of this shape in bfloat16, on torch's meta device."""
    import torch

    from backends.cuda.attention import ATTENTION
    from backends.cuda.streaming import empty_model
    from core.config import ModelConfig

    with tempfile.TemporaryDirectory() as name:
        write_config(Path(name), shape)
        return empty_model(Path(name), ModelConfig(bits=4), dtype=torch.bfloat16, attention=ATTENTION)


def naive_weights(base: PreTrainedModel) -> list[Weight]:
    """What the naive load of a model from `empty_model` holds: linear layers but the head in NF4, and nothing else."""
    from backends.cuda.streaming import planned_weights

    plain = {name: parameter for name, parameter in base.named_parameters() if parameter.dim() == 3}
    return [
        replace(weight, dtype=str(plain[weight.name].dtype).removeprefix("torch."), bytes=plain[weight.name].nbytes)
        if weight.name in plain
        else weight
        for weight in planned_weights(base)
    ]


def table(ours: Iterable[Weight], naive: Iterable[Weight]) -> str:
    """Kind, parameters, and for both loads the type and the bytes; totals below."""
    left, right = census(ours), census(naive)
    kinds = list(dict.fromkeys(group.kind for group in left))
    rows = [("kind", "parameters", "here", "", "naive", "")]
    for kind in kinds:
        of_kind = [[group for group in groups if group.kind == kind] for groups in (left, right)]
        parameters = sum(group.parameters for group in of_kind[0])
        rows.append((kind, f"{parameters:,}", *_cells(of_kind[0]), *_cells(of_kind[1])))
    totals = (sum(group.bytes for group in groups) for groups in (left, right))
    here, there = (f"{total / 1e9:.2f} GB" for total in totals)
    rows.append(("total", f"{sum(group.parameters for group in left):,}", "", here, "", there))
    return "\n".join(f"{a:<12}{b:>16}  {c:<10}{d:>10}  {e:<10}{f:>10}".rstrip() for a, b, c, d, e, f in rows)


def _cells(groups: list[Group]) -> tuple[str, str]:
    return " + ".join(group.dtype for group in groups), size(sum(group.bytes for group in groups))
