"""Adapter folders that peers write and we don't: old names, patterns, and files that say one thing and hold another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.adapter import Adapter, LoraModule, plan_adapter
from core.adapter_files import CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS, find_adapter, write_adapter
from core.architecture import Architecture, read_architecture
from core.config import LoraConfig
from core.convert import _check_values
from core.errors import UserError
from core.init_adapter import keep, read_kept
from tests.tiny import make_model

EXPERTS, HIDDEN, WIDE = 4, 64, 128


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return read_architecture(make_model(tmp_path_factory.mktemp("m") / "mixtral", model_type="mixtral"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return read_architecture(make_model(tmp_path_factory.mktemp("l") / "llama"))


def filled(architecture: Architecture, **lora: Any) -> Adapter:
    adapter = plan_adapter(LoraConfig.model_validate({"rank": 4, "alpha": 16, **lora}), architecture, seed=0)
    rng = np.random.default_rng(0)
    return adapter.with_tensors(
        {name: rng.normal(size=tensor.shape).astype(np.float32) for name, tensor in adapter.tensors.items()}
    )


def pair(rng: np.random.Generator, out: int, inner: int, rank: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(rank, inner)).astype(np.float32), rng.normal(size=(out, rank)).astype(np.float32)


def old_mixtral_folder(folder: Path, *, names: tuple[str, ...] = ("w1", "w2", "w3"), **config: Any) -> Path:
    """As PEFT with transformers 4 saves an adapter on layer 0's experts and router."""
    rng = np.random.default_rng(3)
    tensors = {}
    stem = "base_model.model.model.layers.0.block_sparse_moe"
    for name in names:
        for expert in range(EXPERTS):
            out, inner = (HIDDEN, WIDE) if name == "w2" else (WIDE, HIDDEN)
            place = f"{stem}.experts.{expert}.{name}"
            tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = pair(rng, out, inner)
    tensors[f"{stem}.gate.lora_A.weight"], tensors[f"{stem}.gate.lora_B.weight"] = pair(rng, EXPERTS, HIDDEN)
    folder.mkdir()
    save_file(tensors, folder / PEFT_WEIGHTS)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [*names, "gate"], **config}
    (folder / CONFIG).write_text(json.dumps(plain))
    return folder


def test_a_pattern_for_the_router_of_an_old_folder(tmp_path: Path, mixtral: Architecture) -> None:
    folder = old_mixtral_folder(tmp_path / "old", alpha_pattern={"gate": 32})
    adapter = find_adapter(folder).read(mixtral)
    assert adapter.modules["model.layers.0.mlp.gate"] == LoraModule(4, 32.0)
    assert adapter.modules["model.layers.0.mlp.experts.up_proj"] == LoraModule(4, 8.0)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [(4, 4), (4, 8)])
def test_the_copy_that_a_run_keeps_is_the_adapter(
    tmp_path: Path, mixtral: Architecture, rslora: bool, ranks: tuple[int, int]
) -> None:
    """Through PEFT's fused form it would come back an ulp, or a rank, off, and the run could not be resumed."""
    adapter = filled(mixtral, targets="all-linear", rslora=rslora, dropout=0.25)
    modules, tensors = dict(adapter.modules), dict(adapter.tensors)
    for name in adapter.modules:
        if name.endswith("up_proj"):
            modules[name] = LoraModule(ranks[1], 7.0)
            a, b = adapter.matrices(name)
            tensors[f"{name}.lora_A"] = np.repeat(a, ranks[1] // ranks[0], axis=-2)
            tensors[f"{name}.lora_B"] = np.repeat(b, ranks[1] // ranks[0], axis=-1)
    adapter = replace(adapter, modules=modules, tensors=tensors)
    keep(tmp_path / "kept", adapter)
    again = read_kept(tmp_path / "kept", dropout=0.25)
    assert again.fingerprint == adapter.fingerprint
    assert again.modules == adapter.modules
    assert list(again.tensors) == list(adapter.tensors)
    assert (again.rslora, again.dropout, again.num_layers) == (rslora, 0.25, adapter.num_layers)


def test_a_damaged_copy_is_said(tmp_path: Path, llama: Architecture) -> None:
    keep(tmp_path / "kept", filled(llama))
    (tmp_path / "kept" / "adapter.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="can't be read"):
        read_kept(tmp_path / "kept", dropout=0.0)


def changed_config(folder: Path, **changes: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "change",
    [{"target_modules": ["q_proj"]}, {"target_modules": r".*\.q_proj"}, {"layers_to_transform": [1]}],
)
def test_tensors_that_peft_would_pass_over(tmp_path: Path, llama: Architecture, change: dict[str, Any]) -> None:
    write_adapter(tmp_path / "a", filled(llama, targets=["q_proj", "v_proj"]), base_model="tiny", forms=("peft",))
    with pytest.raises(UserError, match=r"model\.layers\.0\..*which adapter_config.json does not target"):
        find_adapter(changed_config(tmp_path / "a", **change)).read(llama)


@pytest.mark.parametrize("change", [{"target_modules": r".*\.(q|v)_proj"}, {"target_modules": "all-linear"}])
def test_targets_as_a_pattern(tmp_path: Path, llama: Architecture, change: dict[str, Any]) -> None:
    adapter = filled(llama, targets=["q_proj", "v_proj"])
    write_adapter(tmp_path / "a", adapter, base_model="tiny", forms=("peft",))
    assert find_adapter(changed_config(tmp_path / "a", **change)).read(llama).modules == adapter.modules


def test_experts_that_are_not_targeted(tmp_path: Path, mixtral: Architecture) -> None:
    folder = old_mixtral_folder(tmp_path / "old")
    with pytest.raises(UserError, match=r"experts\.0\.w1, which adapter_config.json does not target"):
        find_adapter(changed_config(folder, target_modules=["w2", "gate"])).read(mixtral)


@pytest.mark.parametrize("change", [{"num_layers": 1}, {"lora_parameters": {"rank": 4, "scale": 4.0, "keys": ["x"]}}])
def test_tensors_that_mlx_lm_would_pass_over(tmp_path: Path, llama: Architecture, change: dict[str, Any]) -> None:
    write_adapter(tmp_path / "a", filled(llama), base_model="tiny", forms=("mlx",))
    with pytest.raises(UserError, match=r"which adapter_config\.json does not adapt"):
        find_adapter(changed_config(tmp_path / "a", **change)).read(llama)


@pytest.mark.parametrize("num_layers", [-1, 0, 2, None])
def test_all_layers_in_mlx_lms_ways(tmp_path: Path, llama: Architecture, num_layers: int | None) -> None:
    adapter = filled(llama)
    write_adapter(tmp_path / "a", adapter, base_model="tiny", forms=("mlx",))
    assert (tmp_path / "a" / MLX_WEIGHTS).is_file()
    found = find_adapter(changed_config(tmp_path / "a", num_layers=num_layers)).read(llama)
    assert found.modules.keys() == adapter.modules.keys()


@pytest.mark.parametrize("form", ["peft", "mlx"])
def test_halves_and_scales_of_zero(tmp_path: Path, mixtral: Architecture, form: Any) -> None:
    """An adapter whose first module has scale 0, and of whose experts one projection does nothing."""
    adapter = filled(mixtral, targets="all-linear")
    first = next(iter(adapter.modules))
    gate, up = (f"model.layers.{layer}.mlp.experts.{key}" for layer, key in ((0, "gate_proj"), (1, "up_proj")))
    modules = {**adapter.modules, first: LoraModule(4, 0.0), gate: LoraModule(4, 0.0)}
    tensors = {**adapter.tensors, f"{up}.lora_B": np.zeros_like(adapter.tensors[f"{up}.lora_B"])}
    adapter = replace(adapter, modules=modules, tensors=tensors)
    write_adapter(tmp_path / "a", adapter, base_model="tiny", forms=(form,))
    _check_values(adapter, find_adapter(tmp_path / "a", form=form).read(mixtral), form=form)


def test_a_changed_value_is_found(tmp_path: Path, mixtral: Architecture) -> None:
    adapter = filled(mixtral, targets="all-linear")
    name = "model.layers.1.mlp.experts.up_proj.lora_B"
    changed = adapter.tensors[name].copy()
    changed[3, 100, 2] += 1e-2
    with pytest.raises(AssertionError, match="up_proj is off"):
        _check_values(adapter, adapter.with_tensors({**adapter.tensors, name: changed}), form="mlx")
