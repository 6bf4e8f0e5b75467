"""Tokenised rows on the disk: a second start with the same files, tokenizer and settings tokenises nothing.

An entry is a folder of flat arrays, memory-mapped when read, with their checksums; its name is a hash of everything
that decides the rows. How they are split is not in it: another seed or fold finds the same entry. It appears whole, by
renaming; arrays that are too large for memory are in its folder already while they are made. A damaged one is made
again; whatever else goes wrong with the disk, the rows are tokenised as if there were no cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.config import DataConfig
from data.array_store import Array, file_name, read_array, write_array
from data.dataset import SPLITS, TokenizedData
from data.lines import Line
from data.pipeline import COLUMNS
from data.sources import source_fingerprint

WORTH_SECONDS = 1.0
"""Rows that are there sooner, their tokenizer with them, are not kept. Measured on a CPU core: 219 rows take 0.1 s and
20,000 rows 9 s; loading the tokenizer takes 0.2 s, and 2 to 3 s more where nothing else needs transformers."""
MAX_BYTES = 8 * 10**9
"""Of all entries together; what was used longest ago goes first. A million rows of 100 tokens are 1.1 GB."""

_FORMAT = 2
_META = "rows.json"
"""JSON, and its own checksum in the last line."""
_SPLIT_ONLY = {"validation", "test", "folds", "fold", "near_duplicates", "strict"}
"""Settings that decide on which side a row is, and nothing else."""
_UNFINISHED = ".making-"
_ABANDONED_SECONDS = 3600
_PACKAGES = ("transformers", "tokenizers", "jinja2", "rensa", "detect-secrets")
_TEXTS = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
"""Files of a model folder that a tokenizer may read; which of them it does is its own affair."""


def rows_key(config: DataConfig, *, tokenizer: Path) -> str | None:
    """Hash of what decides the rows: the data's content, the tokenizer's files, settings, our code, its libraries.

    Args:
        tokenizer: a model folder.

    Returns:
        None where there is no data: who reads it says what is wrong.

    Raises:
        UserError: as `data.sources.open_source`.
    """
    content = source_fingerprint(config.path)
    if content is None:
        return None
    digest = hashlib.sha256()
    settings = config.model_dump(mode="json", exclude=_SPLIT_ONLY)
    parts = [_FORMAT, content, settings, [_version(name) for name in _PACKAGES]]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    # the code itself instead of a number that somebody has to think of raising
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *here.glob("check/*.py")]):
        digest.update(path.read_bytes())
    for path in sorted([*tokenizer.glob("*"), *tokenizer.glob("additional_chat_templates/*")]):
        if path.suffix in _TEXTS and path.is_file():
            digest.update(f"\n{path.relative_to(tokenizer)}:{path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cached_rows(
    folder: Path, key: str | None, make: Callable[[Path | None], TokenizedData], *, worth_seconds: float | None = None
) -> TokenizedData:
    """What `make` returns, kept in `folder` under `key` if making it took `worth_seconds` (`WORTH_SECONDS` if None);
    without a key, just that.

    Args:
        make: gets a folder, yet to be made, for arrays that are too large for memory; None where there can be none.
    """
    if key is None:
        return make(None)
    entry = folder / key
    if (found := _read(entry)) is not None:
        return found
    began = time.perf_counter()
    scratch = folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
    try:
        data = make(scratch)
        if time.perf_counter() - began >= (WORTH_SECONDS if worth_seconds is None else worth_seconds):
            with suppress(OSError):  # a full disk, or one that can't be written to: the next start tokenises again
                _write(scratch, data)
                scratch.rename(entry)  # fails where another process was sooner, whose rows are the same
                _evict(folder, keep=entry)
        return data
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # maps of its files stay good


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(entry: Path) -> TokenizedData | None:
    """The rows of an entry, or None where there is none, or a damaged one, which is removed."""
    from data.check.inspection import Inspection

    try:
        meta = _read_meta(entry / _META)
        arrays = {name: _read_array(entry, name, sha256) for name, sha256 in meta["sha256"].items()}
        with suppress(OSError):  # somebody else's entry: good, though it can't be touched
            os.utime(entry / _META)  # the time of its last use
        inspections = meta["inspections"]
        return TokenizedData(
            arrays,
            # JSON's keys were sorted for nobody: the order of the splits is the order of the data
            {split: Inspection.from_json(inspections[split]) for split in SPLITS if split in inspections},
            meta["files"],
            tuple(Line(*line) for line in meta["lines"]),
            meta["name"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _read_meta(path: Path) -> dict[str, Any]:
    """Raises: OSError, ValueError: not whole."""
    text, _, checksum = path.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        raise ValueError(f"{path.name} is damaged")
    meta: dict[str, Any] = json.loads(text)
    return meta


def _read_array(entry: Path, name: str, sha256: str) -> Array:
    """Raises: OSError, ValueError, KeyError: not whole."""
    path = entry / file_name(name)
    if _sha256(path) != sha256:
        raise ValueError(f"{path.name} is damaged")
    return read_array(path, COLUMNS[name.partition("-")[2]])


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(folder: Path, data: TokenizedData) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in data.arrays.items():
        write_array(folder / file_name(name), array)
    meta: dict[str, Any] = {
        "name": data.name,
        "files": dict(data.files),
        "lines": list(data.lines),
        "inspections": {split: inspection.to_json() for split, inspection in data.inspections.items()},
        "sha256": {name: _sha256(folder / file_name(name)) for name in data.arrays},
    }
    text = json.dumps(meta, indent=1)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    (folder / _META).write_text(f"{text}\n{checksum}\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _evict(folder: Path, *, keep: Path) -> None:
    """Removes what was used longest ago until the rest is within `MAX_BYTES`, and what killed processes left."""
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        if time.time() - _last_write(leftover) > _ABANDONED_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    entries = {entry: _size(entry) for entry in sorted(folder.glob("[0-9a-f]*"), key=_last_use)}
    total = sum(entries.values())
    # the new one last: it goes only if it alone is too much
    for entry in [*(other for other in entries if other != keep), keep]:
        if total <= MAX_BYTES:
            return
        shutil.rmtree(entry, ignore_errors=True)
        total -= entries.get(entry, 0)


def _last_write(folder: Path) -> float:
    """Of its files; the folder's own time is that of the last new name."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:  # its process is done with it
        return time.time()


def _last_use(entry: Path) -> float:
    try:
        return (entry / _META).stat().st_mtime
    except OSError:
        return 0.0


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.iterdir() if path.is_file())
