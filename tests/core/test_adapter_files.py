"""The adapter folder in the real PEFT and in the real mlx-lm: it loads, it does something, and both do the same."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from core import adapter_mlx, adapter_peft
from core.adapter import Adapter, plan_adapter
from core.adapter_files import (
    CONFIG,
    MLX_WEIGHTS,
    PEFT_WEIGHTS,
    adapter_config,
    find_adapter,
    read_saved,
    write_adapter,
)
from core.architecture import read_architecture
from core.config import LoraConfig
from tests.tiny import VOCAB_SIZE, make_model

# PEFT 0.21 reads a name that transformers 5.23 calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Logits = npt.NDArray[np.float64]
TOKENS = np.random.default_rng(3).integers(3, VOCAB_SIZE, 17)

MLX_KEYS_IN_PEFT = r"Unexpected keyword arguments \['fine_tune_type', 'lora_parameters', 'num_layers'\]"
"""PEFT warns that it does not know the three keys that mlx-lm needs in the same file."""

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({}, {}),
    "all-linear": ({}, {"targets": "all-linear"}),
    "first half frozen": ({"num_layers": 4}, {"frozen_fraction": 0.5}),
    "frozen all-linear": ({"num_layers": 3}, {"frozen_fraction": 0.4, "targets": "all-linear"}),
    "rslora": ({}, {"rslora": True}),
    "a list": ({}, {"targets": ["v_proj", "mlp.down_proj"]}),
    "a single one": ({}, {"targets": ["o_proj"], "rank": 1, "alpha": 3}),
    "mistral": ({"model_type": "mistral"}, {"targets": "all-linear"}),
    "mixtral": ({"model_type": "mixtral", "num_layers": 3}, {"frozen_fraction": 0.5}),
    "tied": ({"tied": True}, {"alpha": 5, "dropout": 0.3}),
    "experts": ({"model_type": "mixtral"}, {"targets": "all-linear"}),
    "gates of experts": (
        {"model_type": "mixtral", "num_layers": 3},
        {"targets": ["gate_proj"], "frozen_fraction": 0.4},
    ),
    "up and down": ({"model_type": "mixtral"}, {"targets": ["up_proj", "down_proj"], "rslora": True}),
    "router": ({"model_type": "mixtral"}, {"targets": ["gate", "q_proj"]}),
}


def make_adapter(folder: Path, lora: dict[str, Any]) -> Adapter:
    """An adapter as a training leaves it: no zeros in B."""
    config = LoraConfig.model_validate({"rank": 4, "alpha": 8, "dropout": 0.1, **lora})
    adapter = plan_adapter(config, read_architecture(folder), seed=0)
    rng = np.random.default_rng(1)
    return adapter.with_tensors({n: rng.normal(0, 0.3, t.shape).astype(np.float32) for n, t in adapter.tensors.items()})


def peft_logits(model: Path, adapter: Path | None) -> Logits:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        loaded = peft.PeftModel.from_pretrained(loaded, str(adapter))
    with torch.no_grad():
        return np.asarray(loaded.eval()(torch.tensor(TOKENS[None])).logits[0].double().numpy())


def mlx_logits(model: Path, adapter: Path | None) -> Logits:
    pytest.importorskip("mlx_lm")
    from backends.mlx.blas import preload_blas

    preload_blas()
    import mlx.core as mx
    import mlx_lm

    loaded, _ = mlx_lm.load(str(model), adapter_path=None if adapter is None else str(adapter))[:2]
    loaded.eval()
    with mx.stream(mx.cpu):
        return np.array(loaded(mx.array(TOKENS[None]))[0].astype(mx.float32), np.float64)


def by_hand(model: Path, adapter: Adapter) -> Logits:
    """The base model with `scale * B @ A` added to its weights: what an adapter means."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for name in adapter.modules:
            rank, alpha = adapter.modules[name].rank, adapter.modules[name].alpha
            factor = alpha / (rank**0.5 if adapter.rslora else rank)
            delta = torch.from_numpy(factor * adapter.tensors[f"{name}.lora_B"] @ adapter.tensors[f"{name}.lora_A"])
            if ".experts." in name:
                _add_to_experts(loaded.get_submodule(name.rpartition(".")[0]), name, delta)
            else:
                loaded.get_submodule(name).weight += delta
        return np.asarray(loaded.eval()(torch.tensor(TOKENS[None])).logits[0].double().numpy())


def _add_to_experts(experts: Any, name: str, delta: Any) -> None:
    if name.endswith("down_proj"):
        experts.down_proj += delta
        return
    wide = delta.shape[1]
    experts.gate_up_proj[:, : wide if name.endswith("gate_proj") else None][
        :, 0 if name.endswith("gate_proj") else wide :
    ] += delta


@pytest.mark.parametrize("case", CASES)
def test_peft_and_mlx_lm_both_do_what_the_adapter_means(tmp_path: Path, case: str) -> None:
    model_settings, lora = CASES[case]
    model = make_model(tmp_path / "model", **model_settings)
    adapter = make_adapter(model, lora)
    folder = tmp_path / "adapters"
    write_adapter(folder, adapter, base_model=str(model))

    expected = by_hand(model, adapter)
    with warnings.catch_warnings():
        # missing or unexpected adapter keys are warnings in PEFT, no errors
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", MLX_KEYS_IN_PEFT)
        peft = peft_logits(model, folder)
    mlx = mlx_logits(model, folder)
    np.testing.assert_allclose(peft, expected, atol=2e-4)
    np.testing.assert_allclose(mlx, expected, atol=2e-4)
    assert np.abs(expected - peft_logits(model, None)).max() > 0.05
    assert np.abs(mlx - mlx_logits(model, None)).max() > 0.05


@pytest.mark.filterwarnings(f"ignore:{MLX_KEYS_IN_PEFT}")
def test_peft_finds_the_base_model_by_itself(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = make_model(tmp_path / "model")
    write_adapter(tmp_path / "adapters", make_adapter(model, {}), base_model=str(model))
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters", dtype=torch.float32)
    logits = loaded.eval()(torch.tensor(TOKENS[None])).logits[0].detach().double().numpy()
    np.testing.assert_allclose(logits, peft_logits(model, tmp_path / "adapters"), atol=1e-6)
    assert loaded.active_peft_config.inference_mode is True


# --- the files themselves ---------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return make_adapter(make_model(tmp_path / "model", num_layers=4), {"frozen_fraction": 0.5, "targets": "all-linear"})


def test_the_two_weight_files_are_transposes(tmp_path: Path, adapter: Adapter) -> None:
    write_adapter(tmp_path / "adapters", adapter, base_model="hub/base")
    assert sorted(os.listdir(tmp_path / "adapters")) == sorted([CONFIG, PEFT_WEIGHTS, MLX_WEIGHTS])
    peft, mlx = load_file(tmp_path / "adapters" / PEFT_WEIGHTS), load_file(tmp_path / "adapters" / MLX_WEIGHTS)
    assert len(peft) == len(mlx) == len(adapter.tensors)
    for module in adapter.modules:
        a, b = adapter.tensors[f"{module}.lora_A"], adapter.tensors[f"{module}.lora_B"]
        np.testing.assert_array_equal(peft[f"base_model.model.{module}.lora_A.weight"], a)
        np.testing.assert_array_equal(peft[f"base_model.model.{module}.lora_B.weight"], b)
        np.testing.assert_array_equal(mlx[f"{module}.lora_a"], a.T)
        np.testing.assert_array_equal(mlx[f"{module}.lora_b"], b.T)
    for name in (PEFT_WEIGHTS, MLX_WEIGHTS):
        with safe_open(tmp_path / "adapters" / name, "numpy") as file:
            assert file.metadata() == {"format": "pt"}


def test_tensors_that_are_views_are_saved_as_what_they_show(tmp_path: Path, adapter: Adapter) -> None:
    views = adapter.with_tensors({n: np.asfortranarray(t) for n, t in adapter.tensors.items()})
    write_adapter(tmp_path / "one", adapter, base_model="x")
    write_adapter(tmp_path / "two", views, base_model="x")
    for name in (PEFT_WEIGHTS, MLX_WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert all(t.flags.c_contiguous for t in {**adapter_peft.weights(views), **adapter_mlx.weights(views)}.values())


def test_the_configuration_speaks_both_languages(adapter: Adapter) -> None:
    config = adapter_config(adapter, base_model="hub/base")
    assert config["r"] == 4
    assert config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] == "hub/base"
    assert config["layers_to_transform"] == [2, 3]
    assert config["num_layers"] == 2  # mlx-lm counts from the last
    assert config["lora_parameters"]["scale"] == 2.0  # mlx-lm takes alpha / rank, not alpha
    assert config["lora_parameters"]["keys"] == list(adapter.layer_keys)
    json.dumps(config, allow_nan=False)


def test_pefts_part_is_a_lora_config(adapter: Adapter) -> None:
    peft = pytest.importorskip("peft")
    config = adapter_config(adapter, base_model="hub/base")
    for name in ("fine_tune_type", "num_layers", "lora_parameters"):
        del config[name]
    lora = peft.LoraConfig(**config)
    assert lora.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_writing_again_replaces_everything(tmp_path: Path, adapter: Adapter) -> None:
    folder = tmp_path / "adapters"
    write_adapter(folder, adapter, base_model="one")
    other = adapter.with_tensors({n: t + 1 for n, t in adapter.tensors.items()})
    write_adapter(folder, other, base_model="two")
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "two"
    name = next(iter(adapter.modules))
    np.testing.assert_array_equal(load_file(folder / MLX_WEIGHTS)[f"{name}.lora_a"], other.tensors[f"{name}.lora_A"].T)
    assert sorted(os.listdir(folder)) == sorted([CONFIG, PEFT_WEIGHTS, MLX_WEIGHTS])


# --- reading them again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["peft", "mlx"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_was_written(tmp_path: Path, case: str, form: Any) -> None:
    model_settings, lora = CASES[case]
    model = make_model(tmp_path / "model", **model_settings)
    adapter = make_adapter(model, lora)
    write_adapter(tmp_path / "adapters", adapter, base_model="hub/base", forms=[form])
    found = find_adapter(tmp_path / "adapters")
    assert (found.form, found.base_model) == (form, "hub/base")
    read = found.read(read_architecture(model))
    assert list(read.modules) == list(adapter.modules)
    for name in adapter.modules:
        assert read.scale_of(name) == pytest.approx(adapter.scale_of(name), rel=1e-12)
    for name, tensor in adapter.tensors.items():
        np.testing.assert_array_equal(read.tensors[name], tensor)


@pytest.mark.parametrize("case", CASES)
def test_our_own_folder_is_read_back_as_it_was(tmp_path: Path, case: str) -> None:
    model_settings, lora = CASES[case]
    adapter = make_adapter(make_model(tmp_path / "model", **model_settings), lora)
    write_adapter(tmp_path / "adapters", adapter, base_model="hub/base")
    for name, tensor in read_saved(tmp_path / "adapters", adapter).tensors.items():
        np.testing.assert_array_equal(tensor, adapter.tensors[name])
