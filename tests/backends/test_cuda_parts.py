"""PyTorch on a CPU: a batch's parts trained on at once, a thread each. Nothing but the last digits may change."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from backends.cuda.learner import CudaLearner  # noqa: E402
from backends.cuda.workers import Workers, even_parts  # noqa: E402
from core.errors import OutOfMemoryError  # noqa: E402
from core.protocols import IGNORE, Batch  # noqa: E402
from tests.backends.conftest import (  # noqa: E402
    Open,
    assert_same_state,
    in_new_process,
    make_batch,
    microbatches,
    open_learner,
)
from tests.backends.test_prefix import HALF, stored  # noqa: E402
from tests.backends.test_shared_start import SGD, assert_close, shared_batch, with_filler  # noqa: E402
from tests.tiny import VOCAB_SIZE, make_model  # noqa: E402

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
    """How many pieces each call of `Workers.spread` got."""
    seen: list[int] = []
    spread = Workers.spread

    def watched(self: Workers, function: Any, pieces: Any) -> Any:
        seen.append(len(pieces))
        return spread(self, function, pieces)

    monkeypatch.setattr(Workers, "spread", watched)
    return seen


def batches() -> list[Batch]:
    """With a start that is worth sharing, with fillers and padding, with nothing in common, and of one row."""
    return [
        with_filler(shared_batch((40, 41, 39, 44, 42, 40), start=3, width=50)),
        make_batch((13, 12, 13, 11, 12, 13), first_row=6),
        make_batch((7,), first_row=12),
    ]


@pytest.mark.parametrize(("bits", "cores"), [(16, 2), (16, 3), (4, 2)])
@pytest.mark.parametrize(
    ("frozen", "dropout", "optim"),
    [
        (0.0, 0.0, SGD["optim"]),
        (0.0, 0.2, SGD["optim"]),
        (0.5, 0.0, SGD["optim"]),
        (0.5, 0.2, SGD["optim"]),
        (0.5, 0.0, {"name": "adamw"}),
    ],
)
def test_a_step_is_that_of_the_whole_batches(
    on_cores: Any,
    model: Path,
    parts_seen: list[int],
    cores: int,
    bits: int,
    frozen: float,
    dropout: float,
    optim: dict[str, Any],
) -> None:
    settings: dict[str, Any] = {
        "model": {"bits": bits},
        "lora": HALF | {"frozen_fraction": frozen, "dropout": dropout},
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


def test_a_part_of_one_row_begins_with_what_the_batch_shares(
    on_cores: Any, folders: dict[str, Path], parts_seen: list[int]
) -> None:
    """Its start has the masks that the batch's has."""
    batch = shared_batch((40, 41), start=4)
    learners = [on_cores(cores, folders["llama"], lora={"dropout": 0.3}, **SGD) for cores in (1, 2)]
    one, two = (learner.train_step([batch], step=1, lr=1e-2) for learner in learners)
    assert parts_seen == [2]
    assert float(two.loss) == pytest.approx(float(one.loss), rel=1e-6)
    assert_close(learners[0].export_state(), learners[1].export_state())


def test_the_same_bits_after_a_resume(on_cores: Any, model: Path, parts_seen: list[int]) -> None:
    first, resumed = (on_cores(3, model, lora=HALF | {"dropout": 0.2}) for _ in range(2))
    first.train_step(batches(), step=1, lr=1e-2)
    resumed.import_state(first.export_state())
    for learner in (first, resumed):
        learner.train_step(batches(), step=2, lr=1e-2)
    assert parts_seen == [3] * 6
    assert_same_state(first.export_state(), resumed.export_state())


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(
    ("settings", "frozen"),
    [({"low_memory": True}, 0.5), ({"stream_layers": True}, 0.5), ({"stream_layers": True}, 0.0)],
)
def test_layers_left_out_or_streamed_give_the_same_bits_in_parts(
    on_cores: Any, model: Path, parts_seen: list[int], bits: int, settings: dict[str, Any], frozen: float
) -> None:
    lora = HALF | {"frozen_fraction": frozen, "dropout": 0.2}
    plain = on_cores(2, model, lora=lora, model={"bits": bits})
    other = on_cores(2, model, lora=lora, model={"bits": bits, **settings})
    learners = [stored(learner, batches())[0] if frozen else learner for learner in (plain, other)]
    for learner in learners:
        parts_seen.clear()
        for step in (1, 2):
            learner.train_step(batches(), step=step, lr=1e-2)
        assert parts_seen.count(2) >= 4  # of two batches in each step; streamed, of each layer of these
    assert_same_state(plain.export_state(), other.export_state())


def test_the_same_bits_where_a_part_has_several_cores(tmp_path: Path) -> None:
    """With products large enough for a BLAS to split them."""
    folder = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512, num_layers=2)
    in_new_process("train_on_four_cores", str(folder), module=__name__)


def train_on_four_cores(folder: str) -> None:
    torch.set_num_threads(4)
    batch = make_batch((90, 88))
    assert len(even_parts(batch, most=4, cores=4, target_cost=0.5)) == 2
    found = []
    for settings in ({}, {}, {"stream_layers": True}):
        learner = open_learner("cuda", Path(folder), model=settings)
        for step in (1, 2):
            learner.train_step([batch], step=step, lr=1e-2)
        found.append(learner.export_state())
    for other in found[1:]:
        assert_same_state(found[0], other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_changes_nothing(on_cores: Any, model: Path, parts_seen: list[int], dtype: str) -> None:
    """In bfloat16 casts of the adapter are kept for a forward pass, and must not be used in another. Masks of dropout
    are drawn again."""
    plain, other = (
        on_cores(2, model, model={"dtype": dtype}, lora={"dropout": 0.2}, train={"gradient_checkpointing": recomputed})
        for recomputed in (False, True)
    )
    assert other.model.is_gradient_checkpointing
    for learner in (plain, other):
        learner.train_step(batches(), step=1, lr=1e-2)
    assert parts_seen == [2] * 4
    assert_same_state(plain.export_state(), other.export_state())


def test_half_precision_is_that_of_the_whole_batches(on_cores: Any, model: Path) -> None:
    learners = [on_cores(cores, model, model={"dtype": "bfloat16"}, **SGD) for cores in (1, 2)]
    streamed = on_cores(2, model, model={"dtype": "bfloat16", "stream_layers": True}, **SGD)
    one, two, three = (learner.train_step(batches(), step=1, lr=1e-2) for learner in [*learners, streamed])
    assert float(two.loss) == pytest.approx(float(one.loss), rel=1e-3)
    assert float(two.grad_norm) == pytest.approx(float(one.grad_norm), rel=2e-2)
    assert float(three.loss) == float(two.loss)
    assert_same_state(learners[1].export_state(), streamed.export_state())


def test_mixtures_take_the_batch_whole(on_cores: Any, folders: dict[str, Path], parts_seen: list[int]) -> None:
    learners = [on_cores(cores, folders["mixtral"], lora={"dropout": 0.2}) for cores in (1, 2)]
    for learner in learners:
        learner.train_step(microbatches(), step=1, lr=1e-2)
    assert parts_seen == []
    assert_same_state(learners[0].export_state(), learners[1].export_state())


def test_attention_s_own_dropout_takes_the_batch_whole(on_cores: Any, tmp_path: Path, parts_seen: list[int]) -> None:
    """Its masks come from torch's one generator."""
    folder = make_model(tmp_path / "model")
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes | {"attention_dropout": 0.2}))
    learners = [on_cores(cores, folder) for cores in (1, 2)]
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
    batch = with_filler(make_batch((12, 11, 5)))
    batch.targets[2] = IGNORE
    for most in (2, 4):
        found = even_parts(batch, most=most, cores=most, target_cost=1.0)
        assert [part.row_ids.tolist() for part in found] == [[0], [1]]
    assert even_parts(batch, most=1, cores=4, target_cost=1.0) == [batch]


@pytest.mark.parametrize(
    ("lengths", "start", "cores", "parts"),
    [
        # costs 53.5, 47, 51 and 49.5: in four parts 53.5, in two 100.5 / 2 * 1.15 = 57.8, in one 201 / 4 * 1.45 = 72.9
        ((40, 35, 38, 37), 0, 4, 4),
        ((40, 35, 38, 37), 10, 4, 2),  # in two (100.5 - 10) / 2 * 1.15 = 52.0
        ((40, 35, 38, 37), 30, 4, 1),  # costs 45, 37.5, 42, 40.5; in two 30.2, in one (165 - 90) / 4 * 1.45 = 27.2
        ((40, 35, 38, 37), 10, 2, 2),  # in two 90.5, in one (201 - 30) / 2 * 1.15 = 98.3
        ((40, 35, 38, 37), 20, 2, 1),  # costs 50, 42.5, 47, 45.5; in two 92.5 - 20, in one 71.9
        ((60, 12), 0, 2, 1),  # 80 and 16: in one 55.2
        ((40, 40, 40, 40), 0, 6, 2),  # three cores each, and none idle
        ((40, 40, 40), 0, 3, 3),
        ((40,), 0, 4, 1),
    ],
)
def test_as_many_parts_as_take_least(lengths: tuple[int, ...], start: int, cores: int, parts: int) -> None:
    batch = shared_batch(lengths, start=start)
    assert batch.num_shared == start
    found = even_parts(batch, most=min(cores, 4), cores=cores, target_cost=0.5)
    assert len(found) == parts
    assert sorted(row for part in found for row in part.row_ids.tolist()) == list(range(len(lengths)))


def test_no_more_parts_than_are_allowed(on_cores: Any, folders: dict[str, Path]) -> None:
    """A gradient of the adapter for each; and each unpacks 4-bit weights for itself."""
    assert on_cores(8, folders["llama"])._most_parts == 4
    assert on_cores(8, folders["llama"], model={"bits": 4})._most_parts == 2


def test_what_a_target_costs(on_cores: Any, folders: dict[str, Path]) -> None:
    """A row of the head has 64 numbers; a layer takes 2 x 64 x 64 and 3 x 64 x 128, roughly; there are two."""
    learner = on_cores(2, folders["llama"])
    assert learner._target_cost == pytest.approx(VOCAB_SIZE * 64 / (2 * (2 * 64 * 64 + 3 * 64 * 128)))


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
            assert four.spread(work, range(number)) == [(piece * piece, cores, False) for piece in range(number)]
        assert all(with_gradients for *_, with_gradients in four.spread(work, range(number)))
    me = threading.current_thread()
    assert four.spread(lambda _: threading.current_thread(), [0]) == [me]


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_error_is_raised_when_nothing_is_under_way(four: Workers, interrupted: bool) -> None:
    under_way: set[int] = set()
    barrier = threading.Barrier(4, timeout=30)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work(piece: int) -> None:
        under_way.add(piece)
        barrier.wait()
        try:
            if piece == 1 and interrupted:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            elif piece == 1:
                raise ValueError("the second")
            time.sleep(0.2)
        finally:
            under_way.discard(piece)

    try:
        with pytest.raises(KeyboardInterrupt if interrupted else ValueError):
            four.spread(work, range(4))
        assert not under_way
    finally:
        signal.signal(signal.SIGINT, handler)
    assert four.spread(lambda piece: piece, range(4)) == [0, 1, 2, 3]


def test_closing_ends_the_threads(four: Workers) -> None:
    threads = four.spread(lambda _: threading.current_thread(), range(4))
    assert any(thread.is_alive() for thread in threads)
    four.close()
    four.close()
    assert not any(thread.is_alive() for thread in threads)
