"""Adapters on a mixture's experts and router, and the replay of single targets: the same contract for each backend."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.adapter import Adapter, split_name
from core.architecture import read_architecture
from core.census import census
from core.handoff import replay_of_logits
from core.protocols import IGNORE, Batch, TrainState
from tests.backends.conftest import (
    Open,
    make_adapter,
    make_batch,
    make_config,
    microbatches,
    open_learner,
    resolved,
    skip_without,
)
from tests.tiny import make_model

MANY = [make_batch((40, 33), width=48, seed=3)]
"""More than 64 routed tokens: mlx-lm sorts them by expert from there."""
TARGETS: dict[str, Any] = {
    "gate": ["mlp.experts.gate_proj"],
    "up": ["up_proj"],
    "down": ["down_proj"],
    "router": ["mlp.gate"],
    "all": "all-linear",
}
CHECKPOINT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts of which each token chooses two."""
    return make_model(tmp_path_factory.mktemp("experts") / "model", model_type="mixtral", num_experts=8)


def lora_of(targets: Any, **more: Any) -> dict[str, Any]:
    return {"rank": 4, "alpha": 8, "targets": targets, **more}


def merged_model(folder: Path, adapter: Adapter, out: Path) -> Path:
    """The base with scale * B @ A added to each weight, as its checkpoint names them."""
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    for module in adapter.modules:
        a, b = adapter.matrices(module)
        delta = np.float32(adapter.scale_of(module)) * b @ a
        layer, key = split_name(module)
        moe = f"model.layers.{layer}.block_sparse_moe"
        if ".experts." in key:
            leaf = CHECKPOINT_NAMES[key.rsplit(".", 1)[-1]]
            for expert, own in enumerate(delta):
                weights[f"{moe}.experts.{expert}.{leaf}.weight"] += own
        else:
            weights[f"{moe}.gate.weight" if key == "mlp.gate" else f"{module}.weight"] += delta
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("batches", [microbatches(), MANY], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("targets", TARGETS)
def test_adapter_is_the_low_rank_update(
    opened: Open, mixtral: Path, tmp_path: Path, targets: str, batches: list[Batch]
) -> None:
    lora = lora_of(TARGETS[targets])
    adapter = make_adapter(mixtral, make_config(lora=lora))
    merged = merged_model(mixtral, adapter, tmp_path / "merged")
    attention = make_adapter(mixtral, make_config(), filled=False)
    ours = opened(mixtral, initial=adapter, lora=lora).evaluate(batches)
    theirs = opened(merged, initial=attention).evaluate(batches)
    base = opened(mixtral, initial=attention).evaluate(batches)
    np.testing.assert_allclose(ours.nll, theirs.nll, rtol=5e-6)
    assert np.abs(ours.nll / base.nll - 1).max() > 1e-4


def test_gradient_is_the_slope_of_the_loss(opened: Open, mixtral: Path) -> None:
    """After a step of plain gradient descent at rate r the change is r * gradient: walk along it, both ways.

    Experts only: a step of the attention can send a token to another expert, and there the loss jumps.
    """
    learner = opened(mixtral, lora=lora_of(["gate_proj", "up_proj", "down_proj"]), optim={"name": "sgd"})
    start: Any = learner.export_state().adapter
    norm = float(learner.train_step(microbatches(), step=1, lr=1.0).grad_norm)
    gradient = {name: start[name] - after for name, after in learner.export_state().adapter.items()}
    assert norm == pytest.approx(np.sqrt(sum(float((g**2).sum()) for g in gradient.values())), rel=1e-4)
    assert all(np.any(g) for g in gradient.values())
    epsilon = 0.002 / norm
    losses = []
    for sign in (1, -1):
        moved = {name: start[name] + (sign * epsilon * gradient[name]).astype(np.float32) for name in start}
        learner.import_state(TrainState(moved, {}))
        losses.append(learner.evaluate(microbatches()).mean)
    assert (losses[0] - losses[1]) / (2 * epsilon) == pytest.approx(norm**2, rel=1e-3)


def test_experts_without_tokens_stay_as_they_are(opened: Open, mixtral: Path) -> None:
    learner = opened(mixtral, lora=lora_of(["down_proj"]), optim={"name": "sgd"})
    start = learner.export_state().adapter
    learner.train_step([make_batch((2,))], step=1, lr=0.1)  # two tokens choose at most four of eight
    for name, after in learner.export_state().adapter.items():
        moved = [bool(np.any(after[expert] != start[name][expert])) for expert in range(8)]
        assert 1 <= sum(moved) <= 4, name


def test_dropout_on_experts_depends_on_step_and_microbatch_only(opened: Open, mixtral: Path) -> None:
    lora = lora_of("all-linear", dropout=0.4)
    learner = opened(mixtral, lora=lora)
    before = learner.export_state()
    found = {}
    for name, step in (("first", 1), ("again", 1), ("other", 2)):
        learner.import_state(before)
        found[name] = float(learner.train_step(microbatches(), step=step, lr=1e-3).loss)
    assert found["first"] == found["again"] != found["other"]
    learner.import_state(before)
    plain = learner.evaluate(microbatches())
    assert abs(plain.mean - found["first"]) > 1e-4


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_state_of_experts_crosses_in_both_directions(opened: Open, mixtral: Path, name: str) -> None:
    settings = {"lora": lora_of("all-linear"), "optim": {"name": name, "momentum": 0.9 if name == "sgd" else 0.0}}
    learner = opened(mixtral, **settings)
    for step in (1, 2):
        learner.train_step(microbatches(step), step=step, lr=1e-3)
    state = learner.export_state()
    other = opened(mixtral, **settings)
    other.import_state(state)
    for one in (learner, other):
        one.train_step(microbatches(3), step=3, lr=1e-3)
    for tensor, value in learner.export_state().adapter.items():
        np.testing.assert_array_equal(other.export_state().adapter[tensor], value)
    if name == "adafactor":
        shape = state.adapter["model.layers.0.mlp.experts.gate_proj.lora_A"].shape
        assert state.optimizer["row_var/model.layers.0.mlp.experts.gate_proj.lora_A"].shape == shape[:-1]
        assert state.optimizer["col_var/model.layers.0.mlp.experts.gate_proj.lora_A"].shape == (shape[0], shape[2])


def test_checkpointing_changes_nothing_for_experts(opened: Open, mixtral: Path) -> None:
    found = []
    for recompute in (False, True):
        learner = opened(mixtral, lora=lora_of("all-linear", dropout=0.3), train={"gradient_checkpointing": recompute})
        output = learner.train_step(MANY, step=1, lr=1e-3)
        found.append((float(output.loss), float(output.grad_norm)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_ranks_and_alphas_of_their_own(opened: Open, folders: dict[str, Path], tmp_path: Path) -> None:
    """An adapter as a peer may bring it: every module its own rank and alpha, some layers none."""
    from core.adapter import LoraModule

    folder = folders["llama"]
    rng = np.random.default_rng(0)
    modules = {
        "model.layers.0.self_attn.q_proj": LoraModule(3, 6.0),
        "model.layers.1.self_attn.v_proj": LoraModule(5, 1.0),
        "model.layers.1.mlp.down_proj": LoraModule(2, 7.0),
    }
    shapes = {"q_proj": (64, 64), "v_proj": (32, 64), "down_proj": (64, 128)}
    tensors = {}
    for name, lora in modules.items():
        out, inside = shapes[name.rsplit(".", 1)[-1]]
        tensors[f"{name}.lora_A"] = rng.normal(0, 0.1, (lora.rank, inside)).astype(np.float32)
        tensors[f"{name}.lora_B"] = rng.normal(0, 0.1, (out, lora.rank)).astype(np.float32)
    adapter = Adapter(modules=modules, tensors=tensors, num_layers=2, rslora=True)
    merged = tmp_path / "merged"
    shutil.copytree(folder, merged)
    weights = load_file(merged / "model.safetensors")
    for name, lora in modules.items():
        scale = np.float32(lora.alpha / lora.rank**0.5)
        weights[f"{name}.weight"] += scale * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    ours = opened(folder, initial=adapter).evaluate(microbatches())
    theirs = opened(merged, initial=make_adapter(folder, make_config(), filled=False)).evaluate(microbatches())
    np.testing.assert_allclose(ours.nll, theirs.nll, rtol=2e-6)


# --- target by target -------------------------------------------------------------------------------------------------


def test_replay_is_the_evaluation_target_by_target(opened: Open, folders: dict[str, Path], kind: str) -> None:
    learner = opened(folders[kind], lora={"dropout": 0.5})
    batches = [*microbatches(), make_batch((5,), first_row=5, width=8)]
    rows, replay = learner.evaluate(batches), learner.replay(batches)
    np.testing.assert_array_equal(replay.row_ids, rows.row_ids)
    np.testing.assert_array_equal(replay.num_targets, rows.num_targets)
    assert len(replay.nll) == len(replay.greedy) == rows.num_targets.sum()
    np.testing.assert_allclose(replay.row_means, rows.nll / rows.num_targets, rtol=1e-6)


def test_replay_knows_the_most_likely_token(backend: str, opened: Open, folders: dict[str, Path]) -> None:
    """A target changed to the token said to be most likely loses less than any other target there."""
    learner = opened(folders["llama"])
    batch = make_batch((9,))
    replay = learner.replay([batch])
    place = int(np.flatnonzero(batch.targets[0] != IGNORE)[2])
    losses = []
    for token in range(0, 320):
        targets = np.full_like(batch.targets, IGNORE)
        targets[0, place] = token
        losses.append(learner.replay([Batch(batch.row_ids, batch.inputs, targets)]).nll[0])
    assert int(np.argmin(losses)) == replay.greedy[2]
    assert sum(np.exp(-np.array(losses))) == pytest.approx(1.0, rel=1e-5)


def test_the_head_is_carried_but_not_trained(backend: str, folders: dict[str, Path]) -> None:
    import backends
    from core.adapter import LoraModule
    from core.errors import UserError

    tensors = {"lm_head.lora_A": np.ones((2, 64), np.float32), "lm_head.lora_B": np.ones((320, 2), np.float32)}
    adapter = Adapter(modules={"lm_head": LoraModule(2, 2.0)}, tensors=tensors, num_layers=2)
    with pytest.raises(UserError, match="lm_head can't be trained"):
        backends.get(backend).open(make_config(), resolved(folders["llama"]), adapter)


@pytest.mark.parametrize("bits", [4, 16])
def test_every_weight_is_counted_once(opened: Open, mixtral: Path, bits: int) -> None:
    """By kind, against the shapes in config.json; adapters put around modules change no kind."""
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    lora = lora_of([*TARGETS["gate"], "up_proj", "down_proj", "mlp.gate", "q_proj"])
    learner = opened(mixtral, lora=lora, model={"bits": bits})
    counted: dict[str, int] = {}
    for group in census(learner.weights()):
        counted[group.kind] = counted.get(group.kind, 0) + group.parameters
    architecture = read_architecture(mixtral)
    shapes = {key: math.prod(shape) for key, shape in architecture.module_shapes().items()}
    layers, adapter = architecture.num_layers, make_adapter(mixtral, make_config(lora=lora))
    assert counted == {
        "experts": layers * sum(size for key, size in shapes.items() if ".experts." in key),
        "attention": layers * sum(size for key, size in shapes.items() if "self_attn" in key),
        "router": layers * shapes["mlp.gate"],
        "embeddings": 2 * architecture.vocab_size * architecture.hidden_size,
        "norms": (2 * layers + 1) * architecture.hidden_size,
        "adapters": adapter.num_parameters,
    }
    assert sum(counted.values()) == learner.num_parameters


def test_logits_are_what_the_replay_saw(opened: Open, folders: dict[str, Path], kind: str) -> None:
    """Losses and most likely tokens worked out from them in NumPy are the replay's."""
    learner = opened(folders[kind], lora={"dropout": 0.5})
    batches = [*microbatches(), make_batch((5,), first_row=5, width=8)]
    logits = [learner.target_logits(batch) for batch in batches]
    for batch, found in zip(batches, logits, strict=True):
        assert found.shape == (batch.num_targets, 320) and found.dtype == np.float32
    ours, theirs = replay_of_logits(batches, logits), learner.replay(batches)
    np.testing.assert_allclose(ours.nll, theirs.nll, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours.greedy, theirs.greedy)
    nothing = replace(batches[0], targets=np.full_like(batches[0].targets, IGNORE))
    assert learner.target_logits(nothing).shape == (0, 320)


def test_logits_are_the_same_on_both_backends(folders: dict[str, Path], kind: str) -> None:
    for name in ("mlx", "cuda"):
        skip_without(name)
    batch = make_batch((12, 9, 4), width=16)
    found = []
    for name in ("mlx", "cuda"):
        learner = open_learner(name, folders[kind])
        found.append(learner.target_logits(batch))
        learner.close()
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)


def test_logits_come_in_chunks_that_change_nothing(
    backend: str, opened: Open, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, batch = opened(folders["llama"]), make_batch((12, 9, 4), width=16)
    whole = learner.target_logits(batch)
    monkeypatch.setattr(f"backends.{backend}.loss.CHUNK", 3)
    np.testing.assert_allclose(learner.target_logits(batch), whole, atol=1e-6)
