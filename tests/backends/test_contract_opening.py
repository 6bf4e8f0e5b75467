"""What every backend promises (`core.protocols`) of 4 bits, of what can't be opened, and of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import backends
from core.adapter import Adapter
from core.architecture import read_architecture
from core.errors import UserError
from tests.backends.conftest import LR, Open, assert_same_state, make_adapter, make_config, microbatches, resolved
from tests.tiny import make_model

# --- 4 bits, and what can't be opened


def test_four_bits(opened: Open, llama: Path) -> None:
    """Near the 16-bit losses but not equal to them, and it trains and restores like any other."""
    full, quantised = opened(llama), opened(llama, model={"bits": 4})
    ours, theirs = quantised.evaluate(microbatches()), full.evaluate(microbatches())
    assert 1e-4 < abs(ours.mean / theirs.mean - 1) < 0.1
    assert "4" in quantised.description
    assert quantised.num_parameters == full.num_parameters
    before = quantised.export_state()
    losses = [float(quantised.train_step(microbatches(), step=s, lr=0.02).loss) for s in range(1, 9)]
    assert losses[-1] < losses[0] - 0.5
    quantised.import_state(before)
    np.testing.assert_array_equal(quantised.evaluate(microbatches()).nll, ours.nll)


def _break_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _break_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    weights[name] = weights[name][:16].copy()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _break_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _break_type(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "gpt2"}))


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("damage", [_break_missing, _break_shape, _break_file, _break_type, _remove_weights])
def test_bad_folders_are_refused(
    backend: str, llama: Path, tmp_path: Path, damage: Callable[[Path], None], bits: int
) -> None:
    folder = tmp_path / "broken-model"
    shutil.copytree(llama, folder)
    config = make_config(model={"bits": bits})
    adapter = make_adapter(folder, config)
    damage(folder)
    with pytest.raises(UserError) as caught:
        backends.get(backend).open(config, resolved(folder), adapter)
    assert "broken-model" in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.hint


def test_adapter_of_another_model_is_refused(opened: Open, llama: Path, tmp_path: Path) -> None:
    deeper = make_model(tmp_path / "deeper", num_layers=3)
    adapter: Adapter = make_adapter(deeper, make_config())
    assert read_architecture(llama).num_layers == 2
    with pytest.raises(UserError):
        opened(llama, initial=adapter)


# --- check, probe, memory


def test_check_warns_and_refuses(backend: str) -> None:
    chosen = backends.get(backend)
    assert list(chosen.check(make_config())) == []
    found = "\n".join(chosen.check(make_config(optim={"state_bits": 8, "paged": True})))
    assert "optim.state_bits" in found
    assert "8" in found
    assert "optim.paged" in found


def test_eight_bit_state_falls_back_to_32(opened: Open, llama: Path) -> None:
    plain, eight = opened(llama), opened(llama, optim={"state_bits": 8})
    for learner in (plain, eight):
        learner.train_step(microbatches(), step=1, lr=LR)
    assert_same_state(plain.export_state(), eight.export_state())


def test_missing_gpu(backend: str, llama: Path) -> None:
    chosen = backends.get(backend)
    if chosen.probe().accelerator:
        pytest.skip("this machine has an accelerator")
    config = make_config(device="gpu")
    for refuse in (
        lambda: chosen.check(config),
        lambda: chosen.open(config, resolved(llama), make_adapter(llama, config)),
    ):
        with pytest.raises(UserError, match="gpu"):
            refuse()
    report = chosen.probe("gpu")
    assert not report.available
    assert report.problem


def test_probe_and_memory(backend: str, opened: Open, llama: Path) -> None:
    report = backends.get(backend).probe("cpu")
    assert report.available
    assert report.backend == backend
    assert not report.accelerator
    assert report.memory_bytes > 2**28
    assert report.packages
    memory = opened(llama).memory()
    assert 0 < memory.current_bytes <= memory.peak_bytes < memory.total_bytes
