"""What every backend promises (`core.protocols`), on tiny models, through the protocol alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import backends
from core.adapter import Adapter
from core.architecture import read_architecture
from core.errors import UserError
from core.protocols import FILLER_ROW, IGNORE, Batch, Learner, TrainState
from tests.backends.conftest import (
    Open,
    assert_same_state,
    in_new_process,
    load_state,
    make_adapter,
    make_batch,
    make_config,
    microbatches,
    resolved,
    save_state,
    train_from,
)
from tests.tiny import VOCAB_SIZE, make_model

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "betas": [0.8, 0.95], "eps": 1e-6},
    "lion": {"name": "lion", "betas": [0.8, 0.95]},
    "sgd": {"name": "sgd", "momentum": 0.7},
    "adafactor": {"name": "adafactor"},
}
SHOWS_GRADIENT = {"optim": {"name": "sgd", "momentum": 0.5}}
"""With these settings the momentum after the first step is the gradient."""
LR = 3e-3


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


# --- the model and the adapter on it


def test_counts_and_names(opened: Open, folders: dict[str, Path], kind: str) -> None:
    folder = folders[kind]
    config = make_config(lora={"frozen_fraction": 0.5})
    adapter = make_adapter(folder, config, filled=False)
    learner = opened(folder, initial=adapter, lora={"frozen_fraction": 0.5})
    base = sum(array.size for array in load_file(folder / "model.safetensors").values())
    assert learner.num_trainable == adapter.num_parameters == 4 * (128 + 96 + 96 + 128)
    assert learner.num_parameters == base + learner.num_trainable
    exported = learner.export_state().adapter
    assert exported.keys() == adapter.tensors.keys()
    assert {name.split(".")[2] for name in exported} == {"1"}
    for name, array in exported.items():
        np.testing.assert_array_equal(array, adapter.tensors[name])
    assert "CPU" in learner.description


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_is_the_low_rank_update(
    opened: Open, folders: dict[str, Path], kind: str, tmp_path: Path, rslora: bool
) -> None:
    """The base with scale * B @ A added to its weights must give the same losses."""
    folder, lora = folders[kind], {"rslora": rslora, "targets": ["q_proj", "o_proj"]}
    adapter = make_adapter(folder, make_config(lora=lora))
    merged = tmp_path / "merged"
    shutil.copytree(folder, merged)
    weights = load_file(merged / "model.safetensors")
    scale = 8 / 2 if rslora else 8 / 4  # alpha 8, rank 4
    for module in adapter.modules:
        a, b = adapter.tensors[f"{module}.lora_A"], adapter.tensors[f"{module}.lora_B"]
        weights[f"{module}.weight"] += scale * b @ a
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    batches = microbatches()
    ours = opened(folder, initial=adapter, lora=lora).evaluate(batches)
    plain = make_adapter(merged, make_config(lora=lora), filled=False)
    theirs = opened(merged, initial=plain, lora=lora).evaluate(batches)
    base = opened(folder, initial=plain, lora=lora).evaluate(batches)
    np.testing.assert_allclose(ours.nll, theirs.nll, rtol=2e-6)
    assert np.abs(ours.nll / base.nll - 1).min() > 1e-4


def test_uniform_model_loses_log_vocabulary(opened: Open, llama: Path, tmp_path: Path) -> None:
    """With a zero output projection every token has probability 1 / V."""
    folder = tmp_path / "uniform"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][:] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    learner = opened(folder, optim={"label_smoothing": 0.1})
    rows = learner.evaluate(microbatches())
    np.testing.assert_allclose(rows.nll, rows.num_targets * np.log(VOCAB_SIZE), rtol=1e-6)
    output = learner.train_step(microbatches(), step=1, lr=LR)
    assert float(output.loss) == pytest.approx(np.log(VOCAB_SIZE), rel=1e-6)
    assert float(output.grad_norm) == pytest.approx(0.0, abs=1e-7)


def test_base_weights_stay_unchanged(opened: Open, folders: dict[str, Path], kind: str) -> None:
    learner = opened(folders[kind], optim={"name": "adamw"})
    first = learner.export_state()
    before = learner.evaluate(microbatches())
    for step in (1, 2, 3):
        learner.train_step(microbatches(step), step=step, lr=0.1)
    assert not np.array_equal(learner.evaluate(microbatches()).nll, before.nll)
    learner.import_state(first)
    np.testing.assert_array_equal(learner.evaluate(microbatches()).nll, before.nll)


# --- evaluation


def test_evaluate_rows(opened: Open, llama: Path) -> None:
    """Order and ids of the rows, fillers left out, a row without targets kept."""
    learner = opened(llama)
    one, two = make_batch((12, 9, 5)), make_batch((8, 10), first_row=3)
    ids = np.array([7, FILLER_ROW, 2])
    filler = replace(one, row_ids=ids)
    two.targets[1] = IGNORE
    rows = learner.evaluate([two, filler])
    assert rows.row_ids.tolist() == [3, 4, 7, 2]
    assert rows.num_targets.tolist() == [8 - 2, 0, 12 - 4, 5 - 1]
    assert rows.nll.dtype == np.float64
    assert rows.nll[1] == 0.0
    alone = [learner.evaluate([_row(one, i)]).nll[0] for i in (0, 2)]
    np.testing.assert_allclose(rows.nll[2:], alone, rtol=1e-6)
    assert learner.evaluate([]).nll.shape == (0,)


def _row(batch: Batch, row: int) -> Batch:
    part = slice(row, row + 1)
    return Batch(batch.row_ids[part], batch.inputs[part], batch.targets[part])


def test_padding_and_batch_size_change_nothing(opened: Open, folders: dict[str, Path], kind: str) -> None:
    """A row has one loss, whatever stands beside it and however far it is padded (with any token)."""
    learner = opened(folders[kind])
    lengths = (12, 9, 14, 5)
    together = make_batch(lengths, width=30)
    noise = np.random.default_rng(0).integers(3, VOCAB_SIZE, together.inputs.shape)
    for row, length in enumerate(lengths):
        together.inputs[row, length:] = noise[row, length:]
    nll = learner.evaluate([together]).nll
    alone = [
        Batch(
            together.row_ids[i : i + 1],
            together.inputs[i : i + 1, :length],
            together.targets[i : i + 1, :length],
        )
        for i, length in enumerate(lengths)
    ]
    np.testing.assert_allclose(learner.evaluate(alone).nll, nll, rtol=2e-6)


def test_sliding_window_is_in_force(opened: Open, folders: dict[str, Path], tmp_path: Path) -> None:
    """Two layers with a window of 6 see 11 tokens: one that lies further back must not matter, a nearer one must."""
    batch = make_batch((20,))
    batch.targets[:, :-1] = IGNORE
    windowed, full = opened(folders["mistral"]), opened(folders["llama"])

    def loss_with(learner: Learner, position: int) -> float:
        inputs = batch.inputs.copy()
        inputs[0, position] = (inputs[0, position] + 5) % VOCAB_SIZE
        return float(learner.evaluate([replace(batch, inputs=inputs)]).nll[0])

    for learner, reach in ((windowed, 11), (full, 20)):
        whole = learner.evaluate([batch]).nll[0]
        moved = [abs(loss_with(learner, p) - whole) > 1e-6 for p in range(20)]
        assert moved == [p >= 20 - reach for p in range(20)]


def test_evaluate_has_no_dropout_and_leaves_training_alone(opened: Open, llama: Path) -> None:
    dropping = opened(llama, lora={"dropout": 0.5})
    undisturbed = opened(llama, lora={"dropout": 0.5})
    without = opened(llama)
    batches = microbatches()
    first = dropping.evaluate(batches)
    np.testing.assert_array_equal(first.nll, dropping.evaluate(batches).nll)
    np.testing.assert_array_equal(first.nll, without.evaluate(batches).nll)
    for step in (1, 2):
        dropping.train_step(batches, step=step, lr=LR)
        dropping.evaluate(batches)
        undisturbed.train_step(batches, step=step, lr=LR)
    assert_same_state(dropping.export_state(), undisturbed.export_state())


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
    parts = [_row(big, 0), Batch(big.row_ids[1:], big.inputs[1:], big.targets[1:])]
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


def test_dropout_keeps_the_expected_gradient(opened: Open, llama: Path) -> None:
    """Inverted dropout of the adapter's input: B's gradient, averaged over masks, stays what it is without."""
    plain = make_adapter(llama, make_config(), filled=False)  # B is 0: the masks do not change the output
    batch = make_batch((16, 16, 16))
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


# --- 4 bits, and what can't be opened


def test_four_bits(opened: Open, llama: Path) -> None:
    """Near the 16-bit losses but not equal to them, and it trains and restores like any other."""
    full, quantised = opened(llama), opened(llama, model={"bits": 4})
    ours, theirs = quantised.evaluate(microbatches()), full.evaluate(microbatches())
    assert 1e-4 < abs(ours.mean / theirs.mean - 1) < 0.1
    assert "4" in quantised.description
    assert quantised.num_parameters == full.num_parameters
    before = quantised.export_state()
    losses = [float(quantised.train_step(microbatches(), step=s, lr=0.02).loss) for s in range(1, 9)]
    assert losses[-1] < losses[0] - 0.5
    quantised.import_state(before)
    np.testing.assert_array_equal(quantised.evaluate(microbatches()).nll, ours.nll)


def _break_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _break_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    weights[name] = weights[name][:16].copy()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _break_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _break_type(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "gpt2"}))


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("damage", [_break_missing, _break_shape, _break_file, _break_type, _remove_weights])
def test_bad_folders_are_refused(
    backend: str, llama: Path, tmp_path: Path, damage: Callable[[Path], None], bits: int
) -> None:
    folder = tmp_path / "broken-model"
    shutil.copytree(llama, folder)
    config = make_config(model={"bits": bits})
    adapter = make_adapter(folder, config)
    damage(folder)
    with pytest.raises(UserError) as caught:
        backends.get(backend).open(config, resolved(folder), adapter)
    assert "broken-model" in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.hint


def test_adapter_of_another_model_is_refused(opened: Open, llama: Path, tmp_path: Path) -> None:
    deeper = make_model(tmp_path / "deeper", num_layers=3)
    adapter: Adapter = make_adapter(deeper, make_config())
    assert read_architecture(llama).num_layers == 2
    with pytest.raises(UserError):
        opened(llama, initial=adapter)


# --- check, probe, memory


def test_check_warns_and_refuses(backend: str) -> None:
    chosen = backends.get(backend)
    assert list(chosen.check(make_config())) == []
    found = "\n".join(chosen.check(make_config(optim={"state_bits": 8, "paged": True})))
    assert "optim.state_bits" in found
    assert "8" in found
    assert "optim.paged" in found


def test_eight_bit_state_falls_back_to_32(opened: Open, llama: Path) -> None:
    plain, eight = opened(llama), opened(llama, optim={"state_bits": 8})
    for learner in (plain, eight):
        learner.train_step(microbatches(), step=1, lr=LR)
    assert_same_state(plain.export_state(), eight.export_state())


def test_missing_gpu(backend: str, llama: Path) -> None:
    chosen = backends.get(backend)
    if chosen.probe().accelerator:
        pytest.skip("this machine has an accelerator")
    config = make_config(device="gpu")
    for refuse in (
        lambda: chosen.check(config),
        lambda: chosen.open(config, resolved(llama), make_adapter(llama, config)),
    ):
        with pytest.raises(UserError, match="gpu"):
            refuse()
    report = chosen.probe("gpu")
    assert not report.available
    assert report.problem


def test_probe_and_memory(backend: str, opened: Open, llama: Path) -> None:
    report = backends.get(backend).probe("cpu")
    assert report.available
    assert report.backend == backend
    assert not report.accelerator
    assert report.memory_bytes > 2**28
    assert report.packages
    memory = opened(llama).memory()
    assert 0 < memory.current_bytes <= memory.peak_bytes < memory.total_bytes
