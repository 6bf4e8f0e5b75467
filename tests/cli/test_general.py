"""`eval.general` from the command line on both backends, and what a trained run's adapter did to the general texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.handoff import replay_of_logits
from core.trainer import Trainer
from core.workflow.after import find_trained, opened_run
from core.workflow.general import measure_general
from data.general import load_general
from tests.backends.conftest import skip_without
from tests.cli.conftest import Result
from tests.kill.campaign import outcome

NAMES = ("general_loss", "general_flipped")
SETTINGS = ("--set", "eval.general=true", "--lr", "1e-2", "--set", "checkpoint.every=1")


@pytest.fixture(params=["cuda", "mlx"])
def backend(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tenth of the texts: a tokenizer of bytes makes them long."""
    import data.general

    lines = data.general._FILE.read_text(encoding="utf-8").splitlines()[::10]
    path = tmp_path / "general.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(data.general, "_FILE", path)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_after(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Ends the process's training as Ctrl-C does, once."""
    visit = Trainer._visit

    def visit_and_stop(self: Trainer, step: int, lr: float | None) -> None:
        visit(self, step, lr)
        if step == last:
            monkeypatch.setattr(Trainer, "_visit", visit)
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_visit", visit_and_stop)


def test_a_run_says_what_it_forgot_and_goes_on_alike(
    train: Callable[..., Result],
    run_cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    backend: str,
) -> None:
    whole = train("--backend", backend, *SETTINGS)
    assert whole.code == 0, whole.err
    assert "general texts" in whole.out and "% flipped" in whole.out
    measured = [record for record in records(tmp_path / "run") if "general_loss" in record]
    assert [record["step"] for record in measured] == [0, 2, 4]
    assert measured[0]["general_flipped"] == 0.0 < measured[-1]["general_flipped"]
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    best = next(record for record in measured if record["step"] == summary["best_step"])
    assert [summary[name] for name in NAMES] == [best[name] for name in NAMES]
    assert summary["base_general_loss"] == measured[0]["general_loss"]

    stop_after(monkeypatch, 3)
    assert train("--backend", backend, *SETTINGS, "--output", "parts").code == 130
    assert run_cli("train", "--resume", "parts").code == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "run")

    trained = find_trained(tmp_path / "run")
    with opened_run(trained) as opened:
        report = measure_general(opened)
        rows = load_general(opened.tokenizer)
        base, adapter = (opened.use(side).replay(rows.batches) for side in ("base", "adapter"))  # type: ignore[arg-type]
        logits = [opened.use("adapter").target_logits(batch) for batch in rows.batches]
    assert report.base_loss == pytest.approx(base.nll.mean(), rel=1e-5)
    assert report.adapter_loss == pytest.approx(adapter.nll.mean(), rel=1e-5)
    assert report.adapter_loss == pytest.approx(summary["general_loss"], rel=1e-5)
    assert report.flipped == pytest.approx(np.mean(base.greedy != adapter.greedy))
    assert report.flipped == pytest.approx(summary["general_flipped"])
    assert replay_of_logits(list(rows.batches), logits).nll.mean() == pytest.approx(report.adapter_loss, rel=1e-6)
    assert report.kl > 0 and set(report.categories) == {text.category for text in rows.texts}


def test_with_stored_states_and_layers_left_out_it_is_the_same(
    train: Callable[..., Result], tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKEEL_CACHE", str(tmp_path / "cache"))
    frozen = ("--set", "lora.frozen_fraction=0.5", "--backend", backend, *SETTINGS)
    assert train(*frozen, "--set", "train.prefix_store=false").code == 0
    low = train(*frozen, "--set", "model.low_memory=true", "--output", "low")
    assert low.code == 0, low.err
    for one, other in zip(records(tmp_path / "run"), records(tmp_path / "low"), strict=True):
        for name in NAMES:
            assert (name in one) == (name in other)
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4)


def test_other_texts_are_not_the_same_run(
    train: Callable[..., Result], run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    skip_without("cuda")
    stop_after(monkeypatch, 3)
    assert train("--backend", "cuda", *SETTINGS).code == 130
    path = tmp_path / "general.jsonl"
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[1:]), encoding="utf-8")
    refused = run_cli("train", "--resume", "run")
    assert refused.code == 2 and "the settings changed since step 3" in refused.err
