"""What a mistake in the settings is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from core.settings import (
    describe_fields,
    field_names,
)
from tests.core.resolving import refusal, write


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lora.rnk", "lora.rank"),
        ("lora.rang", "lora.rank"),
        ("optim.lrr", "optim.lr"),
        ("rank", "lora.rank"),
        ("epochs", "train.epochs"),
        ("trian", "train"),
        ("guard.patince", "guard.patience"),
        ("lor", "lora"),
        # mlx-lm, TRL, PEFT, Axolotl, LLaMA-Factory
        ("learning_rate", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("lora_alpha", "lora.alpha"),
        ("lora_dropout", "lora.dropout"),
        ("r", "lora.rank"),
        ("lora.r", "lora.rank"),
        ("lora_r", "lora.rank"),
        ("lora.target_modules", "lora.targets"),
        ("num_train_epochs", "train.epochs"),
        ("num_epochs", "train.epochs"),
        ("iters", "train.max_steps"),
        ("per_device_train_batch_size", "train.batch_size"),
        ("micro_batch_size", "train.batch_size"),
        ("gradient_accumulation_steps", "train.accumulation"),
        ("grad_accumulation_steps", "train.accumulation"),
        ("max_seq_length", "data.max_tokens"),
        ("sequence_len", "data.max_tokens"),
        ("cutoff_len", "data.max_tokens"),
        ("val_set_size", "data.validation"),
        ("eval_steps", "eval.every"),
        ("steps_per_eval", "eval.every"),
        ("save_steps", "checkpoint.every"),
        ("logging_steps", "log.every"),
        ("lr_scheduler_type", "schedule.name"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(given: str, meant: str) -> None:
    error = refusal(assignments=[f"{given}=1"])
    assert error.what == f"{given}: no such setting (from --set)"
    assert error.hint == f"did you mean {meant}?"


def test_a_name_like_no_other(tmp_path: Path) -> None:
    error = refusal(files=[write(tmp_path / "my.yaml", "quux: {a: 1}")])
    assert "quux: no such setting" in error.what
    assert "my.yaml" in error.what
    assert "did you mean" not in (error.hint or "")


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    error = refusal(presets=["quickstrat"])
    assert "--preset quickstrat" in error.what
    assert "did you mean quickstart?" in (error.hint or "")
    for name in ("../presets/quickstart", "", ".", "quickstart.yaml"):
        refusal(presets=[name])


BAD_VALUES = [
    ("backend", "tpu"),
    ("device", "tpu"),
    ("output", "5"),
    ("model.path", "''"),
    ("model.revision", "1.5"),
    ("model.bits", "8"),
    ("model.bits", "null"),
    ("model.dtype", "int8"),
    ("model.trust_remote_code", "maybe"),
    ("model.low_memory", "half"),
    ("model.stream_layers", "2"),
    ("data.path", "''"),
    ("data.fields", "5"),
    ("data.max_tokens", "7"),
    ("data.max_tokens", "10.5"),
    ("data.train_on", "prompts"),
    ("data.validation", "1.0"),
    ("data.validation", "-0.1"),
    ("data.validation", ".nan"),
    ("data.test", "1"),
    ("data.skip_bad", "7"),
    ("data.strict", "very"),
    ("data.stratify", "[label]"),
    ("data.group", "7"),
    ("data.near_duplicates", "0"),
    ("data.near_duplicates", "1.1"),
    ("data.folds", "1"),
    ("data.fold", "0"),
    ("lora.rank", "0"),
    ("lora.rank", "eight"),
    ("lora.rank", "{a: 1}"),
    ("lora.alpha", "0"),
    ("lora.alpha", ".inf"),
    ("lora.dropout", "1"),
    ("lora.targets", "atention"),
    ("lora.targets", "[1, 2]"),
    ("lora.frozen_fraction", "1.0"),
    ("lora.rslora", "often"),
    ("lora.init_adapter", "[x]"),
    ("model.cache_packed", "perhaps"),
    ("optim.name", "adam"),
    ("optim.lr", "0"),
    ("optim.lr", "-1e-4"),
    ("optim.lr", ".nan"),
    ("optim.lr", "fast"),
    ("optim.weight_decay", "-1"),
    ("optim.betas", "[0.9]"),
    ("optim.betas", "[0.9, 1.0]"),
    ("optim.betas", "[0.9, 0.99, 0.999]"),
    ("optim.eps", "0"),
    ("optim.momentum", "1"),
    ("optim.max_grad_norm", "0"),
    ("optim.label_smoothing", "1"),
    ("optim.state_bits", "16"),
    ("schedule.name", "cosin"),
    ("schedule.min_lr", "-1"),
    ("schedule.warmup_ratio", "1"),
    ("schedule.warmup_steps", "-1"),
    ("schedule.restarts", "0"),
    ("train.epochs", "0"),
    ("train.max_steps", "0"),
    ("train.batch_size", "0"),
    ("train.batch_tokens", "0"),
    ("train.batch_tokens", "2k"),
    ("train.prefix_store", "always"),
    ("train.prefix_store_gb", "0"),
    ("train.prefix_store_gb", ".inf"),
    ("train.accumulation", "0"),
    ("train.gradient_checkpointing", "sometimes"),
    ("train.seed", "-1"),
    ("train.seed", "2147483648"),
    ("eval.every", "0"),
    ("eval.probe_rows", "0"),
    ("eval.batch_size", "0"),
    ("eval.general", "sometimes"),
    ("guard.patience", "0"),
    ("guard.min_delta", "-1"),
    ("guard.grades", "[0.1, 0.2]"),
    ("guard.grades", "[0.1, 0.2, .inf]"),
    ("guard.relative_gap", "0"),
    ("guard.confidence", "1"),
    ("checkpoint.every", "0"),
    ("checkpoint.keep", "0"),
    ("moe.aux_loss_weight", "-1"),
    ("moe.train_router", "2"),
    ("log.every", "0"),
    ("log.trackers", "[tensorbord]"),
    ("log.project", "[x]"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_one_line_with_field_value_and_source(name: str, value: str) -> None:
    error = refusal(assignments=[f"{name}={value}"])
    assert error.what.startswith(f"{name} = ")
    assert "(from --set): " in error.what
    given = yaml.safe_load(value)
    # of a list, the part that is wrong is enough
    parts = [given, *given] if isinstance(given, list) else [given]
    assert any(repr(part) in error.what for part in parts)
    assert error.hint == describe_fields()[name]
    assert "Config" not in error.what  # the names of our classes say nothing to a user


def test_every_field_has_a_bad_value_above() -> None:
    assert {name for name, _ in BAD_VALUES} | {"optim.paged"} == set(field_names())


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["optim.state_bits=8", "optim.name=sgd"], ("optim.state_bits 8", "sgd")),
        (["optim.paged=true"], ("optim.paged", "optim.state_bits=8")),
        (["schedule.min_lr=0.5"], ("schedule.min_lr 0.5", "optim.lr 0.0002")),
        (["data.validation=0.6", "data.test=0.5"], ("data.validation 0.6", "data.test 0.5")),
        (["guard.grades=[0.3, 0.2, 0.1]"], ("guard.grades", "[0.3, 0.2, 0.1]")),
        (["guard.grades=[0.0, 0.2, 0.3]"], ("guard.grades", "[0.0, 0.2, 0.3]")),
    ],
)
def test_values_that_do_not_go_together(assignments: list[str], words: tuple[str, ...]) -> None:
    error = refusal(assignments=assignments)
    for word in words:
        assert word in error.what


@pytest.mark.parametrize("value", ["null", "5", "[1]"])
def test_a_section_is_not_a_value(tmp_path: Path, value: str) -> None:
    error = refusal(files=[write(tmp_path / "my.yaml", f"lora: {value}")])
    assert error.what.startswith("lora = ")
    assert "section" in error.what


@pytest.mark.parametrize("text", ["lora.rank", "=5", " =5", "lora.rank=[", "lora.rank={a"])
def test_an_assignment_that_is_none(text: str) -> None:
    assert f"--set {text}" in refusal(assignments=[text]).what


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a:\n\tb: 1", ", line 2"),
        ("lora: {rank: 1", ", line 1"),
        ("[1, 2]", ""),
        ("just text", ""),
        ("? [1, 2]\n: 3", ", line 1"),
        ("lora: !!python/object:os.system {}", ", line 1"),
        ("\x00", ""),
        ("{1: 2}", ""),
        ("on: 2", ""),
        ("lora: {1: 2}", ""),
    ],
)
def test_a_file_that_is_not_a_set_of_settings(tmp_path: Path, text: str, where: str) -> None:
    error = refusal(files=[write(tmp_path / "my.yaml", text)])
    assert f"my.yaml{where}" in error.what


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "nowhere.yaml: no such file" in refusal(files=[tmp_path / "nowhere.yaml"]).what
    assert "cannot be read" in refusal(files=[tmp_path]).what
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00lora")
    assert "binary.yaml" in refusal(files=[tmp_path / "binary.yaml"]).what
