"""The configuration's own promises: names that others rely on, defaults, plain values."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from core.config import RunConfig, to_plain
from core.settings import field_names

# the fields that others rely on, with the defaults that are written down for them
PROMISED = """
model:      {path: auto, revision: null, bits: 4, dtype: auto}
data:       {fields: {}, max_tokens: 2048, train_on: completions, validation: 0.2, test: 0.0}
lora:       {rank: 16, alpha: 32, dropout: 0.05, targets: attention, frozen_fraction: 0.0, rslora: false}
optim:      {name: adamw, lr: 2.0e-4, weight_decay: 0.01, max_grad_norm: 1.0, label_smoothing: 0.0, state_bits: 32, paged: false}
schedule:   {name: cosine, min_lr: 0.0, warmup_ratio: 0.03, warmup_steps: null}
train:      {epochs: 3, max_steps: null, batch_size: 2, accumulation: 4, gradient_checkpointing: auto, seed: 0}
eval:       {every: 50, probe_rows: 200}
guard:      {patience: 3, min_delta: 0.0, grades: [0.05, 0.15, 0.30], relative_gap: 0.10}
checkpoint: {every: 50, keep: 3}
moe:        {aux_loss_weight: 0.001, train_router: false}
log:        {every: 10, trackers: []}
"""  # noqa: E501


def test_the_promised_names_and_defaults() -> None:
    plain = to_plain(RunConfig())
    for section, fields in yaml.safe_load(PROMISED).items():
        assert {name: plain[section][name] for name in fields} == fields


def test_plain_values_are_json_and_yaml() -> None:
    plain = to_plain(RunConfig.model_validate({"optim": {"betas": [0.8, 0.9]}, "data": {"fields": {"text": "körper"}}}))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain["optim"]["betas"] == [0.8, 0.9]
    assert sum(len(v) if isinstance(v, dict) else 1 for v in plain.values()) == len(field_names())


@pytest.mark.parametrize("section", ["model", "lora", "optim"])
def test_unknown_keys_are_refused_in_every_section(section: str) -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate({section: {"nonsense": 1}})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj,", ["q_proj", "v_proj"]),
        ("gate", ["gate"]),
        (["mlp.up_proj"], ["mlp.up_proj"]),
        ("attention", "attention"),
    ],
)
def test_targets_as_text(given: Any, expected: Any) -> None:
    assert RunConfig.model_validate({"lora": {"targets": given}}).lora.targets == expected


@pytest.mark.parametrize("word", ["atention", "all_linear", "qkv"])
def test_a_misspelt_word_is_not_a_module(word: str) -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"lora": {"targets": word}})
