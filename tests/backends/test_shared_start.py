"""A start that all rows of a batch have in common changes no result: one suite on each backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.prefix import PrefixedLearner, distinct_rows
from core.protocols import FILLER_ROW, IGNORE, Batch, TrainState
from tests.backends.conftest import Open, make_batch, one_row
from tests.backends.test_prefix import Kept
from tests.tiny import PAD_ID, make_model

SGD: dict[str, Any] = {"optim": {"name": "sgd", "momentum": 0.9}}
"""Its momentum after one step is the gradient."""
CLOSE = 1e-6
START = 9


def shared_batch(lengths: Sequence[int] = (24, 17, 20), *, start: int = START, width: int | None = None) -> Batch:
    """Rows that begin with the same `start` tokens, which have no targets; lengths are those of the whole rows."""
    batch = make_batch(lengths, width=width, seed=3)
    inputs, targets = batch.inputs.copy(), batch.targets.copy()
    inputs[:, :start] = inputs[0, :start]
    targets[:, :start] = IGNORE
    return Batch(batch.row_ids, inputs, targets)


def with_filler(batch: Batch) -> Batch:
    return Batch(
        np.append(batch.row_ids, FILLER_ROW),
        np.vstack([batch.inputs, np.full_like(batch.inputs[:1], PAD_ID)]),
        np.vstack([batch.targets, np.full_like(batch.targets[:1], IGNORE)]),
    )


def rows_alone(batch: Batch) -> list[Batch]:
    """Each row in a batch of its own, where there is nothing to share."""
    return [one_row(batch, row) for row in range(len(batch.row_ids)) if batch.row_ids[row] != FILLER_ROW]


def assert_close(one: TrainState, other: TrainState) -> None:
    for name, gradient in one.optimizer.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(other.optimizer[name], gradient, rtol=0, atol=3 * CLOSE * scale, err_msg=name)


@pytest.fixture(params=["llama", "mistral", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three layers; Mistral's window is shorter than the rows."""
    window: dict[str, Any] = {"sliding_window": 14} if request.param == "mistral" else {}
    return make_model(tmp_path / "model", model_type=request.param, num_layers=3, **window)


def test_what_counts_as_shared() -> None:
    batch = shared_batch()
    assert batch.num_shared == START
    assert with_filler(batch).num_shared == START
    assert one_row(batch, 0).num_shared == 0
    assert with_filler(one_row(batch, 0)).num_shared == 0
    early = batch.targets.copy()
    early[1, 4] = 5
    assert replace(batch, targets=early).num_shared == 4
    other = batch.inputs.copy()
    other[2, 2] += 1
    assert replace(batch, inputs=other).num_shared == 2
    assert make_batch((12, 9)).num_shared == 0


@pytest.mark.parametrize("bits", [16, 4])
def test_a_step_is_that_of_the_rows_alone(opened: Open, model: Path, bits: int) -> None:
    batch = with_filler(shared_batch(width=28))
    together, alone = opened(model, model={"bits": bits}, **SGD), opened(model, model={"bits": bits}, **SGD)
    one = together.train_step([batch, shared_batch((15, 13))], step=1, lr=1e-2)
    two = alone.train_step([*rows_alone(batch), *rows_alone(shared_batch((15, 13)))], step=1, lr=1e-2)
    assert float(one.loss) == pytest.approx(float(two.loss), rel=CLOSE)
    assert float(one.grad_norm) == pytest.approx(float(two.grad_norm), rel=3 * CLOSE)
    assert_close(alone.export_state(), together.export_state())


def test_an_evaluation_is_that_of_the_rows_alone(opened: Open, model: Path) -> None:
    learner, batch = opened(model), with_filler(shared_batch(width=28))
    alone = rows_alone(batch)
    expected, found = learner.evaluate(alone), learner.evaluate([batch])
    np.testing.assert_array_equal(found.row_ids, expected.row_ids)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=CLOSE)
    if expected.expert_tokens is not None:  # a shared token counts in every row
        np.testing.assert_array_equal(found.expert_tokens, expected.expert_tokens)
    np.testing.assert_allclose(learner.replay([batch]).nll, learner.replay(alone).nll, rtol=1e-4, atol=1e-6)
    logits = np.concatenate([learner.target_logits(row) for row in alone])
    np.testing.assert_allclose(learner.target_logits(batch), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"stream_layers": True}], ids=["whole", "low", "stream"])
def test_above_stored_states(opened: Open, model: Path, options: dict[str, bool]) -> None:
    """The states of the start are those of the first row."""
    half = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "frozen_fraction": 0.34}, **SGD}
    plain, other = opened(model, **half), opened(model, model={"bits": 16, **options}, **half)
    batch = with_filler(shared_batch(width=28))
    fast = PrefixedLearner(other, Kept(other, distinct_rows([batch])))  # type: ignore[arg-type]
    one = plain.train_step(rows_alone(batch), step=1, lr=1e-2)
    two = fast.train_step([batch], step=1, lr=1e-2)
    assert float(two.loss) == pytest.approx(float(one.loss), rel=CLOSE)
    assert_close(plain.export_state(), fast.export_state())
    np.testing.assert_allclose(fast.evaluate([batch]).nll, plain.evaluate(rows_alone(batch)).nll, rtol=10 * CLOSE)
