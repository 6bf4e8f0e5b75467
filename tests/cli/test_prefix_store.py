"""The prefix store from the command line: filled once, used again, never wrong, and layers left out of memory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.backends.conftest import skip_without
from tests.cli.conftest import Result

Train = Callable[..., Result]
HALF = ("--set", "lora.frozen_fraction=0.5", "--set", "lora.dropout=0.1", "--set", "optim.lr=1e-2")


@pytest.fixture(params=["mlx", "cuda"])
def half(request: pytest.FixtureRequest, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains the tiny model with its first layer frozen; the cache is empty at first."""
    skip_without(request.param)
    monkeypatch.setenv("TWINKEEL_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: train("--backend", request.param, *HALF, *arguments)


def losses(run: Path) -> list[tuple[Any, ...]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(record.get(name) for name in ("step", "loss", "val_loss", "probe_loss")) for record in records]


def report(run: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads((run / "training_summary.json").read_text())["prefix_store"]
    return found


def segments(cache: Path) -> list[Path]:
    return sorted(cache.glob("prefix/*/*.safetensors"))


def test_a_second_run_finds_the_store_full(half: Train, tmp_path: Path) -> None:
    first = half()
    assert first.code == 0, first.err
    assert "prefix store: 24 of 24 rows through the frozen layers, once" in first.out
    assert re.search(
        r"  frozen   1 of 2 layers computed once for 24 rows \(0\.\d MB\): \d+ % of their work spared", first.out
    )
    assert half("--output", "again").code == 0
    one, two = report(tmp_path / "run"), report(tmp_path / "again")
    assert one is not None and two is not None
    assert (one["layers"], one["rows"], one["computed_rows"], two["computed_rows"]) == (1, 24, 24, 0)
    assert one["bytes"] == two["bytes"] > 0 and one["spared"] < two["spared"] == 1.0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_without_the_store_the_losses_are_the_same(half: Train, tmp_path: Path) -> None:
    assert half().code == 0
    without = half("--output", "without", "--set", "train.prefix_store=false")
    assert without.code == 0 and "frozen " not in without.out
    assert report(tmp_path / "without") is None
    pairs = zip(losses(tmp_path / "run"), losses(tmp_path / "without"), strict=True)
    for one, two in ((a, b) for first, second in pairs for a, b in zip(first, second, strict=True)):
        assert one == two or one == pytest.approx(two, rel=2e-6)


@pytest.mark.parametrize("setting", ["model.low_memory", "model.stream_layers"])
@pytest.mark.parametrize("bits", [16, 4])
def test_layers_left_out_of_memory_change_no_bit(
    half: Train, run_cli: Train, tmp_path: Path, setting: str, bits: int
) -> None:
    assert half("--bits", bits).code == 0
    result = half("--bits", bits, "--output", "small", "--set", f"{setting}=true")
    assert result.code == 0, result.err
    assert {"model.low_memory": "frozen layers left out", "model.stream_layers": "a layer at a time"}[
        setting
    ] in result.out
    assert losses(tmp_path / "small") == losses(tmp_path / "run")
    ends = [json.loads((tmp_path / run / "training_summary.json").read_text())["weights"] for run in ("run", "small")]
    whole, small = (sum(kind["bytes"] for kind in weights) for weights in ends)
    assert (small < whole) if setting == "model.low_memory" else small <= whole
    said = run_cli("generate", "small", "--prompt", "Say red", "--max-tokens", 4)  # with all layers
    assert said.code == 0 and "adapter" in said.out


def test_a_damaged_segment_is_computed_again(half: Train, tmp_path: Path) -> None:
    assert half().code == 0
    (segment,) = segments(tmp_path / "cache")
    raw = bytearray(segment.read_bytes())
    raw[-20] ^= 1
    segment.write_bytes(raw)
    again = half("--output", "again")
    assert again.code == 0 and "damaged; its rows are computed again" in again.err + again.out
    found = report(tmp_path / "again")
    assert found is not None and found["computed_rows"] > 0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_a_resumed_run_computes_an_evicted_store_to_the_same_bits(half: Train, run_cli: Train, tmp_path: Path) -> None:
    assert half("--set", "checkpoint.every=1").code == 0
    whole = losses(tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("step")[1]))
    shutil.rmtree(newest)
    state = tmp_path / "run" / "training_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"status": "running"}))  # as after a SIGKILL
    shutil.rmtree(tmp_path / "cache" / "prefix")
    other = run_cli("train", "--resume", "run", "--set", "optim.lr=1")
    assert other.code == 2 and "--set would change them" in other.err
    resumed = run_cli("train", "--resume", "run", "--set", "model.low_memory=true")  # what changes no result may change
    assert resumed.code == 0 and "24 of 24 rows" in resumed.out and "frozen layers left out" in resumed.out, resumed
    assert losses(tmp_path / "run") == whole


def test_other_weights_find_no_rows(half: Train, model: Path, tmp_path: Path) -> None:
    """The same shapes, names and file size."""
    from safetensors.numpy import load_file, save_file

    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert half().code == 0 and half("--model", other, "--output", "second").code == 0
    found = report(tmp_path / "second")
    assert found is not None and found["computed_rows"] == 24


def test_a_disk_without_room_is_left_alone(half: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil as disk

    full = type(disk.disk_usage(tmp_path))(10**9, 10**9, 0)
    monkeypatch.setattr("core.workflow.prefix.shutil.disk_usage", lambda folder: full)
    result = half()
    assert result.code == 0 and "the disk has 0.0: the frozen layers are computed every time" in result.out
    refused = half("--output", "must", "--set", "model.low_memory=true")
    assert refused.code == 2 and "TWINKEEL_CACHE" in refused.err


def test_what_does_not_fit_is_not_kept(half: Train, tmp_path: Path) -> None:
    result = half("--set", "train.prefix_store_gb=1e-6")
    assert (
        result.code == 0 and "train.prefix_store_gb is 1e-06: the frozen layers are computed every time" in result.out
    )
    assert report(tmp_path / "run") is None and not segments(tmp_path / "cache")


def test_a_smaller_limit_makes_room_for_what_this_run_needs(half: Train, tmp_path: Path) -> None:
    assert half().code == 0
    (old,) = segments(tmp_path / "cache")
    limit = 1.2 * old.stat().st_size / 1e9
    other = half("--bits", 4, "--output", "other", "--set", f"train.prefix_store_gb={limit}")
    assert other.code == 0, other.err
    assert not old.exists() and len(segments(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.low_memory=true", "lora.frozen_fraction=0"], "model.low_memory: the first layer has an adapter"),
        (["model.low_memory=true", "train.prefix_store=false"], "model.low_memory needs the prefix store"),
        (["model.stream_layers=true", "train.prefix_store=false"], "model.stream_layers needs the prefix store"),
        (["model.low_memory=true", "model.trust_remote_code=true"], "keeps nothing of remote code"),
        (["model.low_memory=true", "train.prefix_store_gb=1e-6"], "the prefix store would take"),
        (["train.prefix_store=true", "train.prefix_store_gb=1e-6"], "the prefix store would take"),
    ],
)
def test_what_cannot_be(half: Train, tmp_path: Path, settings: list[str], message: str) -> None:
    result = half(*(part for setting in settings for part in ("--set", setting)))
    assert result.code == 2
    assert message in result.err and "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) == 2
    assert not (tmp_path / "run").exists()
