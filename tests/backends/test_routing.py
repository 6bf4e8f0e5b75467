"""A mixture's router, watched and trained: the same contract for each backend, held against transformers'."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.adapter import Adapter
from core.protocols import FILLER_ROW, IGNORE, Batch, FloatArray, IntArray, Learner
from core.routing import Collapse, Routing
from tests.backends.conftest import (
    Open,
    assert_same_state,
    make_adapter,
    make_batch,
    make_config,
    microbatches,
    open_learner,
    resolved,
    skip_without,
)
from tests.backends.test_experts import merged_model
from tests.tiny import make_model

ROUTER = {"rank": 4, "alpha": 8, "targets": ["mlp.gate"]}
SGD = {"name": "sgd", "lr": 1.0}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts of which each token chooses two."""
    return make_model(tmp_path_factory.mktemp("routing") / "model", model_type="mixtral", num_experts=8)


def leaning(out: Path, *, layer: int, logit: float, num_layers: int = 2) -> Path:
    """A model whose tokens all bring this layer's router about the same extra logit for its third expert.

    It comes from a constant in every embedding, which no other matrix looks at.
    """
    model = make_model(out, model_type="mixtral", num_experts=8, num_layers=num_layers)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 1.0
    for name, tensor in weights.items():
        if any(key in name for key in ("gate.weight", "q_proj", "k_proj", "v_proj", ".w1.", ".w3.", "lm_head")):
            tensor[:, 0] = 0.0
    weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"][2, 0] = logit / 6.0  # of the norm
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


def with_filler() -> Batch:
    """Two rows with padding between last target and width, and a row that only fills up."""
    batch = make_batch((12, 7), width=20, seed=5)
    empty = np.full((1, 20), IGNORE, np.int32)
    return Batch(
        np.append(batch.row_ids, FILLER_ROW),
        np.concatenate([batch.inputs, np.zeros_like(empty)]),
        np.concatenate([batch.targets, empty]),
    )


def theirs(folder: Path) -> Any:
    """transformers' model, in float32, that hands out its router's logits."""
    skip_without("cuda")
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_router_logits=True, experts_implementation="eager"
    )


def forward(model: Any, batch: Batch) -> tuple[Any, tuple[Any, ...]]:
    """transformers' logits [B, T, V] and each layer's router logits [B * T, experts]."""
    import torch

    found = model.model(input_ids=torch.from_numpy(batch.inputs).long(), output_router_logits=True)
    return model.lm_head(found.last_hidden_state), found.router_logits


def reference_aux(router_logits: tuple[Any, ...], batch: Batch) -> Any:
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(router_logits, 8, 2, torch.from_numpy(batch.is_token).long())


# --- which positions count


def test_tokens_end_with_the_last_target() -> None:
    targets = np.array([[IGNORE, 5, IGNORE, 7, IGNORE], [IGNORE] * 5, [1, IGNORE, IGNORE, IGNORE, IGNORE]], np.int32)
    batch = Batch(np.array([0, FILLER_ROW, 1]), np.zeros_like(targets), targets)
    np.testing.assert_array_equal(batch.is_token, np.array([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool))
    assert batch.num_real_tokens == 5


# --- watched


def test_counts_are_those_of_transformers_router(opened: Open, mixtral: Path) -> None:
    import torch

    batches = [*microbatches(3), with_filler()]
    expected = np.zeros((2, 8), np.int64)
    model = theirs(mixtral)
    for batch in batches:
        real = batch.is_token.reshape(-1)
        for layer, logits in enumerate(forward(model, batch)[1]):
            chosen = torch.topk(logits.softmax(-1), 2).indices.numpy()
            for token in np.flatnonzero(real):
                expected[layer, chosen[token]] += 1
    unchanged = make_adapter(mixtral, make_config(), filled=False)
    found = opened(mixtral, initial=unchanged).evaluate(batches).expert_tokens
    assert found is not None
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)
    assert (found.sum(axis=1) == 2 * sum(batch.num_real_tokens for batch in batches)).all()


def test_both_backends_count_the_same(mixtral: Path) -> None:
    for backend in ("mlx", "cuda"):
        skip_without(backend)
    adapter = make_adapter(mixtral, make_config(lora={"targets": "all-linear"}, moe={"train_router": True}))
    assert any(name.endswith("mlp.gate") for name in adapter.modules)
    counts = []
    for backend in ("mlx", "cuda"):
        learner = open_learner(backend, mixtral, initial=adapter, lora={"targets": "all-linear"})
        counts.append(learner.evaluate([make_batch((60, 44), width=64), *microbatches()]).expert_tokens)
        learner.close()
    np.testing.assert_array_equal(*counts)


def test_evaluating_costs_no_count_of_the_next(opened: Open, mixtral: Path) -> None:
    """An evaluation starts from zero, training and replaying leave nothing behind."""
    learner = opened(mixtral, lora=ROUTER)
    first = learner.evaluate(microbatches()).expert_tokens
    learner.replay(microbatches())
    np.testing.assert_array_equal(first, learner.evaluate(microbatches()).expert_tokens)
    learner.train_step(microbatches(), step=1, lr=1e-20)
    np.testing.assert_array_equal(first, learner.evaluate(microbatches()).expert_tokens)


def test_dense_models_have_neither(opened: Open, llama: Path) -> None:
    learner = opened(llama)
    assert learner.evaluate(microbatches()).expert_tokens is None
    assert learner.train_step(microbatches(), step=1, lr=1e-3).aux_loss is None


def test_a_frozen_router_has_no_aux_loss(opened: Open, mixtral: Path) -> None:
    states = []
    for weight in (0.0, 1.0):
        learner = opened(mixtral, moe={"aux_loss_weight": weight})
        assert learner.train_step(microbatches(), step=1, lr=1e-3).aux_loss is None
        states.append(learner.export_state())
    assert_same_state(*states)


def test_four_bits_are_watched_too(opened: Open, backend: str, mixtral: Path) -> None:
    if backend == "cuda" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    learner = opened(mixtral, model={"bits": 4, "cache_packed": False}, lora=ROUTER)
    batch = make_batch((40, 33), width=48)
    found = learner.evaluate([batch]).expert_tokens
    assert found is not None
    assert found.sum(axis=1).tolist() == [2 * 73] * 2
    assert float(learner.train_step([batch], step=1, lr=1e-3).aux_loss or 0.0) > 1.0


def test_a_router_forced_to_one_expert_has_collapsed(opened: Open, mixtral: Path, tmp_path: Path) -> None:
    batch = make_batch((60, 60, 60))
    for folder, expected in (
        (mixtral, ()),
        (leaning(tmp_path / "forced", layer=1, logit=50.0), (Collapse(1, "expert 2 gets 100 % of its tokens"),)),
    ):
        counts = opened(folder).evaluate([batch]).expert_tokens
        assert counts is not None
        assert Routing.measure(counts, num_tokens=180).collapsed() == expected


# --- trained: values and gradients


def test_aux_loss_is_that_of_transformers(opened: Open, mixtral: Path, tmp_path: Path) -> None:
    """Of a step: the mean over its tokens, micro-batch by micro-batch; and the loss stays pure cross-entropy."""
    adapter = make_adapter(mixtral, make_config(lora=ROUTER))
    model = theirs(merged_model(mixtral, adapter, tmp_path / "merged"))
    batches = [*microbatches(2), with_filler()]
    learner = opened(mixtral, initial=adapter, lora=ROUTER, moe={"aux_loss_weight": 0.5})
    loss = learner.evaluate(batches).mean
    output = learner.train_step(batches, step=1, lr=1e-3)
    tokens = np.array([batch.num_real_tokens for batch in batches])
    expected = [float(reference_aux(forward(model, batch)[1], batch).detach()) for batch in batches]
    assert output.aux_loss is not None
    assert float(output.aux_loss) == pytest.approx(float((tokens / tokens.sum()) @ expected), rel=1e-6)
    assert float(output.loss) == pytest.approx(loss, rel=1e-6)


def reference_gradients(model: Any, adapter: Adapter, batches: list[Batch], weight: float) -> dict[str, FloatArray]:
    """torch's gradients of CE per target + weight * aux with the router's weights W + scale * B A, written out."""
    import torch

    parameters = {name: torch.from_numpy(t.copy()).requires_grad_() for name, t in adapter.tensors.items()}
    for name in adapter.modules:
        router = model.get_submodule(name)
        base = router.weight.detach()
        del router.weight
        router.weight = base + adapter.scale_of(name) * (parameters[f"{name}.lora_B"] @ parameters[f"{name}.lora_A"])
    num_targets = sum(batch.num_targets for batch in batches)
    num_tokens = sum(batch.num_real_tokens for batch in batches)
    objective = torch.zeros(())
    for batch in batches:
        logits, routers = forward(model, batch)
        flat, targets = logits.flatten(0, 1), torch.from_numpy(batch.targets).long().flatten()
        total = torch.nn.functional.cross_entropy(flat, targets, reduction="sum", ignore_index=IGNORE)
        objective = objective + total / num_targets
        objective = objective + weight * batch.num_real_tokens / num_tokens * reference_aux(routers, batch)
    objective.backward()
    return {name: np.array(parameter.grad) for name, parameter in parameters.items()}


def gradients_of(learner: Learner, batches: list[Batch]) -> dict[str, FloatArray]:
    """What plain gradient descent at rate 1 takes off."""
    before = learner.export_state().adapter
    learner.train_step(batches, step=1, lr=1.0)
    after = learner.export_state().adapter
    return {name: before[name] - after[name] for name in before}


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_autograds_of_the_plain_formula(
    opened: Open, mixtral: Path, weight: float, recomputed: bool
) -> None:
    adapter = make_adapter(mixtral, make_config(lora=ROUTER))
    batches = microbatches(4)
    expected = reference_gradients(theirs(mixtral), adapter, batches, weight)
    learner = opened(
        mixtral,
        initial=adapter,
        lora=ROUTER,
        optim=SGD,
        train={"gradient_checkpointing": recomputed},
        moe={"aux_loss_weight": weight},
    )
    found = gradients_of(learner, batches)
    assert max(np.abs(gradient).max() for gradient in expected.values()) > 1e-3
    for name, gradient in expected.items():
        # a difference of float32 weights: good to their rounding
        np.testing.assert_allclose(found[name], gradient, atol=3e-7, err_msg=name)


def test_the_weight_moves_what_lies_below_the_router_too(opened: Open, mixtral: Path) -> None:
    """The router's logits depend on the layers below, so their adapters get a gradient from the loss as well."""
    found = []
    for weight in (0.0, 1.0):
        learner = opened(
            mixtral,
            initial=make_adapter(mixtral, make_config(moe={"train_router": True})),
            optim=SGD,
            moe={"train_router": True, "aux_loss_weight": weight},
        )
        found.append(gradients_of(learner, microbatches()))
    name = "model.layers.0.self_attn.o_proj.lora_B"
    assert np.abs(found[0][name] - found[1][name]).max() > 1e-4


def test_gradients_are_clipped_after_both(opened: Open, mixtral: Path) -> None:
    norms = {}
    for limit in (None, 1e-2):
        optim = {**SGD, "max_grad_norm": limit}
        learner = opened(mixtral, lora=ROUTER, optim=optim, moe={"aux_loss_weight": 5.0})
        found = gradients_of(learner, microbatches())
        norms[limit] = float(np.sqrt(sum(float((g.astype(float) ** 2).sum()) for g in found.values())))
    assert norms[None] > 2e-2
    assert norms[1e-2] == pytest.approx(1e-2, rel=1e-3)


def test_recomputing_with_dropout_changes_nothing(opened: Open, mixtral: Path) -> None:
    states, losses = [], []
    for recomputed in (False, True):
        learner = opened(
            mixtral,
            lora={"dropout": 0.3, "targets": "all-linear"},
            train={"gradient_checkpointing": recomputed},
            moe={"train_router": True, "aux_loss_weight": 0.1},
        )
        outputs = [learner.train_step(microbatches(step), step=step, lr=1e-2) for step in (1, 2)]
        losses.append([(float(output.loss), float(output.aux_loss or 0.0)) for output in outputs])
        states.append(learner.export_state())
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    for name, tensor in states[0].adapter.items():
        np.testing.assert_allclose(tensor, states[1].adapter[name], atol=1e-6, err_msg=name)


def test_weight_zero_is_no_aux_loss_to_the_bit(opened: Open, mixtral: Path) -> None:
    results: list[tuple[Any, list[float]]] = []
    for weight, has_aux_loss in ((0.0, True), (0.0, False), (0.5, True)):
        learner: Any = opened(mixtral, lora=ROUTER, moe={"aux_loss_weight": weight})
        learner._has_aux_loss = has_aux_loss
        outputs = [learner.train_step(microbatches(step), step=step, lr=1e-2) for step in (1, 2, 3)]
        assert all((output.aux_loss is not None) == has_aux_loss for output in outputs)
        results.append((learner.export_state(), [float(output.loss) for output in outputs]))
    assert_same_state(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[2][1] != results[1][1]


def test_backends_agree_over_ten_steps(mixtral: Path) -> None:
    for backend in ("mlx", "cuda"):
        skip_without(backend)
    adapter = make_adapter(mixtral, make_config(moe={"train_router": True}))
    outputs, adapters = [], []
    for backend in ("mlx", "cuda"):
        settings: dict[str, Any] = {"optim": {"max_grad_norm": 0.5}, "moe": {"aux_loss_weight": 0.1}}
        learner = open_learner(backend, mixtral, initial=adapter, **settings)
        steps = [learner.train_step(microbatches(step), step=step, lr=1e-3) for step in range(1, 11)]
        outputs.append([[float(o.loss), float(o.aux_loss or 0), float(o.grad_norm)] for o in steps])
        adapters.append(learner.export_state().adapter)
        learner.close()
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=2e-5)
    for name, tensor in adapters[0].items():
        np.testing.assert_allclose(tensor, adapters[1][name], atol=2e-5, err_msg=name)


def entropies(learner: Learner, batches: list[Batch]) -> FloatArray:
    counts: IntArray | None = learner.evaluate(batches).expert_tokens
    assert counts is not None
    return Routing.measure(counts, num_tokens=sum(batch.num_real_tokens for batch in batches)).entropy


def test_a_skewed_router_comes_back_to_balance(opened: Open, tmp_path: Path) -> None:
    """With one layer, since the loss is one of all layers' tokens together."""
    skewed = leaning(tmp_path / "skewed", layer=0, logit=3.0, num_layers=1)
    batches = [make_batch((30, 30, 30, 30), seed=1)]
    rises, aux_losses = {}, {}
    for weight in (0.0, 1.0):
        learner = opened(skewed, lora={**ROUTER, "alpha": 32}, moe={"aux_loss_weight": weight})
        before = entropies(learner, batches)[0]
        outputs = [learner.train_step(batches, step=step, lr=2e-2) for step in range(1, 31)]
        rises[weight] = entropies(learner, batches)[0] - before
        aux_losses[weight] = [float(output.aux_loss or 0) for output in outputs]
    assert rises[1.0] > 0.1
    assert rises[1.0] > rises[0.0] + 0.05
    assert aux_losses[1.0][-1] < 0.8 * aux_losses[1.0][0]
    assert aux_losses[1.0][-1] > 2.0 - 0.05  # k, for even use


# --- the frozen fraction


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("frozen") / "model", model_type="mixtral", num_experts=4, num_layers=4)


HALF_FROZEN: dict[str, Any] = {
    "lora": {"targets": "all-linear", "frozen_fraction": 0.5},
    "moe": {"train_router": True, "aux_loss_weight": 0.5},
}


@pytest.mark.parametrize("recomputed", [False, True])
def test_backward_ends_at_the_lowest_adapter_cuda(four_layers: Path, recomputed: bool) -> None:
    skip_without("cuda")
    learner: Any = open_learner("cuda", four_layers, **HALF_FROZEN, train={"gradient_checkpointing": recomputed})
    entering: dict[int, bool] = {}

    def note(layer: Any, args: tuple[Any, ...]) -> None:
        entering.setdefault(layer.self_attn.layer_idx, args[0].grad_fn is not None)

    for layer in learner.model.model.layers:
        layer.register_forward_pre_hook(note)
    learner.train_step(microbatches(), step=1, lr=1e-3)
    assert entering == {0: False, 1: False, 2: False, 3: True}
    trained = [name for name, parameter in learner.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".layers.2." in name or ".layers.3." in name for name in trained)
    assert all(parameter.grad is None for parameter in learner.model.parameters() if not parameter.requires_grad)
    learner.close()


@pytest.mark.parametrize("fraction", [0.5, 0.0])
def test_backward_ends_at_the_lowest_adapter_mlx(four_layers: Path, fraction: float) -> None:
    skip_without("mlx")
    import mlx.core as mx
    import mlx.nn as nn

    sections = {**HALF_FROZEN, "lora": {"targets": "all-linear", "frozen_fraction": fraction}}
    learner: Any = open_learner("mlx", four_layers, **sections)
    reached: list[int] = []

    @mx.custom_function
    def fence(x: Any) -> Any:
        return x * 1.0

    @fence.vjp
    def _(primals: Any, cotangent: Any, output: Any) -> Any:
        reached.append(1)
        return cotangent

    class Fenced(nn.Module):  # type: ignore[misc]
        """A norm whose gradient tells that it was asked for."""

        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.norm = norm

        def __call__(self, x: Any) -> Any:
            return fence(self.norm(x))

    frozen = learner.network._base.module.layers[1]
    frozen.post_attention_layernorm = Fenced(frozen.post_attention_layernorm)
    learner.train_step(microbatches(), step=1, lr=1e-3)
    assert bool(reached) == (fraction == 0.0)
    layers = {int(name.split(".")[2]) for name in learner.parameters}
    assert layers == ({2, 3} if fraction else {0, 1, 2, 3})
    learner.close()


def test_frozen_layers_are_counted_in_the_aux_loss(opened: Open, four_layers: Path) -> None:
    """As transformers has it: over all layers' tokens, whoever is trained."""
    model = theirs(four_layers)
    learner = opened(four_layers, initial=make_adapter(four_layers, make_config(**HALF_FROZEN), filled=False))
    batch = make_batch((12, 9), width=16)
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    expected = load_balancing_loss_func(forward(model, batch)[1], 4, 2, torch.from_numpy(batch.is_token).long())
    output = learner.train_step([batch], step=1, lr=1e-3)
    assert output.aux_loss is not None
    assert float(output.aux_loss) == pytest.approx(float(expected), rel=1e-6)


def test_check_has_nothing_against_a_trained_router(backend: str, mixtral: Path) -> None:
    import backends

    chosen = backends.get(backend)
    config = make_config(moe={"train_router": True})
    assert not [warning for warning in chosen.check(config) if "router" in warning]
    learner = chosen.open(config, resolved(mixtral), make_adapter(mixtral, config))
    assert any(name.endswith("mlp.gate.lora_A") for name in learner.export_state().adapter)
    learner.close()
