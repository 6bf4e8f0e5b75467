"""transformers' Llama, Mistral and Mixtral layers in fewer passes over the activations, forward and backward.

Each takes the class of the module that it is, with its weights and its place: what is saved, streamed, merged or
packed sees no difference. What is not known to be the same arithmetic is left as transformers has it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import logging
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from backends.cuda.attention import ATTENTION, causal_attention
from backends.cuda.products import linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("twinkeel")

WINDOWED = ("Mistral", "Mixtral")
"""Families whose attention heeds `sliding_window`."""
FAMILIES = ("Llama", *WINDOWED)


def fuse(base: PreTrainedModel) -> None:
    """Makes the layers of a model of a known family do the same in fewer passes."""
    kinds, made = _kinds(), {}
    for module in base.modules():
        original = type(module)
        kind = kinds.get(f"{original.__module__}.{original.__name__}")
        if kind is not None and kind.fits(base):
            if original not in made:
                made[original] = _fused(original, kind)
            module.__class__ = made[original]


def _fused(original: type, kind: Any) -> type:
    """The class to take; the original one if its code is not known: another release may compute something else."""
    if source_of(original) in kind.SOURCES:
        return type(f"Fused{original.__name__}", (kind, original), {})
    log.info("transformers' %s is new to this version: it runs as it is, somewhat slower", original.__name__)
    return original


def source_of(original: type) -> str:
    """Hash of what a module's forward pass does: of its code without comments, and of the rotation's if it has one."""
    functions: list[Any] = [original.forward]  # type: ignore[attr-defined]
    if original.__name__.endswith("Attention"):
        module: Any = sys.modules[original.__module__]
        functions += [module.apply_rotary_pos_emb, module.rotate_half]
    digest = hashlib.sha256()
    for function in functions:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        if ast.get_docstring(tree) is not None:
            tree.body = tree.body[1:]
        tree.decorator_list, tree.returns = [], None
        for argument in ast.walk(tree.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:16]


def _kinds() -> dict[str, Any]:
    """By the full name of transformers' class. A mixture has no dense MLP."""
    found = {}
    for family in FAMILIES:
        attention = _WindowedAttention if family in WINDOWED else _Attention
        for part, kind in {"RMSNorm": _RmsNorm, "Attention": attention, "MLP": _Mlp}.items():
            found[f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}{part}"] = kind
    return found


# --- RMSNorm ----------------------------------------------------------------------------------------------------------


class _RmsNorm(torch.nn.Module):  # type: ignore[misc]
    SOURCES = ("9635bcd843f309a0",)
    """`source_of` the classes that this does the same as: transformers 5.17 to 5.23."""

    @staticmethod
    def fits(base: PreTrainedModel) -> bool:
        return True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad:
            found: torch.Tensor = super().forward(hidden_states)
            return found
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x²) + eps) over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467), the root in
    float32 and the product with the weight in the type of `x`, as in transformers. `weight` gets no gradient."""
    found: torch.Tensor = _RmsNormFunction.apply(x, weight, eps)
    return found


class _RmsNormFunction(torch.autograd.Function):  # type: ignore[misc]
    """With r = 1 / sqrt(mean(x²) + eps), n elements and g = weight * dy: dx = r g - x r³ (g · x) / n."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = _wide(x)
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        found = (wide * inverse).to(x.dtype)
        return found.mul_(weight) if weight.dtype == x.dtype else found * weight

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, slope = _wide(x), _wide(gradient * weight)
        along = (slope * wide).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(x.shape[-1])
        return slope.mul_(inverse).addcmul_(wide, along, value=-1.0).to(x.dtype), None, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


# --- MLP --------------------------------------------------------------------------------------------------------------


class _Mlp(torch.nn.Module):  # type: ignore[misc]
    SOURCES = ("7d2027d4464e3e71",)

    @staticmethod
    def fits(base: PreTrainedModel) -> bool:
        return base.config.hidden_act in ("silu", "swish")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = linears(x, (self.gate_proj, self.up_proj))
        (down,) = linears(swiglu(gate, up), (self.down_proj,))
        return down


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202). Without gradients `gate` is overwritten."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        found: torch.Tensor = _Swiglu.apply(gate, up)
        return found
    return F.silu(gate, inplace=True).mul_(up)


class _Swiglu(torch.autograd.Function):  # type: ignore[misc]
    """Keeps gate and up, and not silu(gate), which is made once more."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_up, times_up = F.silu(gate).mul_(gradient), gradient * up
        return torch.ops.aten.silu_backward.grad_input(times_up, gate, grad_input=times_up), of_up


# --- attention --------------------------------------------------------------------------------------------------------


class _Attention(torch.nn.Module):  # type: ignore[misc]
    SOURCES: tuple[str, ...] = ("dce8f6f66131a0eb",)
    is_windowed = False

    @staticmethod
    def fits(base: PreTrainedModel) -> bool:
        return base.config._attn_implementation == ATTENTION

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As transformers' modules: what they all do, with the products of one input taken together."""
        shape = hidden_states.shape[:-1]
        query, key, value = (
            states.view(*shape, -1, self.head_dim).transpose(1, 2)
            for states in linears(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
        )
        query, key = (rotate(states, *position_embeddings) for states in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed, _ = causal_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window if self.is_windowed else None,
            **kwargs,
        )
        (found,) = linears(mixed.reshape(*shape, -1), (self.o_proj,))
        return found, None


class _WindowedAttention(_Attention):
    SOURCES = ("36023606bc21e7f3",)
    is_windowed = True


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with the two halves of a head as the planes' axes.

    Args:
        x: [batch, heads, T, head size].
        cos, sin: [batch or 1, T, head size] of the angles.
    """
    found: torch.Tensor = _Rotate.apply(x, cos.unsqueeze(1), sin.unsqueeze(1))
    return found


class _Rotate(torch.autograd.Function):  # type: ignore[misc]
    """(x1 cos1 - x2 sin1, x2 cos2 + x1 sin2); the gradient is the transposed product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        (first, second), (sin1, sin2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        return _turned(x, cos, (second, sin1, -1.0), (first, sin2, 1.0))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (first, second), (sin1, sin2) = gradient.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        return _turned(gradient, cos, (second, sin2, 1.0), (first, sin1, -1.0)), None, None


_Term = tuple[torch.Tensor, torch.Tensor, float]


def _turned(x: torch.Tensor, cos: torch.Tensor, first: _Term, second: _Term) -> torch.Tensor:
    """x * cos, and a product more on each half."""
    found = x * cos
    for half, (a, b, sign) in zip(found.chunk(2, dim=-1), (first, second), strict=True):
        half.addcmul_(a, b, value=sign)
    return found
