"""Where a model's bytes are, counted; and a 4-bit run whose weights are not in 4 bits does not go on."""

from __future__ import annotations

import pytest

from core.census import Group, census, kind_of, line, refuse_wide, to_plain
from core.errors import UserError
from core.protocols import Weight

NAMES = {
    "model.layers.0.self_attn.q_proj.weight": "attention",
    "model.layers.0.self_attn.q_norm.weight": "norms",
    "model.layers.0.mlp.gate_proj.weight": "mlp",
    "model.layers.0.mlp.gate.weight": "router",
    "model.layers.0.block_sparse_moe.gate.weight": "router",
    "model.layers.0.mlp.experts.gate_up_proj.3": "experts",
    "model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight": "experts",
    "model.layers.0.mlp.experts.gate_proj.lora_A": "adapters",
    "model.layers.0.input_layernorm.weight": "norms",
    "model.norm.weight": "norms",
    "model.embed_tokens.weight": "embeddings",
    "lm_head.weight": "embeddings",
    "model.something": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_kinds(name: str) -> None:
    assert kind_of(name) == NAMES[name]


WEIGHTS = [
    Weight("model.layers.0.self_attn.q_proj.weight", "nf4", 1000, 516),
    Weight("model.layers.1.self_attn.q_proj.weight", "nf4", 1000, 516),
    Weight("model.layers.0.mlp.experts.down_proj.0", "nf4", 40_000_000, 21_000_000),
    Weight("model.embed_tokens.weight", "bfloat16", 2_000_000, 4_000_000),
    Weight("model.layers.0.mlp.experts.down_proj.1", "bfloat16", 100, 200),
]


def test_sums_by_kind_and_type() -> None:
    groups = census(WEIGHTS)
    assert groups == (
        Group("experts", "nf4", 40_000_000, 21_000_000),
        Group("experts", "bfloat16", 100, 200),
        Group("attention", "nf4", 2000, 1032),
        Group("embeddings", "bfloat16", 2_000_000, 4_000_000),
    )
    assert line(groups) == "25.0 MB: experts 21.0 nf4, embeddings 4.0 bfloat16, the rest 0.00"
    assert to_plain(groups)[0] == {"kind": "experts", "dtype": "nf4", "parameters": 40_000_000, "bytes": 21_000_000}


def test_large_models_are_in_gigabytes() -> None:
    assert line([Group("mlp", "nf4", 1, 24_500_000_000)]) == "24.5 GB: mlp 24.5 nf4"


def test_experts_that_stayed_wide_are_refused() -> None:
    wide = [*WEIGHTS, Weight("model.layers.1.mlp.experts.down_proj", "bfloat16", 45_000_000, 90_000_000)]
    with pytest.raises(UserError, match=r"53% of the linear weights are not in 4 bits: experts 90\.0 MB in bfloat16"):
        refuse_wide(census(wide), bits=4)
    refuse_wide(census(wide), bits=16)


def test_embeddings_and_a_few_odd_layers_may_stay_wide() -> None:
    refuse_wide(census(WEIGHTS), bits=4)
