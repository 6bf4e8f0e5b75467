"""PyTorch on a CPU: a batch's parts trained on at once, a thread each. Nothing but the last digits may change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends.cuda.learner import CudaLearner  # noqa: E402
from backends.cuda.weights import target_cost  # noqa: E402
from backends.cuda.workers import Workers, even_parts  # noqa: E402
from core.errors import OutOfMemoryError  # noqa: E402
from core.protocols import IGNORE, Batch  # noqa: E402
from tests.backends.conftest import Open, assert_same_state, make_batch, microbatches  # noqa: E402
from tests.backends.test_prefix import HALF, stored  # noqa: E402
from tests.backends.test_shared_start import SGD, assert_close, shared_batch, with_filler  # noqa: E402
from tests.tiny import make_model  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def backend() -> str:
    return "cuda"


@pytest.fixture
def on_cores(monkeypatch: pytest.MonkeyPatch, opened: Open) -> Callable[..., Any]:
    """Opens a learner that finds so many cores."""

    def open_on(cores: int, folder: Path, **settings: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: cores)
            return opened(folder, **settings)

    return open_on


@pytest.fixture(params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Four layers; Mistral's window is shorter than a shared start."""
    window: dict[str, Any] = {"sliding_window": 5} if request.param == "mistral" else {}
    return make_model(tmp_path / "model", model_type=request.param, num_layers=4, **window)


@pytest.fixture
def parts_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each call of `Workers.at_once` got."""
    seen: list[int] = []
    at_once = Workers.at_once

    def watched(self: Workers, function: Any, pieces: Any) -> Any:
        seen.append(len(pieces))
        return at_once(self, function, pieces)

    monkeypatch.setattr(Workers, "at_once", watched)
    return seen


def batches() -> list[Batch]:
    """With a start that is worth sharing, with fillers and padding, with nothing in common, and of one row."""
    return [
        with_filler(shared_batch((40, 31, 37, 44), start=3, width=50)),
        make_batch((12, 9, 30), first_row=4),
        make_batch((7,), first_row=7),
    ]


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(("frozen", "optim"), [(0.0, SGD["optim"]), (0.5, SGD["optim"]), (0.5, {"name": "adamw"})])
def test_a_step_is_that_of_the_whole_batches(
    on_cores: Any, model: Path, parts_seen: list[int], cores: int, bits: int, frozen: float, optim: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {
        "model": {"bits": bits},
        "lora": HALF | {"frozen_fraction": frozen},
        "optim": optim | {"label_smoothing": 0.1},
    }
    whole, cut = on_cores(1, model, **settings), on_cores(cores, model, **settings)
    one = whole.train_step(batches(), step=1, lr=1e-2)
    assert parts_seen == []
    two = cut.train_step(batches(), step=1, lr=1e-2)
    assert parts_seen == [cores, cores]  # a row can't be cut
    assert float(two.loss) == pytest.approx(float(one.loss), rel=1e-6)
    assert float(two.grad_norm) == pytest.approx(float(one.grad_norm), rel=1e-5)
    assert_close(whole.export_state(), cut.export_state())


def test_the_same_bits_every_time_and_from_stored_states(on_cores: Any, model: Path) -> None:
    learners = [on_cores(3, model, lora=HALF, **SGD) for _ in range(3)]
    fast, _ = stored(learners[2], batches())
    for step in (1, 2):
        for learner in (learners[0], learners[1]):
            learner.train_step(batches(), step=step, lr=1e-2)
        loss = fast.train_step(batches(), step=step, lr=1e-2).loss
        assert np.isfinite(float(loss))
    assert_same_state(learners[0].export_state(), learners[1].export_state())
    for name, tensor in learners[0].export_state().adapter.items():
        np.testing.assert_allclose(learners[2].export_state().adapter[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("settings", [{"low_memory": True}, {"stream_layers": True}])
def test_layers_left_out_or_streamed_give_the_same_bits_in_parts(
    on_cores: Any, model: Path, parts_seen: list[int], bits: int, settings: dict[str, Any]
) -> None:
    plain = on_cores(2, model, lora=HALF, model={"bits": bits})
    other = on_cores(2, model, lora=HALF, model={"bits": bits, **settings})
    learners = [stored(learner, batches())[0] for learner in (plain, other)]
    for step in (1, 2):
        one, two = (learner.train_step(batches(), step=step, lr=1e-2) for learner in learners)
        assert float(two.loss) == float(one.loss)
        assert float(two.grad_norm) == float(one.grad_norm)
    assert 2 in parts_seen
    assert_same_state(plain.export_state(), other.export_state())


def test_checkpointing_changes_nothing(on_cores: Any, model: Path) -> None:
    plain, other = (
        on_cores(2, model, lora=HALF, train={"gradient_checkpointing": recomputed}) for recomputed in (False, True)
    )
    for learner in (plain, other):
        learner.train_step([make_batch((12, 9, 30))] if learner.num_prefix_layers == 0 else batches(), step=1, lr=1e-2)
    assert_same_state(plain.export_state(), other.export_state())


@pytest.mark.parametrize(("kind", "dropout"), [("llama", 0.2), ("mixtral", 0.0)])
def test_dropout_and_mixtures_take_the_batch_whole(
    on_cores: Any, folders: dict[str, Path], parts_seen: list[int], kind: str, dropout: float
) -> None:
    learners = [on_cores(cores, folders[kind], lora={"dropout": dropout}) for cores in (1, 2)]
    for learner in learners:
        learner.train_step(microbatches(), step=1, lr=1e-2)
    assert parts_seen == []
    assert_same_state(learners[0].export_state(), learners[1].export_state())


def test_no_memory_in_a_part_is_one_line_and_leaves_the_learner_usable(on_cores: Any, folders: dict[str, Path]) -> None:
    learner: CudaLearner = on_cores(2, folders["llama"])

    def too_much(*_: Any) -> None:
        torch.empty(2**50)

    before = learner.export_state()
    hook = learner.model.model.layers[1].register_forward_hook(too_much)
    with pytest.raises(OutOfMemoryError, match="in a training step with 2 x 12 tokens at a time"):
        learner.train_step([make_batch((12, 9))], step=1, lr=1e-2)
    hook.remove()
    assert_same_state(before, learner.export_state())
    assert float(learner.train_step([make_batch((12, 9))], step=1, lr=1e-2).loss) > 0


# --- how a batch is cut -----------------------------------------------------------------------------------------------


def test_parts_hold_the_rows_with_targets() -> None:
    batch = with_filler(make_batch((12, 5, 9)))
    batch.targets[1] = IGNORE
    for most in (2, 3):
        found = even_parts(batch, most=most, target_cost=1.0)
        assert [part.row_ids.tolist() for part in found] == [[0], [2]]
    assert even_parts(batch, most=1, target_cost=1.0) == [batch]


@pytest.mark.parametrize(
    ("start", "parts"),
    [
        (0, 4),
        (4, 4),  # 150 - 3 * 4 = 138 positions, of which 3 * 4 are within a tenth
        (5, 3),  # 135: two times 5, but not three times
        (12, 1),  # 114
        (30, 1),
    ],
)
def test_a_long_start_is_not_computed_again_in_each_part(start: int, parts: int) -> None:
    batch = shared_batch((40, 35, 38, 37), start=start)
    assert batch.num_shared == start
    assert len(even_parts(batch, most=4, target_cost=0.5)) == parts


def test_what_a_target_costs(on_cores: Any, folders: dict[str, Path]) -> None:
    """64 x 128 of the head; of a layer q and o 64 x 64, k and v 64 x 32, three of 64 x 128: 36,864; two layers."""
    learner = on_cores(2, folders["llama"])
    head = learner.model.lm_head
    expected = head.in_features * head.out_features / (2 * 36_864)
    assert target_cost(learner.model.model.layers, head) == pytest.approx(expected)


# --- the threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Workers:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 4)
        workers = Workers(CPU, mode=nullcontext)
    return workers


def test_all_pieces_at_the_same_time_with_the_cores_divided(four: Workers) -> None:
    for number, cores in ((4, 1), (3, 1), (2, 2)):
        barrier = threading.Barrier(number, timeout=30)

        def work(piece: int, barrier: threading.Barrier = barrier) -> tuple[int, int, bool]:
            barrier.wait()
            return piece * piece, torch.get_num_threads(), torch.is_grad_enabled()

        with torch.no_grad():
            assert four.at_once(work, range(number)) == [(piece * piece, cores, False) for piece in range(number)]
        assert all(with_gradients for *_, with_gradients in four.at_once(work, range(number)))
    me = threading.current_thread()
    assert four.at_once(lambda _: threading.current_thread(), [0]) == [me]


def test_an_error_is_raised_when_nothing_is_under_way(four: Workers) -> None:
    under_way: set[int] = set()
    barrier = threading.Barrier(4, timeout=30)

    def work(piece: int) -> None:
        under_way.add(piece)
        barrier.wait()
        if piece == 1:
            under_way.discard(piece)
            raise ValueError("the second")
        threading.Event().wait(0.05)
        under_way.discard(piece)

    with pytest.raises(ValueError, match="the second"):
        four.at_once(work, range(4))
    assert not under_way
    assert four.at_once(lambda piece: piece, range(4)) == [0, 1, 2, 3]
