"""The doctor: what it says about packages, backends, disks and keys, and its exit code."""

from __future__ import annotations

import io
import json
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
from rich.console import Console

from core import doctor
from core.protocols import DeviceReport

ROOT = Path(doctor.__file__).parent.parent
Usage = namedtuple("Usage", ["total", "used", "free"])


def report(backend: str, *, available: bool = True, notes: tuple[str, ...] = ()) -> DeviceReport:
    return DeviceReport(
        backend=backend,
        available=available,
        device="NVIDIA H200",
        accelerator=True,
        memory_bytes=150_000_000_000,
        problem="" if available else f"{backend} is broken; mend it",
        notes=notes,
    )


@pytest.fixture(autouse=True)
def a_plain_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def items(diagnosis: doctor.Diagnosis, title: str) -> dict[str, doctor.Item]:
    (group,) = [group for group in diagnosis.groups if group.title == title]
    return {item.name: item for item in group.items}


def text(diagnosis: doctor.Diagnosis, width: int = 200, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, color_system=None).print(doctor.render(diagnosis))
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("mlx", "cuda", "code", "answer"),
    [
        (True, True, 0, "This machine can train with --backend mlx or cuda."),
        (False, True, 1, "This machine can train with --backend cuda. Not with mlx."),
        (True, False, 1, "This machine can train with --backend mlx. Not with cuda."),
        (False, False, 2, "No backend can train here yet: see what is missing above."),
    ],
)
def test_exit_code_and_answer(*, mlx: bool, cuda: bool, code: int, answer: str) -> None:
    diagnosis = doctor.diagnose([report("mlx", available=mlx), report("cuda", available=cuda)], hub=True)
    assert doctor.exit_code(diagnosis) == code
    assert text(diagnosis).splitlines()[-1] == answer


def test_a_backend_that_the_platform_has_not_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    diagnosis = doctor.diagnose([report("mlx", available=False), report("cuda")], hub=True)
    assert doctor.exit_code(diagnosis) == 0
    assert items(diagnosis, "backends")["mlx"].value == "not on this platform"
    assert "packages of mlx" not in [group.title for group in diagnosis.groups]
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert doctor.exit_code(doctor.diagnose([report("mlx", available=False), report("cuda")], hub=True)) == 1


def test_backends_say_device_memory_problem_and_notes() -> None:
    reports = [report("cuda", notes=("uses MKL",)), report("mlx", available=False)]
    shown = text(doctor.diagnose(reports, hub=True))
    assert "can train: NVIDIA H200, 150.0 GB" in shown
    assert "uses MKL" in shown
    assert "mlx is broken; mend it" in shown


def test_packages_missing_old_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1+cu128", "peft": "0.19.0", "accelerate": "1.10rc1", "numpy": "1.26.4"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    diagnosis = doctor.diagnose([report("cuda")], hub=True)
    found = items(diagnosis, "packages of cuda")
    assert (found["torch"].mark, found["torch"].value) == ("missing", "2.9.1+cu128, needs 2.11")
    assert found["torch"].hint == 'pip install "torch>=2.11"'
    assert found["peft"].mark == "ok"
    assert found["bitsandbytes"].hint == 'pip install -e ".[cuda]"'
    shown = text(diagnosis)
    assert "1.26.4, needs 2.0" in shown
    assert "not installed, needs 5.17" in shown


def test_no_bitsandbytes_wanted_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert "bitsandbytes" not in items(doctor.diagnose([report("cuda")], hub=True), "packages of cuda")


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13)), ("5.17", (5, 17)), ("0.32.4.dev0", (0, 32, 4)), ("17", (17,)), ("10.0", (10,))],
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert doctor.release(version) == numbers


def test_lowest_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def lowest(requirements: list[str]) -> dict[str, str]:
        plain = [requirement.split(";")[0].strip() for requirement in requirements if "[" not in requirement]
        return dict(requirement.split(">=", 1) for requirement in plain if ">=" in requirement)

    base = [requirement for requirement in project["dependencies"] if ";" not in requirement]
    assert lowest(base) == doctor.BASE_PACKAGES
    assert lowest(extras["cuda"]) == doctor.BACKEND_PACKAGES["cuda"]
    wanted = {name: version for name, version in lowest(extras["mlx"]).items() if name != "mkl"}
    assert wanted == doctor.BACKEND_PACKAGES["mlx"]


def test_keys_are_present_or_not_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    none = items(doctor.diagnose([], hub=True), "hub and keys")
    assert none["hub token"].value == "none"
    monkeypatch.setattr(doctor, "installed_version", {"wandb": "0.20"}.get)
    monkeypatch.setenv("WANDB_API_KEY", "wandb-hidden")
    monkeypatch.setenv("HF_TOKEN", "hub-hidden")
    diagnosis = doctor.diagnose([], hub=True)
    found = items(diagnosis, "hub and keys")
    assert found["hub token"].value == "present"
    assert found["wandb"].value == "0.20, WANDB_API_KEY is present"
    assert "hidden" not in text(diagnosis) + json.dumps(doctor.to_json(diagnosis))
    monkeypatch.delenv("HF_TOKEN")
    token = tmp_path / "home" / "token"
    token.parent.mkdir()
    token.write_text("")
    assert items(doctor.diagnose([], hub=True), "hub and keys")["hub token"].value == "none"
    token.write_text("file-hidden")
    diagnosis = doctor.diagnose([], hub=True)
    assert items(diagnosis, "hub and keys")["hub token"].value == "present"
    assert "hidden" not in text(diagnosis)


@pytest.mark.parametrize(("hub", "mark", "value"), [(True, "ok", "answers"), (None, "note", "not asked")])
def test_hub(*, hub: bool | None, mark: str, value: str) -> None:
    found = items(doctor.diagnose([], hub=hub), "hub and keys")["hub"]
    assert (found.mark, found.value) == (mark, value)


def test_an_unreachable_hub_is_no_failure_but_has_advice() -> None:
    diagnosis = doctor.diagnose([report("cuda")], hub=False)
    found = items(diagnosis, "hub and keys")["hub"]
    assert found.value == "does not answer"
    assert "proxy" in found.hint
    assert doctor.exit_code(diagnosis) == 0


def test_little_space_is_noted_where_it_is_little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "home"
    cache.mkdir()
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: Usage(0, 0, 5_000_000_000 if Path(path) == cache else 30_000_000_000)
    )
    found = items(doctor.diagnose([], hub=True), "machine")
    assert found["disk"].mark == "ok"
    assert found["disk"].value.startswith("30.0 GB free")
    assert (found["cache disk"].mark, found["cache disk"].value) == ("note", f"5.0 GB free, {cache / 'hub'}")
    assert "HF_HOME" in found["cache disk"].hint


def test_cache_folder_follows_the_hub_librarys_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.cache_folder() == tmp_path / "home" / "hub"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert doctor.cache_folder() == tmp_path / "xdg" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "direct"))
    assert doctor.cache_folder() == tmp_path / "direct"


def test_json_says_it_all(tmp_path: Path) -> None:
    diagnosis = doctor.diagnose([report("cuda"), report("mlx", available=False)], hub=None)
    found = json.loads(json.dumps(doctor.to_json(diagnosis)))
    assert found["can_train"] == {"cuda": True, "mlx": False}
    assert found["exit_code"] == 1
    assert [item["name"] for item in found["groups"]["machine"]] == ["platform", "python", "disk", "cache disk"]


def test_80_columns_and_ascii(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "größe"))
    shown = text(doctor.diagnose([report("cuda")], hub=False), width=80, encoding="ascii")
    assert max(map(len, shown.splitlines())) <= 80
    assert "gr??e" in shown.replace("\n", "").replace(" ", "")
