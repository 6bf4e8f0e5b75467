"""What a mixture's routers do in a forward pass: which experts get the tokens, and the load-balancing loss.

Hooks on the routers see what they return (logits, weights and indices of the chosen experts). They look only while a
forward pass is watched: gradient checkpointing runs the layers once more in the backward pass, and what they say then
was heard before. Nothing in here waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from core.architecture import ROUTER

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Logits [tokens, experts], weights [tokens, k] and indices int64 [tokens, k] of the chosen experts."""


class RouterWatch:
    """Hooks on every router of a model; a dense model has none."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._routers = [module for name, module in model.named_modules() if name.endswith(f".{ROUTER}")]
        self._is_watching = False
        self._seen: list[Routed] = []
        for router in self._routers:
            router.register_forward_hook(self._hear)

    def __bool__(self) -> bool:
        return bool(self._routers)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Remembers what the routers say in the one forward pass within."""
        self._is_watching, self._seen = True, []
        try:
            yield
        finally:
            self._is_watching = False

    def _hear(self, router: torch.nn.Module, inputs: Any, output: Routed) -> None:
        if self._is_watching:
            self._seen.append(output)

    def expert_tokens(self, is_token: torch.Tensor, below: torch.Tensor | None = None) -> torch.Tensor:
        """int64 [layers, experts]: tokens that each expert got in the pass watched.

        Args:
            is_token: int64 [B, T]: 1, and 0 for padding.
            below: of the layers that the pass left out, `core.protocols.Prefix.routed`.
        """
        counts = [_counts(logits.shape[-1], index, is_token.flatten()) for logits, _, index in self._take(below)]
        above = torch.stack(counts)
        return above if below is None else torch.cat([below[0].long(), above])

    def aux_loss(self, is_token: torch.Tensor, below: torch.Tensor | None = None) -> torch.Tensor:
        """float32 scalar: `core.protocols.StepOutput.aux_loss` of the pass watched, with its gradient."""
        weights = is_token.flatten().float()
        seen = self._take(below)
        num_experts = seen[0][0].shape[-1]
        total = weights.sum() * len(self._routers)
        chosen = torch.stack([_counts(num_experts, index, weights) for _, _, index in seen]).sum(0)
        probabilities = torch.stack([_summed(logits, weights) for logits, _, _ in seen]).sum(0)
        if below is not None:
            chosen, probabilities = chosen + below[0].sum(0), probabilities + below[1].sum(0)
        loss: torch.Tensor = num_experts * (chosen / total * (probabilities / total)).sum()
        return loss

    def routed(self) -> torch.Tensor:
        """float32 [2, layers, experts] of a pass without padding: `core.protocols.Prefix.routed`."""
        found = []
        for logits, _, index in self._take(None):
            every = torch.ones(len(logits), device=logits.device)
            found.append(torch.stack([_counts(logits.shape[-1], index, every), _summed(logits, every)]))
        return torch.stack(found, dim=1)

    def _take(self, below: torch.Tensor | None) -> list[Routed]:
        num_left_out = 0 if below is None else below.shape[1]
        assert len(self._seen) == len(self._routers) - num_left_out, "a pass over all other layers was watched"
        seen, self._seen = self._seen, []
        return seen


def _counts(num_experts: int, index: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """[experts], in the type of `is_token`: how often each expert was chosen. No bincount: that waits for a GPU."""
    each = is_token[:, None].expand_as(index).flatten()
    zeros = torch.zeros(num_experts, dtype=is_token.dtype, device=is_token.device)
    return zeros.scatter_add_(0, index.flatten(), each)


def _summed(logits: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """float32 [experts]: router probabilities summed over the tokens. No matrix product: autocast would round it."""
    return (logits.float().softmax(-1) * is_token[:, None]).sum(0)
