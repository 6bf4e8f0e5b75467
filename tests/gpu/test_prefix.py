"""Stored states, layers left out and streamed layers on a GPU: the same bits, less memory, nothing that waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.protocols import Batch
from tests.backends.conftest import Open, assert_same_state, microbatches
from tests.backends.test_prefix import HALF, stored
from tests.gpu.conftest import no_waiting
from tests.tiny import make_model

pytest.importorskip("bitsandbytes")

MIB = 2**20


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 layers of 6 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("prefix") / "deep"
    return make_model(folder, num_layers=16, hidden_size=512, intermediate_size=1024, num_heads=8)


@pytest.mark.usefixtures("exact_attention")
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("setting", ["low_memory", "stream_layers"])
def test_layers_left_out_change_no_bit(opened: Open, deep: Path, bits: int, setting: str) -> None:
    lora = HALF | {"dropout": 0.2}
    plain = opened(deep, model={"bits": bits}, lora=lora, train={"gradient_checkpointing": False})
    other = opened(deep, model={"bits": bits, setting: True}, lora=lora)
    batches = microbatches()
    (whole, _), (small, _) = stored(plain, batches), stored(other, batches)
    for step in (1, 2):
        one, two = (float(learner.train_step(batches, step=step, lr=1e-2).loss) for learner in (whole, small))
        assert one == two
    assert_same_state(whole.export_state(), small.export_state())
    np.testing.assert_array_equal(small.evaluate(batches).nll, whole.evaluate(batches).nll)


@pytest.mark.usefixtures("gpu")
def test_stored_states_are_close_to_computed_ones(opened: Open, deep: Path) -> None:
    """In bfloat16, where a row by itself and a row in a batch are rounded otherwise."""
    plain, other = opened(deep, lora=HALF), opened(deep, lora=HALF)
    fast, _ = stored(other, microbatches())
    assert fast.evaluate(microbatches()).mean == pytest.approx(plain.evaluate(microbatches()).mean, rel=5e-3)


@pytest.mark.usefixtures("gpu")
def test_memory_falls_with_the_layers_held(opened: Open, deep: Path) -> None:
    import torch

    peaks = []
    for settings in ({}, {"low_memory": True}, {"stream_layers": True}):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        learner = opened(deep, model={"bits": 16, **settings}, lora=HALF)
        fast, _ = stored(learner, microbatches())
        float(fast.train_step(microbatches(), step=1, lr=1e-2).loss)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        learner.close()
    whole, low, stream = peaks
    assert whole - low > 6 * 6 * MIB  # eight layers less, but for one that is read
    assert low - stream > 4 * 6 * MIB


@pytest.mark.usefixtures("gpu")
def test_steps_from_stored_states_wait_for_nothing(opened: Open, deep: Path) -> None:
    learner = opened(deep, model={"bits": 4}, lora=HALF)
    fast, _ = stored(learner, microbatches())
    ready: list[Batch] = [fast._with_prefix(batch) for batch in microbatches()]
    learner.train_step(ready, step=1, lr=1e-2)
    outputs: list[Any] = []
    with no_waiting() as callers:
        outputs += [learner.train_step(ready, step=step, lr=1e-2) for step in (2, 3)]
    assert not callers
    assert all(np.isfinite(float(output.loss)) for output in outputs)
