"""4-bit weights as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314), for matrices that are no layer of their own.

NF4 in blocks of 64 with double quantisation: 4 bits a weight, an 8-bit scale for each block, a float32 for each 256 of
those scales and one offset. bitsandbytes packs and multiplies; here is only what its `Linear4bit` does not serve: the
matrices of experts, which transformers 5 keeps as slices of one tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

BLOCK = 64
NESTED_BLOCK = 256
KIND = "nf4"


def packed_bytes(num_weights: int) -> int:
    """Bytes of a matrix in this form: 4.127 bits a weight, apart from rounding up."""
    num_blocks = -(-num_weights // BLOCK)
    return -(-num_weights // 2) + num_blocks + 4 * -(-num_blocks // NESTED_BLOCK) + 4


def quantise(matrix: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Packed uint8 [out * in / 2, 1] and bitsandbytes' `QuantState` of a matrix [out, in], on its device."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        matrix.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=KIND, quant_storage=torch.uint8
    )
    return packed, state


def keep_packing(base: torch.nn.Module) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes repacks a weight in its first evaluation, in a form that is computed in
    bfloat16 and has no backward pass. Here it does not."""
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def state_bytes(state: Any) -> int:
    """Bytes of the scales in a `QuantState`; the maps of levels are shared by all matrices and left out."""
    nested = state.state2.absmax.nbytes + state.offset.nbytes if state.nested else 0
    return int(state.absmax.nbytes + nested)


def state_on(state: Any, device: torch.device) -> Any:
    """A copy of a `QuantState` on another device; bitsandbytes' own `to` would move the original."""
    moved = copy.copy(state)
    if state.nested:
        moved.state2 = copy.copy(state.state2)
        moved.offset = state.offset.clone()
    moved.to(device)
    return moved


class Nf4Matrix(torch.nn.Module):  # type: ignore[misc]
    """A frozen matrix [out, in] that multiplies without ever lying there whole for longer than the product takes.

    The backward pass keeps the packed form and unpacks it again.
    """

    def __init__(self, packed: torch.Tensor, state: Any) -> None:
        super().__init__()
        self.register_buffer("packed", packed, persistent=False)
        self.state = state

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Nf4Matrix:
        return cls(*quantise(matrix))

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Nf4Matrix:
        """From what `saved` gave."""
        from bitsandbytes.functional import QuantState

        rest = {name: tensor for name, tensor in tensors.items() if name != "packed"}
        return cls(tensors["packed"].to(device), QuantState.from_dict(rest, device=device))

    def on(self, device: torch.device) -> Nf4Matrix:
        """A copy on another device."""
        return Nf4Matrix(self.packed.to(device, copy=True), state_on(self.state, device))

    def saved(self) -> dict[str, torch.Tensor]:
        """All of it, in bitsandbytes' own names, for a file."""
        return {"packed": self.packed, **self.state.as_dict(packed=True)}

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.state.shape
        return int(out_features), int(in_features)

    @property
    def num_bytes(self) -> int:
        """Bytes on the device that belong to this matrix alone."""
        return int(self.packed.nbytes) + state_bytes(self.state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] -> [tokens, out], in the type of `x`."""
        from bitsandbytes import matmul_4bit

        # transposed, as `Linear4bit` gives it: bitsandbytes 0.49 goes by the stride, 0.50 no longer
        product: torch.Tensor = matmul_4bit(x, self.packed.t(), quant_state=self.state)
        return product
