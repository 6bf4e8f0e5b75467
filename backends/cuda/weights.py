"""What a model consists of: every tensor once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from backends.cuda.nf4 import KIND, Nf4Matrix, state_bytes
from core.protocols import Weight


def weights_of(model: torch.nn.Module, adapter: Mapping[str, torch.nn.Parameter]) -> Iterator[Weight]:
    """What model and adapter consist of; buffers that are computed and not learned are left out."""
    for name, parameter in adapter.items():
        yield Weight(name, _dtype(parameter), parameter.numel(), parameter.nbytes)
    trained = {id(parameter) for parameter in adapter.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in trained or parameter.device.type == "meta":
            continue
        name = _unwrapped(name)
        if (state := getattr(parameter, "quant_state", None)) is None:
            yield Weight(name, _dtype(parameter), parameter.numel(), parameter.nbytes)
        else:
            yield Weight(name, state.quant_type, math.prod(state.shape), parameter.nbytes + state_bytes(state))
    for name, module in model.named_modules():
        if isinstance(module, Nf4Matrix):
            yield Weight(_unwrapped(name), KIND, math.prod(module.shape), module.num_bytes)


def _unwrapped(name: str) -> str:
    """The base model's own name of something that an adapter was put around."""
    return name.replace(".base.", ".")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
