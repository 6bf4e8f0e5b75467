"""From `model.path` to a folder that is there already."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.errors import UserError
from core.models import ResolvedModel
from core.models.folder import count_parameters
from tests.core.models.conftest import _cut_short, make_folder, resolve


def test_a_folder_is_itself(model: Path) -> None:
    found = resolve(model)
    assert found == ResolvedModel(model, str(model), None, "folder", "", 12)


def test_a_relative_folder_beats_a_hub_id(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(model.parent / "org" / "name")
    monkeypatch.chdir(model.parent)
    found = resolve("org/name")
    assert (found.source, found.name) == ("folder", "org/name")
    assert found.path == model.parent / "org" / "name"


def test_a_revision_of_a_folder_is_warned_of(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    resolve(model, revision="main")
    assert "has no effect" in caplog.text


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "models/x/"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(path: str) -> None:
    with pytest.raises(UserError, match=f"no such model folder: {path}"):
        resolve(path)


def test_a_file_is_not_a_folder(model: Path) -> None:
    with pytest.raises(UserError, match="is a file, not a model folder"):
        resolve(model / "config.json")


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _only_consolidated(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def _adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _only_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def _missing_shard(folder: Path) -> None:
    index = {"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs\noid sha256:0\nsize 5\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        (_adapter, "is an adapter, not a model"),
        (lambda f: (f / "model.safetensors").unlink(), r"has no weights \(\*\.safetensors\)"),
        (_only_bin, r"only \*\.bin"),
        (_only_consolidated, "consolidated"),
        (_missing_shard, r"model-2\.safetensors is missing"),
        (_cut_short, "cut short"),
        (_lfs_pointer, "Git LFS pointer"),
        (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        (_only_sentencepiece, r"only tokenizer\.model"),
    ],
)
def test_a_bad_folder_is_named_in_one_line(model: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(model)
    with pytest.raises(UserError, match=message) as caught:
        resolve(model)
    assert str(model) in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.hint


def test_packed_weights_count_unpacked(model: Path) -> None:
    config = {"quantization": {"bits": 4, "group_size": 32}}
    (model / "config.json").write_text(json.dumps(config))
    packed = {
        "a.weight": np.zeros((2, 8), np.uint32),  # 2 x 64 weights of four bits
        "a.scales": np.zeros((2, 2), np.float16),
        "a.biases": np.zeros((2, 2), np.float16),
        "norm.weight": np.zeros(5, np.float16),
    }
    save_file(packed, model / "model.safetensors")
    assert count_parameters(model) == 2 * 64 + 5
