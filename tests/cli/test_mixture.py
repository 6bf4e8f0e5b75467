"""A mixture from the command line: its routers watched, trained and drawn; settings without effect named."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from core.routing import SCALARS
from tests.backends.conftest import skip_without
from tests.cli.conftest import Result
from tests.tiny import make_model

Train = Callable[..., Result]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("mixture") / "tiny", model_type="mixtral")


def records_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_a_trained_router_from_command_to_plot(
    train: Train, run_cli: Train, mixtral: Path, tmp_path: Path, backend: str
) -> None:
    skip_without(backend)
    result = train("--backend", backend, "--model", mixtral, "--set", "moe.train_router=true", "--lr", "1e-2")
    assert result.code == 0, result
    run = tmp_path / "run"
    lines = result.out.splitlines()
    shown = [index for index, line in enumerate(lines) if line.startswith("  experts: entropy 0.")]
    assert len(shown) == 3
    assert re.fullmatch(r"  experts: entropy 0\.\d\d \(lowest 0\.\d\d, layer [01]\)", lines[shown[0]])
    assert re.search(r"\), moved [01]\.\d\d from the base model \(layer [01]\)$", lines[shown[-1]])
    assert lines[shown[0] - 1].startswith("base model: validation")
    assert re.search(r"step 4/4 .* aux loss [1-4]\.\d{3}  lr", result.out)
    records = records_of(run)
    assert [record["step"] for record in records if "routing" in record] == [0, 2, 4]
    assert all(record["aux_loss"] * 1.1 >= 2 for record in records if record["step"])
    summary = json.loads((run / "training_summary.json").read_text())
    best = next(record for record in records if record["step"] == summary["best_step"])
    assert tuple(name for name in summary["routing"] if name != "collapse") == SCALARS
    assert all(summary["routing"][name] == best["routing"][name] for name in SCALARS)
    assert summary["routing"]["moved_max"] > 0
    if best["routing"]["collapsed"]:  # as it does here at this rate: the verdict says so too
        assert summary["routing"]["collapse"].startswith(f"layer {best['routing']['collapsed'][0]}: ")
        assert f"the router collapsed: {summary['routing']['collapse']}" in result.out
    rows = list(csv.DictReader((run / "training_metrics.csv").open()))
    assert float(rows[-1]["routing.entropy"]) == records[-1]["routing"]["entropy"]
    assert (run / "experts.png").read_bytes().startswith(b"\x89PNG")
    monitor = run_cli("monitor", "run", "--once").out
    assert "experts: entropy" in monitor and "share of each expert" in monitor
    adapter = load_file(run / "adapters" / "adapter_model.safetensors")
    routers = [tensor for name, tensor in adapter.items() if "gate.lora_B" in name]
    assert len(routers) == 2 and all(np.any(tensor) for tensor in routers)


def test_a_resumed_mixture_leaves_the_same_records(train: Train, run_cli: Train, mixtral: Path, tmp_path: Path) -> None:
    """Its routing before the first step comes from the checkpoint."""
    skip_without("cuda")
    common = ("--backend", "cuda", "--model", mixtral, "--set", "moe.train_router=true", "--set", "checkpoint.every=1")
    assert train(*common).code == 0
    before = records_of(tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("step")[1]))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    state = tmp_path / "run" / "training_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"status": "running"}))  # as after a SIGKILL
    resumed = run_cli("train", "--resume", "run")
    assert resumed.code == 0, resumed
    assert "resumed  after step 3" in resumed.out
    after = records_of(tmp_path / "run")
    assert [record.get("routing") for record in after] == [record.get("routing") for record in before]
    assert [record.get("aux_loss") for record in after] == [record.get("aux_loss") for record in before]
    assert after[-1]["routing"]["moved_max"] > 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), []),
        (("moe.aux_loss_weight=0",), []),
        (("moe.aux_loss_weight=0.5",), ["moe.aux_loss_weight 0.5 has no effect: the router is frozen"]),
        (("moe.aux_loss_weight=0.5", "moe.train_router=true"), []),
        (("moe.aux_loss_weight=0.5", "lora.targets=[q_proj, mlp.gate]"), []),
    ],
)
def test_a_weight_without_effect_is_named(
    train: Train, mixtral: Path, settings: tuple[str, ...], expected: list[str]
) -> None:
    skip_without("cuda")
    sets = [part for text in settings for part in ("--set", text)]
    result = train("--backend", "cuda", "--model", mixtral, "--max-steps", "1", *sets)
    assert result.code == 0, result
    found = [line.removeprefix("warning: ") for line in result.out.splitlines() if "moe." in line]
    assert found == expected


def test_a_dense_model_has_no_router_to_train(train: Train, tmp_path: Path) -> None:
    skip_without("cuda")
    result = train(
        "--backend", "cuda", "--max-steps", "1", "--set", "moe.train_router=true", "--set", "moe.aux_loss_weight=1"
    )
    assert result.code == 0, result
    assert "warning: moe.train_router true has no effect: this llama model has no router" in result.out
    assert "warning: moe.aux_loss_weight 1 has no effect: this llama model has no router" in result.out
    assert "experts" not in result.out.replace("expert.jsonl", "")
    assert not (tmp_path / "run" / "experts.png").exists()
