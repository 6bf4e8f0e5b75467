"""Packed 4-bit weights on disk, so that the second start reads a quarter of the bytes and packs nothing.

One folder for each (model files, compute type): a safetensors file for each layer with the packed bytes and scales in
bitsandbytes' names, and a manifest with their SHA-256. It appears in one step when it is whole; one that does not match
its manifest is removed and made again, never used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from backends.cuda.nf4 import BLOCK, Nf4Matrix
from core.files import read_json, sha256_of, to_json
from core.models.fingerprint import model_fingerprint
from core.models.wheel import cache_folder
from core.protocols import Weight

log = logging.getLogger("twinkeel")

FORMAT = 1
MANIFEST = "manifest.json"
_DRAFT = ".making-"
"""Start of a draft's folder name; the number of its process follows."""
_PART = "|"
"""Between the name of a matrix and the name of what belongs to it; in no tensor's name."""
_AIR = 1.2
"""The disk must have more room than the packed weights need by this factor."""


def open_cache(model: Path, dtype: torch.dtype, plan: Sequence[Weight], *, source: str = "") -> PackedCache | None:
    """The place for a model's packed weights; None, with a line, when the disk has no room for them.

    Args:
        plan: what the loaded model will consist of.
        source: name of where the weights come from, if that is not the model folder.
    """
    cache = PackedCache(cache_folder() / "nf4" / _key(model, dtype, plan, source))
    needed, parent = _AIR * sum(weight.bytes for weight in plan), cache.folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(parent)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        log.info("4-bit weights are not kept: %s can't be written (%s)", parent, error.strerror)
        return None
    if not cache.folder.exists() and free < needed:
        others = sum(path.stat().st_size for path in parent.rglob("*.safetensors"))
        log.info(
            "4-bit weights are not kept: %s needs %.1f GB and has %.1f free; of other models it holds %.1f GB",
            parent,
            needed / 1e9,
            free / 1e9,
            others / 1e9,
        )
        return None
    return cache


def _key(model: Path, dtype: torch.dtype, plan: Sequence[Weight], source: str) -> str:
    digest = hashlib.sha256(f"{FORMAT} nf4 {BLOCK} double {dtype} {source} {model_fingerprint(model)}".encode())
    for weight in plan:  # other versions of transformers may name parameters otherwise
        digest.update(f"{weight.name} {weight.dtype} {weight.parameters}\n".encode())
    for path in sorted(model.glob("*.safetensors")):  # the fingerprint does not see a change within a file
        digest.update(f"{path.name} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _remove_unfinished(parent: Path) -> None:
    """Drafts of processes that were killed: up to a whole model each."""
    for draft in parent.glob(f"{_DRAFT}*"):
        number = draft.name.removeprefix(_DRAFT).partition("-")[0]
        if not (number.isdecimal() and psutil.pid_exists(int(number))):
            shutil.rmtree(draft, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class PackedCache:
    folder: Path

    def is_whole(self) -> bool:
        """Whether every file is there with its checksum; removes a folder that is damaged."""
        if not self.folder.exists():
            return False
        manifest = read_json(self.folder / MANIFEST)
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if isinstance(files, dict) and files and manifest.get("format") == FORMAT:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:  # hashing leaves the interpreter alone
                if all(pool.map(lambda item: _has(self.folder / item[0], item[1]), files.items())):
                    return True
        log.warning("%s: damaged; packing the weights again", self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        return False

    def read(self, piece: str, device: torch.device) -> dict[str, torch.Tensor | Nf4Matrix]:
        """What `Draft.write` was given, on the device."""
        from safetensors.torch import load_file

        plain: dict[str, torch.Tensor | Nf4Matrix] = {}
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(self.folder / f"{piece}.safetensors").items():
            name, is_part, part = key.partition(_PART)
            if is_part:
                parts.setdefault(name, {})[part] = tensor
            else:
                plain[name] = tensor.to(device)
        packed = {name: Nf4Matrix.restore(tensors, device) for name, tensors in parts.items()}
        # experts are numbered: 10 comes after 9
        return plain | dict(sorted(packed.items(), key=lambda item: _natural(item[0])))

    @contextmanager
    def writing(self) -> Iterator[Draft]:
        """A draft that becomes the cache when the context ends well. A disk that fails costs the cache, not the run."""
        draft = Draft(self.folder.parent)
        try:
            yield draft
            draft.become(self.folder)
        finally:
            draft.remove()


class Draft:
    """A cache in the making. What the disk refuses is said once, and ends the draft."""

    def __init__(self, parent: Path) -> None:
        self._files: dict[str, dict[str, Any]] = {}
        self._folder: Path | None = None
        with self._giving_up():
            self._folder = Path(tempfile.mkdtemp(prefix=f"{_DRAFT}{os.getpid()}-", dir=parent))

    def write(self, piece: str, values: Mapping[str, torch.Tensor | Nf4Matrix]) -> None:
        """Keeps a portion of the model."""
        from safetensors.torch import save_file

        if self._folder is None:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, value in values.items():
            if isinstance(value, Nf4Matrix):
                # the maps of levels are shared by all matrices; a file holds no shared tensors
                tensors |= {f"{name}{_PART}{part}": t.cpu().contiguous().clone() for part, t in value.saved().items()}
            else:
                tensors[name] = value.cpu().contiguous()
        path = self._folder / f"{piece}.safetensors"
        with self._giving_up():
            save_file(tensors, path)
            self._files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}

    def become(self, folder: Path) -> None:
        """Puts the whole draft in its place; if another process was quicker, its cache is as good."""
        if self._folder is None:
            return
        with self._giving_up():
            self._folder.chmod(0o755)
            (self._folder / MANIFEST).write_text(to_json({"format": FORMAT, "files": self._files}), encoding="utf-8")
            if not folder.exists():
                self._folder.replace(folder)
            log.info("4-bit weights kept in %s", folder)

    def remove(self) -> None:
        """Takes back what is still a draft."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            log.warning("4-bit weights are not kept: %s", error)
            self.remove()
            self._folder = None


def _has(path: Path, expected: Mapping[str, Any]) -> bool:
    try:
        return path.stat().st_size == expected["bytes"] and sha256_of(path) == expected["sha256"]
    except (OSError, KeyError, TypeError):
        return False


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
