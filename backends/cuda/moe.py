"""LoRA on a mixture's experts and router, which transformers 5 keeps as bare parameters and not as linear layers.

An expert's matrices are applied to the tokens that were routed to it and to no others. What the experts say of a token
is added up in a fixed order, so that the same batch gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from backends.cuda.dropout import drop
from backends.cuda.experts import product, route
from backends.cuda.lora import LoraPair
from core.adapter import LORA_A, LORA_B, Adapter
from core.architecture import EXPERTS, ROUTER
from core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GATE, _UP, _DOWN = (key.rsplit(".", 1)[-1] for key in EXPERTS)


def is_sparse(module: str) -> bool:
    """Whether a module of an adapter is a layer's experts or its router."""
    return ".mlp.experts." in module or module.endswith(f".{ROUTER}")


def attach_sparse(base: PreTrainedModel, adapter: Adapter, names: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """Wraps the experts and routers of `names`; returns the new parameters under their neutral names.

    Raises:
        UserError: the model has no such experts or router.
    """
    found: dict[str, torch.nn.Parameter] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        wrapper = _wrapped(base, path if ".mlp.experts." in name else name, adapter.dropout)
        lora = LoraPair(adapter, name)
        wrapper.add(leaf, lora.to(wrapper.device))
        found[f"{name}.{LORA_A}"], found[f"{name}.{LORA_B}"] = lora.a, lora.b
    return found


def _wrapped(base: PreTrainedModel, path: str, dropout: float) -> LoraExperts | LoraRouter:
    """The wrapper around the module at `path`, put there if it isn't yet."""
    parent_path, _, leaf = path.rpartition(".")
    try:
        parent: Any = base.get_submodule(parent_path)
        module = getattr(parent, leaf)
    except AttributeError:
        raise UserError(f"the adapter is for {path}, which this model lacks") from None
    if not isinstance(module, LoraExperts | LoraRouter):
        module = LoraExperts(module, dropout) if leaf == "experts" else LoraRouter(module, dropout)
        setattr(parent, leaf, module)
    return module


class _Lora(torch.nn.Module):  # type: ignore[misc]
    """Something frozen with LoRA pairs by name."""

    def __init__(self, base: torch.nn.Module, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.pairs = torch.nn.ModuleDict()
        self.dropout = dropout

    @property
    def device(self) -> torch.device:
        return next(chain(self.base.parameters(), self.base.buffers())).device  # packed weights are buffers

    def add(self, name: str, pair: LoraPair) -> None:
        self.pairs[name] = pair

    def _delta(self, name: str, x: torch.Tensor, expert: int | None = None) -> torch.Tensor | float:
        if name not in self.pairs:
            return 0.0
        pair: Any = self.pairs[name]
        delta: torch.Tensor = pair(drop(x, self.dropout, pair.name, training=self.training, expert=expert), expert)
        return delta


class LoraRouter(_Lora):
    """transformers' `MixtralTopKRouter` with LoRA on its logits."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [tokens, experts], normalised weights [tokens, k] and indices [tokens, k] of the chosen experts."""
        base: Any = self.base
        hidden = hidden.reshape(-1, base.hidden_dim)
        logits = F.linear(hidden, base.weight) + self._delta(ROUTER.rsplit(".", 1)[-1], hidden)
        top, index = torch.topk(F.softmax(logits.float(), dim=-1), base.top_k, dim=-1)
        return logits, top / top.sum(dim=-1, keepdim=True), index


class LoraExperts(_Lora):
    """transformers' fused experts (`gate_up_proj`, `down_proj`) with LoRA on gate, up and down."""

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `backends.cuda.experts.route`."""
        base: Any = self.base
        for pair in self.pairs.values():
            pair.split()
        return route(hidden, index, weights, num_experts=base.num_experts, apply=self._expert)

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        base: Any = self.base
        gate, up = product(base.gate_up_proj, expert, x).chunk(2, dim=-1)
        inner = base.act_fn(gate + self._delta(_GATE, x, expert)) * (up + self._delta(_UP, x, expert))
        return product(base.down_proj, expert, inner) + self._delta(_DOWN, inner, expert)
