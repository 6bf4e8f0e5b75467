"""Model folders, and a hub that stands in for the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.models import QUICKSTART_MODEL, ResolvedModel, hub, resolve_model

SMALL = QUICKSTART_MODEL


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may see the user's caches or the network."""
    monkeypatch.setenv("TWINKEEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub._probe.cache_clear()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": np.zeros((3, 4), np.float32)}, folder / "model.safetensors")
    return folder


def resolve(path: object, *, revision: str | None = None, offline: bool = False) -> ResolvedModel:
    return resolve_model(
        str(path),
        revision=revision,
        backend="cuda",
        bits=4,
        memory_bytes=10**9,
        accelerator=False,
        offline=offline,
    )


def _cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


class FakeHub:
    """Stands in for `huggingface_hub.snapshot_download`."""

    def __init__(self) -> None:
        self.cached: Path | None = None
        self.answer: Path | Exception | None = None
        self.downloads: list[dict[str, Any]] = []

    def snapshot_download(self, hub_id: str, **options: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        if options["local_files_only"]:
            if self.cached is None:
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.cached)
        self.downloads.append({"hub_id": hub_id, **options})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import huggingface_hub

    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake
