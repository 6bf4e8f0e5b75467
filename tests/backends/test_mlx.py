"""What only the MLX backend has: a BLAS to load first, mlx-lm's readings to mend, and Metal's ways to fail."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import backends
from core.errors import OutOfMemoryError, UserError
from core.protocols import IGNORE, Batch
from tests.backends.conftest import (
    ROOT,
    assert_same_state,
    make_adapter,
    make_batch,
    make_config,
    microbatches,
    missing_package,
    open_learner,
    resolved,
)
from tests.tiny import VOCAB_SIZE, make_model

if missing := missing_package("mlx"):
    pytest.skip(f"mlx: {missing} is not installed", allow_module_level=True)

from backends.mlx import backend as backend_module
from backends.mlx import loss as loss_module
from backends.mlx import memory as memory_module
from backends.mlx.generate import generate
from backends.mlx.learner import MlxLearner
from core.sampling import pick_token

import mlx.core as mx  # isort: skip

LR = 3e-3
MLX = backends.get("mlx")
ON_LINUX = sys.platform.startswith("linux")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def opened() -> Iterator[Callable[..., MlxLearner]]:
    learners: list[Any] = []

    def open_one(folder: Path, **sections: Any) -> MlxLearner:
        learners.append(open_learner("mlx", folder, **sections))
        return learners[-1]

    yield open_one
    for learner in learners:
        learner.close()


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes config.json; a value of None removes the field."""
    raw = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def logits(learner: MlxLearner, tokens: np.ndarray) -> np.ndarray:
    hidden = learner.network.hidden_states(learner.parameters, mx.array(tokens))
    return np.array(learner.network.project(hidden).astype(mx.float32))


# --- imports, and the BLAS that must come first


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = """
import sys, backends
mlx = backends.get("mlx")
print([n for n in ("mlx.core", "mlx_lm", "transformers", "torch") if n in sys.modules])
mlx.probe()
print([n for n in ("mlx_lm", "transformers", "torch") if n in sys.modules])
"""
    assert run_python(code).split("\n") == ["[]", "[]"]


@pytest.mark.skipif(not ON_LINUX, reason="the Linux wheel's own trouble")
@pytest.mark.parametrize("module", ["backends.mlx.optim", "backends.mlx.model"])
def test_the_fast_blas_comes_before_mlx(module: str) -> None:
    code = f"""
import ctypes, os, sys
seen = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx.core": seen.append("mlx")
sys.meta_path.insert(0, Finder())
load = ctypes.CDLL
def spy(name, *args, **kwargs):
    seen.append("blas" if kwargs.get("mode") == ctypes.RTLD_GLOBAL else "other")
    return load(name, *args, **kwargs)
ctypes.CDLL = spy
import {module}
from backends.mlx.blas import preload_blas
print([s for s in seen if s != "other"], preload_blas(), os.environ.get("MKL_CBWR"))
"""
    order, *rest = run_python(code).rsplit("] ", 1)
    library, mode = rest[0].split(" ")
    if library == "":
        pytest.skip("no fast BLAS on this machine")
    assert order == "['blas', 'mlx'"
    assert library.startswith(("libmkl_rt.so", "libopenblas.so"))
    assert mode == ("AUTO,STRICT" if "mkl" in library else "None")


@pytest.mark.skipif(importlib.util.find_spec("mkl") is None and not ON_LINUX, reason="needs PyPI's mkl")
def test_mlx_computes_with_it() -> None:
    """`libmkl_rt` loads MKL's core when the first function is called: by MLX's matrix product, or by nobody."""
    code = """
import backends.mlx, mlx.core as mx
from backends.mlx.blas import preload_blas
def mapped(): return "libmkl_core" in open("/proc/self/maps").read()
before = mapped()
a = mx.ones((64, 64)); mx.eval(a @ a)
print(preload_blas(), before, mapped())
"""
    library, before, after = run_python(code).rjust(3).split(" ")
    if "mkl" not in library:
        pytest.skip("MKL is not installed")
    assert (before, after) == ("False", "True")


@pytest.mark.skipif(not ON_LINUX, reason="the Linux wheel's own trouble")
def test_a_slow_blas_is_reported() -> None:
    """No library can be loaded; MLX was there first; a setting of the user's stays."""
    nothing = """
import ctypes
def refuse(*args, **kwargs): raise OSError("no")
ctypes.CDLL = refuse
import backends
from backends.mlx.blas import preload_blas
print(repr(preload_blas()), *backends.get("mlx").probe().notes)
"""
    found = run_python(nothing)
    assert found.startswith("''")
    assert "30 times slower" in found
    assert "libopenblas0-pthread" in found
    late = "import mlx.core\nfrom backends.mlx.blas import preload_blas\nprint(repr(preload_blas()))"
    assert run_python(late) == "''"
    chosen = "import os\nos.environ['MKL_CBWR'] = 'AVX2'\nimport backends.mlx\nprint(os.environ['MKL_CBWR'])"
    assert run_python(chosen) == "AVX2"


@pytest.mark.parametrize("order", [("backends.mlx.optim", "torch"), ("torch", "backends.mlx.optim")])
def test_torch_lives_in_the_same_process(order: tuple[str, str]) -> None:
    pytest.importorskip("torch")
    code = f"""
import {order[0]}, {order[1]}
import numpy as np, torch, mlx.core as mx
a = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
exact = a.astype(np.float64) @ a.T.astype(np.float64)
for product in (np.array(mx.array(a) @ mx.array(a).T), (torch.from_numpy(a) @ torch.from_numpy(a).T).numpy()):
    print(np.abs(product - exact).max() < 1e-3)
"""
    assert run_python(code).split() == ["True", "True"]


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


def _make(folder: Path, name: str) -> Path:
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
    folder = _make(tmp_path / name, name)
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 40)).astype(np.int32)
    expected = _peer_logits(folder, tokens)
    config = make_config()
    learner = opened(folder, initial=make_adapter(folder, config, filled=False))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(learner, tokens), expected, rtol=0, atol=1e-5 * scale)


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
    folder = _make(tmp_path / "model", name)
    right = _peer_logits(folder, tokens)
    edit_config(folder, **MISREAD[name])
    assert np.abs(_peer_logits(folder, tokens) - right).max() > 1e-3 * np.abs(right).max()


@pytest.mark.parametrize("name", ["theta-new", "mixtral-theta"])
def test_what_transformers_saves_can_be_read(opened: Callable[..., MlxLearner], tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = _make(tmp_path / "made", name)
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


# --- the step


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_compiled_equals_uncompiled(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Metal the step is compiled: with accumulation, dropout, recomputation and a restored state."""
    sections = {"lora": {"dropout": 0.3}, "train": {"gradient_checkpointing": True}, "optim": {"max_grad_norm": 1.0}}
    calls: list[Any] = []
    compile_ = mx.compile
    monkeypatch.setattr(mx, "compile", lambda function: calls.append(function) or compile_(function))
    init = MlxLearner.__init__

    def with_(compiled: bool) -> Any:
        def patched(self: MlxLearner, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **{**kwargs, "compiled": compiled})

        monkeypatch.setattr(MlxLearner, "__init__", patched)
        return open_learner("mlx", llama, **sections)

    found = []
    for compiled in (False, True):
        learner = with_(compiled)
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
        learner.train_step([make_batch()], step=1, lr=LR)
        assert len(used) == layers
        learner.evaluate([make_batch()])
        assert len(used) == layers
    assert TransformerBlock.__call__ is call


@pytest.fixture
def wide_vocabulary(tmp_path: Path) -> Path:
    return make_model(tmp_path / "wide", vocab_size=32768, num_layers=1)


def _peak(learner: MlxLearner, batch: Batch, call: str) -> int:
    """Bytes that a call needs at most beyond those in use before it."""
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
def test_logits_never_exist_whole(
    wide_vocabulary: Path, opened: Callable[..., MlxLearner], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Logits of 344 targets x 32768 tokens in float32 are 43 MiB; few targets, or chunks of 8, must need far less."""
    learner = opened(wide_vocabulary)
    everywhere = make_batch((128, 128, 128, 128))
    whole = everywhere.num_targets * 32768 * 4
    few = replace(everywhere, targets=everywhere.targets.copy())
    few.targets[:, :-4] = IGNORE
    _peak(learner, few, call)
    assert _peak(learner, few, call) < whole / 3
    assert _peak(learner, everywhere, call) > whole
    monkeypatch.setattr(loss_module, "CHUNK", 8)
    assert _peak(learner, everywhere, call) < whole / 4


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


# --- text


def _greedy_without_cache(learner: MlxLearner, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(learner, np.array([ids], np.int32))[0, -1].argmax()))
    return ids[len(prompt) :]


NO_END = SimpleNamespace(eos_token_id=None)


def test_greedy_text_equals_recomputation(
    folders: dict[str, Path],
    kind: str,
    opened: Callable[..., MlxLearner],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With a cache, a window that has long been passed and a prompt in several parts; dropout plays no role."""
    folder = shutil.copytree(folders[kind], tmp_path / "model")
    edit_config(folder, eos_token_id=None)
    learner = opened(folder, lora={"dropout": 0.5})
    learner.train_step(microbatches(), step=1, lr=LR)  # leaves dropout keys in the modules
    prompt = np.random.default_rng(3).integers(3, VOCAB_SIZE, 21).tolist()
    expected = _greedy_without_cache(learner, prompt, 16)
    assert generate(learner, NO_END, prompt, max_tokens=16) == expected
    monkeypatch.setattr("backends.mlx.generate._PREFILL", 8)
    assert generate(learner, NO_END, prompt, max_tokens=16) == expected


def test_text_stops_at_end_tokens(llama: Path, opened: Callable[..., MlxLearner], tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    edit_config(folder, eos_token_id=None)
    prompt = [5, 6, 7]
    text = generate(opened(folder), NO_END, prompt, max_tokens=12)
    assert len(text) == 12
    end = next(token for token in text[3:] if token not in text[:3])
    expected = text[: text.index(end)]
    by_tokenizer = generate(opened(folder), SimpleNamespace(eos_token_id=end), prompt, max_tokens=12)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [VOCAB_SIZE + 1, end]}))
    assert by_tokenizer == generate(opened(folder), NO_END, prompt, max_tokens=12) == expected
    assert generate(opened(folder), NO_END, prompt, max_tokens=2) == text[:2]


def test_sampled_text(llama: Path, opened: Callable[..., MlxLearner]) -> None:
    learner = opened(llama)

    def sample(**settings: Any) -> list[int]:
        return generate(learner, NO_END, [5, 6, 7], max_tokens=8, **settings)

    assert sample(temperature=5.0, seed=1) == sample(temperature=5.0, seed=1)
    assert sample(temperature=5.0, seed=1) != sample(temperature=5.0, seed=2)
    assert sample(temperature=5.0, top_k=1, seed=3) == sample()
    assert sample(temperature=1e-4, seed=3) == sample()


def test_pick_token_draws_what_it_should() -> None:
    """Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1; 0.64, 0.16, 0.04, 0.04 over 0.88 at 1/2 (squares)."""
    values = np.log([0.125, 0.5, 0.125, 0.25])

    def shares(temperature: float, top_p: float = 1.0, top_k: int = 0) -> np.ndarray:
        random = np.random.default_rng(0)
        drawn = [pick_token(values, temperature, top_p=top_p, top_k=top_k, random=random) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(1.0), [0.125, 0.5, 0.125, 0.25], atol=0.03)
    np.testing.assert_allclose(shares(0.5), np.array([1, 16, 1, 4]) / 22, atol=0.03)
    np.testing.assert_allclose(shares(1.0, top_k=2), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(shares(1.0, top_p=0.6), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    assert shares(1.0, top_p=0.3).tolist() == [0, 1, 0, 0]


# --- memory, devices, packages


@pytest.mark.parametrize(
    "text",
    [
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of 8.",
        "[malloc_or_wait] Unable to allocate 9 bytes.",
        "[metal::malloc] Resource limit (499000) exceeded.",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackError)",
    ],
)
def test_running_out_of_memory(llama: Path, opened: Callable[..., MlxLearner], text: str) -> None:
    learner = opened(llama)
    state = learner.export_state()

    def fail(*_: Any) -> Any:
        raise RuntimeError(text)

    learner._gradients = learner._losses = fail
    with pytest.raises(OutOfMemoryError, match="2 x 2 x 16 tokens") as caught:
        learner.train_step([make_batch(width=16)] * 2, step=1, lr=LR)
    assert "\n" not in caught.value.what
    with pytest.raises(OutOfMemoryError, match="evaluation"):
        learner.evaluate(microbatches())
    assert_same_state(learner.export_state(), state)


def test_loading_can_run_out_of_memory_and_other_errors_stay(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_lm.utils

    config = make_config()

    def failing(text: str) -> Callable[..., Any]:
        def load_model(*_: Any, **__: Any) -> Any:
            raise RuntimeError(text)

        return load_model

    for text, kind in (
        ("[malloc] Unable to allocate 9 bytes.", OutOfMemoryError),
        ("[load_safetensors] bad", UserError),
    ):
        monkeypatch.setattr(mlx_lm.utils, "load_model", failing(text))
        with pytest.raises(UserError) as caught:
            MLX.open(config, resolved(llama), make_adapter(llama, config))
        assert type(caught.value) is kind
    with pytest.raises(RuntimeError, match="something else"), memory_module.translate_out_of_memory("a step"):
        raise RuntimeError("something else")


def test_the_buffer_cache_is_bounded_and_given_back(llama: Path) -> None:
    gib = 2**30
    assert [memory_module.cache_limit_bytes(n * gib) // gib for n in (8, 16, 64, 512)] == [1, 1, 4, 8]
    before = mx.set_cache_limit(123 * gib)
    mx.set_cache_limit(123 * gib)
    learner = open_learner("mlx", llama)
    limit = mx.set_cache_limit(7)
    mx.set_cache_limit(limit)
    assert limit == memory_module.cache_limit_bytes(memory_module.total_bytes())
    learner.close()
    learner.close()
    assert mx.set_cache_limit(before) == 123 * gib


def test_the_cache_counts_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = memory_module.MemoryMeter(accelerator=True)
    figures = {"get_active_memory": 5, "get_cache_memory": 7, "get_peak_memory": 9}
    for name, value in figures.items():
        monkeypatch.setattr(mx, name, lambda value=value: value)
    assert (meter.read().current_bytes, meter.read().peak_bytes) == (12, 12)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 40)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    assert (meter.read().current_bytes, meter.read().peak_bytes) == (5, 40)


def test_slow_choices_on_a_cpu_are_warned_of() -> None:
    if MLX.probe("auto").accelerator:
        pytest.skip("this machine has an accelerator")
    found = MLX.check(make_config(device="cpu", model={"bits": 4, "dtype": "bfloat16"}))
    assert [line.split(":")[0] for line in found] == ["model.dtype", "model.bits"]
    assert "bfloat16" in found[0]


def test_missing_packages_are_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "mlx-lm":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    report = MLX.probe()
    assert not report.available
    assert "mlx-lm not installed" in report.problem
    assert "pip install" in report.problem
    assert report.packages.keys() == {"mlx"}
    with pytest.raises(UserError, match="needs mlx-lm"):
        MLX.open(make_config(), resolved(llama), make_adapter(llama, make_config()))


def test_a_broken_installation_is_reported() -> None:
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx.core": raise ImportError("libmlx.so: cannot open shared object file")
sys.meta_path.insert(0, Broken())
import backends
report = backends.get("mlx").probe()
print(report.available, report.problem)
"""
    assert run_python(code) == "False mlx does not work here: ImportError: libmlx.so: cannot open shared object file"
