"""What every backend promises (`core.protocols`) of a step, the optimisers and their state, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from core.protocols import IGNORE, Batch, Learner, TrainState
from tests.backends.conftest import (
    LR,
    Open,
    assert_same_state,
    in_new_process,
    load_state,
    make_adapter,
    make_batch,
    make_config,
    microbatches,
    one_row,
    save_state,
    train_from,
)
from tests.backends.test_shared_start import shared_batch
from tests.tiny import VOCAB_SIZE

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "betas": [0.8, 0.95], "eps": 1e-6},
    "lion": {"name": "lion", "betas": [0.8, 0.95]},
    "sgd": {"name": "sgd", "momentum": 0.7},
    "adafactor": {"name": "adafactor"},
}
SHOWS_GRADIENT = {"optim": {"name": "sgd", "momentum": 0.5}}
"""With these settings the momentum after the first step is the gradient."""


def gradient(learner: Learner, batches: list[Batch], *, step: int = 1) -> dict[str, np.ndarray]:
    """Gradient of a step from the learner's present adapter; for a learner that `SHOWS_GRADIENT`."""
    state = learner.export_state()
    learner.import_state(TrainState(state.adapter, {}, 0))
    learner.train_step(batches, step=step, lr=0.0)
    slots = learner.export_state().optimizer
    return {name.removeprefix("momentum/"): np.array(array) for name, array in slots.items()}


def assert_close(ours: Any, theirs: Any, *, rtol: float) -> None:
    """Within `rtol` of the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = float(np.abs(theirs[name]).max())
        assert scale > 0, name
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=rtol * scale, err_msg=name)


def norm(tensors: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((t.astype(np.float64) ** 2).sum() for t in tensors.values())))


# --- the step


def test_step_reports_the_evaluated_loss(opened: Open, folders: dict[str, Path], kind: str) -> None:
    """Without dropout the loss of a step is the evaluation's: sum over target tokens, label smoothing left out."""
    learner = opened(folders[kind], optim={"label_smoothing": 0.2})
    rows = learner.evaluate(microbatches())
    output = learner.train_step(microbatches(), step=1, lr=LR)
    assert output.num_targets == rows.num_targets.sum() == 8 + 6 + 11 + 5 + 2
    assert float(output.loss) == pytest.approx(rows.nll.sum() / rows.num_targets.sum(), rel=1e-6)


def test_accumulation_equals_one_big_batch(opened: Open, folders: dict[str, Path], kind: str) -> None:
    learner = opened(folders[kind], **SHOWS_GRADIENT)
    big = make_batch((12, 9, 14, 5), width=16)
    parts = [one_row(big, 0), Batch(big.row_ids[1:], big.inputs[1:], big.targets[1:])]
    empty = replace(parts[0], targets=np.full_like(parts[0].targets, IGNORE))
    whole = gradient(learner, [big])
    assert_close(gradient(learner, [parts[0], empty, parts[1]]), whole, rtol=2e-6)
    # a mean of means would be off by far more than the tolerance
    means = [gradient(learner, [part]) for part in parts]
    naive = {name: (means[0][name] + means[1][name]) / 2 for name in whole}
    assert max(np.abs(naive[n] - whole[n]).max() / np.abs(whole[n]).max() for n in whole) > 0.05


def test_gradient_is_the_slope_of_the_loss(opened: Open, llama: Path) -> None:
    learner = opened(llama, **SHOWS_GRADIENT)
    batches = microbatches()
    state = learner.export_state()
    slope = gradient(learner, batches)
    size = norm(slope)
    losses = []
    for sign in (1, -1):
        moved = {n: t + sign * 0.02 * slope[n] / size for n, t in state.adapter.items()}
        learner.import_state(TrainState(moved, {}, 0))
        losses.append(learner.evaluate(batches).mean)
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(size, rel=2e-3)


def test_label_smoothing(opened: Open, llama: Path) -> None:
    """The gradient is (1 - e) times the plain one plus e times that of V rows with every token as the target."""
    row = make_batch((8,))
    row.targets[:, :-1] = IGNORE
    every = Batch(
        np.arange(VOCAB_SIZE),
        np.repeat(row.inputs, VOCAB_SIZE, axis=0),
        np.repeat(row.targets, VOCAB_SIZE, axis=0),
    )
    every.targets[:, -1] = np.arange(VOCAB_SIZE)
    plain = opened(llama, **SHOWS_GRADIENT)
    smooth = opened(llama, optim={**SHOWS_GRADIENT["optim"], "label_smoothing": 0.3})
    hard, uniform = gradient(plain, [row]), gradient(plain, [every])
    expected = {name: 0.7 * hard[name] + 0.3 * uniform[name] for name in hard}
    assert_close(gradient(smooth, [row]), expected, rtol=1e-5)


def test_clipping(opened: Open, llama: Path) -> None:
    free = opened(llama, **SHOWS_GRADIENT)
    batches = microbatches()
    slope = gradient(free, batches)
    size = norm(slope)
    for limit in (size / 3, size * 3):
        clipping = opened(llama, optim={**SHOWS_GRADIENT["optim"], "max_grad_norm": limit})
        output = clipping.train_step(batches, step=1, lr=0.0)
        assert float(output.grad_norm) == pytest.approx(size, rel=1e-5)
        factor = min(1.0, limit / (size + 1e-6))
        expected = {name: factor * array for name, array in slope.items()}
        clipping.import_state(free.export_state())
        assert_close(gradient(clipping, batches), expected, rtol=1e-5)


def test_dropout_masks_depend_on_step_and_microbatch_only(opened: Open, llama: Path) -> None:
    learner = opened(llama, lora={"dropout": 0.5}, **SHOWS_GRADIENT)
    batch = make_batch()
    one, again = gradient(learner, [batch], step=1), gradient(learner, [batch], step=1)
    two = gradient(learner, [batch], step=2)
    twice = gradient(learner, [batch, batch], step=1)
    other_seed = opened(
        llama,
        lora={"dropout": 0.5},
        train={"seed": 1},
        initial=make_adapter(llama, make_config(lora={"dropout": 0.5})),
        **SHOWS_GRADIENT,
    )
    elsewhere = gradient(other_seed, [batch], step=1)
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
        for different in (two, twice, elsewhere):
            assert np.abs(different[name] - one[name]).max() > 1e-3 * np.abs(one[name]).max()


@pytest.mark.parametrize("start", [0, 12])
def test_dropout_keeps_the_expected_gradient(opened: Open, llama: Path, start: int) -> None:
    """Inverted dropout of the adapter's input: B's gradient, averaged over masks, stays what it is without. Also where
    all rows begin alike, and the masks of that are one."""
    plain = make_adapter(llama, make_config(), filled=False)  # B is 0: the masks do not change the output
    batch = shared_batch((16, 16, 16), start=start)
    assert batch.num_shared == start
    wanted = gradient(opened(llama, initial=plain, **SHOWS_GRADIENT), [batch])
    dropping = replace(plain, dropout=0.2)
    learner = opened(llama, initial=dropping, lora={"dropout": 0.2}, **SHOWS_GRADIENT)
    draws = [gradient(learner, [batch], step=step) for step in range(1, 81)]
    for name in (n for n in wanted if n.endswith("lora_B")):
        mean = np.mean([draw[name] for draw in draws], axis=0)
        spread = np.std([draw[name] for draw in draws], axis=0) / np.sqrt(len(draws))
        assert spread.max() > 0
        assert np.abs(mean - wanted[name]).max() < 5 * spread.max()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(
    opened: Open, folders: dict[str, Path], kind: str, dropout: float
) -> None:
    lora = {"dropout": dropout}
    found = [
        gradient(
            opened(folders[kind], lora=lora, train={"gradient_checkpointing": on}, **SHOWS_GRADIENT),
            microbatches(),
        )
        for on in (False, True)
    ]
    assert_close(found[1], found[0], rtol=1e-6)


# --- optimisers, against the formulas in NumPy (float64)


def _adamw(p: Any, g: Any, s: dict[str, Any], t: int, lr: float, wd: float) -> Any:
    b1, b2 = OPTIMIZERS["adamw"]["betas"]
    s["exp_avg"] = b1 * s.get("exp_avg", 0) + (1 - b1) * g
    s["exp_avg_sq"] = b2 * s.get("exp_avg_sq", 0) + (1 - b2) * g * g
    m, v = s["exp_avg"] / (1 - b1**t), s["exp_avg_sq"] / (1 - b2**t)
    return p * (1 - lr * wd) - lr * m / (np.sqrt(v) + OPTIMIZERS["adamw"]["eps"])


def _lion(p: Any, g: Any, s: dict[str, Any], t: int, lr: float, wd: float) -> Any:
    b1, b2 = OPTIMIZERS["lion"]["betas"]
    m = s.get("exp_avg", 0)
    s["exp_avg"] = b2 * m + (1 - b2) * g
    return p * (1 - lr * wd) - lr * np.sign(b1 * m + (1 - b1) * g)


def _sgd(p: Any, g: Any, s: dict[str, Any], t: int, lr: float, wd: float) -> Any:
    s["momentum"] = OPTIMIZERS["sgd"]["momentum"] * s.get("momentum", 0) + g
    return p * (1 - lr * wd) - lr * s["momentum"]


def _adafactor(p: Any, g: Any, s: dict[str, Any], t: int, lr: float, wd: float) -> Any:
    decay, square = 1 - t**-0.8, g * g + 1e-30
    s["row_var"] = decay * s.get("row_var", 0) + (1 - decay) * square.mean(axis=1)
    s["col_var"] = decay * s.get("col_var", 0) + (1 - decay) * square.mean(axis=0)
    second = np.outer(s["row_var"], s["col_var"]) / s["row_var"].mean()
    update = g / np.sqrt(second)
    update /= max(1.0, float(np.sqrt((update**2).mean())))
    return p * (1 - lr * wd) - lr * update


FORMULAS: dict[str, Callable[..., Any]] = {
    "adamw": _adamw,
    "lion": _lion,
    "sgd": _sgd,
    "adafactor": _adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_follows_its_formula(opened: Open, llama: Path, name: str) -> None:
    learner = opened(llama, optim={**OPTIMIZERS[name], "weight_decay": 0.5})
    slopes = opened(llama, **SHOWS_GRADIENT)
    moments: dict[str, dict[str, Any]] = {}
    values = {n: t.astype(np.float64) for n, t in learner.export_state().adapter.items()}
    for step, lr in enumerate((LR, 2 * LR, LR / 2, LR), start=1):
        slopes.import_state(TrainState(learner.export_state().adapter, {}, 0))
        slope = gradient(slopes, microbatches(step), step=step)
        learner.train_step(microbatches(step), step=step, lr=lr)
        state = learner.export_state()
        assert state.optimizer_steps == step
        for tensor, g in slope.items():
            slots = moments.setdefault(tensor, {})
            values[tensor] = FORMULAS[name](values[tensor], g.astype(np.float64), slots, step, lr, 0.5)
            np.testing.assert_allclose(state.adapter[tensor], values[tensor], rtol=0, atol=2e-4 * lr, err_msg=tensor)
            for slot, expected in slots.items():
                found = state.optimizer[f"{slot}/{tensor}"]
                assert found.dtype == np.float32
                assert found.shape == expected.shape
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.max())
    slots_per_tensor = {"adamw": 2, "lion": 1, "sgd": 1, "adafactor": 2}[name]
    assert len(state.optimizer) == slots_per_tensor * len(state.adapter)


def test_sgd_without_momentum_has_no_state(opened: Open, llama: Path) -> None:
    plain, heavy = opened(llama, optim={"name": "sgd"}), opened(llama, **SHOWS_GRADIENT)
    for learner in (plain, heavy):
        learner.train_step(microbatches(), step=1, lr=LR)
    assert plain.export_state().optimizer == {}
    assert_close(plain.export_state().adapter, heavy.export_state().adapter, rtol=1e-6)


# --- state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_crosses_in_both_directions(opened: Open, llama: Path, name: str) -> None:
    """Bit for bit: into a fresh learner, into one that has moved on, and back to before the first step."""
    settings = {"optim": {**OPTIMIZERS[name], "max_grad_norm": 1.0}, "lora": {"dropout": 0.3}}
    learner, fresh = opened(llama, **settings), opened(llama, **settings)
    untouched = learner.export_state()
    for step in (1, 2):
        learner.train_step(microbatches(step), step=step, lr=LR)
    middle = learner.export_state()
    learner.train_step(microbatches(3), step=3, lr=LR)
    end = learner.export_state()
    assert not np.array_equal(*(next(iter(s.adapter.values())) for s in (middle, end)))
    for other in (fresh, learner):
        other.import_state(middle)
        assert_same_state(other.export_state(), middle)
        other.train_step(microbatches(3), step=3, lr=LR)
        assert_same_state(other.export_state(), end)
    learner.import_state(untouched)
    for step in (1, 2):
        learner.train_step(microbatches(step), step=step, lr=LR)
    assert_same_state(learner.export_state(), middle)


def test_exported_state_is_a_copy(opened: Open, llama: Path) -> None:
    learner = opened(llama)
    learner.train_step(microbatches(), step=1, lr=LR)
    state = learner.export_state()
    kept = {name: array.copy() for name, array in {**state.adapter, **state.optimizer}.items()}
    learner.train_step(microbatches(2), step=2, lr=LR)
    for name, array in {**state.adapter, **state.optimizer}.items():
        np.testing.assert_array_equal(array, kept[name])


def test_resuming_in_a_new_process_equals_never_stopping(
    backend: str, opened: Open, folders: dict[str, Path], tmp_path: Path
) -> None:
    """With dropout, accumulation and every optimiser, bit for bit."""
    folder, jobs = folders["mistral"], []
    for name, optim in OPTIMIZERS.items():
        sections = {
            "optim": {**optim, "max_grad_norm": 1.0, "weight_decay": 0.1, "label_smoothing": 0.1},
            "lora": {"dropout": 0.3},
        }
        learner = opened(folder, **sections)
        for step in (1, 2):
            learner.train_step(microbatches(step), step=step, lr=LR)
        save_state(tmp_path / f"{name}-before.npz", learner.export_state())
        for step in (3, 4, 5):
            learner.train_step(microbatches(step), step=step, lr=LR)
        save_state(tmp_path / f"{name}-end.npz", learner.export_state())
        before, after = tmp_path / f"{name}-before.npz", tmp_path / f"{name}-after.npz"
        jobs.append(
            {
                "sections": sections,
                "before": str(before),
                "steps": [3, 4, 5],
                "lr": LR,
                "after": str(after),
            }
        )
    in_new_process(train_from.__name__, backend, folder, jobs)
    for name in OPTIMIZERS:
        ours = load_state(tmp_path / f"{name}-after.npz")
        assert_same_state(ours, load_state(tmp_path / f"{name}-end.npz"))


def test_wrong_states_are_refused(opened: Open, llama: Path) -> None:
    adamw, lion = opened(llama), opened(llama, optim=OPTIMIZERS["lion"])
    adamw.train_step(microbatches(), step=1, lr=LR)
    state = adamw.export_state()
    name = next(iter(state.adapter))
    wrong = [
        (lion, state),
        (adamw, replace(state, optimizer={})),
        (adamw, replace(state, adapter={n: t for n, t in state.adapter.items() if n != name})),
        (adamw, replace(state, adapter={**state.adapter, name: state.adapter[name].T.copy()})),
    ]
    for learner, other in wrong:
        before = learner.export_state()
        with pytest.raises(UserError):
            learner.import_state(other)
        assert_same_state(learner.export_state(), before)
