"""What every backend promises (`core.protocols`) of the model, the adapter on it and evaluation, on tiny models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.protocols import FILLER_ROW, IGNORE, Batch, Learner
from tests.backends.conftest import (
    LR,
    Open,
    assert_same_state,
    make_adapter,
    make_batch,
    make_config,
    microbatches,
    one_row,
)
from tests.tiny import VOCAB_SIZE, make_model

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


def test_losses_are_those_of_the_logits(opened: Open, tmp_path: Path) -> None:
    """Of a vocabulary larger than any part of it that is looked at at one time; in float64, with NumPy."""
    vocab_size = 5000
    learner = opened(make_model(tmp_path / "large", vocab_size=vocab_size))
    batch = make_batch((12, 9, 5))
    batch.targets[0, 9:12] = (vocab_size - 1, 2047, 2048)
    logits = learner.target_logits(batch).astype(np.float64)
    assert logits.shape == (batch.num_targets, vocab_size)
    is_target = batch.targets != IGNORE
    picked = logits[np.arange(len(logits)), batch.targets[is_target]]
    losses = np.log(np.exp(logits).sum(-1)) - picked
    rows = np.nonzero(is_target)[0]
    expected = np.bincount(rows, weights=losses, minlength=3)
    np.testing.assert_allclose(learner.evaluate([batch]).nll, expected, rtol=1e-6)
    output = learner.train_step([batch], step=1, lr=LR)
    assert float(output.loss) == pytest.approx(losses.mean(), rel=1e-6)


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
    alone = [learner.evaluate([one_row(one, i)]).nll[0] for i in (0, 2)]
    np.testing.assert_allclose(rows.nll[2:], alone, rtol=1e-6)
    assert learner.evaluate([]).nll.shape == (0,)


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
