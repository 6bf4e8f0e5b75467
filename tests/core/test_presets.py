"""The presets are the reference set-ups."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import cli
from core.errors import UserError
from core.settings import (
    preset_names,
    resolve,
)
from tests.core.resolving import refusal, value_of

MISTRAL_MLX = "mlx-community/Mistral-7B-Instruct-v0.3-4bit"
MIXTRAL_INSTRUCT = "mistralai/Mixtral-8x7B-Instruct-v0.1"
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]

PRESETS: dict[str, dict[str, Any]] = {
    "mistral-mlx-v1": {
        "backend": "mlx", "model.path": MISTRAL_MLX, "model.bits": 4,
        "lora.rank": 8, "lora.alpha": 16, "lora.dropout": 0.0, "lora.targets": "attention",
        "optim.lr": 5e-4, "schedule.name": "constant", "train.batch_size": 4, "train.accumulation": 4,
        "optim.weight_decay": 0.0, "optim.max_grad_norm": 1.0, "train.epochs": 3,
        "eval.every": 200, "guard.patience": None,
    },
    "mistral-mlx-v2": {
        "backend": "mlx", "model.path": MISTRAL_MLX, "model.bits": 4,
        "lora.rank": 6, "lora.alpha": 12, "lora.dropout": 0.08, "lora.targets": "attention",
        "optim.lr": 2e-4, "schedule.name": "cosine", "schedule.warmup_ratio": 0.03,
        "train.batch_size": 2, "train.accumulation": 4,
        "optim.weight_decay": 0.01, "optim.max_grad_norm": 1.0, "train.epochs": 3,
        "eval.every": 200, "guard.patience": 5, "guard.min_delta": 0.001,
    },
    "mixtral-expert": {
        "backend": "cuda", "model.path": MIXTRAL_INSTRUCT, "model.bits": 4,
        "lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.15,
        "lora.targets": [*QKVO, "gate_proj", "up_proj", "down_proj"],
        "optim.lr": 1.5e-5, "schedule.name": "cosine", "schedule.warmup_ratio": 0.03,
        "train.batch_size": 1, "train.accumulation": 8,
        "optim.weight_decay": 0.08, "optim.max_grad_norm": 1.0, "train.epochs": 3,
        "eval.every": 50, "guard.patience": 3, "guard.min_delta": 0.0,
        "lora.frozen_fraction": 0.5, "data.validation": 0.2,
    },
    "mixtral-attention": {
        "backend": "cuda", "model.path": MIXTRAL_INSTRUCT, "model.bits": 16,
        "lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.05, "lora.targets": "attention",
        "optim.lr": 2e-4, "schedule.name": "cosine", "schedule.min_lr": 1e-6, "schedule.warmup_ratio": 0.03,
        "train.batch_size": 1, "train.accumulation": 16,
        "optim.weight_decay": 0.01, "optim.max_grad_norm": 1.0, "train.epochs": 3,
        "eval.every": 100, "guard.patience": 3, "guard.min_delta": 0.001,
        "moe.aux_loss_weight": 0.001, "data.max_tokens": 4096, "data.validation": 0.05, "checkpoint.keep": 3,
    },
    "mistral-nli": {
        "backend": "cuda", "model.path": "mistralai/Mistral-7B-v0.3", "model.bits": 4,
        "lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.05, "lora.targets": "attention",
        "optim.lr": 2e-4, "schedule.name": "cosine", "schedule.warmup_ratio": 0.03,
        "train.batch_size": 4, "train.accumulation": 4,
        "optim.weight_decay": 0.01, "optim.max_grad_norm": 1.0, "train.epochs": 3,
        "eval.every": 250, "guard.patience": 3, "guard.min_delta": 0.0,
        "optim.name": "adamw", "optim.state_bits": 8, "optim.paged": True, "data.max_tokens": 512,
    },
    "mixtral-academic": {
        "backend": "cuda", "model.path": "mistralai/Mixtral-8x7B-v0.1", "model.bits": 4,
        "lora.rank": 16, "lora.alpha": 16, "lora.dropout": 0.05, "lora.targets": [*QKVO, "gate_proj"],
        "optim.lr": 2.5e-5, "schedule.name": "constant", "schedule.warmup_steps": 5,
        "train.batch_size": 1, "train.accumulation": 4,
        "optim.weight_decay": 0.001, "optim.max_grad_norm": 0.3, "train.epochs": 1,
        "eval.every": 30, "guard.patience": None,
        "data.max_tokens": 1200, "data.validation": 0.1, "data.test": 0.1,
    },
    "conservative": {
        "optim.lr": 1e-4, "train.accumulation": 32, "optim.weight_decay": 0.1, "train.epochs": 5,
    },
    "balanced": {
        "optim.lr": 2e-4, "train.accumulation": 16, "optim.weight_decay": 0.01, "train.epochs": 3,
    },
    "aggressive": {
        "optim.lr": 3e-4, "train.accumulation": 8, "optim.weight_decay": 0.001, "train.epochs": 2,
    },
    "quickstart": {
        "backend": "auto", "model.path": "HuggingFaceTB/SmolLM2-135M-Instruct", "lora.targets": "attention",
    },
}  # fmt: skip


def test_these_are_all_presets() -> None:
    assert preset_names() == sorted(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_reference_set_up(preset: str) -> None:
    config = resolve(presets=[preset]).config
    assert {name: value_of(config, name) for name in PRESETS[preset]} == PRESETS[preset]


@pytest.mark.parametrize("overlay", ["conservative", "balanced", "aggressive"])
def test_an_overlay_sets_nothing_but_its_four(overlay: str) -> None:
    assert set(resolve(presets=[overlay]).sources) == set(PRESETS[overlay])


def test_the_constant_baseline_has_no_warmup() -> None:
    assert resolve(presets=["mistral-mlx-v1"]).config.schedule.warmup_ratio == 0.0


def test_hints_name_commands_that_exist() -> None:
    """`config show` is named in hints; the command line must have it."""

    named = re.findall(r"python cli\.py ([a-z ]+)", str(refusal(assignments=["quux=1"])))
    assert named == ["config show"]
    args = cli.build_parser().parse_args(["config", "show"])
    assert callable(args.run_command)


def test_a_section_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("lora: {rank: 4}\noptim: {lr: 1.0e-3}\nlora: {alpha: 8}\n")
    with pytest.raises(UserError, match=r"twice.yaml, line 3: not YAML \('lora' stands twice\)"):
        resolve(files=[file])
