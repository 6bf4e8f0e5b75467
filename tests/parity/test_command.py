"""`python cli.py parity`: its three forms, its exit codes, and what it leaves on the disk."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends
from core.errors import UserError
from core.parity import REPORT
from core.parity_plot import PLOT
from core.parity_record import read_record, write_record
from core.parity_run import run_parity
from core.run import newest_run
from core.screen import make_console
from core.settings import load_config
from tests.backends.conftest import ROOT, skip_without
from tests.cli.conftest import Result
from tests.parity.made import make_record, make_settings

RunCli = Callable[..., Result]


@pytest.fixture
def settings(model: Path, rows: Path) -> list[object]:
    return [
        *("--model", model, "--data", rows, "--device", "cpu", "--max-tokens", 96),
        *("--batch-size", 2, "--accumulation", 2, "--lr", 3e-3),
    ]


@pytest.fixture
def run_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunCli:
    """As `run_cli`, in a process of its own: what its children say is seen too."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def needs_both() -> None:
    for backend in ("mlx", "cuda"):
        skip_without(backend)


@pytest.mark.usefixtures("needs_both")
def test_both_sides_in_their_own_processes(run_process: RunCli, settings: list[object]) -> None:
    done = run_process("parity", *settings, "--dropout", 0.1, "--bits", 4, "--steps", 3)
    assert done.code == 0, done.out + done.err
    assert "mlx: step 3/3" in done.out and "cuda: step 3/3" in done.out
    assert "for parity: model.bits: 4 -> 16, lora.dropout: 0.1 -> 0.0" in done.out
    assert "Parity. mlx and cuda train the same adapter" in done.out
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("parity-colours-")
    report = json.loads((folder / REPORT).read_text())
    assert report["verdict"] == "same" and (folder / PLOT).is_file()
    assert [side["backend"] for side in report["sides"]] == ["mlx", "cuda"]
    assert "mlx" in report["sides"][0]["packages"] and "torch" in report["sides"][1]["packages"]
    records = [read_record(folder / name) for name in ("mlx", "cuda")]
    assert [len(record.steps) for record in records] == [3, 3]
    assert [record.config["backend"] for record in records] == ["mlx", "cuda"]
    config = load_config(folder / "settings.yaml")
    assert (config.lora.dropout, config.model.bits, config.train.max_steps) == (0.0, 16, 3)
    with pytest.raises(UserError, match="no runs yet"):
        newest_run()
    if importlib.util.find_spec("bitsandbytes") is not None:
        four = report["four_bits"]
        assert four["num_rows"] == len(records[0].rows.row_ids)
        for side in (0, 1):
            assert 1e-4 < abs(four["base_4"][side] - four["base_16"][side]) < 0.5
            assert abs(four["final_4"][side] - four["base_4"][side]) > 1e-4


def test_one_side(run_cli: RunCli, settings: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without("cuda")
    for name in ("MLX_ENABLE_TF32", "NVIDIA_TF32_OVERRIDE"):
        monkeypatch.setenv(name, "1")
    command = ("parity", "record", *settings, "--backend", "cuda", "--steps", 2, "--skip-4bit", "--output", "side")
    done = run_cli(*command)
    assert done.code == 0, done.err
    record = read_record(Path("side"))
    assert (record.backend, len(record.steps), record.four_bits.rows) == ("cuda", 2, None)
    assert "recorded in side" in done.out
    assert os.environ["MLX_ENABLE_TF32"] == os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    again = run_cli(*command)
    assert again.code == 2 and "side: already exists" in again.err


def run_sides(child: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """`run_parity` with a program of two lines in the place of this one; its exit code and what is said."""
    code = run_parity(
        make_settings(),
        steps=2,
        four_bits=False,
        problems={"mlx": "", "cuda": ""},
        command=(sys.executable, "-c", child),
        typed=(),
        console=make_console(),
    )
    captured = capfd.readouterr()
    return code, captured.out + captured.err


def test_a_side_that_fails_passes_its_message_and_code_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown = run_sides("import sys; print('error: no such data', file=sys.stderr); sys.exit(2)", capfd)
    assert code == 2
    assert shown.count("error: no such data") == 1 and "the mlx side could not be recorded" in shown


def test_a_side_that_is_killed_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="mlx side was ended by signal 9"):
        run_sides("import os; os.kill(os.getpid(), 9)", capfd)


def test_one_backend_alone_names_the_commands(
    run_cli: RunCli, settings: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without("cuda")
    real = backends.get

    def without_mlx(name: str) -> Any:
        backend = real(name)
        if name == "mlx":
            right = backend.probe
            monkeypatch.setattr(
                backend, "probe", lambda device: replace(right(device), available=False, problem="no mlx")
            )
        return backend

    monkeypatch.setattr(backends, "get", without_mlx)
    done = run_cli("parity", *settings, "--steps", 7, "--output", "out")
    assert done.code == 2 and not Path("out").exists()
    assert "mlx can't train here (no mlx)" in done.err
    model, data = (shlex.quote(str(settings[place])) for place in (1, 3))
    assert f"python cli.py parity record --device cpu --model {model} --data {data}" in done.err
    for name in ("mlx", "cuda"):
        assert f"--backend {name} --steps 7 --output parity-{name}" in done.err
    assert "python cli.py parity compare parity-cuda parity-mlx" in done.err


# --- compare, on records that are made --------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path: Path) -> Path:
    write_record(tmp_path / "a", make_record(backend="mlx"))
    return tmp_path / "a"


def test_compare_within_tolerance(run_cli: RunCli, record: Path, tmp_path: Path) -> None:
    write_record(tmp_path / "b", make_record())
    done = run_cli("parity", "compare", record, tmp_path / "b", "--output", "out")
    assert done.code == 0, done.err
    assert json.loads(Path("out", REPORT).read_text())["verdict"] == "same"
    assert Path("out", PLOT).is_file()


def test_compare_beyond_tolerance(run_cli: RunCli, record: Path, tmp_path: Path) -> None:
    made = make_record()
    adapter = {name: np.asarray(tensor * np.float32(1.01)) for name, tensor in made.adapter.items()}
    write_record(tmp_path / "b", replace(made, adapter=adapter))
    done = run_cli("parity", "compare", record, tmp_path / "b", "--output", "out")
    assert done.code == 1
    assert "No parity. mlx and cuda part first at: final adapter of step 5" in done.out


def test_compare_records_of_other_settings(run_cli: RunCli, record: Path, tmp_path: Path) -> None:
    write_record(tmp_path / "b", make_record(optim={"weight_decay": 0.5}))
    done = run_cli("parity", "compare", record, tmp_path / "b", "--output", "out")
    assert done.code == 1
    assert "Not comparable" in done.out and "optim.weight_decay 0.01 and 0.5" in done.out
    assert json.loads(Path("out", REPORT).read_text())["mismatches"][0]["place"] == "settings"


def test_compare_what_is_no_record(run_cli: RunCli, record: Path) -> None:
    done = run_cli("parity", "compare", record, "nowhere", "--output", "out")
    assert done.code == 2 and "nowhere: not a parity record" in done.err
    assert "Traceback" not in done.err and not Path("out").exists()


MISTAKES: list[tuple[tuple[object, ...], str]] = [
    (("compare", "one"), "parity compare one: no such form"),
    (("bogus",), "parity bogus: no such form"),
    (("compare", "one", "two", "--lr", 1e-3), "--lr has no effect"),
    (("compare", "one", "two", "--steps", 20, "--skip-4bit"), "--steps, --skip-4bit has no effect"),
    (("--backend", "mlx"), "parity runs both backends"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_forms_that_are_none(run_cli: RunCli, arguments: tuple[object, ...], words: str) -> None:
    done = run_cli("parity", *arguments)
    assert done.code == 2 and words in done.err
