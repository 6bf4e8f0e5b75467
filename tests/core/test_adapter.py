"""Which modules get an adapter, with which shapes and first values."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest

from core.adapter import Adapter, plan_adapter, target_keys
from core.architecture import Architecture
from core.config import LoraConfig
from core.errors import UserError

QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def architecture(**changes: Any) -> Architecture:
    values: dict[str, Any] = {
        "model_type": "llama",
        "num_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "tied_embeddings": False,
        "num_experts": 0,
        "max_positions": 512,
        "mlx_bits": None,
    }
    return Architecture(**(values | changes))


DENSE = architecture()
MIXTRAL = architecture(model_type="mixtral", num_experts=8)


def plan(seed: int = 0, arch: Architecture = DENSE, **lora: Any) -> Adapter:
    return plan_adapter(LoraConfig.model_validate({"rank": 4, **lora}), arch, seed=seed)


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", QKVO),
        ("all-linear", (*QKVO, *MLP)),
        (["q_proj"], QKVO[:1]),
        (["v_proj", "q_proj", "v_proj"], (QKVO[0], QKVO[2])),  # in the model's order, once
        (["self_attn.o_proj", "down_proj"], (QKVO[3], MLP[2])),
        (["mlp.gate_proj"], (MLP[0],)),
    ],
)
def test_target_keys(targets: Any, expected: tuple[str, ...]) -> None:
    assert target_keys(targets, DENSE) == expected


@pytest.mark.parametrize(
    ("target", "near"), [("q_prj", "q_proj"), ("gate", "gate_proj"), ("oproj", "o_proj"), ("self_attn.qproj", "q_proj")]
)
def test_an_unknown_target_is_answered_with_the_nearest(target: str, near: str) -> None:
    with pytest.raises(UserError, match="matches no linear module of this llama model") as caught:
        target_keys(["q_proj", target], DENSE)
    assert repr(target) in caught.value.what
    assert f"did you mean {near}?" in (caught.value.hint or "")
    assert "down_proj" in (caught.value.hint or "")


@pytest.mark.parametrize("target", ["proj", "", "_proj", "rotary", "lm_head"])
def test_a_part_of_a_name_is_no_target(target: str) -> None:
    with pytest.raises(UserError, match=r"lora\.targets"):
        target_keys([target], DENSE)


def test_no_targets_at_all() -> None:
    with pytest.raises(UserError, match=r"lora\.targets is empty"):
        target_keys([], DENSE)


def test_a_mixture_of_experts_has_its_router_adapted_only_when_asked() -> None:
    experts = tuple(f"mlp.experts.{name}_proj" for name in ("gate", "up", "down"))
    assert target_keys("attention", MIXTRAL) == QKVO
    assert target_keys("all-linear", MIXTRAL) == (*QKVO, *experts)
    assert target_keys(["down_proj", "q_proj"], MIXTRAL) == ("self_attn.q_proj", "mlp.experts.down_proj")
    assert target_keys(["gate"], MIXTRAL) == ("mlp.gate",)
    assert target_keys("attention", MIXTRAL, router=True) == (*QKVO, "mlp.gate")
    assert target_keys("attention", DENSE, router=True) == QKVO


def test_experts_have_a_leading_axis() -> None:
    adapter = plan(targets=["up_proj"], rank=3, arch=MIXTRAL)
    experts, out, inside = MIXTRAL.num_experts, MIXTRAL.intermediate_size, MIXTRAL.hidden_size
    name = "model.layers.1.mlp.experts.up_proj"
    assert adapter.tensors[f"{name}.lora_A"].shape == (experts, 3, inside)
    assert adapter.tensors[f"{name}.lora_B"].shape == (experts, out, 3)
    a = adapter.tensors[f"{name}.lora_A"]
    assert not np.array_equal(a[0], a[1])  # each expert starts elsewhere


# --- shapes and values ------------------------------------------------------------------------------------------------


def test_names_and_shapes() -> None:
    adapter = plan(targets="all-linear", rank=3)
    assert len(adapter.modules) == 4 * 7
    assert adapter.layer_keys == (*QKVO, *MLP)
    # 64 features, four heads and two key-value heads of 16, 160 in the middle
    outs_and_ins = [(64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
    for layer in range(4):
        for key, (out, inside) in zip((*QKVO, *MLP), outs_and_ins, strict=True):
            name = f"model.layers.{layer}.{key}"
            assert adapter.tensors[f"{name}.lora_A"].shape == (3, inside)
            assert adapter.tensors[f"{name}.lora_B"].shape == (out, 3)
    assert all(tensor.dtype == np.float32 for tensor in adapter.tensors.values())
    assert adapter.num_parameters == 4 * 3 * sum(out + inside for out, inside in outs_and_ins)


def test_a_is_uniform_in_one_over_the_root_of_in_and_b_is_zero() -> None:
    adapter = plan(targets=["down_proj"], rank=64)
    bound = 1 / math.sqrt(160)
    for name, tensor in adapter.tensors.items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            assert np.abs(tensor).max() <= np.float32(bound)
            assert np.abs(tensor).max() > 0.99 * bound
            # variance of a uniform distribution: bound^2 / 3; 10240 draws
            assert tensor.var() == pytest.approx(bound**2 / 3, rel=0.05)
            assert abs(tensor.mean()) < 4 * bound / math.sqrt(3 * tensor.size)


def test_the_bound_is_pefts() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.empty(512, 160)
    torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # peft.tuners.lora.LoraLayer.reset_lora_parameters
    largest = max(np.abs(t).max() for t in plan(targets=["down_proj"], rank=512, arch=DENSE).tensors.values())
    assert largest == pytest.approx(float(weight.abs().max()), rel=1e-3)


def test_first_values_are_drawn_as_defined() -> None:
    name = "model.layers.2.self_attn.v_proj"
    key = int(hashlib.sha256(f"5\x1fadapter\x1f{name}".encode()).hexdigest()[:32], 16)
    expected = np.random.Generator(np.random.Philox(key=key)).uniform(-1 / 8, 1 / 8, (4, 64)).astype(np.float32)
    np.testing.assert_array_equal(plan(seed=5).tensors[f"{name}.lora_A"], expected)


def test_first_values_depend_on_seed_and_name_only() -> None:
    name = "model.layers.3.self_attn.q_proj.lora_A"
    value = plan().tensors[name]
    for other in (
        plan(targets="all-linear"),
        plan(targets=["q_proj"]),
        plan(frozen_fraction=0.5),
        plan(alpha=99, dropout=0.3, rslora=True),
        plan(arch=architecture(intermediate_size=32, num_layers=9)),
    ):
        np.testing.assert_array_equal(other.tensors[name], value)
    assert not np.array_equal(plan(seed=1).tensors[name], value)
    assert not np.array_equal(plan().tensors[name.replace("q_proj", "o_proj")], value)
    assert not np.array_equal(plan().tensors[name.replace("3", "2")], value)


# --- frozen layers, scale ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "num_layers", "first"),
    [
        (0.0, 4, 0),
        (0.24, 4, 0),
        (0.25, 4, 1),
        (0.5, 4, 2),
        (0.5, 5, 2),
        (0.99, 4, 3),
        (0.999, 1, 0),  # one layer stays
        (0.5, 32, 16),
        (0.3, 32, 9),
        (0.58, 50, 29),  # 28.999999999999996 in binary
        (0.29, 100, 29),
    ],
)
def test_frozen_fraction(fraction: float, num_layers: int, first: int) -> None:
    adapter = plan(arch=architecture(num_layers=num_layers), frozen_fraction=fraction, targets=["q_proj"], rank=1)
    assert adapter.layers == tuple(range(first, num_layers))
    assert adapter.num_layers == num_layers
    expected = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in range(first, num_layers))
    assert tuple(adapter.modules) == expected
    assert set(adapter.tensors) == {f"{name}.lora_{part}" for name in expected for part in "AB"}


def test_scale() -> None:
    name = "model.layers.0.self_attn.q_proj"
    assert plan(rank=16, alpha=32).scale_of(name) == 2.0
    assert plan(rank=16, alpha=32, rslora=True).scale_of(name) == 8.0
    assert plan(rank=8, alpha=4).scale_of(name) == 0.5


def test_an_adapter_does_nothing_until_a_pair_is_filled() -> None:
    adapter = plan()
    assert adapter.does_nothing
    tensors = dict(adapter.tensors)
    tensors["model.layers.1.self_attn.v_proj.lora_B"] = np.ones((32, 4), np.float32)
    assert not adapter.with_tensors(tensors).does_nothing
    tensors["model.layers.1.self_attn.v_proj.lora_A"] = np.zeros((4, 64), np.float32)
    assert adapter.with_tensors(tensors).does_nothing


def test_with_tensors_changes_the_values_only() -> None:
    adapter = plan(alpha=7, dropout=0.2, rslora=True, frozen_fraction=0.5)
    ones = {name: np.ones_like(tensor) for name, tensor in adapter.tensors.items()}
    other = adapter.with_tensors(ones)
    assert other.tensors is ones
    for name in ("modules", "dropout", "rslora", "num_layers", "layers", "layer_keys", "ranks"):
        assert getattr(other, name) == getattr(adapter, name)
    with pytest.raises(AssertionError):
        adapter.with_tensors(dict(list(ones.items())[1:]))
