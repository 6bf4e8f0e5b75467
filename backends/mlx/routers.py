"""What a mixture's routers do in a forward pass: which experts get the tokens, and the load-balancing loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Routed = tuple[mx.array, mx.array]
"""Of one router: [experts] how many tokens each expert got, and float32 [experts] router probabilities summed over the
tokens; padding left out of both."""


def run_watched(
    layer: nn.Module, mask: mx.array | str | None, cache: Any, is_token: mx.array, hidden: mx.array
) -> tuple[mx.array, ...]:
    """mlx-lm's `MixtralDecoderLayer`, and `Routed` of its router, whose logits mlx-lm keeps to itself.

    They are computed a second time here, which is nothing beside the experts: of Mixtral-8x7B an expert's matrices are
    5,000 times the router's.
    """
    attended = hidden + layer.self_attn(layer.input_layernorm(hidden), mask, cache)
    states = layer.post_attention_layernorm(attended)
    block = layer.block_sparse_moe
    counts, probabilities = watched_router(block.gate(states), is_token, k=block.num_experts_per_tok)
    return attended + block(states), counts, probabilities


def watched_router(logits: mx.array, is_token: mx.array, *, k: int) -> Routed:
    """What a router with the logits [B, T, experts] does with the tokens: see `Routed`."""
    num_experts = logits.shape[-1]
    # as mlx-lm chooses, so that equal logits fall the same way
    chosen = mx.stop_gradient(mx.argpartition(-logits, kth=k - 1, axis=-1)[..., :k])
    times = (chosen[..., None] == mx.arange(num_experts)).sum(axis=-2)
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    real = is_token[..., None]
    return (times * real).sum(axis=(0, 1)), (probabilities * real).sum(axis=(0, 1))


def balancing_loss(routed: Sequence[Routed], num_tokens: mx.array, *, below: mx.array | None = None) -> mx.array:
    """`core.protocols.StepOutput.aux_loss` of a micro-batch, a float32 scalar with its gradient.

    Args:
        routed: of each layer that was run.
        num_tokens: float32 scalar: tokens of the micro-batch, padding left out.
        below: of the layers under these, `core.protocols.Prefix.routed`.
    """
    chosen = mx.stop_gradient(mx.stack([counts for counts, _ in routed]).sum(axis=0))
    probabilities = mx.stack([sums for _, sums in routed]).sum(axis=0)
    num_layers = len(routed)
    if below is not None:
        chosen, probabilities = chosen + below[0].sum(axis=0), probabilities + below[1].sum(axis=0)
        num_layers += below.shape[1]
    total = num_tokens * num_layers
    return len(chosen) * (chosen / total * (probabilities / total)).sum()
