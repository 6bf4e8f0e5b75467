"""The MLX backend's step: against a plain loop, compiled, and in chunks of logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends
from core.protocols import IGNORE, Batch
from tests.backends.conftest import (
    LR,
    make_adapter,
    make_batch,
    make_config,
    microbatches,
    missing_package,
    open_learner,
)
from tests.tiny import make_model

if missing := missing_package("mlx"):
    pytest.skip(f"mlx: {missing} is not installed", allow_module_level=True)

from backends.mlx import backend as backend_module
from backends.mlx import columns
from backends.mlx import loss as loss_module
from backends.mlx.learner import MlxLearner
from backends.mlx.model import Network

import mlx.core as mx  # isort: skip

MLX = backends.get("mlx")


@pytest.fixture(scope="session")
def backend() -> str:
    return "mlx"


# --- against a plain loop


def test_steps_equal_a_plain_torch_loop(folders: dict[str, Path], opened: Callable[..., MlxLearner]) -> None:
    """transformers, PEFT, torch's AdamW and clipping as everybody writes it, six steps, all linear layers."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    sections: dict[str, Any] = {
        "lora": {"targets": "all-linear"},
        "optim": {"max_grad_norm": 0.5, "weight_decay": 0.1, "label_smoothing": 0.1},
    }
    adapter = make_adapter(folders["llama"], make_config(**sections))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    peer = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets))
    named = {f"base_model.model.{n}.default.weight": torch.from_numpy(t.copy()) for n, t in adapter.tensors.items()}
    assert not peer.load_state_dict(named, strict=False).unexpected_keys
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.1, eps=1e-8)
    learner = opened(folders["llama"], initial=adapter, **sections)
    for step in range(1, 7):
        output = learner.train_step(microbatches(step), step=step, lr=LR)
        total, pure = 0.0, 0.0
        optimizer.zero_grad()
        for batch in microbatches(step):
            ids, wanted = torch.from_numpy(batch.inputs).long(), torch.from_numpy(batch.targets).long()
            flat = peer(input_ids=ids).logits.flatten(0, 1)
            kwargs: dict[str, Any] = {"ignore_index": IGNORE, "reduction": "sum"}
            cross_entropy = torch.nn.functional.cross_entropy
            total = total + cross_entropy(flat, wanted.flatten(), label_smoothing=0.1, **kwargs)
            pure += cross_entropy(flat.detach(), wanted.flatten(), **kwargs).item()
        (total / output.num_targets).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(trained, 0.5))
        assert norm > 0.5
        assert float(output.loss) == pytest.approx(pure / output.num_targets, rel=2e-6)
        assert float(output.grad_norm) == pytest.approx(norm, rel=2e-5)
        optimizer.step()
    ours = learner.export_state().adapter
    for name, parameter in peer.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            moved = np.abs(ours[key] - adapter.tensors[key]).max()
            assert moved > LR
            np.testing.assert_allclose(ours[key], parameter.detach().numpy(), rtol=0, atol=2e-3 * moved)


# --- the step


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_compiled_equals_uncompiled(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Metal the step is compiled: with accumulation, dropout, recomputation and a restored state."""
    sections = {"lora": {"dropout": 0.3}, "train": {"gradient_checkpointing": True}, "optim": {"max_grad_norm": 1.0}}
    calls: list[Any] = []
    compile_ = mx.compile
    init = MlxLearner.__init__

    def patched(self: MlxLearner, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "compiled": True})

    monkeypatch.setattr(MlxLearner, "__init__", patched)
    found = []
    for compiler in (lambda function: function, lambda function: calls.append(function) or compile_(function)):
        monkeypatch.setattr(mx, "compile", compiler)
        learner = open_learner("mlx", llama, **sections)
        for step in (1, 2):
            learner.train_step(microbatches(step), step=step, lr=LR)
        middle = learner.export_state()
        learner.train_step(microbatches(9), step=9, lr=LR)
        learner.import_state(middle)
        output = learner.train_step(microbatches(3), step=3, lr=LR / 2)
        found.append(
            (float(output.loss), float(output.grad_norm), learner.export_state(), learner.evaluate([make_batch()]))
        )
        learner.close()
    assert len(calls) == 3
    (loss, norm, state, rows), (compiled_loss, compiled_norm, compiled_state, compiled_rows) = found
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert compiled_norm == pytest.approx(norm, rel=1e-4)
    np.testing.assert_allclose(compiled_rows.nll, rows.nll, rtol=1e-5)
    for name, array in state.adapter.items():
        np.testing.assert_allclose(compiled_state.adapter[name], array, rtol=0, atol=LR / 50, err_msg=name)


def test_checkpointing_leaves_the_layer_class_alone(
    folders: dict[str, Path], opened: Callable[..., MlxLearner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is on from so many parameters, for the layers that have an adapter."""
    from mlx_lm.models.llama import TransformerBlock

    call, used = TransformerBlock.__call__, []
    checkpoint = mx.checkpoint
    monkeypatch.setattr(mx, "checkpoint", lambda function: used.append(1) or checkpoint(function))
    for threshold, layers in ((10**9, 0), (1000, 1)):
        monkeypatch.setattr(backend_module, "CHECKPOINT_FROM", threshold)
        learner = opened(folders["llama"], lora={"frozen_fraction": 0.5})
        used.clear()
        learner.train_step([make_batch((12,))], step=1, lr=LR)  # more rows are taken in parts
        assert len(used) == layers
        learner.evaluate([make_batch()])
        assert len(used) == layers
    assert TransformerBlock.__call__ is call


def test_with_checkpointing_memory_does_not_grow_with_the_layers(
    tmp_path: Path, opened: Callable[..., MlxLearner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's activations at a time, and its adapter's gradients before the next one's. Seen: 105 and 109 MB; with
    all gradients last 147 and 228, without checkpointing 164 and 289."""
    monkeypatch.setattr(backend_module, "CHECKPOINT_FROM", 1000)
    peaks = []
    for num_layers in (4, 8):
        folder = make_model(tmp_path / str(num_layers), num_layers=num_layers, hidden_size=128, intermediate_size=512)
        learner = opened(folder, lora={"targets": "all-linear"})
        peaks.append(_peak(learner, make_batch((256,) * 8), "train"))
    assert peaks[1] < 1.25 * peaks[0]


@pytest.fixture
def wide_vocabulary(tmp_path: Path) -> Path:
    return make_model(tmp_path / "wide", vocab_size=32768, num_layers=1)


def _peak(learner: MlxLearner, batch: Batch, call: str) -> int:
    """Bytes that a call needs at most beyond those in use before it: the least of four calls.

    On a CPU MLX takes memory for operations ahead of the one that it computes, more of it when the machine is busy.
    What a call can't do without shows in every call.
    """
    return min(_peak_of_one(learner, batch, call) for _ in range(4))


def _peak_of_one(learner: MlxLearner, batch: Batch, call: str) -> int:
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    if call == "train":
        float(learner.train_step([batch], step=1, lr=LR).loss)
    else:
        learner.evaluate([batch])
    mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("call", ["train", "evaluate"])
@pytest.mark.parametrize("by_columns", [True, False])
def test_logits_never_exist_whole(
    wide_vocabulary: Path,
    opened: Callable[..., MlxLearner],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    by_columns: bool,
) -> None:
    """Logits of 344 targets x 32768 tokens in float32 are 43 MiB; few targets, or small pieces, must need far less.

    Seen: 0.2 to 0.4 of that for both, and 3 to 5 times that for all logits at once.
    """
    if not by_columns:
        monkeypatch.setattr(Network, "vocabulary", None)
    learner = opened(wide_vocabulary)
    everywhere = make_batch((128, 128, 128, 128))
    whole = everywhere.num_targets * 32768 * 4
    few = replace(everywhere, targets=everywhere.targets.copy())
    few.targets[:, :-2] = IGNORE
    sizes = {(columns, "COLUMNS"): (2**20, 256)} if by_columns else {(loss_module, "CHUNK"): (1024, 8)}
    for (module, name), (large, _) in sizes.items():
        monkeypatch.setattr(module, name, large)
    assert _peak(learner, few, call) < whole / 3
    assert _peak(learner, everywhere, call) > whole
    for (module, name), (_, small) in sizes.items():
        monkeypatch.setattr(module, name, small)
    # two parts at once, and memory for a hundred operations ahead
    assert _peak(learner, everywhere, call) < whole / 2


def test_the_sum_over_a_large_vocabulary_is_exact() -> None:
    """49,152 terms one after the other in float32 are 7e-5 off, and the gradient with them; blocks are not."""
    rows = np.random.default_rng(0).normal(0, 3, (8, 49152)).astype(np.float32)
    wide = rows.astype(np.float64)
    exact = np.log(np.exp(wide).sum(axis=-1))
    logits = mx.array(rows)
    with mx.stream(mx.cpu):
        found = np.array(loss_module.log_sum_exp(logits))
        slope = np.array(mx.grad(lambda values: loss_module.log_sum_exp(values).sum())(logits))
    np.testing.assert_allclose(found, exact, rtol=0, atol=5e-6)
    np.testing.assert_allclose(slope, np.exp(wide - exact[:, None]), rtol=2e-5)


@pytest.mark.parametrize("size", [320, 32003, 128257, 7])
def test_vocabularies_that_blocks_do_not_divide(size: int) -> None:
    """128,257 is a prime: a sum one after the other would be 1e-4 off."""
    rows = np.random.default_rng(size).normal(0, 1, (3, size)).astype(np.float32)
    wide = rows.astype(np.float64)
    found = np.array(loss_module.log_sum_exp(mx.array(rows)))
    np.testing.assert_allclose(found, np.log(np.exp(wide).sum(axis=-1)), rtol=0, atol=3e-6)
    np.testing.assert_allclose(np.array(loss_module._mean(mx.array(rows + 5))), (wide + 5).mean(axis=-1), rtol=2e-6)


def test_chunks_change_nothing(llama: Path, opened: Callable[..., MlxLearner], monkeypatch: pytest.MonkeyPatch) -> None:
    """1,800 targets of which the last chunk is padding for the most part, against one piece."""
    monkeypatch.setattr(Network, "vocabulary", None)
    batch = make_batch((450, 450, 450, 450, 450, 450))
    found = []
    for chunk in (1024, 4096):
        monkeypatch.setattr(loss_module, "CHUNK", chunk)
        learner = opened(llama, optim={"name": "sgd", "momentum": 0.5, "label_smoothing": 0.1})
        rows = learner.evaluate([batch])
        output = learner.train_step([batch], step=1, lr=LR)
        found.append((rows, float(output.loss), learner.export_state().optimizer))
    (rows, loss, slots), (other_rows, other_loss, other_slots) = found
    assert rows.num_targets.sum() == 1800
    np.testing.assert_allclose(rows.nll, other_rows.nll, rtol=1e-6)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for name, array in slots.items():
        np.testing.assert_allclose(array, other_slots[name], rtol=0, atol=3e-6 * np.abs(array).max())


def test_few_shapes(llama: Path) -> None:
    sizes = {loss_module.padded_size(count) for count in range(0, 3000)}
    assert sizes == {32, 64, 128, 256, 512, 1024, 2048, 3072}
    assert all(loss_module.padded_size(n) >= n for n in range(3000))


def test_selection_names_the_targets() -> None:
    batch = Batch(
        np.arange(2), np.zeros((2, 4), np.int32), np.array([[IGNORE, 5, IGNORE, 6], [7, IGNORE] * 2], np.int32)
    )
    batch.targets[1, 2] = IGNORE
    found = loss_module.select_targets(batch)
    assert found.position[:3].tolist() == [1, 3, 4]
    assert found.target[:3].tolist() == [5, 6, 7]
    assert found.row.tolist() == [0, 0, 1]
    assert found.weight.sum() == 3 == found.num_targets


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_compute_keeps_a_float32_adapter(
    llama: Path, opened: Callable[..., MlxLearner], dtype: str
) -> None:
    full, half = opened(llama), opened(llama, model={"dtype": dtype})
    assert dtype in half.description
    exact, rounded = (learner.evaluate(microbatches()).mean for learner in (full, half))
    assert 0 < abs(rounded / exact - 1) < 0.01
    first = float(half.train_step(microbatches(), step=1, lr=0.02).loss)
    for step in range(2, 7):
        last = float(half.train_step(microbatches(), step=step, lr=0.02).loss)
    assert last < first - 0.3
    assert all(a.dtype == mx.float32 for a in half.parameters.values())
