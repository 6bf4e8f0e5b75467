"""Attention as the learner needs it, registered with transformers: causal, and over rows that lie end to end."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from backends.cuda.layout import Layout
from backends.cuda.workers import MOST

ATTENTION = "twinkeel_causal"
_HAND_ON = ("transformers.models.", "backends.cuda.")
"""Packages whose modules hand on what attention alone looks at."""


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa" attention for rows that are padded on the right only, so that no mask is needed.

    Text is generated from rows padded on the left, with a mask of its own (`backends.cuda.generate`), which is used.
    Given no mask, transformers 5 looks for packed rows in every forward pass with "sdpa", and that waits for the
    device. For an attention of another name it makes no mask and looks for nothing; then torch runs its fast causal
    kernel. A sliding window still needs a mask, once a row is longer than the window; while a cache is read (one
    query), the cache itself holds no more than the window.

    Args:
        query: [batch, heads, queries, head size]; key and value: [batch, key-value heads, keys, head size].
        layout: of a batch whose positions come as one row, [1, heads, N, head size]; so does what is returned.
    """
    if layout is not None:
        layout.num_uses += 1
        query, key, value = (layout.to_rows(states) for states in (query, key, value))
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is None and sliding_window is not None and num_queries > 1 and num_keys > sliding_window:
        assert num_queries == num_keys, "several queries on a filled cache"
        attention_mask = window_mask(num_keys, sliding_window, query.device)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output if layout is None else layout.from_rows(output), None


def hands_on_layout(decoder: Any) -> bool:
    """Whether decoder, layers and attention are transformers' own: others need not hand on what they don't know."""
    parts = [decoder, *decoder.layers, *(getattr(layer, "self_attn", layer) for layer in decoder.layers)]
    return all(type(part).__module__.startswith(_HAND_ON) for part in parts)


@functools.lru_cache(maxsize=MOST)  # every layer asks again; on a CPU, for as many rows as there are threads
def window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Boolean [1, 1, length, length]: position i sees the `window` positions i - window + 1 to i."""
    position = torch.arange(length, dtype=torch.int32, device=device)
    seen = position[None, :] <= position[:, None]
    seen &= position[None, :] > position[:, None] - window
    return seen[None, None]


AttentionInterface.register(ATTENTION, causal_attention)
