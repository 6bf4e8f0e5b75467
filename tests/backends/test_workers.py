"""Pieces of work side by side on a CPU: the order, the lookahead, the errors, the mode of each thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends.cuda.workers import Workers, last_ones_in_parts  # noqa: E402
from core.errors import OutOfMemoryError  # noqa: E402
from core.protocols import Prefix  # noqa: E402
from tests.backends.conftest import in_new_process, make_batch, open_learner  # noqa: E402
from tests.tiny import make_model  # noqa: E402

CPU = torch.device("cpu")


@contextmanager
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return int(request.param)


def test_order_mode_and_threads(threads: int) -> None:
    together = threading.Barrier(threads, timeout=30)

    def work(piece: int) -> tuple[int, bool, str]:
        if piece < threads:
            together.wait()  # passes only if as many are under way at once
        return piece * piece, torch.is_grad_enabled(), threading.current_thread().name

    done = list(Workers(CPU, mode=without_gradients).map(work, range(9)))
    assert [found for found, _, _ in done] == [piece * piece for piece in range(9)]
    assert not any(has_gradients for _, has_gradients, _ in done)
    assert len({name for _, _, name in done}) == threads
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("cores", "threads", "each"), [(1, 1, 1), (2, 2, 1), (8, 8, 1), (12, 6, 2), (64, 8, 8)])
def test_no_core_is_left_idle(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, each: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    workers = Workers(CPU, mode=without_gradients)
    assert (workers.num_threads, workers._cores_each) == (threads, each)
    assert workers.num_cores == cores
    assert Workers(CPU, mode=without_gradients, alone=True).num_threads == 1


def test_asks_for_a_few_pieces_ahead_only(threads: int) -> None:
    asked: list[int] = []

    def pieces() -> Iterator[int]:
        for piece in range(20):
            asked.append(piece)
            yield piece

    results = Workers(CPU, mode=without_gradients).map(lambda piece: piece, pieces())
    assert next(results) == 0
    assert len(asked) <= threads + 1


def test_an_error_ends_it_and_is_raised(threads: int) -> None:
    begun: list[int] = []
    under_way: set[int] = set()

    def work(piece: int) -> int:
        begun.append(piece)
        if piece == 2:
            raise ValueError("the third")
        under_way.add(piece)
        time.sleep(0.02)
        under_way.remove(piece)
        return piece

    results = Workers(CPU, mode=without_gradients).map(work, range(50))
    found: list[int] = []
    with pytest.raises(ValueError, match="the third"):
        found.extend(results)
    assert len(begun) <= 3 + 2 * threads
    assert not under_way


def test_evaluations_and_stored_states_do_not_depend_on_the_threads(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    batches = [make_batch((12, 9), seed=seed, first_row=2 * seed) for seed in range(7)]
    rows = [batch.inputs[0] for batch in batches]
    for count in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        learner = open_learner("cuda", folders["mistral"], lora={"frozen_fraction": 0.5, "dropout": 0.3})
        losses = learner.evaluate(batches)
        found.append((losses.row_ids, losses.nll, [prefix.states for prefix in learner.prefixes(rows)]))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("number", "at_once", "rows"),
    [
        (3, 2, [[0, 1, 2], [3, 4, 5], [6, 7], [8]]),
        (2, 2, [[0, 1, 2], [3, 4, 5]]),
        (1, 8, [[0], [1], [2]]),
        (2, 3, [[0, 1, 2], [3, 4, 5]]),
        (6, 4, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13], [14], [15, 16], [17]]),
        (2, 1, [[0, 1, 2], [3, 4, 5]]),
        (0, 2, []),
    ],
)
def test_the_last_batches_are_cut_for_the_threads(number: int, at_once: int, rows: list[list[int]]) -> None:
    batches = [make_batch((9, 7, 8), first_row=3 * n) for n in range(number)]
    batches = [replace(batch, prefix=Prefix(batch.inputs[:, :, None] * np.ones(2, np.float32))) for batch in batches]
    found = list(last_ones_in_parts(batches, at_once=at_once))
    assert [batch.row_ids.tolist() for batch in found] == rows
    for batch in found:
        assert batch.prefix is not None
        np.testing.assert_array_equal(batch.prefix.states[:, :, 1], batch.inputs)
        targets = [batches[row // 3].targets[row % 3] for row in batch.row_ids]
        np.testing.assert_array_equal(batch.targets, targets)


def test_an_evaluation_leaves_no_thread_a_batch_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    learner: Any = open_learner("cuda", folders["llama"])
    seen: list[list[int]] = []
    evaluated = learner._nll

    def watched(batch: Any) -> Any:
        seen.append(batch.row_ids.tolist())
        return evaluated(batch)

    monkeypatch.setattr(learner, "_nll", watched)
    losses = learner.evaluate([make_batch((12, 9, 8), first_row=3 * number) for number in range(3)])
    assert sorted(seen) == [[0, 1, 2], [3, 4, 5], [6, 7], [8]]
    assert losses.row_ids.tolist() == list(range(9))


def test_no_memory_in_a_thread_is_the_same_one_line(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    learner = open_learner("cuda", folders["llama"])

    def too_much(*_: Any) -> None:
        torch.empty(2**50)

    hook = learner.model.model.layers[1].register_forward_hook(too_much)
    with pytest.raises(OutOfMemoryError, match="in an evaluation with 2 x 12 tokens at a time, 2 batches side by side"):
        learner.evaluate([make_batch((12, 9))] * 4)
    hook.remove()
    assert learner.evaluate([make_batch((12, 9))]).mean > 0
    assert learner.model.training


def test_layers_that_are_left_out_give_the_same_bits_on_two_cores(tmp_path: Path) -> None:
    """With products large enough for a BLAS to split them."""
    folder = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512, num_layers=2)
    in_new_process("fill_on_two_cores", str(folder), module=__name__)


def fill_on_two_cores(folder: str) -> None:
    torch.set_num_threads(2)
    rows = [make_batch((length,)).inputs[0] for length in (90, 33, 61)]
    found = []
    for settings in ({}, {"low_memory": True}):
        learner = open_learner("cuda", Path(folder), model=settings, lora={"frozen_fraction": 0.5})
        found.append([prefix.states for prefix in learner.prefixes(rows)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
