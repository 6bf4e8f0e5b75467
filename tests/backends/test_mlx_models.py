"""Models in MLX: read as transformers reads them, packed as mlx-lm packs them, and the text that they give."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import backends
from core.errors import UserError
from core.protocols import IGNORE, Batch
from tests.backends.conftest import (
    LR,
    assert_same_state,
    make_adapter,
    make_config,
    microbatches,
    missing_package,
    resolved,
)
from tests.tiny import VOCAB_SIZE, make_model

if missing := missing_package("mlx"):
    pytest.skip(f"mlx: {missing} is not installed", allow_module_level=True)

from backends.mlx.learner import MlxLearner

import mlx.core as mx  # isort: skip

MLX = backends.get("mlx")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="session")
def backend() -> str:
    return "mlx"


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes config.json; a value of None removes the field."""
    raw = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def logits(learner: MlxLearner, tokens: np.ndarray) -> np.ndarray:
    hidden = learner.network.hidden_states(learner.parameters, mx.array(tokens))
    return np.array(learner.network.project(hidden).astype(mx.float32))


# --- reading a folder as transformers reads it

FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "theta-old": ({"rope_theta": 100000.0}, {}),
    "theta-new": ({"rope_theta": 100000.0, "new_rope_style": True, "tied": True}, {}),
    "linear-old": ({"rope_theta": 50000.0}, {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama3-old": ({"rope_theta": 500000.0}, {"rope_scaling": LLAMA3}),
    "llama3-new": ({}, {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "yarn": (
        {},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 64},
    ),
    "wide-heads": ({"num_heads": 4}, {"head_dim": 32}),
    "biased": ({}, {"attention_bias": True}),
    "mistral-window": ({"model_type": "mistral", "sliding_window": 7, "new_rope_style": True}, {}),
    "mixtral-theta": ({"model_type": "mixtral", "rope_theta": 100000.0, "new_rope_style": True}, {}),
    "mixtral-default-theta": ({"model_type": "mixtral"}, {"rope_theta": None}),
    "mixtral-llama3": (
        {"model_type": "mixtral"},
        {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "sliding_window": 9},
    ),
}


def make_folder(folder: Path, name: str) -> Path:
    """A model of `FOLDERS`."""
    settings, changes = FOLDERS[name]
    make_model(folder, **settings)
    edit_config(folder, **changes)
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(1)
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        if name == "wide-heads":
            for key, shape in {"q": (128, 64), "k": (64, 64), "v": (64, 64), "o": (64, 128)}.items():
                weights[f"{prefix}{key}_proj.weight"] = rng.normal(0, 0.08, shape).astype(np.float32)
        if name == "biased":
            for key, size in {"q": 64, "k": 32, "v": 32, "o": 64}.items():
                weights[f"{prefix}{key}_proj.bias"] = rng.normal(0, 0.3, size).astype(np.float32)
    # larger queries and keys than `make_model` gives, so that positions matter to the logits
    for key in weights:
        if "q_proj.weight" in key or "k_proj.weight" in key:
            weights[key] *= 3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _peer_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_equal_those_of_transformers(opened: Callable[..., MlxLearner], tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / name, name)
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 40)).astype(np.int32)
    expected = _peer_logits(folder, tokens)
    config = make_config()
    learner = opened(folder, initial=make_adapter(folder, config, filled=False))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(learner, tokens), expected, rtol=0, atol=1e-5 * scale)
    # Rows of several lengths with a start in common, as they are trained: packed, where the model allows it.
    tokens[1, :12] = tokens[0, :12]
    targets = np.full_like(tokens, IGNORE)
    targets[0, 12:], targets[1, 12:30] = 5, 5
    expected = _peer_logits(folder, tokens)[targets != IGNORE]
    found = learner.target_logits(Batch(np.arange(2), tokens, targets))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


MISREAD: dict[str, dict[str, Any]] = {
    "theta-old": {"rope_theta": None},
    "theta-new": {"rope_parameters": None},
    "linear-old": {"rope_scaling": None},
    "llama3-new": {"rope_parameters": {"rope_theta": 5e5}},
    "yarn": {"rope_parameters": None},
    "mistral-window": {"sliding_window": 4096},
    "mixtral-theta": {"rope_parameters": {"rope_theta": 1e6}},
    "mixtral-llama3": {"rope_parameters": {"rope_theta": 5e5}},
}


@pytest.mark.parametrize("name", MISREAD)
def test_a_misreading_would_show(tmp_path: Path, name: str) -> None:
    """The comparison above is worth something: what mlx-lm by itself reads moves the logits far beyond it."""
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 40)).astype(np.int32)
    folder = make_folder(tmp_path / "model", name)
    right = _peer_logits(folder, tokens)
    edit_config(folder, **MISREAD[name])
    assert np.abs(_peer_logits(folder, tokens) - right).max() > 1e-3 * np.abs(right).max()


@pytest.mark.parametrize("name", ["theta-new", "mixtral-theta"])
def test_what_transformers_saves_can_be_read(opened: Callable[..., MlxLearner], tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = make_folder(tmp_path / "made", name)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    rows = [opened(path).evaluate(microbatches()) for path in (folder, tmp_path / "saved")]
    np.testing.assert_array_equal(rows[0].nll, rows[1].nll)


@pytest.mark.parametrize(
    ("field", "model_type", "changes"),
    [
        ("rope_type", "llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        (
            "attention_factor",
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "attention_factor": 1.0}},
        ),
        ("partial_rotary_factor", "llama", {"partial_rotary_factor": 0.5}),
        ("hidden_act", "mistral", {"hidden_act": "gelu"}),
        ("head_dim", "mixtral", {"head_dim": 32}),
        ("bitsandbytes", "llama", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    ],
)
def test_what_mlx_lm_would_misread_is_refused(
    tmp_path: Path, field: str, model_type: str, changes: dict[str, Any]
) -> None:
    folder = make_model(tmp_path / "model", model_type=model_type)
    adapter = make_adapter(folder, make_config())
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=field) as caught:
        MLX.open(make_config(), resolved(folder), adapter)
    assert caught.value.hint


# --- 4 bits


def test_quantised_as_mlx_lm_does_it(
    folders: dict[str, Path], kind: str, opened: Callable[..., MlxLearner], tmp_path: Path
) -> None:
    """A 16-bit folder quantised on loading gives the losses of the folder that mlx-lm quantised, to the bit."""
    from mlx_lm.utils import load_model, quantize_model, save

    folder, made = folders[kind], tmp_path / "mlx-4bit"
    module, raw = load_model(folder, model_config={"tie_word_embeddings": False})
    module, raw = quantize_model(module, raw, group_size=64, bits=4)
    shutil.copytree(folder, made)
    (made / "model.safetensors").unlink()
    save(made, folder, module, SimpleNamespace(save_pretrained=lambda _: None), raw)
    assert json.loads((made / "config.json").read_text())["quantization"]["bits"] == 4
    ours, theirs = opened(folder, model={"bits": 4}), opened(made, model={"bits": 4})
    np.testing.assert_array_equal(ours.evaluate(microbatches()).nll, theirs.evaluate(microbatches()).nll)
    assert ours.num_parameters == theirs.num_parameters
    for learner in (ours, theirs):
        learner.train_step(microbatches(), step=1, lr=LR)
    assert_same_state(ours.export_state(), theirs.export_state())
    with pytest.raises(UserError, match="quantised already") as caught:
        opened(made, model={"bits": 16})
    assert caught.value.hint == "set model.bits=4"


def test_modules_that_stay_16_bit_are_named(
    opened: Callable[..., MlxLearner], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """96 is not a multiple of 64: the down projections stay, the others don't."""
    folder = make_model(tmp_path / "model", intermediate_size=96)
    with caplog.at_level(logging.WARNING, logger="twinkeel"):
        opened(folder, model={"bits": 4})
    named = [record.getMessage() for record in caplog.records if "16 bits" in record.getMessage()]
    assert len(named) == 1
    assert named[0].startswith("model.bits 4: 2 modules")
    assert "model.layers.1.mlp.down_proj" in named[0]
