"""Products with frozen matrices, with LoRA beside them, and their gradients: as few passes as there can be.

A linear layer's gradient with respect to its input is itself a product. torch takes it for each layer alone and adds up
what comes back; here layers that read the same input add into one array, in the product's own last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
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
    scales: list[float] = []
    tensors: list[torch.Tensor | None] = []
    for layer in layers:
        scale, a, b, levels, thresholds = 0.0, None, None, None, None
        if isinstance(layer, LoraLinear):
            scale, a, b = layer.lora.scale, layer.lora.a, layer.lora.b
            if layer.drops:
                mask = draw(x, layer.dropout, layer.lora.name)
                scale, levels, thresholds = scale / (1.0 - layer.dropout), mask.levels, mask.thresholds
            layer = layer.base
        scales.append(scale)
        tensors += [layer.weight, a, b, levels, thresholds]
    if all(a is None for a in tensors[1::5]) and not (x.requires_grad and torch.is_grad_enabled()):
        return tuple(F.linear(x, weight) for weight in tensors[::5])
    found: tuple[torch.Tensor, ...] = _Linears.apply(x, tuple(scales), *tensors)
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
        ctx: Any, x: torch.Tensor, scales: tuple[float, ...], *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """`tensors`, of each layer: W, A, B, and its mask's two; None for what it lacks."""
        weights, a, b = (tensors[part::5] for part in range(3))
        rows = x.reshape(-1, x.shape[-1])
        inner = _inner(rows, a, _masks(tensors))
        found = []
        for weight, b_i, part, scale in zip(weights, b, _parts(inner, a), scales, strict=True):
            assert weight is not None
            out = rows @ weight.t()
            if b_i is not None:
                out.addmm_(part, b_i.t(), alpha=scale)
            found.append(out.view(*x.shape[:-1], -1))
        if not ctx.needs_input_grad[0]:  # below the lowest adapter
            ctx.mark_non_differentiable(*(out for out, b_i in zip(found, b, strict=True) if b_i is None))
        ctx.scales, ctx.shape = scales, x.shape
        # Without a pair the input itself is not needed. Checkpointing forgets what is saved, but no other attributes.
        ctx.save_for_backward(None if inner is None else rows, inner, *tensors)
        return tuple(found)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        rows, inner, *tensors = ctx.saved_tensors
        weights, a, b = (tensors[part::5] for part in range(3))
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
        of_a = _through_a(rows, back, a, _masks(tensors), dx)
        of_layers = [[None, of_a_i, of_b_i, None, None] for of_a_i, of_b_i in zip(of_a, of_b, strict=True)]
        return None if dx is None else dx.view(ctx.shape), None, *chain.from_iterable(of_layers)


def _masks(tensors: Sequence[torch.Tensor | None]) -> list[Mask | None]:
    both = zip(tensors[3::5], tensors[4::5], strict=True)
    return [None if levels is None or thresholds is None else Mask(levels, thresholds) for levels, thresholds in both]


def _inner(rows: torch.Tensor, a: Sequence[torch.Tensor | None], masks: Sequence[Mask | None]) -> torch.Tensor | None:
    """A_i m_i x side by side, [N, sum of ranks]; None without a pair."""
    there = [a_i for a_i in a if a_i is not None]
    if not there:
        return None
    if not any(masks):
        return rows @ _stacked(there).t()
    inner = rows.new_empty(len(rows), sum(map(len, there)))
    for a_i, mask, part in zip(a, masks, _parts(inner, a), strict=True):
        if a_i is not None:
            assert mask is not None, "dropout of some pairs only"
            torch.mm(mask.keep(rows), a_i.t(), out=part)
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
    if back is None:
        return [None] * len(a)
    if not any(masks):
        if dx is not None:
            dx.addmm_(back, _stacked([a_i for a_i in a if a_i is not None]))
        return [None if part is None else part.t() for part in _parts((back.t() @ rows).t(), a)]
    found: list[torch.Tensor | None] = [None] * len(a)
    for index, (a_i, mask, t) in enumerate(zip(a, masks, _parts(back, a), strict=True)):
        if a_i is None:
            continue
        assert mask is not None, "dropout of some pairs only"
        factors = mask.factors(rows)
        if dx is not None:
            dx.addcmul_(t @ a_i, factors)
        found[index] = t.t() @ factors.mul_(rows)
    return found


def _stacked(a: Sequence[torch.Tensor]) -> torch.Tensor:
    """[sum of ranks, in]"""
    return a[0] if len(a) == 1 else torch.cat(list(a))


def _parts(columns: torch.Tensor | None, a: Sequence[torch.Tensor | None]) -> list[Any]:
    """The columns [N, sum of ranks] of each pair; None where there is no pair."""
    if columns is None:
        return [None] * len(a)
    ends = [0]
    for a_i in a:
        ends.append(ends[-1] + (0 if a_i is None else a_i.shape[0]))
    return [None if a_i is None else columns[:, i:j] for a_i, (i, j) in zip(a, pairwise(ends), strict=True)]
