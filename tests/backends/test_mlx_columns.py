"""The MLX backend's cross-entropy on a CPU, some tokens of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.backends.conftest import LR, make_batch, missing_package
from tests.tiny import make_model

if missing := missing_package("mlx"):
    pytest.skip(f"mlx: {missing} is not installed", allow_module_level=True)

from backends.mlx import columns
from backends.mlx.learner import MlxLearner
from backends.mlx.model import Network

import mlx.core as mx  # isort: skip


@pytest.fixture(scope="session")
def backend() -> str:
    return "mlx"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 tokens are four pieces, the last of them of 36; 40 positions are three of 14, 14 and 12."""
    monkeypatch.setattr(columns, "COLUMNS", 88)
    monkeypatch.setattr(columns, "_ROWS", 16)


def given(rows: int, *, tokens: int = 300, size: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An output projection, hidden states, and targets; float32 and integers."""
    rng = np.random.default_rng(rows)
    vocabulary = rng.normal(0, 1, (tokens, size)).astype(np.float32)
    ids = rng.integers(0, tokens, rows)
    ids[: min(rows, 4)] = [0, 87, 88, tokens - 1][: min(rows, 4)]  # at the pieces' ends
    return vocabulary, rng.normal(0, 1, (rows, size)).astype(np.float32), ids


def losses_and_slopes(vocabulary: np.ndarray, hidden: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    given = columns.Vocabulary(mx.array(vocabulary)), mx.array(hidden), mx.array(ids)
    losses, slopes = columns.losses_and_slopes(*given, label_smoothing=0.0)
    return np.array(losses), np.array(slopes)


def by_hand(
    vocabulary: np.ndarray, hidden: np.ndarray, ids: np.ndarray, smoothing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy, and the gradient of the smoothed one, in float64."""
    wide, states = vocabulary.astype(np.float64), hidden.astype(np.float64)
    logits = states @ wide.T
    largest = logits.max(axis=1, keepdims=True)
    log_p = logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    nll = -log_p[np.arange(len(ids)), ids]
    wanted = np.full_like(logits, smoothing / len(vocabulary))
    wanted[np.arange(len(ids)), ids] += 1 - smoothing
    return nll, (np.exp(log_p) - wanted) @ wide


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_equals_float64(rows: int, smoothing: float) -> None:
    vocabulary, hidden, ids = given(rows)
    nll, slope = by_hand(vocabulary, hidden, ids, smoothing)
    arrays = columns.Vocabulary(mx.array(vocabulary)), mx.array(hidden), mx.array(ids)
    found = columns.losses_and_slopes(*arrays, label_smoothing=smoothing)
    np.testing.assert_allclose(np.array(found[0]), nll, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(np.array(found[1]), slope, rtol=0, atol=3e-6 * np.abs(slope).max())
    np.testing.assert_array_equal(np.array(columns.losses_of(*arrays)), np.array(found[0]))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_logits_far_apart(order: str) -> None:
    """One piece's exponentials are nothing beside another's: in whichever order they come."""
    vocabulary, hidden, ids = given(5, size=1)
    hidden = np.abs(hidden) + 1
    vocabulary[:, 0] = np.linspace(-400, 400, len(vocabulary)) * (1 if order == "rising" else -1)
    nll, slope = by_hand(vocabulary, hidden, ids, 0.0)
    found = losses_and_slopes(vocabulary, hidden, ids)
    np.testing.assert_allclose(found[0], nll, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(found[1], slope, rtol=1e-5, atol=1e-4)


def test_a_nan_shows_in_its_own_row_only() -> None:
    vocabulary, hidden, ids = given(3)
    hidden[1, 5] = np.nan
    losses, slopes = losses_and_slopes(vocabulary, hidden, ids)
    assert np.isnan(losses).tolist() == [False, True, False]
    assert np.isnan(slopes).any(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_learner_trains_the_same(
    tmp_path: Path, opened: Callable[..., MlxLearner], monkeypatch: pytest.MonkeyPatch, tied: bool, smoothing: float
) -> None:
    """Against whole rows of logits, differentiated by MLX."""
    folder = make_model(tmp_path / "model", tied=tied)
    optim = {"name": "sgd", "momentum": 0.5, "label_smoothing": smoothing}
    batch, found = make_batch((21, 9, 14)), []
    for by_columns in (True, False):
        if not by_columns:
            monkeypatch.setattr(Network, "vocabulary", None)
        learner = opened(folder, optim=optim)
        assert (learner.network.vocabulary is not None) == by_columns
        rows, output = learner.evaluate([batch]), learner.train_step([batch], step=1, lr=LR)
        found.append((rows.nll, float(output.loss), learner.export_state().optimizer))
    (nll, loss, slots), (other_nll, other_loss, other_slots) = found
    np.testing.assert_allclose(nll, other_nll, rtol=1e-6)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for name, array in slots.items():
        np.testing.assert_allclose(array, other_slots[name], rtol=0, atol=3e-6 * np.abs(array).max())


def test_only_a_plain_matrix_in_float32(tmp_path: Path, opened: Callable[..., MlxLearner]) -> None:
    folder = make_model(tmp_path / "model")
    for settings in ({"bits": 4}, {"dtype": "bfloat16"}):
        assert opened(folder, model=settings).network.vocabulary is None
