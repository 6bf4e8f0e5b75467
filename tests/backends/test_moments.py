"""AdamW's moments cross between 8 and 32 bits when a state is imported, whichever precision is kept here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.optimizer_state import dequantised, is_eight_bit
from core.protocols import Learner, TrainState
from tests.backends.conftest import Open, assert_same_state, microbatches

EIGHT_BIT = {"optim": {"name": "adamw", "state_bits": 8}, "lora": {"rank": 64, "alpha": 64}}
"""Rank 64 on 64 features: tensors of 4096 elements, which get 8-bit moments, and of 2048, which do not."""
LR = 3e-3


def train(learner: Learner, steps: range) -> TrainState:
    for step in steps:
        learner.train_step(microbatches(step), step=step, lr=LR)
    return learner.export_state()


def in_eight_bits(state: TrainState) -> TrainState:
    """As AdamW8bit would have exported it."""
    pytest.importorskip("bitsandbytes")
    from backends.cuda.optim import quantised

    return TrainState(state.adapter, quantised(state.optimizer), state.optimizer_steps)


def test_8_bit_moments_go_on_in_32(opened: Open, llama: Path) -> None:
    """They are exactly the levels times the scales, and training goes on from there, near to where it would have."""
    learner, fresh = opened(llama, **EIGHT_BIT), opened(llama, **EIGHT_BIT)
    assert learner.state_bits == 32, "as nowhere but on a GPU"
    start = learner.export_state()
    middle = train(learner, range(1, 5))
    narrow = in_eight_bits(middle)
    kinds = {array.dtype.name for key, array in narrow.optimizer.items() if key.startswith("state")}
    assert is_eight_bit(narrow.optimizer) and kinds == {"uint8", "float32"}
    fresh.import_state(narrow)
    expected = TrainState(middle.adapter, dequantised(narrow.optimizer), middle.optimizer_steps)
    assert_same_state(fresh.export_state(), expected)
    end, other = train(learner, range(5, 7)), train(fresh, range(5, 7))
    assert 0 < distance(end, other) < 0.2 * distance(end, start)


def distance(one: TrainState, other: TrainState) -> float:
    gaps = [np.subtract(one.adapter[name], other.adapter[name], dtype=np.float64) for name in one.adapter]
    return float(np.sqrt(sum((gap**2).sum() for gap in gaps)))


def test_32_bit_moments_in_8(llama: Path) -> None:
    """What `AdamW8bit` takes over: bitsandbytes' own levels and codes, and small tensors as they are."""
    pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    from backends.cuda.optim import quantised

    rng = np.random.default_rng(3)
    mean = rng.normal(0, 1e-3, (68, 70)).astype(np.float32)  # 4760 values: the last block is short
    moments = {
        "exp_avg/big": mean,
        "exp_avg_sq/big": np.square(mean),
        "exp_avg/small": mean[:2],
        "exp_avg_sq/small": np.square(mean[:2]),
    }
    found = quantised(moments)
    assert found.keys() == {
        *("state1/big", "state2/big", "absmax1/big", "absmax2/big", "qmap1/big", "qmap2/big"),
        *("state1/small", "state2/small"),
    }
    for number, moment in (("1", mean), ("2", np.square(mean))):
        levels = create_dynamic_map(signed=number == "1")
        codes, state = quantize_blockwise(torch.from_numpy(moment), code=levels, blocksize=256)
        np.testing.assert_array_equal(found[f"state{number}/big"], codes.numpy())
        np.testing.assert_array_equal(found[f"absmax{number}/big"], state.absmax.numpy())
        np.testing.assert_array_equal(found[f"qmap{number}/big"], levels.numpy())
        assert found[f"state{number}/big"].shape == (68, 70) and found[f"absmax{number}/big"].shape == (19,)
        np.testing.assert_array_equal(found[f"state{number}/small"], moment[:2])
    back = dequantised(found)
    for slot in ("exp_avg", "exp_avg_sq"):
        # within a block, half the coarsest step between the 256 levels of its largest value
        wanted = moments[f"{slot}/big"]
        assert np.abs(back[f"{slot}/big"] - wanted).max() < 0.02 * np.abs(wanted).max()


def test_the_8_bit_optimiser_takes_32_bit_moments(llama: Path) -> None:
    """It can't step on a CPU, but it can take over and give back."""
    pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    from backends.cuda.optim import AdamW8bit, quantised
    from core.config import OptimConfig

    rng = np.random.default_rng(4)
    shapes = {"big": (64, 70), "small": (3, 5)}
    moments = {f"exp_avg/{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    moments |= {f"exp_avg_sq/{name}": np.square(moments[f"exp_avg/{name}"]) for name in shapes}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    optimizer = AdamW8bit(parameters, OptimConfig(state_bits=8))
    optimizer.import_slots(moments, num_steps=7)
    held, expected = optimizer.export_slots(), quantised(moments)
    assert held.keys() == expected.keys() and optimizer.num_steps == 7
    for key, array in expected.items():
        np.testing.assert_array_equal(held[key], array, err_msg=key)
    again = AdamW8bit(parameters, OptimConfig(state_bits=8))
    again.import_slots(held, num_steps=7)
    for key, array in again.export_slots().items():
        np.testing.assert_array_equal(array, held[key], err_msg=key)
