"""What config.json says about a model, against transformers' own count of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.architecture import Architecture, read_architecture
from core.errors import UserError
from tests.tiny import make_model

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tied": True},
    "llama deep": {"num_layers": 3, "hidden_size": 48, "intermediate_size": 80, "num_heads": 6, "num_kv_heads": 3},
    "mistral": {"model_type": "mistral", "num_kv_heads": 1},
    "mixtral": {"model_type": "mixtral", "num_experts": 3},
    "mixtral tied": {"model_type": "mixtral", "tied": True},
}

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def read(folder: Path, *, without: str = "", **changes: Any) -> Architecture:
    config = {name: value for name, value in {**CONFIG, **changes}.items() if name != without}
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


@pytest.mark.parametrize("kind", MODELS)
def test_the_count_is_transformers(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = make_model(tmp_path / "model", **MODELS[kind])
    architecture = read_architecture(folder)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert architecture.num_parameters == model.num_parameters()
    # and the linear modules are where, and as large as, it says
    tensors = dict(model.named_parameters())
    for layer in range(architecture.num_layers):
        for key, shape in architecture.module_shapes().items():
            name = f"model.layers.{layer}.{key}"
            if ".experts." not in key:
                assert tuple(tensors[f"{name}.weight"].shape) == shape
            elif key.endswith("down_proj"):
                assert tuple(tensors[name].shape) == shape
            else:  # transformers fuses gate and up
                fused = tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
                assert tuple(fused.shape) == (shape[0], 2 * shape[1], shape[2])
    assert architecture.is_moe == ("mixtral" in kind)
    assert architecture.tied_embeddings == model.config.tie_word_embeddings


def test_mistral_7b_by_hand(tmp_path: Path) -> None:
    architecture = read(
        tmp_path, model_type="mistral", num_hidden_layers=32, hidden_size=4096, intermediate_size=14336,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32768, max_position_embeddings=32768,
    )  # fmt: skip
    assert architecture.num_parameters == 7_248_023_552  # as its model card says
    assert architecture.max_positions == 32768


def test_mixtral_8x7b_by_hand(tmp_path: Path) -> None:
    architecture = read(
        tmp_path, model_type="mixtral", num_hidden_layers=32, hidden_size=4096, intermediate_size=14336,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, num_local_experts=8,
    )  # fmt: skip
    assert architecture.num_parameters == 46_702_792_704  # as its model card says
    assert architecture.is_moe
    experts = {f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")}
    assert set(architecture.module_shapes()) == {f"self_attn.{name}_proj" for name in "qkvo"} | {"mlp.gate"} | experts
    assert architecture.module_shapes()["mlp.experts.down_proj"] == (8, 4096, 14336)


@pytest.mark.parametrize(("given", "expected"), [({}, 8), ({"head_dim": None}, 8), ({"head_dim": 24}, 24)])
def test_head_dim(tmp_path: Path, given: dict[str, Any], expected: int) -> None:
    architecture = read(tmp_path, **given)
    assert architecture.head_dim == expected
    assert architecture.module_shapes()["self_attn.q_proj"] == (4 * expected, 32)
    assert architecture.module_shapes()["self_attn.k_proj"] == (2 * expected, 32)
    assert architecture.module_shapes()["self_attn.o_proj"] == (32, 4 * expected)


def test_without_grouped_queries(tmp_path: Path) -> None:
    assert read(tmp_path, without="num_key_value_heads").num_kv_heads == 4
    assert read(tmp_path, num_key_value_heads=None).num_kv_heads == 4


def test_other_variants(tmp_path: Path) -> None:
    assert read(tmp_path).max_positions == 0
    assert not read(tmp_path).tied_embeddings
    assert read(tmp_path, tie_word_embeddings=True).tied_embeddings
    assert read(tmp_path, model_type="mixtral").num_experts == 8
    assert read(tmp_path, num_local_experts=8).num_experts == 0  # a llama has none, whatever the file says
    assert read(tmp_path).mlx_bits is None
    assert read(tmp_path, quantization={"bits": 4, "group_size": 64}).mlx_bits == 4


@pytest.mark.parametrize("name", [name for name in CONFIG if name not in ("model_type", "num_key_value_heads")])
@pytest.mark.parametrize("value", [None, "many", 1.5])
def test_a_missing_or_wrong_number_is_named(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"config\.json: {name} is missing or not a whole number"):
        read(tmp_path, **{name: value})


@pytest.mark.parametrize("model_type", ["gpt2", None, 5])
def test_other_families_are_refused(tmp_path: Path, model_type: Any) -> None:
    with pytest.raises(UserError, match="is not supported") as caught:
        read(tmp_path, model_type=model_type)
    assert repr(model_type) in caught.value.what
    assert "llama, mistral, mixtral" in (caught.value.hint or "")


def test_a_folder_without_or_with_a_damaged_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        read_architecture(tmp_path)
    for content in (b"", b"{", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json: not JSON"):
            read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="is not supported"):
        read_architecture(tmp_path)
