"""`python cli.py parity`: its three forms, its exit codes, and what it leaves on the disk."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends
import cli
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
    assert "can train:" not in done.out and "--lr 0.003" in done.out[done.out.index("next ") :]
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
    typed = [str(word) for word in ("parity", "record", *settings, "--steps", 2, "--skip-4bit", "--backend", "mlx")]
    follows = next(line for line in done.out.splitlines() if line.startswith("next, where mlx can train: "))
    words = shlex.split(follows.removeprefix("next, where mlx can train: "))
    assert words[:2] == ["python", "cli.py"] and parsed(words[2:]) == parsed([*typed, "--output", "parity-mlx"])
    assert "and with both folders: python cli.py parity compare side parity-mlx\n" in done.out
    assert os.environ["MLX_ENABLE_TF32"] == os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    again = run_cli(*command)
    assert again.code == 2 and "side: already exists" in again.err


def parsed(words: list[str]) -> dict[str, Any]:
    return vars(cli.build_parser().parse_args(words))


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
    assert shown.count("error: no such data") == 1 and "the mlx side was not recorded" in shown
    assert os.listdir() == [], "nothing stands in the way of the same command"


def test_a_side_that_is_killed_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="mlx side was ended by signal 9"):
        run_sides("import os; os.kill(os.getpid(), 9)", capfd)
    assert os.listdir() == []


FIRST_SIDE_ONLY = """
import sys
from pathlib import Path
from core.parity_record import write_record
from tests.parity.made import make_record
out = Path(sys.argv[sys.argv.index("--output") + 1])
write_record(out, make_record(backend=out.name))
if out.name == "cuda":
    (out / "record.json").unlink()
    sys.exit(2)
"""


def test_after_a_second_side_that_fails_the_first_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the commands that are named go on from it: the place of the second side is free."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code, shown = run_sides(FIRST_SIDE_ONLY, capfd)
    assert code == 2 and "the cuda side was not recorded" in shown
    (folder,) = Path("runs").iterdir()
    assert sorted(os.listdir(folder)) == ["mlx", "settings.yaml"]
    assert read_record(folder / "mlx").backend == "mlx"
    assert load_config(folder / "settings.yaml").backend == "cuda"
    record = f"python cli.py parity record --config {folder}/settings.yaml --steps 2 --output {folder}/cuda --skip-4bit"
    assert f"to go on from it: {record}\n" in shown
    assert f"and then: python cli.py parity compare {folder}/mlx {folder}/cuda\n" in shown


@pytest.mark.usefixtures("needs_both")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_parity_leaves_nothing_and_says_so_once(
    tmp_path: Path, settings: list[object], number: signal.Signals
) -> None:
    """Ctrl-C reaches both processes, a SIGTERM the one that it is sent to."""
    command = [sys.executable, "-u", str(ROOT / "cli.py"), "parity", *map(str, settings), "--steps", "20000"]
    process = subprocess.Popen(
        [*command, "--output", "out"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a runner in the background has SIGINT ignored, and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        assert process.stdout is not None
        try:
            seen = next(line for line in process.stdout if "validation rows" in line)
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            shown = process.stdout.read()
        finally:
            process.kill()
    assert seen.startswith("mlx: base model") and process.returncode == 130
    assert shown.count("interrupted") == 1 and "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


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
    done = run_cli("parity", *settings, "--steps", 7, "--skip-4bit", "--output", "out")
    assert done.code == 2 and not Path("out").exists()
    assert "mlx can't train here (no mlx)" in done.err
    model, data = (shlex.quote(str(settings[place])) for place in (1, 3))
    assert f"python cli.py parity record --device cpu --model {model} --data {data}" in done.err
    for name in ("mlx", "cuda"):
        assert f"--backend {name} --steps 7 --output parity-{name} --skip-4bit\n" in done.err
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
    assert "Not comparable" in done.out and "optim.weight_decay 0.01 (mlx) and 0.5 (cuda)" in done.out
    assert json.loads(Path("out", REPORT).read_text())["mismatches"][0]["place"] == "settings"


def test_compare_what_is_no_record(run_cli: RunCli, record: Path) -> None:
    def refused(folder: str) -> str:
        done = run_cli("parity", "compare", record, folder, "--output", "out")
        assert done.code == 2 and not Path("out").exists()
        return done.err

    assert "nowhere: no such folder" in refused("nowhere")
    Path("file").write_text("")
    assert "file: not a folder" in refused("file")
    Path("model").mkdir()
    assert "model: not a parity record" in refused("model")
    assert "make one with: python cli.py parity record --output parity-record\n" in refused("model")
    Path("parity-record").mkdir()
    assert "parity record --output parity-record-2\n" in refused("model"), "a name that is free"
    for name in ("mlx", "cuda"):
        write_record(Path("model", name), make_record(backend=name))
    assert "the records are the folders in it: model/cuda, model/mlx\n" in refused("model")


def test_compare_one_folder_twice(run_cli: RunCli, record: Path) -> None:
    for other in (record, record.parent / "elsewhere" / ".." / record.name):
        (record.parent / "elsewhere").mkdir(exist_ok=True)
        done = run_cli("parity", "compare", record, other, "--output", "out")
        assert done.code == 2 and "are one folder" in done.err and not Path("out").exists()


def test_compare_records_of_one_backend(run_cli: RunCli, record: Path, tmp_path: Path) -> None:
    write_record(tmp_path / "b", make_record(backend="mlx"))
    done = run_cli("parity", "compare", record, tmp_path / "b", "--output", "out")
    assert done.code == 0 and "Parity." not in done.out
    assert "this proves that one backend repeats itself, not that two agree" in done.out


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
