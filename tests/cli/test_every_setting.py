"""Every setting does something: changing it changes what the run leaves, what it says, or whether it starts.

Peers shipped options that were validated, documented and read by nothing. Each field of the configuration stands in
`CHANGES` with another value, and a tiny run with it must differ from the run without it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.adapter_files import write_adapter
from core.settings import field_names
from tests.cli.conftest import Result, filled_adapter, write_rows
from tests.kill.campaign import outcome

BASE = {
    "model.bits": "16",
    "device": "cpu",
    "backend": "cuda",
    "train.batch_size": "2",
    "train.accumulation": "2",
    "train.epochs": "1",
    "eval.every": "2",
    "data.max_tokens": "96",
    "optim.lr": "1e-2",
    "lora.rank": "4",
    "lora.alpha": "8",
    "lora.dropout": "0.2",
    "log.every": "2",
    "checkpoint.every": "2",
    "model.path": "./model",
    "data.path": "./rows.jsonl",
    "output": "run",
}

# field -> the changed value, or (the changed value, settings that both runs need to show it)
CHANGES: dict[str, str | tuple[str, tuple[str, ...]]] = {
    "backend": "mlx",
    "device": "gpu",
    "output": "elsewhere",
    "model.path": "./other",
    "model.revision": "v2",
    "model.bits": "4",
    "model.dtype": "bfloat16",
    "model.trust_remote_code": "true",
    "model.low_memory": ("true", ("lora.frozen_fraction=0.5",)),
    "model.stream_layers": "true",
    "model.cache_packed": ("false", ("model.path=./moe", "model.bits=4")),
    "data.path": "./other.jsonl",
    "data.fields": "{prompt: completion, completion: prompt}",
    "data.max_tokens": "44",
    "data.train_on": "all",
    "data.validation": "0.4",
    "data.test": "0.2",
    "data.skip_bad": ("true", ("data.path=./bad.jsonl",)),
    "data.stratify": ("colour", ("data.path=./labelled.jsonl",)),
    "data.group": ("colour", ("data.path=./labelled.jsonl",)),
    "data.near_duplicates": ("null", ("data.path=./near.jsonl",)),
    "data.folds": "3",
    "data.fold": ("2", ("data.folds=3",)),
    "data.strict": ("true", ("data.path=./secret.jsonl",)),
    "lora.rank": "8",
    "lora.alpha": "16",
    "lora.dropout": "0.5",
    "lora.targets": "[q_proj]",
    "lora.frozen_fraction": "0.5",
    "lora.rslora": "true",
    "lora.init_adapter": "./adapter",
    "optim.name": "lion",
    "optim.lr": "2e-2",
    "optim.weight_decay": "0.5",
    "optim.betas": "[0.5, 0.9]",
    "optim.eps": "1e-2",
    "optim.momentum": ("0.9", ("optim.name=sgd",)),
    "optim.max_grad_norm": "0.01",
    "optim.label_smoothing": "0.3",
    "optim.state_bits": "8",
    "optim.paged": ("true", ("optim.state_bits=8",)),
    "schedule.name": "linear",
    "schedule.min_lr": "5e-3",
    "schedule.warmup_ratio": "0.5",
    "schedule.warmup_steps": "2",
    "schedule.restarts": ("2", ("schedule.name=cosine_restarts",)),
    "train.epochs": "2",
    "train.max_steps": "3",
    "train.batch_size": "3",
    "train.batch_tokens": "300",
    "train.accumulation": "1",
    "train.gradient_checkpointing": "true",
    "train.prefix_store": ("false", ("lora.frozen_fraction=0.5",)),
    "train.prefix_store_gb": ("1e-6", ("lora.frozen_fraction=0.5",)),
    "train.seed": "1",
    "eval.every": "3",
    "eval.probe_rows": "4",
    "eval.batch_size": "1",
    "eval.general": "true",
    "guard.patience": ("1", ("optim.lr=1e-30", "train.epochs=3")),
    "guard.min_delta": ("10", ("guard.patience=1", "train.epochs=3")),
    "guard.grades": "[1.0e-6, 2.0e-6, 3.0e-6]",
    "guard.relative_gap": ("1.0e-9", ("train.seed=3", "train.epochs=8")),
    "guard.confidence": "0.5",
    "checkpoint.every": "1",
    "checkpoint.keep": ("1", ("checkpoint.every=1",)),
    "moe.aux_loss_weight": ("0", ("model.path=./moe", "moe.train_router=true")),
    "moe.train_router": ("true", ("model.path=./moe",)),
    "log.every": "1",
    "log.trackers": "[tensorboard]",
    "log.project": ("other", ("log.trackers=[trackio]",)),
}


def test_the_table_names_every_setting() -> None:
    assert sorted(CHANGES) == sorted(field_names())


@pytest.fixture
def everything(
    run_cli: Callable[..., Result], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Runs with `--set` assignments and returns all that can be seen of the run."""
    from tests.tiny import make_model

    shutil.copytree(model, tmp_path / "model")
    make_model(tmp_path / "other", seed=1)
    make_model(tmp_path / "moe", model_type="mixtral")
    write_adapter(tmp_path / "adapter", filled_adapter(model), base_model="tiny")
    write_rows(tmp_path / "rows.jsonl")
    write_rows(tmp_path / "other.jsonl", 30)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, "not json"]))
    write_labelled(tmp_path / "labelled.jsonl", lines)
    write_near_copies(tmp_path / "near.jsonl", lines)
    secret = {"prompt": "Say the key.", "completion": "-----BEGIN RSA PRIVATE " + "KEY-----"}
    (tmp_path / "secret.jsonl").write_text("\n".join([*lines, json.dumps(secret)]))
    calls = record_calls(monkeypatch)

    def run(assignments: tuple[str, ...]) -> dict[str, Any]:
        calls.clear()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        settings = [*(f"{name}={value}" for name, value in BASE.items()), *assignments]
        sets = [part for text in settings for part in ("--set", text)]
        result = run_cli("train", *sets)
        found: dict[str, Any] = {"code": result.code, "error": result.err, "says": _said(result.out)}
        found["calls"] = sorted(calls)
        if result.code == 0:
            folder = tmp_path / ("elsewhere" if "output=elsewhere" in assignments else "run")
            found |= {"folder": folder.name, **outcome(folder)}
        return found

    return run


def write_labelled(path: Path, lines: list[str]) -> None:
    """The rows with their colour in a column, one colour rare."""
    rows = [json.loads(line) for line in lines]
    path.write_text("\n".join(json.dumps(row | {"colour": row["completion"].split()[0]}) for row in rows[:-3]))


def write_near_copies(path: Path, lines: list[str]) -> None:
    """Each row three times, with a word more."""
    rows = [json.loads(line) for line in lines[::3]]
    texts = [
        row | {"prompt": "Now listen to me and " + row["prompt"] + end} for row in rows for end in ("", "!", " So")
    ]
    path.write_text("\n".join(map(json.dumps, texts)))


def record_calls(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What crosses to the libraries without a trace in the numbers."""
    import torch.utils.checkpoint
    from transformers import AutoTokenizer

    calls: set[str] = set()
    load = AutoTokenizer.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        calls.add(f"trust_remote_code {kwargs.get('trust_remote_code')}")
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    recompute = torch.utils.checkpoint.checkpoint

    def checkpoint(*args: Any, **kwargs: Any) -> Any:
        calls.add("recomputed")
        return recompute(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", checkpoint)
    return calls


def _said(text: str) -> str:
    """What was printed, without times, speed and memory."""
    return re.sub(r"\d+:\d\d|[\d,]+ tok/s|[\d.]+ GB", "", text)


_BEFORE: dict[tuple[str, ...], dict[str, Any]] = {}


@pytest.mark.parametrize("name", CHANGES)
def test_changing_it_changes_something(everything: Callable[..., dict[str, Any]], name: str) -> None:
    change = CHANGES[name]
    value, needs = (change, ()) if isinstance(change, str) else change
    if needs not in _BEFORE:
        _BEFORE[needs] = everything(needs)
    before = _BEFORE[needs]
    after = everything((*needs, f"{name}={value}"))
    # the settings file is allowed to differ and proves nothing; it is not part of the outcome
    different = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    assert different, f"{name}={value} changed nothing"


def test_the_same_settings_leave_the_same_run(everything: Callable[..., dict[str, Any]]) -> None:
    """Otherwise the test above would prove nothing."""
    assert json.dumps(everything(()), default=repr) == json.dumps(everything(()), default=repr)
