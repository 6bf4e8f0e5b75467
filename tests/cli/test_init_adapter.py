"""`train --init-adapter`: an adapter goes on from where it was, on both backends, and nowhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.adapter import Adapter, LoraModule
from core.adapter_files import find_adapter, write_adapter
from core.architecture import read_architecture
from core.checkpoint import Checkpointer
from core.journal import JOURNAL
from tests.backends.conftest import skip_without
from tests.cli.conftest import Result, filled_adapter
from tests.tiny import make_model

Train = Callable[..., Result]


@pytest.fixture(params=["mlx", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return str(request.param)


@pytest.fixture
def given(tmp_path: Path, model: Path) -> Path:
    """An adapter with a rank and a scale of its own for one module, on the upper layer only."""
    adapter = filled_adapter(model, rank=3, alpha=5, frozen_fraction=0.5, targets=["q_proj", "up_proj"])
    narrow = next(name for name in adapter.modules if name.endswith("up_proj"))
    a, b = adapter.matrices(narrow)
    tensors = {**adapter.tensors, f"{narrow}.lora_A": a[:2], f"{narrow}.lora_B": b[:, :2]}
    mixed = Adapter({**adapter.modules, narrow: LoraModule(2, 9.0)}, tensors, adapter.num_layers)
    write_adapter(tmp_path / "given", mixed, base_model=str(model), forms=("peft",))
    return tmp_path / "given"


def first_record(folder: Path) -> dict[str, Any]:
    with open(folder / JOURNAL, encoding="utf-8") as file:
        record: dict[str, Any] = json.loads(file.readline())
    return record


def test_training_goes_on_from_the_adapter(backend: str, train: Train, model: Path, given: Path) -> None:
    options = ("--backend", backend, "--init-adapter", given)
    assert train("--output", "plain", "--backend", backend).code == 0
    # a rate that changes nothing: what is saved is what was given
    result = train("--output", "run", *options, "--set", "optim.lr=1e-30")
    assert result.code == 0, result.err
    architecture = read_architecture(model)
    before, after = (find_adapter(folder).read(architecture) for folder in (given, Path("run")))
    assert after.modules == before.modules
    for name in before.tensors:
        np.testing.assert_allclose(after.tensors[name], before.tensors[name], rtol=1e-6, atol=1e-7)
    start, plain = first_record(Path("run")), first_record(Path("plain"))
    assert abs(start["val_loss"] - plain["val_loss"]) > 1e-3
    assert "initial adapter: validation" in result.out
    assert json.loads(Path("run/training_summary.json").read_text())["start"] == "initial adapter"
    assert result.out.count("No better than the initial adapter") == 1


def test_both_backends_start_from_the_same_place(train: Train, given: Path) -> None:
    losses = []
    for backend in ("mlx", "cuda"):
        skip_without(backend)
        assert train("--output", backend, "--backend", backend, "--init-adapter", given).code == 0
        losses.append(first_record(Path(backend))["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_adapter_decides_and_says_so(train: Train, run_cli: Train, given: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lora: {targets: attention, alpha: 99}\n")
    result = train("--output", "run", "--init-adapter", given, "--config", "mine.yaml")
    assert result.code == 0, result.err
    assert "decides: lora.alpha 5.0 (not 99.0, from mine.yaml)" in result.out
    shown = run_cli("config", "show", "--config", "run/config.yaml").out
    for line in ("rank: 3", "alpha: 5.0", "targets: [self_attn.q_proj, mlp.up_proj]", "frozen_fraction: 0.5"):
        assert line in shown


@pytest.mark.parametrize(("flag", "value"), [("--rank", "7"), ("--alpha", "1"), ("--set", "lora.rslora=true")])
def test_what_is_typed_against_it_is_refused(train: Train, given: Path, flag: str, value: str) -> None:
    result = train("--output", "run", "--init-adapter", given, flag, value)
    assert result.code == 2
    assert f"(from {flag}): the adapter in {given} has" in result.err
    assert not Path("run").exists()


def test_the_run_goes_on_without_the_folder(train: Train, run_cli: Train, given: Path) -> None:
    """It keeps a copy, which it is resumed from even before the first checkpoint."""
    options = ("--init-adapter", given, "--set", "train.max_steps=4", "--set", "checkpoint.every=2")
    assert train("--output", "whole", *options).code == 0
    assert train("--output", "run", *options).code == 0
    state = json.loads(Path("run/training_state.json").read_text())
    Path("run/training_state.json").write_text(json.dumps({**state, "status": "running"}))
    shutil.rmtree("run/checkpoints")
    shutil.rmtree(given)
    result = run_cli("train", "--resume", "run")
    assert result.code == 0, result.err
    ends = [Checkpointer(Path(folder), keep=3).latest() for folder in ("whole", "run")]
    assert ends[0] is not None
    assert ends[1] is not None
    for name, tensor in ends[0].state.adapter.items():
        np.testing.assert_array_equal(ends[1].state.adapter[name], tensor)


def test_an_adapter_that_is_none(train: Train, tmp_path: Path) -> None:
    result = train("--output", "run", "--init-adapter", "missing")
    assert result.code == 2
    assert "missing: no such folder" in result.err
    assert not (tmp_path / "run").exists()


def test_generate_uses_an_adapter_of_several_ranks(train: Train, run_cli: Train, given: Path) -> None:
    assert train("--output", "run", "--init-adapter", given).code == 0
    result = run_cli("generate", "run", "--prompt", "Say red 1.", "--max-tokens", "4")
    assert result.code == 0, result.err
    assert "adapter" in result.out


def test_auto_means_the_model_of_the_adapter(run_cli: Train, rows: Path, given: Path, model: Path) -> None:
    options = ("--data", rows, "--bits", 16, "--device", "cpu", "--max-steps", 1, "--max-tokens", 96)
    result = run_cli("train", "--output", "run", "--init-adapter", given, *options)
    assert result.code == 0, result.err
    assert f"auto: {model}, which the adapter was made for" in result.out


def test_another_base_of_the_same_shape_is_warned_of(train: Train, given: Path, model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "elsewhere" / model.name, seed=9)
    result = train("--output", "run", "--init-adapter", given, "--model", other)
    assert result.code == 0, result.err
    assert f"{given}: made for {model}, not for {other}" in result.out
    shutil.copytree(model, tmp_path / "moved")
    result = train("--output", "run2", "--init-adapter", given, "--model", tmp_path / "moved")
    assert "made for" not in result.out
