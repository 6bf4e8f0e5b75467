"""A mixture in real 4 bits on a GPU: it trains, to the same bits each time, and never lies there unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.adapter import plan_adapter
from core.architecture import read_architecture
from core.protocols import Learner
from tests.backends.conftest import Open, assert_same_state, make_config, microbatches, resolved
from tests.tiny import make_model

pytest.importorskip("bitsandbytes")

TARGETS: dict[str, Any] = {"attention": "attention", "all": "all-linear"}
PACKED = {"model": {"bits": 4}}
MIB, GB = 2**20, 1e9


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("mixture") / "mixtral", model_type="mixtral", num_experts=8)


def train(learner: Learner, steps: range, *, lr: float = 1e-2) -> list[float]:
    return [float(learner.train_step(microbatches(1), step=step, lr=lr).loss) for step in steps]


def packed_matrices(learner: Any) -> list[Any]:
    from backends.cuda.nf4 import Nf4Matrix

    return [module for module in learner.model.modules() if isinstance(module, Nf4Matrix)]


@pytest.mark.parametrize("targets", TARGETS)
def test_training_lowers_the_loss(opened: Open, mixtral: Path, device: str, targets: str) -> None:
    learner = opened(mixtral, lora={"targets": TARGETS[targets]}, **PACKED)
    matrices = packed_matrices(learner)
    assert len(matrices) == 2 * 2 * 8
    assert {matrix.packed.device.type for matrix in matrices} == {"cuda" if device == "gpu" else "cpu"}
    losses = train(learner, range(1, 17))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.usefixtures("exact_attention")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_same_steps_give_the_same_bits(opened: Open, mixtral: Path, checkpointing: bool) -> None:
    """With dropout, adapters on the experts, and a second learner that starts from the packed weights on disk."""
    settings = {
        "lora": {"targets": "all-linear", "dropout": 0.3},
        "moe": {"train_router": True},
        "train": {"gradient_checkpointing": checkpointing},
        **PACKED,
    }
    one, other = (opened(mixtral, **settings) for _ in range(2))
    before = one.export_state()
    assert train(one, range(1, 5)) == train(other, range(1, 5))
    assert_same_state(one.export_state(), other.export_state())
    assert any(not np.array_equal(before.adapter[name], end) for name, end in one.export_state().adapter.items())
    rows, others = one.evaluate(microbatches(9)), other.evaluate(microbatches(9))
    assert rows.nll.tobytes() == others.nll.tobytes()
    assert rows.expert_tokens is not None and np.array_equal(rows.expert_tokens, others.expert_tokens)


def peak_of_loading(folder: Path, *, random_weights: bool, cache: bool) -> tuple[int, int]:
    """Bytes on the device: at most while a learner is opened, beyond what was held, and of its weights."""
    import torch

    from backends.cuda.backend import CudaBackend
    from benchmarks.mixtral_tools import RandomSource

    config = make_config(device="gpu", model={"bits": 4, "cache_packed": cache})
    adapter = plan_adapter(config.lora, read_architecture(folder), seed=0)
    source = RandomSource(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16) if random_weights else None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    learner = CudaBackend().open(config, resolved(folder), adapter, source=source)
    try:
        return torch.cuda.max_memory_allocated() - held, sum(weight.bytes for weight in learner.weights())
    finally:
        learner.close()


@pytest.mark.usefixtures("gpu")
def test_loading_a_tiny_mixture_takes_its_packed_bytes(mixtral: Path) -> None:
    for _ in ("packing", "from the cache"):
        peak, weights = peak_of_loading(mixtral, random_weights=False, cache=True)
        assert weights <= peak <= weights + 64 * MIB


@pytest.mark.usefixtures("gpu")
def test_loading_layers_of_mixtral_8x7b_takes_their_packed_bytes_and_a_gigabyte(tmp_path: Path) -> None:
    """Two layers of the real widths: 2.0 GB; in 16 bits 6.3 GB, of which one matrix (0.2 GB) is there at a time."""
    from benchmarks.common import write_config
    from benchmarks.mixtral import SHAPES

    write_config(tmp_path, SHAPES["mixtral-8x7b"], layers=2)
    peak, weights = peak_of_loading(tmp_path, random_weights=True, cache=False)
    assert weights < 2.2 * GB
    assert weights <= peak <= weights + GB
