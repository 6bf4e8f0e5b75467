"""Tells one model folder from another without reading all of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_SAMPLE_BYTES = 1 << 16


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over config.json, tokenizer.json and, of each weight file, its size, head and tail.

    The head of a safetensors file holds every name, shape and offset. A change in the middle of a file that keeps its
    size goes unseen; reading 90 GB at each start to see it would not be worth it.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(size - _SAMPLE_BYTES, 0))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def model_traits(folder: Path) -> dict[str, Any]:
    """What stays when a model's weights are rounded, apart from its shapes; what the folder does not say is left out.

    `rope theta` and `rope scaling` from config.json, in either of its two styles, and of tokenizer.json `tokenizer`:
    SHA-256 over its tokens and their ids, because the same tokenizer is written in more than one form.
    """
    raw = _json_of(folder / "config.json")
    new_style = raw.get("rope_parameters")
    scaling = dict(raw.get("rope_scaling") or new_style or {})
    theta = scaling.pop("rope_theta", None) or raw.get("rope_theta")
    kind = scaling.pop("type", None)
    if scaling.setdefault("rope_type", kind) in (None, "default"):
        scaling = {}
    traits: dict[str, Any] = {}
    if theta is not None:
        traits["rope theta"] = float(theta)
    if "rope_scaling" in raw or new_style is not None:
        traits["rope scaling"] = scaling
    if (tokens := _tokens(_json_of(folder / "tokenizer.json"))) is not None:
        traits["tokenizer"] = tokens
    return traits


def _json_of(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # who needs the file says what is wrong with it
        return {}
    return raw if isinstance(raw, dict) else {}


def _tokens(tokenizer: dict[str, Any]) -> str | None:
    """None where there is no vocabulary in a known form."""
    vocabulary, added = (tokenizer.get("model") or {}).get("vocab"), tokenizer.get("added_tokens") or []
    if isinstance(vocabulary, list):  # a unigram model's: token and score
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        return None
    ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    return hashlib.sha256(json.dumps(sorted(ids.items())).encode()).hexdigest()
