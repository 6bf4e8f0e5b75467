"""LoRA (Hu et al. 2021, arXiv:2106.09685): the pair of matrices, and a linear layer with one.

PEFT's layer says the same; this one does it in fewer passes over the activations (the scale is applied to the rank's
few columns, the sum in place), and a start without PEFT is two seconds shorter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from backends.cuda.dropout import drop
from core.adapter import Adapter


class LoraPair(torch.nn.Module):  # type: ignore[misc]
    """A and B of one module, of all experts where it has experts."""

    def __init__(self, adapter: Adapter, name: str) -> None:
        super().__init__()
        a, b = adapter.matrices(name)
        self.a = torch.nn.Parameter(torch.from_numpy(a.copy()))
        self.b = torch.nn.Parameter(torch.from_numpy(b.copy()))
        self.scale = adapter.scale_of(name)
        self.name = name
        """Of the module."""
        self._each: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] = ((), ())

    def forward(self, x: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """scale * B A x, in the type of `x`: [tokens, in] -> [tokens, out]. Under autocast nothing is cast here."""
        a, b = (self.a, self.b) if expert is None else (self._each[0][expert], self._each[1][expert])
        return F.linear(self.scale * F.linear(x, a), b).to(x.dtype)  # scaled where it is small

    def split(self) -> None:
        """Before a forward pass: the experts' matrices one by one, so that their gradients are put together once."""
        self._each = self.a.unbind(0), self.b.unbind(0)


class LoraLinear(torch.nn.Module):  # type: ignore[misc]
    """A frozen linear layer, `torch.nn.Linear` or bitsandbytes' `Linear4bit`, and a pair beside it."""

    def __init__(self, base: torch.nn.Module, pair: LoraPair, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.lora = pair
        self.dropout = dropout

    @property
    def drops(self) -> bool:
        """Whether a forward pass would draw a mask now."""
        return bool(self.training and self.dropout > 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        out: torch.Tensor = self.base(x)
        # what the base returned belongs to nobody else, and no backward pass reads it
        return out.add_(self.lora(drop(x, self.dropout, self.lora.name, training=self.training)))
