"""`doctor`: what this machine can train, what is missing, and what to type to get it.

The backends' reports and whether the hub answers are arguments, so nothing here imports a backend or asks the network.
Keys and tokens are reported as present or not, never read or shown.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.protocols import DeviceReport
from core.trackers.base import KINDS
from core.trackers.environment import environment

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Mark = Literal["ok", "note", "missing"]

PYTHON = (3, 11)
BASE_PACKAGES = {
    "beautifulsoup4": "4.13",
    "datasets": "4.0",
    "detect-secrets": "1.5",
    "gguf": "0.17",
    "huggingface-hub": "1.0",
    "jinja2": "3.1",
    "markdown-it-py": "3.0",
    "matplotlib": "3.9",
    "numpy": "2.0",
    "pandas": "2.2",
    "plotext": "6.0",
    "psutil": "6.0",
    "pyarrow": "17",
    "pydantic": "2.8",
    "pylatexenc": "2.10",
    "pypdf": "6.0",
    "python-dotenv": "1.0",
    "pyyaml": "6.0",
    "rensa": "0.5",
    "rich": "14",
    "rouge-score": "0.1.2",
    "safetensors": "0.5",
    "scikit-learn": "1.5",
    "scipy": "1.13",
    "tokenizers": "0.22",
    "transformers": "5.17",
    "tree-sitter": "0.25",
    "tree-sitter-c": "0.24",
    "tree-sitter-cpp": "0.23",
    "tree-sitter-go": "0.25",
    "tree-sitter-java": "0.23",
    "tree-sitter-javascript": "0.25",
    "tree-sitter-python": "0.25",
    "tree-sitter-rust": "0.24",
    "tree-sitter-typescript": "0.23",
    "xxhash": "3.4",
}
"""Lowest versions, as in pyproject.toml (a test compares the two)."""
BACKEND_PACKAGES: Mapping[str, Mapping[str, str]] = {
    "mlx": {"mlx": "0.32.2", "mlx-lm": "0.32"},
    "cuda": {"torch": "2.11", "peft": "0.19", "accelerate": "1.10", "bitsandbytes": "0.49"},
}
TRACKER_KEYS = {"wandb": "WANDB_API_KEY"}
"""The variable that holds a tracker's key, where it has one."""

CACHE_BYTES = 20e9
"""Less free space than that in the hub's cache is noted: a 7B model in 16 bits takes 15 GB."""
FOLDER_BYTES = 2e9
"""Likewise where the run folders go."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that was looked at."""

    name: str
    mark: Mark
    value: str
    hint: str = ""
    """What to do about it, in a line."""


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `doctor` found."""

    groups: tuple[Group, ...]
    can_train: Mapping[str, bool]
    """For each backend that exists on this platform, whether it can train here."""


def diagnose(reports: Sequence[DeviceReport], *, hub: bool | None) -> Diagnosis:
    """Looks at this machine.

    Args:
        reports: what each backend's `probe` returned.
        hub: whether the model hub answers; None when it was not asked.
    """
    can_train = {report.backend: report.available for report in reports if is_supported(report.backend)}
    groups = [
        Group("machine", tuple(_machine())),
        Group("backends", tuple(item for report in reports for item in _backend(report))),
        Group("packages", tuple(_packages(BASE_PACKAGES))),
    ]
    for report in reports:
        needed = BACKEND_PACKAGES.get(report.backend, {})
        if is_supported(report.backend):
            groups.append(Group(f"packages of {report.backend}", tuple(_packages(needed, report.backend))))
    groups.append(Group("hub and keys", tuple(_hub(hub))))
    return Diagnosis(tuple(groups), can_train)


def is_supported(backend: str) -> bool:
    """Whether there is such a backend for this platform at all: MLX has no builds for Windows and Intel Macs."""
    if backend != "mlx":
        return True
    return (platform.system(), platform.machine()) == ("Darwin", "arm64") or platform.system() == "Linux"


def exit_code(diagnosis: Diagnosis) -> int:
    """0: every backend of this platform can train here; 1: some can; 2: none can."""
    able = list(diagnosis.can_train.values())
    if not any(able):
        return 2
    return 0 if all(able) else 1


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """All of it as JSON can hold it."""
    return {
        "can_train": dict(diagnosis.can_train),
        "exit_code": exit_code(diagnosis),
        "groups": {group.title: [asdict(item) for item in group.items] for group in diagnosis.groups},
    }


# --- what is looked at ------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Item]:
    cores = os.cpu_count() or 1
    system = {"Darwin": "macOS"}.get(platform.system(), platform.system())
    release = platform.mac_ver()[0] or platform.release()
    yield Item("platform", "ok", f"{system} {release}, {platform.machine()}, {cores} cores")
    version, needed = platform.python_version(), ".".join(map(str, PYTHON))
    if sys.version_info >= PYTHON:
        yield Item("python", "ok", version)
    else:
        yield Item("python", "missing", f"{version}, needs {needed}", f"install Python {needed} or newer")
    yield _disk("disk", Path.cwd(), FOLDER_BYTES, "runs are written here; free some space")
    yield _disk("cache disk", cache_folder(), CACHE_BYTES, "set HF_HOME to a folder on a larger disk")


def cache_folder() -> Path:
    """Where downloaded models go, by the rules of huggingface_hub, without importing it."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    return _hub_home() / "hub"


def _hub_home() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{base}/huggingface")).expanduser()


def _disk(name: str, folder: Path, enough: float, hint: str) -> Item:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path.cwd())
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:,.1f} GB free, {folder}"
    return Item(name, "ok", text) if free >= enough else Item(name, "note", text, hint)


def _backend(report: DeviceReport) -> Iterator[Item]:
    if not is_supported(report.backend):
        yield Item(report.backend, "note", "not on this platform")
        return
    if not report.available:
        yield Item(report.backend, "missing", "cannot train here", report.problem or _install(report.backend))
        return
    memory = f", {report.memory_bytes / 1e9:,.1f} GB" if report.memory_bytes else ""
    slow = "" if report.accelerator else ", no accelerator: for small models"
    yield Item(report.backend, "ok", f"can train: {report.device}{memory}{slow}")
    for note in report.notes:
        yield Item("", "note", note)


def _packages(needed: Mapping[str, str], backend: str | None = None) -> Iterator[Item]:
    for name, lowest in needed.items():
        if name == "bitsandbytes" and platform.system() == "Darwin":
            continue  # 4-bit weights on a Mac are MLX's
        installed = installed_version(name)
        what = f'pip install "{name}>={lowest}"'
        if installed is None:
            yield Item(name, "missing", f"not installed, needs {lowest}", _install(backend) if backend else what)
        elif release(installed) < release(lowest):
            yield Item(name, "missing", f"{installed}, needs {lowest}", what)
        else:
            yield Item(name, "ok", f"{installed} (>= {lowest})")


def _install(backend: str) -> str:
    return f'pip install -e ".[{backend}]"'


def installed_version(package: str) -> str | None:
    """The version that is installed, by its metadata: nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13): the release segment of PEP 440, without trailing zeros, which mean nothing."""
    match = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in match.group().split(".")] if match else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _hub(hub: bool | None) -> Iterator[Item]:
    if hub is None:
        yield Item("hub", "note", "not asked")
    elif hub:
        yield Item("hub", "ok", "answers")
    else:
        hint = "local folders and cached models work without; else check the network, a proxy or HF_ENDPOINT"
        yield Item("hub", "note", "does not answer", hint)
    token = _has_hub_token()
    hint = "" if token else "only gated and private models need one: set HF_TOKEN, or hf auth login"
    yield Item("hub token", "ok" if token else "note", "present" if token else "none", hint)
    yield from _trackers()


def _trackers() -> Iterator[Item]:
    """Those that are installed, each with its version; the others in a line."""
    absent = []
    for name, kind in KINDS.items():
        if not all(any(map(installed_version, some)) for some in kind.packages):
            absent.append(name)
            continue
        version = next(found for some in kind.packages[0] if (found := installed_version(some)))
        key = TRACKER_KEYS.get(name)
        present = f", {key} is {'present' if environment().get(key) else 'not set'}" if key else ""
        yield Item(name, "ok", version + present)
    if absent:
        hint = f'if wanted: pip install -e ".[{",".join(absent)}]"'
        yield Item("trackers", "note", f"not installed: {', '.join(absent)}", hint)


def _has_hub_token() -> bool:
    if any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return True
    file = Path(os.environ.get("HF_TOKEN_PATH", _hub_home() / "token")).expanduser()
    return file.is_file() and file.stat().st_size > 0


# --- how it looks -----------------------------------------------------------------------------------------------------

_STYLES = {"ok": "green", "note": "yellow", "missing": "red"}
_WORDS = {"ok": "ok", "note": "-", "missing": "MISSING"}


@dataclass(frozen=True, slots=True)
class Page:
    """A rich renderable: a word beside every colour, what to do under what is missing, the answer last."""

    diagnosis: Diagnosis

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        def plain(text: str) -> str:
            return text.encode("ascii", "replace").decode() if options.ascii_only else text

        for group in self.diagnosis.groups:
            yield Text(group.title, "bold")
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(width=9)
            table.add_column(width=12)
            table.add_column(overflow="fold")
            for item in _gathered(group):
                mark = Text(f"  {_WORDS[item.mark]}", _STYLES[item.mark])
                table.add_row(mark, Text(item.name), Text(plain(item.value)))
                if item.hint:
                    table.add_row("", "", Text(plain(item.hint), "dim"))
            yield table
            yield Text()
        yield Text(_answer(self.diagnosis), "bold")


def render(diagnosis: Diagnosis) -> Page:
    """The diagnosis for `Console.print`."""
    return Page(diagnosis)


def _gathered(group: Group) -> Sequence[Item]:
    """Base packages that are as they should be take one line."""
    if group.title != "packages":
        return group.items
    fine = [item for item in group.items if item.mark == "ok"]
    rest = [item for item in group.items if item.mark != "ok"]
    return [Item("base", "ok", f"{len(fine)} of {len(group.items)} as needed"), *rest] if fine else rest


def _answer(diagnosis: Diagnosis) -> str:
    able = [name for name, can in diagnosis.can_train.items() if can]
    unable = [name for name, can in diagnosis.can_train.items() if not can]
    if not able:
        return "No backend can train here yet: see what is missing above."
    answer = f"This machine can train with --backend {' or '.join(able)}."
    return answer + (f" Not with {' or '.join(unable)}." if unable else "")
