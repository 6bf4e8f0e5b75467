"""One decoder layer of mlx-lm's Llama (and Mistral) over packed positions; see `packing.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from backends.mlx import fastmath
from backends.mlx.packing import Layout

_IN_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "rope"}


def is_plain(layer: nn.Module) -> bool:
    """Whether `run_packed` does what this layer does."""
    from mlx_lm.models.llama import MLP, Attention, TransformerBlock

    parts = ((layer, TransformerBlock), (layer.get("self_attn"), Attention), (layer.get("mlp"), MLP))
    if not all(type(part) is kind for part, kind in parts):
        return False
    # What a later mlx-lm may add, such as norms of queries and keys or a window for some layers, is not done here.
    return set(layer.self_attn.children()) == _IN_ATTENTION and not getattr(layer, "use_sliding", False)


def run_packed(layer: nn.Module, hidden: mx.array, layout: Layout, *, window: int | None) -> mx.array:
    """The states [N, D] after the layer. What a shared start's positions hold is computed once, for all rows.

    Args:
        window: positions that attention looks back over, the present one included; None for all.
    """
    attended = hidden + _attention(layer.self_attn, layer.input_layernorm(hidden), layout, window)
    return attended + _mlp(layer.mlp, layer.post_attention_layernorm(attended))


def _mlp(mlp: Any, x: mx.array) -> mx.array:
    if not fastmath.is_wanted(x):
        return mlp(x)
    return mlp.down_proj(fastmath.swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


def _attention(attention: Any, x: mx.array, layout: Layout, window: int | None) -> mx.array:
    shared, groups = layout
    queries, keys, values = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    made: list[mx.array] = []
    start: tuple[mx.array, mx.array] | None = None
    pieces = zip(*(_pieces(array, layout) for array in (queries, keys, values)), strict=True)
    for (rows, length), (q, k, v) in zip(([(1, shared)] if shared else []) + list(groups), pieces, strict=True):
        q = _heads(q, rows, length, attention.n_heads)
        k, v = (_heads(array, rows, length, attention.n_kv_heads) for array in (k, v))
        offset = 0 if start is None else shared
        q, k = attention.rope(q, offset=offset), attention.rope(k, offset=offset)
        if start is not None:
            k, v = (_after(before, own) for before, own in zip(start, (k, v), strict=True))
        elif shared:
            start = k, v
        out = _attend(q, k, v, scale=attention.scale, window=window)
        made.append(out.transpose(0, 2, 1, 3).reshape(rows * length, -1))
    return attention.o_proj(mx.concatenate(made) if len(made) > 1 else made[0])


def _pieces(array: mx.array, layout: Layout) -> Iterator[mx.array]:
    """[N, ...] cut at the start's end and between groups. A split's gradient is one concatenation."""
    shared, groups = layout
    sizes = [shared] * bool(shared) + [rows * length for rows, length in groups]
    ends = [sum(sizes[: count + 1]) for count in range(len(sizes) - 1)]
    yield from mx.split(array, ends) if ends else [array]


def _heads(flat: mx.array, rows: int, length: int, num_heads: int) -> mx.array:
    return flat.reshape(rows, length, num_heads, -1).transpose(0, 2, 1, 3)


def _after(start: mx.array, own: mx.array) -> mx.array:
    """[1, H, S, d] in front of each of [rows, H, T, d]."""
    return mx.concatenate([mx.broadcast_to(start, (own.shape[0], *start.shape[1:])), own], axis=2)


def _attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, window: int | None) -> mx.array:
    """Causal attention of the last positions' queries [B, H, T, d] to all keys [B, KV heads, S + T, d]."""
    from mlx_lm.models.base import create_causal_mask

    length, total = q.shape[2], k.shape[2]
    is_cut = window is not None and total > window
    if not fastmath.is_wanted(q):
        mask = create_causal_mask(length, total - length, window_size=window) if is_cut else "causal"
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    seen = create_causal_mask(length, total - length, window_size=window if is_cut else None)
    rows, num_heads, _, width = q.shape
    groups = k.shape[1]
    # A key head serves several query heads: these are rows of one matrix product.
    scores = (q * scale).reshape(rows, groups, -1, width) @ k.swapaxes(-1, -2)
    hidden = mx.where(seen, 0.0, -mx.inf)
    shares = fastmath.softmax(scores.reshape(rows, num_heads, length, total) + hidden)
    return (shares.reshape(rows, groups, -1, total) @ v).reshape(rows, num_heads, length, -1)
