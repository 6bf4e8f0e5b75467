"""One decoder layer of mlx-lm's Llama (and Mistral) over packed positions; see `packing.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

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


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotary embedding of N packed positions (arXiv:2104.09864), a head's halves as a pair."""

    cos: mx.array
    """[N, 1, d / 2], times whatever the embedding scales by; so is the sine."""
    sin: mx.array

    def of(self, flat: mx.array) -> mx.array:
        """Queries or keys [N, H x d], turned."""
        first, second = mx.split(flat.reshape(len(flat), -1, 2 * self.cos.shape[-1]), 2, axis=-1)
        turned = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return mx.concatenate(turned, axis=-1).reshape(flat.shape)


class Common:
    """What all layers take of one layout: on a CPU MLX would put sines, cosines and masks together anew in each.

    `is_plain` layers are made from the same settings: those that have an embedding of one type turn positions alike.
    """

    def __init__(self, layout: Layout, *, window: int | None) -> None:
        """
        Args:
            window: positions that attention looks back over, the present one included; None for all.
        """
        self.layout = layout
        self._window = window
        self._rotations: dict[type, Rotation | None] = {}
        self._masks: dict[tuple[int, int], mx.array] = {}

    def rotation(self, attention: nn.Module, like: mx.array) -> Rotation | None:
        """None: the layer turns each row itself; on a GPU there is a kernel for it."""
        kind = type(attention.rope)
        if kind not in self._rotations:
            wanted = fastmath.is_wanted(like)
            self._rotations[kind] = _rotation(attention.rope, self.layout, attention.head_dim) if wanted else None
        return self._rotations[kind]

    def is_cut(self, total: int) -> bool:
        """Whether the window is shorter than so many positions."""
        return self._window is not None and total > self._window

    def seen(self, length: int, total: int) -> mx.array:
        """bool [length, total]: which of all positions each of the last ones sees."""
        return _mask(length, total, self._window if self.is_cut(total) else None)

    def penalty(self, length: int, total: int) -> mx.array:
        """float32 [length, total]: 0 where `seen`, else -inf."""
        if (length, total) not in self._masks:
            self._masks[length, total] = mx.where(self.seen(length, total), 0.0, -mx.inf)
        return self._masks[length, total]


def _mask(length: int, total: int, window: int | None) -> mx.array:
    from mlx_lm.models.base import create_causal_mask

    mask: mx.array = create_causal_mask(length, total - length, window_size=window)
    return mask


def _rotation(rope: Any, layout: Layout, width: int) -> Rotation | None:
    """What `rope` does to heads of so many numbers, read off what it makes of the first axis of each plane."""
    from mlx_lm.models import rope_utils

    # These turn a position by its number alone, whatever else is in the row.
    known = (nn.RoPE, rope_utils.Llama3RoPE, rope_utils.YarnRoPE)
    if type(rope) not in known or rope.traditional or rope.dims != width:
        return None
    shared, groups = layout
    starts = [np.arange(shared)] if shared else []
    own = [np.tile(np.arange(shared, shared + length), rows) for rows, length in groups]
    position = np.concatenate(starts + own)
    axes = mx.concatenate([mx.ones((width // 2,)), mx.zeros((width // 2,))])
    turned = rope(mx.broadcast_to(axes, (1, 1, int(position.max()) + 1, width)))[0, 0]
    cos, sin = mx.split(turned[mx.array(position)][:, None], 2, axis=-1)
    return Rotation(cos, sin)


def run_packed(layer: nn.Module, hidden: mx.array, common: Common) -> mx.array:
    """The states [N, D] after the layer. What a shared start's positions hold is computed once, for all rows."""
    attended = hidden + _attention(layer.self_attn, layer.input_layernorm(hidden), common)
    return attended + _mlp(layer.mlp, layer.post_attention_layernorm(attended))


def _mlp(mlp: Any, x: mx.array) -> mx.array:
    if not fastmath.is_wanted(x):
        return mlp(x)
    return mlp.down_proj(fastmath.swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


def _attention(attention: Any, x: mx.array, common: Common) -> mx.array:
    layout = shared, groups = common.layout
    queries, keys, values = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    rotation = common.rotation(attention, queries)
    if rotation is not None:
        queries, keys = rotation.of(queries), rotation.of(keys)
    made: list[mx.array] = []
    start: tuple[mx.array, mx.array] | None = None
    pieces = zip(*(_pieces(array, layout) for array in (queries, keys, values)), strict=True)
    for (rows, length), (q, k, v) in zip(([(1, shared)] if shared else []) + list(groups), pieces, strict=True):
        q = _heads(q, rows, length, attention.n_heads)
        k, v = (_heads(array, rows, length, attention.n_kv_heads) for array in (k, v))
        offset = 0 if start is None else shared
        if rotation is None:
            q, k = attention.rope(q, offset=offset), attention.rope(k, offset=offset)
        if start is not None:
            k, v = (_after(before, own) for before, own in zip(start, (k, v), strict=True))
        elif shared:
            start = k, v
        out = _attend(q, k, v, scale=attention.scale, common=common)
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


def _attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, common: Common) -> mx.array:
    """Causal attention of the last positions' queries [B, H, T, d] to all keys [B, KV heads, S + T, d]."""
    length, total = q.shape[2], k.shape[2]
    if not fastmath.is_wanted(q):
        mask = common.seen(length, total) if common.is_cut(total) else "causal"
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    rows, num_heads, _, width = q.shape
    groups = k.shape[1]
    # A key head serves several query heads: these are rows of one matrix product.
    scores = (q * scale).reshape(rows, groups, -1, width) @ k.swapaxes(-1, -2)
    shares = fastmath.softmax(scores.reshape(rows, num_heads, length, total) + common.penalty(length, total))
    return (shares.reshape(rows, groups, -1, total) @ v).reshape(rows, num_heads, length, -1)
