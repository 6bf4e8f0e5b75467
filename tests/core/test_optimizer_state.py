"""8-bit moments and back, against hand-worked values and bitsandbytes on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from core.optimizer_state import dequantise_blockwise, dequantised, is_adamw, is_eight_bit
from core.protocols import Tensors


def test_by_hand() -> None:
    """Two blocks, the second of two values: level times the block's largest magnitude, in the tensor's shape."""
    levels = np.linspace(-1, 1, 256, dtype=np.float32)
    codes = np.zeros((2, 129), np.uint8)
    codes[0, 1], codes[1, 126], codes[1, 127], codes[1, 128] = 255, 255, 255, 0
    values = dequantise_blockwise(codes, levels=levels, absmax=np.array([2.0, 0.5], np.float32))
    assert values.shape == codes.shape and values.dtype == np.float32
    # positions 255, 256 and 257 of the flattened tensor: the first block ends between the first two of them
    assert [values[0, 0], values[0, 1]] == [-2.0, 2.0]
    assert values[1, 126:].tolist() == [2.0, 0.5, -0.5]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 1000), (17, 61), (256,), (255,), (1, 257)])
def test_as_bitsandbytes_does_it(signed: bool, shape: tuple[int, ...]) -> None:
    """With its real levels: signed for the first moment, unsigned for the second."""
    pytest.importorskip("bitsandbytes")
    import torch
    from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    values = values if signed else values.square()
    levels = create_dynamic_map(signed=signed)
    codes, state = quantize_blockwise(values, code=levels, blocksize=256)
    theirs = dequantize_blockwise(codes, absmax=state.absmax, code=levels, blocksize=256).numpy()
    ours = dequantise_blockwise(codes.numpy(), levels=levels.numpy(), absmax=state.absmax.numpy())
    np.testing.assert_array_equal(ours, theirs)
    assert np.abs(ours - values.numpy()).max() < 0.02 * np.abs(values.numpy()).max(), "and they are the moments"


def eight_bit_state() -> dict[str, np.ndarray]:
    """As a checkpoint of 8-bit AdamW has it: a large tensor in 8 bits, a small one in float32."""
    levels = np.linspace(0, 1, 256, dtype=np.float32)
    return {
        "state1/big": np.full((2, 200), 255, np.uint8),
        "state2/big": np.full((2, 200), 51, np.uint8),
        "absmax1/big": np.array([3.0, 4.0], np.float32),
        "absmax2/big": np.array([1.0, 5.0], np.float32),
        "qmap1/big": levels,
        "qmap2/big": levels,
        "state1/small": np.array([0.25], np.float32),
        "state2/small": np.array([0.5], np.float32),
    }


def test_a_whole_state_gets_the_names_of_32_bits() -> None:
    state = dequantised(eight_bit_state())
    assert state.keys() == {"exp_avg/big", "exp_avg_sq/big", "exp_avg/small", "exp_avg_sq/small"}
    assert {array.dtype.name for array in state.values()} == {"float32"}
    assert np.unique(state["exp_avg/big"]).tolist() == [3.0, 4.0]
    assert np.unique(state["exp_avg_sq/big"]) == pytest.approx([0.2, 1.0])
    assert state["exp_avg/small"] == 0.25 and state["exp_avg_sq/small"] == 0.5


def test_other_states_stay_as_they_are() -> None:
    adamw: Tensors = {"exp_avg/a": np.ones(2, np.float32), "exp_avg_sq/a": np.ones(2, np.float32)}
    lion: Tensors = {"exp_avg/a": np.ones(2, np.float32)}
    for state in (adamw, lion, {}):
        assert dequantised(state) is state
    kinds = [(is_eight_bit(state), is_adamw(state)) for state in (eight_bit_state(), adamw, lion, {})]
    assert kinds == [(True, False), (False, True), (False, False), (False, False)]
