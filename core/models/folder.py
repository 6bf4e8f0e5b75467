"""What a usable model folder has in it, and how many parameters that is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from core.errors import UserError

_TOKENIZER_SOURCES = ("tokenizer.model", "tekken.json")
_INDEX = "model.safetensors.index.json"
# Parts of a quantised matrix beside its packed weights: MLX's and bitsandbytes' names.
_QUANTISATION_PARTS = (".scales", ".biases", ".absmax", ".quant_map", ".nested_absmax")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


def check_model_folder(folder: Path, *, name: str | None = None) -> None:
    """Raises UserError if `folder` is no model in Hugging Face layout; reads only JSON headers.

    `name`: what the user calls the model, for the message; the folder itself by default.
    """
    name = name or str(folder)
    _check_config(folder, name)
    for path in weight_files(folder, name=name):
        read_header(path)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{name} has no tokenizer.json{_other_tokenizer(folder)}", hint=_TOKENIZER_HINT)


def weight_files(folder: Path, *, name: str | None = None) -> list[Path]:
    """The safetensors files that hold the model, sorted. Raises UserError if any is missing."""
    name = name or str(folder)
    listed = _indexed_files(folder, name)
    if listed:
        for path in listed:
            if not path.is_file():
                raise UserError(f"{name}: {path.name} is missing", hint="copy or download it again")
        return listed
    # Mistral's consolidated files hold the same weights under names that nothing here reads.
    found = [
        path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(("consolidated", "adapter"))
    ]
    if not found:
        raise _no_weights(folder, name)
    return found


def count_parameters(folder: Path) -> int:
    """Number of weights in the folder's safetensors; packed 4-bit matrices count unpacked."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    per_element = _weights_per_element(config)
    total = 0
    for path in weight_files(folder):
        for tensor, entry in read_header(path).items():
            if tensor == "__metadata__" or _is_quantisation_part(tensor):
                continue
            total += math.prod(entry["shape"]) * per_element.get(entry["dtype"], 1)
    return total


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: name -> dtype, shape, data_offsets.

    Raises UserError if the file is cut short or is something else.
    Format: eight bytes with the header's length, little-endian, then the header, then the data.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        # A Git LFS pointer begins with text, which reads as an absurd length.
        text = file.read(length) if len(start) == 8 and length < _MAX_HEADER_BYTES else b""
    try:
        header: dict[str, Any] = json.loads(text)
        end = max((e["data_offsets"][1] for key, e in header.items() if key != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        pointer = " (it is a Git LFS pointer: run `git lfs pull`)" if start == b"version " else ""
        raise UserError(f"{path} is not a safetensors file{pointer}", hint="copy or download it again") from error
    if path.stat().st_size != 8 + length + end:
        raise UserError(f"{path} is cut short or damaged", hint="copy or download it again")
    return header


_TOKENIZER_HINT = (
    'save one beside the model: AutoTokenizer.from_pretrained("FOLDER").save_pretrained("FOLDER") in transformers'
)


def _other_tokenizer(folder: Path) -> str:
    for source in _TOKENIZER_SOURCES:
        if (folder / source).is_file():
            return f" (only {source})"
    return ""


def _check_config(folder: Path, name: str) -> None:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{name} is an adapter, not a model", hint="give the model it was trained on")
        raise UserError(f"{name} has no config.json", hint="give a model folder in Hugging Face layout")
    _read_object(path, name)


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{name}: {path.name} is not JSON ({error})", hint="copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{name}: {path.name} is not a JSON object", hint="download it again")
    return content


def _indexed_files(folder: Path, name: str) -> list[Path]:
    path = folder / _INDEX
    if not path.is_file():
        return []
    weight_map = _read_object(path, name).get("weight_map", {})
    return [folder / file for file in sorted(set(weight_map.values()))]


def _no_weights(folder: Path, name: str) -> UserError:
    what = f"{name} has no weights (*.safetensors)"
    if any(folder.glob("consolidated*.safetensors")):
        return UserError(
            f"{what}, only Mistral's consolidated ones",
            hint="use the model's folder in Hugging Face layout (model-*.safetensors)",
        )
    if any(folder.glob("*.bin")):
        return UserError(
            f"{what}, only *.bin, which can run code and is not read",
            hint='convert it with transformers: AutoModelForCausalLM.from_pretrained("FOLDER").save_pretrained("NEW")',
        )
    return UserError(what, hint="give a model folder in Hugging Face layout")


def _is_quantisation_part(tensor: str) -> bool:
    return tensor.endswith(_QUANTISATION_PARTS) or ".quant_state." in tensor


def _weights_per_element(config: dict[str, Any]) -> dict[str, int]:
    """safetensors dtype -> how many weights one stored element packs."""
    mlx = config.get("quantization") or {}
    bitsandbytes = config.get("quantization_config") or {}
    return {
        "U32": 32 // int(mlx.get("bits", 32)),
        "U8": 2 if bitsandbytes.get("load_in_4bit") else 1,
    }
