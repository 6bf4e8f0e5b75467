"""A run from the command line to its verdict, on both backends; what it leaves; the other commands on it."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from core.journal import COLUMNS, MACHINE_FIELDS
from tests.cli.conftest import Result
from tests.warm import WarmPython

Train = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
LEARN = ("--lr", "2e-2", "--max-steps", "20", "--epochs", "5", "--eval-every", "5", "--set", "log.every=2")


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_a_run_leaves_what_the_specification_names(train: Train, tmp_path: Path, backend: str) -> None:
    result = train("--backend", backend, *LEARN)
    assert result.code == 0, result
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {
        *("config.yaml", "adapters", "checkpoints", "metrics.jsonl", "training_metrics.json", "training_metrics.csv"),
        *("training_state.json", "training_summary.json", "training_curves.png", "training.log"),
    }
    check_metrics(run)
    check_summary(run, backend)
    assert (run / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "Train/val loss difference: " in result.out
    assert "Train/val loss difference: " in (run / "training.log").read_text()
    assert "python cli.py evaluate run" in result.out
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["backend"] == backend and config["model"]["path"] == str(config["model"]["path"])
    # what is left of the checkpoints is the newest and the best
    summary = json.loads((run / "training_summary.json").read_text())
    steps = [int(path.name.split("step")[1]) for path in (run / "checkpoints").iterdir()]
    assert len(steps) <= 4 and {summary["best_step"], 20} <= set(steps)


def check_metrics(run: Path) -> None:
    records = json.loads((run / "training_metrics.json").read_text())
    assert records == [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((run / "training_metrics.csv").open()))
    assert list(rows[0]) == list(COLUMNS)
    assert [int(row["step"]) for row in rows] == [record["step"] for record in records]
    evaluated = [record["step"] for record in records if "val_loss" in record]
    assert evaluated == [0, 5, 10, 15, 20]
    for record in records:
        assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens_per_second", "memory_gb", "time"} <= record.keys()
    for record in records:
        if "gap" in record:
            assert record["gap"] == pytest.approx(record["val_loss"] - record["probe_loss"])
            assert record["gap_low"] <= record["gap"] <= record["gap_high"]
    assert records[-1]["val_loss"] < records[0]["val_loss"] - 0.3, "it learned"


def check_summary(run: Path, backend: str) -> None:
    summary = json.loads((run / "training_summary.json").read_text())
    records = json.loads((run / "training_metrics.json").read_text())
    assert summary["backend"] == backend and summary["status"] == "finished" and summary["steps"] == 20
    trained = [record for record in records if "val_loss" in record and record["step"] > 0]
    best = min(trained, key=lambda record: record["val_loss"])
    assert summary["best_step"] == best["step"] and summary["best_val_loss"] == best["val_loss"]
    assert summary["gap"] == best["gap"] and summary["grade"] == best["grade"]
    assert summary["base_val_loss"] == records[0]["val_loss"]
    # 24 rows at 0.2: five of them, rounded up; five steps an epoch
    assert (summary["num_train_rows"], summary["num_val_rows"], summary["epochs"]) == (19, 5, 4.0)
    for name in ("probe_loss", "gap_low", "gap_high", "best_epoch", "num_target_tokens", "tokens_per_second"):
        assert summary[name] is not None
    assert summary["peak_memory_gb"] > 0 and summary["wall_seconds"] > 0


@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_the_adapter_loads_in_both_worlds_and_does_the_same(
    train: Train, model: Path, tmp_path: Path, backend: str
) -> None:
    assert train("--backend", backend, *LEARN, "--set", "lora.frozen_fraction=0.5").code == 0
    adapters = tmp_path / "run" / "adapters"
    ids = [[1, 40, 41, 42, 43, 44, 45]]
    base, with_peft = peft_logits(model, adapters, ids)
    with_mlx = mlx_logits(model, adapters, ids)
    assert np.abs(with_peft - base).max() > 0.1, "the adapter does something"
    assert np.abs(with_peft - with_mlx).max() < 1e-4


def peft_logits(model: Path, adapters: Path, ids: list[list[int]]) -> tuple[Any, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(torch.tensor(ids)).logits.numpy()
        after = PeftModel.from_pretrained(base, adapters).eval()(torch.tensor(ids)).logits.numpy()
    return before, after


def mlx_logits(model: Path, adapters: Path, ids: list[list[int]]) -> Any:
    from backends.mlx.blas import preload_blas

    preload_blas()
    import mlx.core as mx
    import mlx_lm

    loaded, _ = mlx_lm.load(str(model), adapter_path=str(adapters))[:2]
    return np.array(loaded(mx.array(ids)).astype(mx.float32))


def test_both_backends_agree_after_twenty_steps(train: Train, tmp_path: Path) -> None:
    losses = {}
    for backend in ("mlx", "cuda"):
        result = train("--backend", backend, *LEARN, "--dropout", "0", "--output", backend)
        assert result.code == 0, result
        records = json.loads((tmp_path / backend / "training_metrics.json").read_text())
        losses[backend] = [record["val_loss"] for record in records if "val_loss" in record]
    assert losses["mlx"] == pytest.approx(losses["cuda"], abs=1e-3)
    assert losses["mlx"][-1] < losses["mlx"][0] - 0.3


def test_generate_answers_with_and_without_the_adapter(train: Train, run_cli: Train) -> None:
    assert train(*LEARN).code == 0
    result = run_cli("generate", "run", "--prompt", "Say red 0.", "--max-tokens", "8")
    assert result.code == 0, result
    assert [line.split()[0] for line in result.out.splitlines() if line.startswith(("base", "adapter"))] == [
        "base",
        "adapter",
    ]


def test_monitor_once_and_json(train: Train, run_cli: Train) -> None:
    assert train(*LEARN).code == 0
    shown = run_cli("monitor", "run", "--once")
    assert shown.code == 0 and "step 20/20" in shown.out and "gap" in shown.out
    found = json.loads(run_cli("monitor", "run", "--json").out)
    assert found["status"] == "finished" and found["step"] == 20


def test_config_show_names_the_sources(run_cli: Train, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: mistral-mlx-v2\noptim: {lr: 1.0e-3}\n")
    shown = run_cli("config", "show", "--config", "mine.yaml", "--rank", "4").out
    lines = {line.split(":")[0].strip(): line for line in shown.splitlines()}
    assert "# mine.yaml" in lines["lr"] and "0.001" in lines["lr"]
    assert "# --rank" in lines["rank"]
    assert "# preset mistral-mlx-v2" in lines["dropout"]
    assert "# default" in lines["max_tokens"]


def test_doctor_knows_both_backends(run_cli: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    result = run_cli("doctor", "--json")
    assert result.code == 0, result
    assert {"mlx", "cuda"} <= set(json.dumps(json.loads(result.out)).replace('"', " ").split())
    assert "hf_secret_value" not in result.out
    assert "hf_secret_value" not in run_cli("doctor").out


def test_tokens_from_the_environment_reach_no_file(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "a-very-secret-value")
    assert train().code == 0
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"a-very-secret-value" not in path.read_bytes(), path


# enough steps that a signal falls between them
MANY_STEPS = ("--max-steps", "100", "--epochs", "50", "--eval-every", "50", "--set", "log.every=10")


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmPython]:
    llama = "transformers.models.llama.modeling_llama"
    with WarmPython("datasets", "matplotlib.figure", "peft", llama, "backends.cuda.learner") as python:
        yield python


@pytest.fixture(scope="module")
def whole(warm: WarmPython, model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, in a process without MLX, like those that it is compared with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = warm.run(base_command(model, rows, *MANY_STEPS, "--output", str(folder)), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_at_the_step_boundary_and_resume_ends_where_it_would_have(
    model: Path, rows: Path, warm: WarmPython, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    start = base_command(model, rows, *MANY_STEPS)
    process = subprocess.Popen([*start, "--output", str(tmp_path / "parts")], cwd=ROOT, stdout=subprocess.PIPE)
    wait_for_step(tmp_path / "parts", 10)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out
    assert f"python cli.py train --resume {tmp_path / 'parts'}".encode() in out
    state = json.loads((tmp_path / "parts" / "training_state.json").read_text())
    assert state["status"] == "interrupted" and 10 <= state["step"] < 100
    again = warm.run([sys.executable, "-m", "cli", "train", "--resume", str(tmp_path / "parts")], cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert plain_metrics(whole) == plain_metrics(tmp_path / "parts")
    names = ("adapter_model.safetensors", "adapters.safetensors")
    for name in names:
        assert (whole / "adapters" / name).read_bytes() == (tmp_path / "parts/adapters" / name).read_bytes()


def base_command(model: Path, rows: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "cli", "train", "--backend", "cuda", "--device", "cpu", "--bits", "16"),
        *("--model", str(model), "--data", str(rows), "--max-tokens", "96", *more),
    ]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        journal = run / "metrics.jsonl"
        if journal.exists() and f'"step": {step},' in journal.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {run}")


def plain_metrics(run: Path) -> list[dict[str, Any]]:
    records = json.loads((run / "training_metrics.json").read_text())
    return [{k: v for k, v in record.items() if k not in MACHINE_FIELDS} for record in records]


def test_two_processes_can_not_train_into_one_run(run_cli: Train, model: Path, rows: Path, tmp_path: Path) -> None:
    command = base_command(model, rows, "--max-steps", "2000", "--epochs", "900", "--output", str(tmp_path / "run"))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for_step(tmp_path / "run", 10)
        second = run_cli("train", "--resume", tmp_path / "run")
        assert second.code == 2
        assert "another process is training here" in second.err
    finally:
        process.kill()
        process.wait()


def test_help_is_quick_to_read() -> None:
    for command in ([], ["train"], ["monitor"], ["config", "show"], ["doctor"], ["generate"]):
        ran = subprocess.run(
            [sys.executable, "cli.py", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "usage: python cli.py" in ran.stdout


def test_a_failure_after_the_last_step_is_written_down(
    train: Train, run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import core.session

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room for the plot")

    with monkeypatch.context() as patch:
        patch.setattr(core.session, "write_training_curves", fail)
        with pytest.raises(MemoryError):
            train()
    state = json.loads((tmp_path / "run" / "training_state.json").read_text())
    assert state["status"] == "failed" and "no room for the plot" in state["error"]
    assert run_cli("train", "--resume", "run").code == 0


def test_all_checkpoints_damaged_loses_nothing(
    train: Train, run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.cli.test_bad_input import interrupt_after

    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert train().code == 130
    journal = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "adapter.safetensors").write_bytes(b"")
    result = run_cli("train", "--resume", "run")
    assert result.code == 2 and "checkpoints are damaged" in result.err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == journal


def test_a_full_log_file_stops_nothing(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    import core.session
    from core.screen import logging_to_file

    monkeypatch.setattr(core.session, "logging_to_file", lambda path: logging_to_file(Path("/dev/full")))
    result = train()
    assert result.code == 0 and "Logging error" not in result.err


def test_early_stopping_that_can_not_act_is_warned_of(train: Train) -> None:
    result = train("--eval-every", "4")
    assert "early stopping can't act" in result.out and "--eval-every" in result.out
