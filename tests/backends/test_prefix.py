"""Beginning at the first adapted layer, from stored states, changes no result: one suite on each backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.prefix import PrefixedLearner, distinct_rows, rows_of
from core.protocols import Batch, Learner, Prefix, TokenArray
from tests.backends.conftest import Open, make_batch, microbatches
from tests.tiny import make_model

HALF = {"rank": 4, "alpha": 8, "dropout": 0.0, "frozen_fraction": 0.5}
CLOSE = 1e-6


class Kept:
    """A store in memory, which knows no rows but those it was given."""

    def __init__(self, learner: Learner, rows: Sequence[TokenArray]) -> None:
        self._found = {row.tobytes(): prefix for row, prefix in zip(rows, learner.prefixes(rows), strict=True)}
        self.num_read = 0

    def get(self, row: TokenArray) -> Prefix:
        self.num_read += 1
        return self._found[row.tobytes()]


def stored(learner: Learner, batches: Iterable[Batch]) -> tuple[PrefixedLearner, Kept]:
    kept = Kept(learner, distinct_rows(batches))
    return PrefixedLearner(learner, kept), kept  # type: ignore[arg-type]


@pytest.fixture(params=["llama", "mistral", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Four layers; Mistral's window is shorter than the rows."""
    folder = tmp_path / "model"
    window: dict[str, Any] = {"sliding_window": 5} if request.param == "mistral" else {}
    make_model(folder, model_type=request.param, num_layers=4, **window)
    return folder


@pytest.mark.parametrize("bits", [16, 4])
def test_three_steps_and_an_evaluation_are_the_same(opened: Open, model: Path, bits: int) -> None:
    settings: dict[str, Any] = {"model": {"bits": bits}, "lora": HALF | {"dropout": 0.2}}
    plain, other = opened(model, **settings), opened(model, **settings)
    steps = [microbatches(step) for step in (1, 2, 3)]
    validation = [make_batch((15, 4, 9), seed=8), make_batch((6,), first_row=3, seed=8)]
    fast, kept = stored(other, [*(batch for step in steps for batch in step), *validation])
    assert plain.num_prefix_layers == 2

    for number, batches in enumerate(steps, start=1):
        one = plain.train_step(batches, step=number, lr=1e-2)
        two = fast.train_step(batches, step=number, lr=1e-2)
        assert float(two.loss) == pytest.approx(float(one.loss), rel=CLOSE)
        assert float(two.grad_norm) == pytest.approx(float(one.grad_norm), rel=10 * CLOSE)
        assert two.num_targets == one.num_targets
    before, after = plain.evaluate(validation), fast.evaluate(validation)
    assert kept.num_read > 0
    np.testing.assert_array_equal(after.row_ids, before.row_ids)
    np.testing.assert_allclose(after.nll, before.nll, rtol=10 * CLOSE)
    if before.expert_tokens is None:
        assert after.expert_tokens is None
    else:
        np.testing.assert_array_equal(after.expert_tokens, before.expert_tokens)
    np.testing.assert_allclose(fast.replay(validation).nll, plain.replay(validation).nll, rtol=1e-4, atol=1e-6)
    for batch in validation:
        np.testing.assert_allclose(fast.target_logits(batch), plain.target_logits(batch), rtol=1e-4, atol=1e-5)


def test_the_same_arithmetic_gives_the_same_bits(opened: Open, model: Path) -> None:
    """One row at a time, without padding, is what the store computes; so nothing at all may differ."""
    plain, other = opened(model, lora=HALF), opened(model, lora=HALF)
    batches = [make_batch((length,), first_row=row) for row, length in enumerate((16, 11, 7))]
    fast, _ = stored(other, batches)
    np.testing.assert_array_equal(fast.evaluate(batches).nll, plain.evaluate(batches).nll)
    for step, batch in enumerate(batches, start=1):
        plain.train_step([batch], step=step, lr=1e-2)
        fast.train_step([batch], step=step, lr=1e-2)
    one, two = plain.export_state(), fast.export_state()
    for name in one.adapter:
        np.testing.assert_array_equal(two.adapter[name], one.adapter[name])


def test_a_row_has_the_same_states_whatever_rows_are_asked_for_with_it(opened: Open, model: Path) -> None:
    learner = opened(model, lora=HALF)
    rows = rows_of(make_batch((16, 9, 3)))
    together = list(learner.prefixes(rows))
    for row, prefix in zip(rows, together, strict=True):
        (alone,) = learner.prefixes([row])
        assert prefix.states.shape == (len(row), 64)
        np.testing.assert_array_equal(alone.states, prefix.states)


def test_the_balancing_loss_counts_the_frozen_routers(opened: Open, tmp_path: Path) -> None:
    make_model(tmp_path / "model", model_type="mixtral", num_layers=4)
    settings: dict[str, Any] = {"lora": HALF, "moe": {"train_router": True, "aux_loss_weight": 0.1}}
    plain, other = opened(tmp_path / "model", **settings), opened(tmp_path / "model", **settings)
    fast, _ = stored(other, microbatches())
    one, two = (learner.train_step(microbatches(), step=1, lr=1e-2) for learner in (plain, fast))
    assert one.aux_loss is not None and two.aux_loss is not None
    assert float(two.aux_loss) == pytest.approx(float(one.aux_loss), rel=CLOSE)
    assert float(two.grad_norm) == pytest.approx(float(one.grad_norm), rel=10 * CLOSE)


def test_the_stored_states_are_what_is_used(opened: Open, model: Path) -> None:
    learner = opened(model, lora=HALF)
    batch = make_batch()
    fast, _ = stored(learner, [batch])
    with_states = fast._with_prefix(batch)
    assert with_states.prefix is not None
    spoilt = replace(with_states, prefix=replace(with_states.prefix, states=with_states.prefix.states[::-1]))
    assert abs(learner.evaluate([spoilt]).mean - learner.evaluate([batch]).mean) > 1e-3


def test_an_adapter_on_every_layer_leaves_nothing_to_store(opened: Open, llama: Path) -> None:
    assert opened(llama).num_prefix_layers == 0


@pytest.mark.parametrize("bits", [16, 4])
def test_without_the_frozen_layers_weights_the_bits_are_the_same(opened: Open, model: Path, bits: int) -> None:
    settings: dict[str, Any] = {"lora": HALF}
    plain = opened(model, model={"bits": bits}, **settings)
    other = opened(model, model={"bits": bits, "low_memory": True}, **settings)
    batches = microbatches()
    (whole, _), (upper, _) = stored(plain, batches), stored(other, batches)
    for step in (1, 2):
        one, two = (learner.train_step(batches, step=step, lr=1e-2) for learner in (whole, upper))
        assert float(two.loss) == float(one.loss)
        assert float(two.grad_norm) == float(one.grad_norm)
    np.testing.assert_array_equal(upper.evaluate(batches).nll, whole.evaluate(batches).nll)
    assert other.num_parameters == plain.num_parameters


@pytest.mark.parametrize("bits", [16, 4])
def test_low_memory_holds_the_upper_layers_only(opened: Open, model: Path, bits: int) -> None:
    plain = opened(model, model={"bits": bits}, lora=HALF)
    upper = opened(model, model={"bits": bits, "low_memory": True}, lora=HALF)
    list(upper.prefixes(rows_of(make_batch())))
    held = {weight.name: weight for weight in upper.weights()}
    for weight in plain.weights():
        is_frozen_layer = ".layers.0." in weight.name or ".layers.1." in weight.name
        assert (weight.name in held) != is_frozen_layer
        assert is_frozen_layer or held[weight.name] == weight


def test_absent_layers_take_the_rows_in_portions(opened: Open, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(make_batch((16, 9, 3, 12)))
    learner = opened(model, model={"bits": 16, "low_memory": True}, lora=HALF)
    together = list(learner.prefixes(rows))
    monkeypatch.setattr("core.portions.PORTION_BYTES", 20 * 64 * 4)
    for one, two in zip(learner.prefixes(rows), together, strict=True):
        np.testing.assert_array_equal(one.states, two.states)
    assert len(together) == len(rows)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("frozen", [0.5, 0.0])
def test_streamed_layers_train_to_the_same_bits(opened: Open, model: Path, bits: int, frozen: float) -> None:
    lora = HALF | {"dropout": 0.2, "frozen_fraction": frozen}
    plain = opened(model, model={"bits": bits}, lora=lora)
    other = opened(model, model={"bits": bits, "stream_layers": True}, lora=lora)
    batches = microbatches()
    whole, streamed = (stored(one, batches)[0] if frozen else one for one in (plain, other))
    for step in (1, 2):
        one, two = (learner.train_step(batches, step=step, lr=1e-2) for learner in (whole, streamed))
        assert float(two.loss) == float(one.loss)
        assert float(two.grad_norm) == float(one.grad_norm)
    one_state, two_state = whole.export_state(), streamed.export_state()
    for name in one_state.adapter:
        np.testing.assert_array_equal(two_state.adapter[name], one_state.adapter[name])
    before, after = whole.evaluate(batches), streamed.evaluate(batches)
    np.testing.assert_array_equal(after.nll, before.nll)
    if before.expert_tokens is not None:
        np.testing.assert_array_equal(after.expert_tokens, before.expert_tokens)
    np.testing.assert_array_equal(streamed.replay(batches).greedy, whole.replay(batches).greedy)
