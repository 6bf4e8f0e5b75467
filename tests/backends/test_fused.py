"""The PyTorch layers in fewer passes: against transformers' own modules, autograd, and the same model without them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.adapter import Adapter, LoraModule
from tests.backends.conftest import KINDS, LR, make_adapter, make_config, microbatches, missing_package, open_learner

if missing := missing_package("cuda"):
    pytest.skip(f"cuda: {missing} is not installed", allow_module_level=True)

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from backends.cuda import loss, model
from backends.cuda.attention import ATTENTION
from backends.cuda.dropout import Masks
from backends.cuda.fused import fuse, rms_norm, rotate, swiglu
from backends.cuda.lora import LoraLinear, LoraPair
from backends.cuda.products import linears

Module = Callable[[torch.Tensor], torch.Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def through(module: Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out, and the gradient of a fixed sum of it with respect to `x`."""
    x = x.detach().requires_grad_()
    found = module(x)
    found.backward(normal(*found.shape, seed=9, dtype=found.dtype))
    assert x.grad is not None
    return found.detach(), x.grad


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, *, rel: float = 1e-6) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= rel * float(theirs.abs().max())


# --- each piece


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm_is_transformers(dtype: torch.dtype, rel: float) -> None:
    theirs = LlamaRMSNorm(24, eps=1e-2).requires_grad_(False)
    theirs.weight.data = normal(24, seed=1)
    theirs.to(dtype)
    x = normal(2, 5, 24, dtype=dtype)
    for ours, other in zip(through(lambda x: rms_norm(x, theirs.weight, 1e-2), x), through(theirs, x), strict=True):
        assert_close(ours, other, rel=rel)


def test_gradients_of_the_pieces() -> None:
    x, weight = normal(2, 3, 8, dtype=torch.float64).requires_grad_(), normal(8, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-3), x)
    up = normal(2, 3, 8, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (x, up))
    # the halves' angles differ, which no model has, so that none is taken for the other
    cos, sin = normal(1, 3, 8, seed=3, dtype=torch.float64), normal(1, 3, 8, seed=4, dtype=torch.float64)
    heads = normal(1, 2, 3, 8, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), heads)


def test_rotate_is_transformers() -> None:
    query, key = normal(2, 4, 5, 8), normal(2, 2, 5, 8, seed=1)
    cos, sin = normal(2, 5, 8, seed=2), normal(2, 5, 8, seed=3)
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    for states, theirs in zip((query, key), expected, strict=True):
        assert_close(rotate(states, cos, sin), theirs)
        # as it comes from a projection: the heads in the middle
        turned = states.transpose(1, 2).contiguous().transpose(1, 2)
        assert_close(rotate(turned, cos, sin), theirs)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_swiglu_is_transformers(dtype: torch.dtype, rel: float) -> None:
    gate, up = normal(3, 8, dtype=dtype), normal(3, 8, seed=1, dtype=dtype)
    for fixed, function in ((up, lambda x: swiglu(x, up)), (gate, lambda x: swiglu(gate, x))):
        plain = (
            (lambda x: torch.nn.functional.silu(x) * up)
            if fixed is up
            else (lambda x: torch.nn.functional.silu(gate) * x)
        )
        for ours, theirs in zip(through(function, gate), through(plain, gate), strict=True):
            assert_close(ours, theirs, rel=rel)
    expected = torch.nn.functional.silu(gate) * up
    with torch.no_grad():
        assert_close(swiglu(gate.clone(), up), expected, rel=rel)


# --- products of one input


def layer(size: int, *, rank: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A frozen linear layer from 6 to `size`, with a pair of this rank if it is not 0."""
    base = torch.nn.Linear(6, size, bias=False, dtype=dtype).requires_grad_(False)
    base.weight.data = normal(size, 6, seed=size, dtype=dtype)
    if not rank:
        return base
    name = f"model.layers.{size}.self_attn.q_proj"
    a, b = normal(rank, 6, seed=size + 1), normal(size, rank, seed=size + 2)
    adapter = Adapter(
        modules={name: LoraModule(rank, 3.0 * size)},
        tensors={f"{name}.lora_A": a.numpy(), f"{name}.lora_B": b.numpy()},
        num_layers=8,
        dropout=dropout,
        rslora=False,
    )
    return LoraLinear(base, LoraPair(adapter, name).to(base.weight.dtype), dropout)


RANKS = [(2, 3, 1), (2, 0, 3), (0, 0, 0), (0, 2, 0)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_linears_are_the_layers_by_themselves(ranks: tuple[int, ...], dropout: float) -> None:
    """Written out by hand: W x + scale B A m x / (1 - dropout), all in float64, each pair with a mask m of its own; and
    the gradients by torch."""
    layers = [
        layer(size, rank=rank, dropout=dropout, dtype=torch.float64)
        for size, rank in zip((5, 4, 7), ranks, strict=True)
    ]
    trained = [parameter for one in layers for parameter in one.parameters() if parameter.requires_grad]
    x = normal(2, 3, 6, dtype=torch.float64)
    masks = Masks(1, [(0, 3), (1, 3)])

    def by_hand(x: torch.Tensor, layers: list[Any]) -> torch.Tensor:
        found = []
        for one, rank in zip(layers, ranks, strict=True):
            if not rank:
                found.append(x @ one.weight.t())
                continue
            kept = masks.draw(x, dropout, one.lora.name).factors(x).view(x.shape)
            assert dropout == 0 or 0 < kept.sum() < kept.numel()
            beside = (x * kept / (1 - dropout)) @ one.lora.a.t() @ one.lora.b.t()
            found.append(x @ one.base.weight.t() + one.lora.scale * beside)
        return torch.cat(found, -1)

    outcomes = []
    for module in (lambda x: torch.cat(linears(x, layers), -1), lambda x: by_hand(x, layers)):
        with masks.used():
            found = [*through(module, x), *[parameter.grad for parameter in trained]]
        outcomes.append([tensor.clone() for tensor in found if tensor is not None])
        for parameter in trained:
            parameter.grad = None
    assert len(outcomes[0]) == 2 + 2 * sum(rank > 0 for rank in ranks)
    for ours, theirs in zip(*outcomes, strict=True):
        assert_close(ours, theirs, rel=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_linears_of_an_input_without_gradient(dropout: float) -> None:
    """The lowest layer with an adapter: only the pairs get gradients."""
    layers = [layer(5, rank=2, dropout=dropout), layer(4)]
    x, masks = normal(3, 6), Masks(1, [(0, 3)])
    with masks.used():
        first, second = linears(x, layers)
    assert first.requires_grad and not second.requires_grad
    first.sum().backward()
    assert isinstance(layers[0], LoraLinear) and layers[0].lora.a.grad is not None
    kept = masks.draw(x, dropout, layers[0].lora.name).factors(x)
    entering = (x * kept / (1 - dropout)).sum(0)
    expected = layers[0].lora.scale * (layers[0].lora.b.sum(0)[:, None] * entering[None])
    assert_close(layers[0].lora.a.grad, expected.detach())


def test_linears_keep_to_the_layers_where_arithmetic_differs() -> None:
    """Casts, bias: to the bit what the layers themselves give."""
    x = normal(3, 6)
    dropping = [layer(5, rank=2, dropout=0.5), layer(4, rank=2, dropout=0.5)]
    biased = [torch.nn.Linear(6, 5).requires_grad_(False)]
    assert torch.equal(linears(x, biased)[0], biased[0](x))
    with torch.autocast("cpu", dtype=torch.bfloat16), Masks(1, [(0, 3)]).used():
        ours, theirs = linears(x, dropping), [one(x) for one in dropping]
    assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for one in dropping:
        one.eval()
    for ours_, one in zip(linears(x, dropping), dropping, strict=True):
        assert_close(ours_.detach(), one(x).detach())


# --- whole models


def load(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    found = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION, dtype=dtype)
    return found.requires_grad_(False)


def test_fused_model_says_the_same(folders: dict[str, Path], kind: str) -> None:
    plain = load(folders[kind])
    fused = copy.deepcopy(plain)
    fuse(fused)
    changed = [name for name, module in fused.named_modules() if type(module).__name__.startswith("Fused")]
    assert len(changed) == 1 + 2 * (3 if kind == "mixtral" else 4)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    ids = torch.from_numpy(microbatches()[0].inputs).long()
    with torch.no_grad():
        expected = plain(input_ids=ids, use_cache=False).logits
        assert_close(fused(input_ids=ids, use_cache=False).logits, expected, rel=2e-6)
        assert_close(copy.deepcopy(fused)(input_ids=ids, use_cache=False).logits, expected, rel=2e-6)


def test_fused_model_reads_a_cache(folders: dict[str, Path]) -> None:
    """The last of 9 tokens, read after the others, as if all had come at once."""
    fused = load(folders["llama"]).eval()
    fuse(fused)
    ids = torch.from_numpy(microbatches()[0].inputs[:1, :9]).long()
    with torch.no_grad():
        whole = fused(input_ids=ids, use_cache=False).logits[:, -1]
        cache = fused(input_ids=ids[:, :8], use_cache=True).past_key_values
        last = fused(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True).logits[:, -1]
    assert_close(last, whole, rel=2e-6)


def test_other_classes_are_left_alone(folders: dict[str, Path]) -> None:
    class Other(LlamaMLP):  # type: ignore[misc]
        pass

    base = load(folders["llama"])
    base.model.layers[0].mlp.__class__ = Other
    base.config.hidden_act = "gelu"
    fuse(base)
    assert [type(layer.mlp).__name__ for layer in base.model.layers] == ["Other", "LlamaMLP"]
    assert type(base.model.norm).__name__ == "FusedLlamaRMSNorm"


def test_another_release_is_left_alone(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that computes something else: here one that clamps."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1.0) * self.up_proj(x))
        return down

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    base = load(folders["llama"])
    fuse(base)
    assert {type(layer.mlp).__name__ for layer in base.model.layers} == {"LlamaMLP"}
    assert {type(layer.self_attn).__name__ for layer in base.model.layers} == {"FusedLlamaAttention"}


def test_biases_stay(folders: dict[str, Path]) -> None:
    settings = AutoConfig.from_pretrained(folders["llama"])
    settings.attention_bias = settings.mlp_bias = True
    plain = AutoModelForCausalLM.from_config(settings, attn_implementation=ATTENTION).requires_grad_(False)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    fused = copy.deepcopy(plain)
    fuse(fused)
    ids = torch.from_numpy(microbatches()[0].inputs).long()
    with torch.no_grad():
        expected = plain(input_ids=ids, use_cache=False).logits
        assert_close(fused(input_ids=ids, use_cache=False).logits, expected, rel=2e-6)


ALL_TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "all modules": {"lora": {"targets": ALL_TARGETS}},
    "dropout": {"lora": {"dropout": 0.3}},
    "4 bits": {"model": {"bits": 4}},
    "recomputed": {"train": {"gradient_checkpointing": True}},
    "streamed": {"model": {"stream_layers": True}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_training_with_and_without(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, settings: str) -> None:
    """Losses of three steps and of the rows afterwards, with transformers' own modules and ours."""
    sections, kinds = SETTINGS[settings], ("llama",) if settings != "float32" else tuple(KINDS)
    rel = 2e-2 if settings == "bfloat16" else 2e-6
    for kind in kinds:
        found = []
        for change in (fuse, lambda base: None):
            monkeypatch.setattr(model, "fuse", change)
            monkeypatch.setattr(loss, "_by_columns", lambda hidden, ours=change is fuse: ours)
            monkeypatch.setattr(loss, "COLUMNS", 100)
            adapter = make_adapter(folders[kind], make_config(**sections))
            learner: Any = open_learner("cuda", folders[kind], initial=adapter, **sections)
            names = {type(module).__name__ for module in learner.model.modules()}
            assert any(name.startswith("Fused") for name in names) == (change is fuse)
            losses = [float(learner.train_step(microbatches(s), step=s, lr=LR).loss) for s in (1, 2, 3)]
            found.append(np.array([*losses, *learner.evaluate(microbatches(9)).nll]))
            learner.close()
        np.testing.assert_allclose(found[0], found[1], rtol=rel, err_msg=kind)
        assert found[0][0] != found[0][2]


# --- the loss by parts of the vocabulary


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_by_columns_is_torch(monkeypatch: pytest.MonkeyPatch, smoothing: float, bias: bool) -> None:
    """Seven parts of 3 tokens and one of 2; two of four positions; logits so large that exp alone would overflow."""
    monkeypatch.setattr(loss, "COLUMNS", 3)
    monkeypatch.setattr(loss, "CHUNK", 4)
    head = torch.nn.Linear(6, 23, bias=bias).requires_grad_(False)
    head.weight.data = 20 * normal(23, 6, seed=1)
    targets = torch.tensor([0, 22, 2, 3, 21, 20, 11])
    hidden = normal(7, 6, seed=2)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return loss.summed_losses(head, x, targets, smoothing=smoothing)[0]

    def theirs(x: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(x, head.weight, head.bias)
        assert logits.max() > 89
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)

    for found, expected in zip(through(ours, hidden), through(theirs, hidden), strict=True):
        assert_close(found, expected)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert_close(loss.token_losses(head, hidden, targets), expected)
    assert_close(loss.summed_losses(head, hidden, targets, smoothing=smoothing)[1], expected.sum())


def test_loss_by_columns_in_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "COLUMNS", 5)
    head = torch.nn.Linear(6, 23, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight.data = normal(23, 6, seed=1, dtype=torch.bfloat16)
    hidden, targets = normal(7, 6, seed=2, dtype=torch.bfloat16), torch.arange(7)
    found = []
    for by_columns in (True, False):
        monkeypatch.setattr(loss, "_by_columns", lambda hidden, answer=by_columns: answer)
        x = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            objective, nll = loss.summed_losses(head, x, targets, smoothing=0.1)
        objective.backward()
        found.append((objective.detach(), nll, x.grad))
    for (ours, theirs), rel in zip(zip(*found, strict=True), (1e-4, 1e-5, 2e-2), strict=True):
        assert ours is not None and theirs is not None
        assert_close(ours, theirs, rel=rel)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [0, 4, 7])
def test_loss_by_columns_hides_no_divergence(monkeypatch: pytest.MonkeyPatch, value: float, token: int) -> None:
    """A logit that is no number, or infinite, in the first part, in the target's, in the last."""
    monkeypatch.setattr(loss, "COLUMNS", 3)
    head = torch.nn.Linear(2, 8).requires_grad_(False)
    with torch.no_grad():
        head.bias[token] = value
    hidden, targets = normal(3, 2), torch.tensor([4, 5, 3])
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(loss.token_losses(head, hidden, targets), expected, equal_nan=True)


def test_loss_by_columns_with_tokens_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole first part at minus infinity."""
    monkeypatch.setattr(loss, "COLUMNS", 3)
    head = torch.nn.Linear(2, 8).requires_grad_(False)
    with torch.no_grad():
        head.bias[:3] = -math.inf
    hidden, targets = normal(3, 2).requires_grad_(), torch.tensor([4, 5, 3])
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    (slope,) = torch.autograd.grad(expected, hidden)
    objective, nll = loss.summed_losses(head, hidden, targets, smoothing=0.0)
    torch.testing.assert_close(nll, expected)
    (found,) = torch.autograd.grad(objective, hidden)
    torch.testing.assert_close(found, slope)
