"""A mixture's experts whose matrices are each packed in 4 bits, run through transformers' experts interface.

bitsandbytes replaces `nn.Linear` only. transformers 5 keeps a layer's experts in two tensors, `gate_up_proj` (experts,
2 * inner, hidden) and `down_proj` (experts, hidden, inner), so its 4-bit loading leaves them in 16 bits, without a
word: of Mixtral 96 %. Here each expert's two matrices are packed by themselves. Tokens are sorted by expert, each
matrix is unpacked for its own tokens only, and an expert that no token chose is not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from backends.cuda.nf4 import Nf4Matrix
from core.errors import UserError

IMPLEMENTATION = "twinkeel_packed"
FUSED = ("gate_up_proj", "down_proj")

Matrices: TypeAlias = "torch.nn.ModuleList | torch.Tensor"
"""One matrix for each expert: packed ones, or a tensor (experts, out, in)."""


def route(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    *,
    num_experts: int,
    apply: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What the chosen experts make of each token, weighted and added up; always in the same order, to the same bits.

    Args:
        hidden: [tokens, hidden]; index: int64 [tokens, k], the chosen experts; weights: [tokens, k].
        apply: expert and its tokens [n, hidden] -> [n, hidden]; not called for an expert without tokens.
    """
    num_tokens, k = index.shape
    order = index.flatten().argsort(stable=True)  # tokens of the same expert side by side
    # no bincount: it would wait for the device once more
    counts = torch.zeros(num_experts, dtype=torch.int64, device=index.device)
    counts.scatter_add_(0, index.flatten(), torch.ones_like(index.flatten()))
    # device-to-host synchronisation: the sizes of the experts' shares
    shares = hidden[order // k].split(counts.tolist())
    found = torch.cat([apply(expert, share) for expert, share in enumerate(shares) if len(share)])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    by_token = found[back].view(num_tokens, k, -1)
    return (by_token * weights[..., None]).sum(dim=1).to(hidden.dtype)


def product(matrices: Matrices, expert: int, x: torch.Tensor) -> torch.Tensor:
    """x [tokens, in] times the expert's matrix: [tokens, out]."""
    if isinstance(matrices, torch.nn.ModuleList):
        packed: torch.Tensor = matrices[expert](x)
        return packed
    return F.linear(x, matrices[expert])


def packed_experts_forward(
    module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """transformers' interface: the experts' module, tokens [tokens, hidden], choices and weights [tokens, k]."""

    def apply(expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = product(module.gate_up_proj, expert, x).chunk(2, dim=-1)
        return product(module.down_proj, expert, module.act_fn(gate) * up)

    return route(hidden, index, weights, num_experts=module.num_experts, apply=apply)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, packed_experts_forward)


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module keeps experts in fused tensors, as transformers 5 does."""
    return hasattr(module, "num_experts") and any(isinstance(getattr(module, n, None), torch.Tensor) for n in FUSED)


def refuse_other_forms(module: Any, name: str) -> None:
    """Raises: UserError: experts that are not two plain products with a gate between them."""
    kind = type(module).__name__
    flags = {
        "biases": getattr(module, "has_bias", False),
        "transposed matrices": getattr(module, "is_transposed", False),
        "interleaved gates": not getattr(module, "is_concatenated", True),
        "no gate": not getattr(module, "has_gate", True),
        "a norm after each expert": getattr(module, "has_post_expert_norm", False),
        "a gate of its own": getattr(type(module)._apply_gate, "__name__", "") != "_default_apply_gate"
        if hasattr(type(module), "_apply_gate")
        else False,
        "no activation": not hasattr(module, "act_fn"),
    }
    if not all(isinstance(getattr(module, one, None), torch.Tensor) for one in FUSED):
        raise UserError(f"model.bits 4: {name} ({kind}) has no {' and '.join(FUSED)}", hint=_OTHERWISE)
    if found := [what for what, has in flags.items() if has]:
        raise UserError(
            f"model.bits 4: {name} ({kind}) has {' and '.join(found)}, which can't be packed", hint=_OTHERWISE
        )


_OTHERWISE = "set model.bits=16, or use a Mixtral"


def put_packed(module: Any, name: str, matrices: list[Nf4Matrix]) -> None:
    """Packed matrices, one for each expert, in place of the fused tensor `name`."""
    assert len(matrices) == module.num_experts
    delattr(module, name)
    setattr(module, name, torch.nn.ModuleList(matrices))
