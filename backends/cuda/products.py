"""Products with frozen matrices, with LoRA beside them, and their gradients: as few passes as there can be.

A linear layer's gradient with respect to its input is itself a product. torch takes it for each layer alone and adds up
what comes back; here layers that read the same input add into one array, in the product's own last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from backends.cuda.dropout import Mask, draw
from backends.cuda.lora import LoraLinear
from backends.cuda.memory import GPU


def linears(x: torch.Tensor, layers: Sequence[torch.nn.Module]) -> tuple[torch.Tensor, ...]:
    """What each of `layers` makes of `x`: [..., in] -> [..., out] each.

    Args:
        layers: linear layers of any kind, `LoraLinear` among them.
    """
    if not is_plain(x, layers):
        return tuple(layer(x) for layer in layers)
    weights, scales, matrices = [], [], []
    masks: list[Mask | None] = []
    for layer in layers:
        if not isinstance(layer, LoraLinear):
            weights.append(layer.weight)
            scales.append(0.0)
            masks.append(None)
            matrices += [None, None]
            continue
        weights.append(layer.base.weight)
        mask = draw(x, layer.dropout, layer.lora.place) if layer.drops else None
        scales.append(layer.lora.scale * (1.0 if mask is None else mask.scale))
        masks.append(mask)
        matrices += [layer.lora.a, layer.lora.b]
    if all(matrix is None for matrix in matrices) and not (x.requires_grad and torch.is_grad_enabled()):
        return tuple(F.linear(x, weight) for weight in weights)
    found: tuple[torch.Tensor, ...] = _Linears.apply(x, tuple(scales), tuple(masks), *weights, *matrices)
    return found


def is_plain(x: torch.Tensor, layers: Sequence[torch.nn.Module]) -> bool:
    """Whether all is of one type, frozen but for LoRA, without bias, packing or casts, and on a GPU without dropout."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    for layer in layers:
        if isinstance(layer, LoraLinear):
            if (layer.drops and x.device.type == GPU) or layer.lora.a.dtype != x.dtype:
                return False
            layer = layer.base
        if type(layer) is not torch.nn.Linear or layer.bias is not None:
            return False
        if layer.weight.dtype != x.dtype or layer.weight.requires_grad:
            return False
    return True


class _Linears(torch.autograd.Function):  # type: ignore[misc]
    """W_i x + scale_i B_i A_i m_i x for several i, with m_i 0 where dropout drops an element and else 1; with dy_i the
    gradients of what comes out and t_i = scale_i B_i' dy_i,

    dx = sum of (W_i' dy_i + m_i A_i' t_i), dA_i = t_i (m_i x)', dB_i = scale_i dy_i (A_i m_i x)'.

    Without dropout the narrow products with all A_i are one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scales: tuple[float, ...],
        masks: tuple[Mask | None, ...],
        *matrices: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        count = len(scales)
        weights, a, b = matrices[:count], matrices[count::2], matrices[count + 1 :: 2]
        rows = x.reshape(-1, x.shape[-1])
        inner = _inner(rows, a, masks)
        found = []
        for weight, b_i, part, scale in zip(weights, b, _parts(inner, a), scales, strict=True):
            assert weight is not None
            out = rows @ weight.t()
            if b_i is not None:
                out.addmm_(part, b_i.t(), alpha=scale)
            found.append(out.view(*x.shape[:-1], -1))
        if not ctx.needs_input_grad[0]:  # below the lowest adapter
            ctx.mark_non_differentiable(*(out for out, b_i in zip(found, b, strict=True) if b_i is None))
        ctx.scales, ctx.masks, ctx.shape = scales, masks, x.shape
        # without a pair the input itself is not needed
        ctx.save_for_backward(None if inner is None else rows, inner, *matrices)
        return tuple(found)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        rows, inner, *matrices = ctx.saved_tensors
        count = len(ctx.scales)
        weights, a, b = matrices[:count], matrices[count::2], matrices[count + 1 :: 2]
        slopes = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        back = None if inner is None else torch.empty_like(inner)
        of_b: list[torch.Tensor | None] = []
        for slope, b_i, part, t, scale in zip(slopes, b, _parts(inner, a), _parts(back, a), ctx.scales, strict=True):
            if b_i is None:
                of_b.append(None)
                continue
            torch.mm(slope, b_i, out=t).mul_(scale)
            # the narrow matrix on the left: MKL is several times slower with it on the right
            of_b.append((part.t() @ slope).mul_(scale).t())
        dx = None
        if ctx.needs_input_grad[0]:
            dx = slopes[0] @ weights[0]
            for slope, weight in zip(slopes[1:], weights[1:], strict=True):
                dx.addmm_(slope, weight)
        of_a = _through_a(rows, back, a, ctx.masks, dx)
        pairs = [g for both in zip(of_a, of_b, strict=True) for g in both]
        return None if dx is None else dx.view(ctx.shape), None, None, *[None] * count, *pairs


def _inner(rows: torch.Tensor, a: Sequence[torch.Tensor | None], masks: Sequence[Mask | None]) -> torch.Tensor | None:
    """A_i m_i x side by side, [N, sum of ranks]; None without a pair."""
    stacked = _stacked(a)
    if stacked is None or not any(masks):
        return None if stacked is None else rows @ stacked.t()
    inner = rows.new_empty(len(rows), len(stacked))
    for a_i, mask, part in zip(a, masks, _parts(inner, a), strict=True):
        if a_i is not None:
            torch.mm(rows if mask is None else mask.keep(rows), a_i.t(), out=part)
    return inner


def _through_a(
    rows: torch.Tensor,
    back: torch.Tensor | None,
    a: Sequence[torch.Tensor | None],
    masks: Sequence[Mask | None],
    dx: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """The gradients of all A_i; adds m_i A_i' t_i to `dx` if it is there.

    Args:
        back: t_i side by side, [N, sum of ranks]; None without a pair.
    """
    stacked = _stacked(a)
    if stacked is None or back is None:
        return [None] * len(a)
    if not any(masks):
        if dx is not None:
            dx.addmm_(back, stacked)
        return [None if part is None else part.t() for part in _parts((back.t() @ rows).t(), a)]
    found: list[torch.Tensor | None] = []
    for a_i, mask, t in zip(a, masks, _parts(back, a), strict=True):
        if a_i is None or mask is None:
            assert a_i is None, "dropout of some pairs only"
            found.append(None)
            continue
        factors = mask.factors(rows)
        if dx is not None:
            dx.addcmul_(t @ a_i, factors)
        found.append(t.t() @ factors.mul_(rows))
    return found


def _stacked(a: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """[sum of ranks, in]"""
    there = [a_i for a_i in a if a_i is not None]
    return None if not there else there[0] if len(there) == 1 else torch.cat(there)


def _parts(columns: torch.Tensor | None, a: Sequence[torch.Tensor | None]) -> list[Any]:
    """The columns [N, sum of ranks] of each pair; None where there is no pair."""
    if columns is None:
        return [None] * len(a)
    ends = [0]
    for a_i in a:
        ends.append(ends[-1] + (0 if a_i is None else a_i.shape[0]))
    return [None if a_i is None else columns[:, i:j] for a_i, (i, j) in zip(a, pairwise(ends), strict=True)]
