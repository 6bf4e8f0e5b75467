"""Tokenised rows on the disk: a second start with the same files, tokenizer and settings tokenises nothing.

An entry is a folder of NumPy arrays, memory-mapped when read, with their checksums; its name is a hash of everything
that decides the rows. It appears whole, by renaming. A damaged one is made again; whatever else goes wrong with the
disk, the rows are tokenised as if there were no cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import core.seeding
from core.config import DataConfig
from data.batches import TokenRows
from data.dataset import Prepared
from data.sources import source_fingerprint

WORTH_SECONDS = 1.0
"""Rows that are there sooner, their tokenizer with them, are not kept. Measured on a CPU core: 219 rows take 0.1 s and
20,000 rows 9 s; loading the tokenizer takes 0.2 s, and 2 to 3 s more where nothing else needs transformers."""
MAX_BYTES = 2 * 10**9
"""Of all entries together; what was used longest ago goes first."""

_FORMAT = 1
_META = "rows.json"
"""JSON, and its own checksum in the last line."""
_SPLITS = ("train", "validation", "test")
_UNFINISHED = ".making-"
_ABANDONED_SECONDS = 3600
_PACKAGES = ("transformers", "tokenizers", "jinja2")
_TEXTS = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
"""Files of a model folder that a tokenizer may read; which of them it does is its own affair."""


def rows_key(config: DataConfig, *, seed: int, tokenizer: Path) -> str | None:
    """Hash of what decides the rows: the data's content, the tokenizer's files, settings, our code, its libraries.

    Args:
        tokenizer: a model folder.

    Returns:
        None where there is no data: who reads it says what is wrong.

    Raises:
        UserError: as `data.sources.read_source`.
    """
    content = source_fingerprint(config.path)
    if content is None:
        return None
    digest = hashlib.sha256()
    parts = [_FORMAT, content, config.model_dump(mode="json"), seed, [_version(name) for name in _PACKAGES]]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    # the code itself instead of a number that somebody has to think of raising
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(core.seeding.__file__)]:
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
    folder: Path, key: str | None, make: Callable[[], Prepared], *, worth_seconds: float | None = None
) -> Prepared:
    """What `make` returns, kept in `folder` under `key` if making it took `worth_seconds` (`WORTH_SECONDS` if None);
    without a key, just that."""
    if key is None:
        return make()
    entry = folder / key
    if (found := _read(entry)) is not None:
        return found
    began = time.perf_counter()
    prepared = make()
    if time.perf_counter() - began >= (WORTH_SECONDS if worth_seconds is None else worth_seconds):
        try:
            _write(entry, prepared)
            _evict(folder, keep=entry)
        except OSError:
            return prepared  # a full disk, or one that can't be written to: the next start tokenises again
    return prepared


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(entry: Path) -> Prepared | None:
    """The rows of an entry, or None where there is none, or a damaged one, which is removed."""
    try:
        meta = _read_meta(entry / _META)
        rows = {split: _read_rows(entry, split, meta["sha256"]) for split in _SPLITS}
        with suppress(OSError):  # somebody else's entry: good, though it can't be touched
            os.utime(entry / _META)  # the time of its last use
        return Prepared(
            train=rows["train"],
            validation=rows["validation"],
            test=rows["test"],
            findings=tuple(meta["findings"]),
            fingerprint=meta["fingerprint"],
            name=meta["name"],
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


def _read_rows(entry: Path, split: str, sha256: Mapping[str, str]) -> TokenRows:
    """Raises: OSError, ValueError, KeyError: not whole."""
    names = [f"{split}-{part}" for part in ("ids.npy", "targets.npy", "lengths.npy", "origins.json")]
    for name in names:
        with open(entry / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256[name]:
                raise ValueError(f"{name} is damaged")
    # an array over the map, because a memmap's own slices cost several times as much
    ids, is_target = (np.asarray(np.load(entry / name, mmap_mode="r")) for name in names[:2])
    ends = np.cumsum(np.load(entry / names[2]))
    origins = json.loads((entry / names[3]).read_text(encoding="utf-8"))
    return TokenRows.of(np.split(ids, ends)[:-1], np.split(is_target, ends)[:-1], origins)


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(entry: Path, prepared: Prepared) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=entry.parent))
    try:
        for split in _SPLITS:
            _write_rows(scratch, split, getattr(prepared, split))
        meta: dict[str, Any] = {
            "name": prepared.name,
            "fingerprint": prepared.fingerprint,
            "findings": list(prepared.findings),
            "sha256": {path.name: _sha256(path) for path in sorted(scratch.iterdir())},
        }
        text = json.dumps(meta, indent=1)
        checksum = hashlib.sha256(text.encode()).hexdigest()
        (scratch / _META).write_text(f"{text}\n{checksum}\n", encoding="utf-8")
        scratch.rename(entry)  # fails where another process was sooner, whose rows are the same
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_rows(folder: Path, split: str, rows: TokenRows) -> None:
    assert np.array_equal(rows.row_ids, np.arange(len(rows)))  # a split of its own
    np.save(folder / f"{split}-ids.npy", np.concatenate([np.empty(0, np.int32), *rows.ids]))
    np.save(folder / f"{split}-targets.npy", np.concatenate([np.empty(0, np.bool_), *rows.is_target]))
    np.save(folder / f"{split}-lengths.npy", rows.lengths)
    (folder / f"{split}-origins.json").write_text(json.dumps(rows.origin), encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _evict(folder: Path, *, keep: Path) -> None:
    """Removes what was used longest ago until the rest is within `MAX_BYTES`, and what killed processes left."""
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        if time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    entries = {entry: _size(entry) for entry in sorted(folder.glob("[0-9a-f]*"), key=_last_use)}
    total = sum(entries.values())
    # the new one last: it goes only if it alone is too much
    for entry in [*(other for other in entries if other != keep), keep]:
        if total <= MAX_BYTES:
            return
        shutil.rmtree(entry, ignore_errors=True)
        total -= entries.get(entry, 0)


def _last_use(entry: Path) -> float:
    try:
        return (entry / _META).stat().st_mtime
    except OSError:
        return 0.0


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.iterdir() if path.is_file())
