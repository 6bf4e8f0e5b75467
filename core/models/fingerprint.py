"""Tells one model folder from another without reading all of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

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
