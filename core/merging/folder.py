"""What a merged model's folder has beside the weights, and how it appears: whole, or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from core.architecture import Architecture
from core.errors import UserError
from core.files import disk_errors, fsync_folder, to_json, write_atomic
from core.models import ResolvedModel
from core.models.reference import original_of

CONFIG = "config.json"
REPORT = "merge_report.json"
"""What was merged, and what the check saw."""
_COPIED = (
    *(
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
    ),
    *("merges.txt", "tekken.json", "chat_template*", "additional_chat_templates"),
    *("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "USAGE_POLICY*"),
)
"""Of the base folder. Its README is about another model, and *.bin and *.gguf are its weights in other forms."""
_OWN_CODE = ("*.py",)
_RESERVE_BYTES = 100_000_000
"""Room that is left on the disk."""


def refuse_quantised(model: ResolvedModel, architecture: Architecture) -> None:
    """Raises: UserError: the base's weights are quantised, so that they can't be merged into."""
    if not (method := _quantised_by(model.path, architecture)):
        return
    original = original_of(model.name) or "ORIGINAL"
    raise UserError(
        f"{model.name}: its weights are quantised ({method}); a merge into them would round them again",
        hint=f"give the 16-bit model that it was made from: --model {original}",
    )


def _quantised_by(folder: Path, architecture: Architecture) -> str | None:
    if architecture.mlx_bits is not None:
        return f"MLX, {architecture.mlx_bits}-bit"
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "as its config.json says")) if isinstance(found, dict) else str(found)


def merged_config(raw: dict[str, Any], architecture: Architecture, *, dtype: str) -> dict[str, Any]:
    """The base's `config.json` with the type that was written, and unmistakable for each library that reads it.

    transformers 5 saves `rope_parameters`, where mlx-lm reads `rope_theta` and `rope_scaling` and falls back to other
    values in silence; and where `tie_word_embeddings` is missing, the two assume opposite values.
    """
    merged = {key: value for key, value in raw.items() if key != "_name_or_path"}
    for key in [key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"]:
        merged[key] = dtype
    merged["tie_word_embeddings"] = architecture.tied_embeddings
    if isinstance(rope := raw.get("rope_parameters"), dict):
        if "rope_theta" in rope:
            merged.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default" and not raw.get("rope_scaling"):
            merged["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return merged


def write_config(folder: Path, base: Path, architecture: Architecture, *, dtype: str) -> None:
    """Writes `config.json` for weights of this type."""
    raw = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    write_atomic(folder / CONFIG, to_json(merged_config(raw, architecture, dtype=dtype)))


def side_files(base: Path, *, code: bool = False) -> list[Path]:
    """Tokenizer, chat template, generation settings and licence of a model folder.

    Args:
        code: its Python files as well, which `trust_remote_code` lets run.
    """
    patterns = (*_COPIED, *_OWN_CODE) if code else _COPIED
    return sorted({path for pattern in patterns for path in base.glob(pattern)})


def copy_side_files(base: Path, folder: Path, *, code: bool = False) -> None:
    """Copies them; a hub's cache has links in their place, whose targets are copied."""
    with disk_errors(folder):
        for path in side_files(base, code=code):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)


def refuse_full_disk(output: Path, num_bytes: int) -> None:
    """Raises: UserError: less than `num_bytes` are free where `output` would be."""
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes + _RESERVE_BYTES:
        raise UserError(
            f"{output}: needs {gigabytes(num_bytes)} on the disk, and {gigabytes(free)} are free",
            hint="free some space, or choose a folder on another disk with --output",
        )


def gigabytes(num_bytes: float) -> str:
    """`269 MB`, `14.5 GB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.{1 if num_bytes < 1e7 else 0}f} MB"


def folder_bytes(folder: Path) -> int:
    """Size of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def readable(folder: Path) -> None:
    """safetensors leaves its files to their owner alone; these are as readable as the others."""
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / CONFIG).stat().st_mode)


class Draft:
    """A folder beside `output` that takes its name when `keep` is called; use as a context.

    What is there at the end without `keep` goes away, Ctrl-C included; what a killed process left, with the next merge.

    Raises:
        UserError: `output` exists, or another process is making it.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f".{output.name}.partial")
        self._lock: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Draft:
        refuse_taken(self.output)
        self._made = [path for path in self.output.absolute().parents if not path.exists()]
        with disk_errors(self.output):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
        try:
            with suppress(PermissionError):  # a file system without locks
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(
                f"{self.output}: another process is writing it", hint="wait for it, or choose another --output"
            ) from None
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self

    def keep(self) -> None:
        """Gives the folder its name.

        Raises:
            UserError: something has got there meanwhile.
        """
        refuse_taken(self.output)
        with disk_errors(self.output):
            fsync_folder(self.path)
            self.path.replace(self.output)
            fsync_folder(self.output.absolute().parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        for path in self._made:
            with suppress(OSError):  # it is of use now
                path.rmdir()


def refuse_taken(folder: Path) -> None:
    """Raises: UserError: the folder exists and has something in it, or can't be replaced by a new one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already", hint="give another folder with --output, or remove it")
    place = folder.resolve()
    if place == Path.cwd() or place.is_mount():
        raise UserError(
            f"{folder}: merge makes a new folder, and this is "
            f"{'the folder that you are in' if place == Path.cwd() else 'a mount point'}",
            hint=f"name one in it: --output {folder / 'merged'}",
        )
