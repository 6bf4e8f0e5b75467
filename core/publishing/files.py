"""What a push uploads: the files, their checksums, and a look for what must not leave this machine.

The plan is everything: what is not in it is not uploaded. Small files are read here, so that what was shown is what is
sent; weights are read again when they are sent, and held against their checksum afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from core.adapter_files import CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS
from core.errors import UserError
from core.files import read_json, sha256_of, to_json
from core.models.folder import read_header, weight_files
from core.publishing.base import PublishedBase
from core.publishing.card_snippets import Weights

CARD = "README.md"
SUMMARY = "training_summary.json"
_MERGED = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json"),
    *("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "USAGE_POLICY*"),
)
"""Of a merged model's folder; no code, which loading the model would run."""
_MORE_TEMPLATES = "additional_chat_templates"
_NAMES_A_PATH = ("_name_or_path", "name_or_path")
"""Where transformers writes the folder that a model or a tokenizer was loaded from."""
_SUMMARY_KEYS = (
    *("backend", "status", "steps", "total_steps", "epochs", "start", "base_val_loss", "best_val_loss", "best_step"),
    *("best_epoch", "probe_loss", "gap", "gap_low", "gap_high", "grade", "base_gap", "not_judged", "final_val_loss"),
    *("final_gap", "num_train_rows", "num_val_rows", "num_target_tokens", "tokens_per_second", "peak_memory_gb"),
    *("wall_seconds", "moves"),
)
_LARGE = 20_000_000
"""Bytes from where a file stays on the disk until it is sent."""
_METADATA_BYTES = 8_000_000
"""How much of a GGUF file is looked through: its metadata stands first."""


@dataclass(frozen=True)
class UploadFile:
    """One file of a push."""

    name: str
    """In the repository."""
    source: Path | bytes

    @cached_property
    def sha256(self) -> str:
        """In hex."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        return sha256_of(self.source)

    @cached_property
    def git_hash(self) -> str:
        """SHA-1 of a git blob, in hex: how a repository names a file that is not in its large-file storage."""
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

    @cached_property
    def num_bytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


# --- adapter ----------------------------------------------------------------------------------------------------------


def adapter_files(folder: Path, base: PublishedBase) -> list[UploadFile]:
    """The adapter of a run, whole, with the hub's name of its base model in place of a folder's.

    Raises:
        UserError: a damaged file.
    """
    files = [UploadFile(CONFIG, to_json(_public_config(folder / CONFIG, base)).encode())]
    for name in (PEFT_WEIGHTS, MLX_WEIGHTS):
        read_header(folder / name)  # a damaged file is not for others
        files.append(_file(folder / name))
    return files


def _public_config(path: Path, base: PublishedBase) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object", hint="copy the adapter again, whole")
    # null rather than a folder's name: libraries would look for a model of that name on the hub
    config["base_model_name_or_path"] = base.hub_id
    if base.revision is not None and base.trained_on is None:
        config["revision"] = base.revision
    return config


def run_files(folder: Path, summary: Mapping[str, Any], *, model: str, images: Iterable[str]) -> list[UploadFile]:
    """The run's numbers, and its pictures."""
    public = {"model": model} | {name: summary[name] for name in _SUMMARY_KEYS if name in summary}
    return [UploadFile(SUMMARY, to_json(public).encode()), *(_file(folder / name) for name in images)]


# --- merged model -----------------------------------------------------------------------------------------------------


def merged_files(folder: Path, base: PublishedBase) -> tuple[list[UploadFile], list[str]]:
    """The files of a merged model's folder that make a model, and the names of those that stay here.

    Raises:
        UserError: no model there, or a damaged one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", hint="merge first: python cli.py merge RUN --output DIR")
    weights = {path.name for path in weight_files(folder)}  # says which shard is missing
    for name in weights:
        read_header(folder / name)
    files: list[UploadFile] = []
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name == _MORE_TEMPLATES and path.is_dir():
            files += [_file(one, within=path.name) for one in sorted(path.glob("*.jinja"))]
            continue
        is_part = any(fnmatchcase(path.name, pattern) for pattern in _MERGED)
        if not is_part or not path.is_file() or (path.name.endswith(".safetensors") and path.name not in weights):
            left.append(path.name + "/" * path.is_dir())
        elif path.suffix == ".json":
            files.append(UploadFile(path.name, _without_origin(path, base)))
        else:
            files.append(_file(path))
    return files, left


def _without_origin(path: Path, base: PublishedBase) -> bytes:
    """A JSON file; where it names the folder that it was loaded from, the base model's hub id or nothing."""
    content = path.read_bytes()
    try:
        config = json.loads(content)
    except ValueError:
        raise UserError(f"{path}: not JSON", hint="merge again: python cli.py merge RUN --output DIR") from None
    named = [key for key in _NAMES_A_PATH if isinstance(config, dict) and key in config]
    if not named:
        return content
    for key in named:
        if base.hub_id is None:
            del config[key]
        else:
            config[key] = base.hub_id
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def merged_weights(folder: Path) -> Weights:
    """The form of a merged model."""
    config = read_json(folder / "config.json")
    config = config if isinstance(config, dict) else {}
    if config.get("quantization"):
        return "mlx-4bit"
    return "nf4" if config.get("quantization_config") else "16-bit"


# --- both -------------------------------------------------------------------------------------------------------------


def _file(path: Path, *, within: str = "") -> UploadFile:
    name = f"{within}/{path.name}" if within else path.name
    return UploadFile(name, path if path.stat().st_size >= _LARGE else path.read_bytes())


def refuse_private(files: Sequence[UploadFile], needles: Iterable[str]) -> None:
    """Looks for what must not be published, such as a path of this machine or the token itself, in every file.

    Of weights only what stands before the numbers is looked through.

    Raises:
        UserError: a file holds one.
    """
    # a single word after one slash may well be in a vocabulary
    wanted = [needle for needle in needles if needle and (needle.count("/") >= 2 or "/" not in needle)]
    # as JSON writes a backslash or a letter that is not ASCII
    forms = {form.encode() for needle in wanted for form in (needle, json.dumps(needle)[1:-1])}
    for file in files:
        content = _beginning(file)
        if any(form in content for form in forms):
            raise UserError(
                f"{file.name} names a folder of this machine, or your token: nothing was uploaded",
                hint="take it out of the file; paths in a model's own files come from where it was saved",
            )


def _beginning(file: UploadFile) -> bytes:
    if file.name.endswith(".safetensors"):
        length = int.from_bytes(_first(file, 8), "little")
        return _first(file, 8 + length)
    return _first(file, _METADATA_BYTES if file.name.endswith(".gguf") else file.num_bytes)


def _first(file: UploadFile, num_bytes: int) -> bytes:
    if isinstance(file.source, bytes):
        return file.source[:num_bytes]
    with open(file.source, "rb") as opened:
        return opened.read(num_bytes)
