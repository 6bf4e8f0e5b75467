"""A merged model's folder: its configuration, the files beside the weights, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.architecture import read_architecture
from core.errors import UserError
from core.merging import folder as merge_folder
from core.merging.folder import (
    Draft,
    copy_side_files,
    merged_config,
    refuse_full_disk,
    refuse_quantised,
    refuse_taken,
)
from core.models import ResolvedModel
from tests.tiny import make_model


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in (raw | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    return merged_config(raw, read_architecture(folder), dtype="bfloat16")


def test_config_says_what_mlx_lm_would_misread(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", new_rope_style=True, rope_theta=123456.0)
    found = config_of(base, tie_word_embeddings=None, _name_or_path="somebody/somewhere")
    assert found["rope_theta"] == 123456.0
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 123456.0}
    assert found["tie_word_embeddings"] is False
    assert "rope_scaling" not in found and "_name_or_path" not in found


def test_config_carries_a_scaled_rope_in_both_spellings(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", new_rope_style=True)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    found = config_of(base, rope_parameters=rope)
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 2.0} and found["rope_theta"] == 5000.0
    old = config_of(base, rope_parameters=None, rope_theta=7.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert old["rope_scaling"] == {"type": "linear", "factor": 2.0} and old["rope_theta"] == 7.0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": None, "torch_dtype": "float16"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": None}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
    ],
)
def test_config_says_the_type_that_was_written(before: dict[str, Any], after: dict[str, str], tmp_path: Path) -> None:
    found = config_of(make_model(tmp_path / "base"), **before)
    assert {key: value for key, value in found.items() if key in ("dtype", "torch_dtype")} == after


def test_side_files(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    kept = ["LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "chat_template.jinja", "generation_config.json"]
    kept += ["special_tokens_map.json", "tokenizer.model", "merges.txt", "vocab.json"]
    left = ["README.md", "optimizer.pt", "pytorch_model.bin", "model.gguf", "training_args.bin", "adapter_config.json"]
    for name in [*kept, *left, "tokenization_own.py"]:
        (base / name).write_text(name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (base / "NOTICE").unlink()
    (tmp_path / "blob").write_text("linked")
    (base / "NOTICE").symlink_to(tmp_path / "blob")  # as in the hub's cache
    output = tmp_path / "out"
    output.mkdir()
    copy_side_files(base, output)
    found = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert found == {*kept, "additional_chat_templates/tools.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert (output / "NOTICE").read_text() == "linked" and not (output / "NOTICE").is_symlink()
    again = tmp_path / "with-code"
    again.mkdir()
    copy_side_files(base, again, code=True)
    assert (again / "tokenization_own.py").is_file()


@pytest.mark.parametrize(
    ("name", "changes", "method", "original"),
    [
        (
            "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
            {"quantization": {"bits": 4, "group_size": 64}},
            "MLX, 4-bit",
            "mistralai/Mistral-7B-Instruct-v0.3",
        ),
        (
            "someone/model-bnb-4bit",
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "bitsandbytes",
            "ORIGINAL",
        ),
        ("someone/model-awq", {"quantization_config": {"quant_method": "awq"}}, "awq", "ORIGINAL"),
    ],
)
def test_a_quantised_base_is_refused(
    name: str, changes: dict[str, Any], method: str, original: str, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base")
    model = ResolvedModel(base, name, None, "hub", "", 1)
    refuse_quantised(model, read_architecture(base))
    config_of(base, **changes)
    with pytest.raises(UserError) as caught:
        refuse_quantised(model, read_architecture(base))
    assert name in caught.value.what and method in caught.value.what
    assert caught.value.hint is not None and caught.value.hint.endswith(f"--model {original}")


# --- the draft --------------------------------------------------------------------------------------------------------


def test_a_draft_gets_its_name_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with Draft(output) as draft:
        (draft.path / "file").write_text("whole")
        assert not output.exists() and draft.path.parent == output.parent
        draft.keep()
    assert (output / "file").read_text() == "whole"
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_nothing_is_left_of_a_failed_draft(error: type[BaseException], tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise error("stopped")

    with pytest.raises(error), Draft(tmp_path / "deep" / "er" / "out") as draft:
        fail(draft.path)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_goes_away(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "sub").mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    with Draft(tmp_path / "out") as draft:
        assert os.listdir(draft.path) == []
        draft.keep()
    assert os.listdir(tmp_path) == ["out"]


def test_two_at_once(tmp_path: Path) -> None:
    with Draft(tmp_path / "out") as first:
        (first.path / "file").write_text("mine")
        with pytest.raises(UserError, match="another process is writing it"), Draft(tmp_path / "out"):
            pass
        assert (first.path / "file").read_text() == "mine"


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Draft(tmp_path / "out") as draft:  # an empty one is no obstacle
        draft.keep()
    (tmp_path / "out" / "file").write_text("somebody's")
    with pytest.raises(UserError, match="exists already"), Draft(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "file").read_text() == "somebody's"


def test_a_folder_that_can_not_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for output in (Path(), tmp_path, Path("gone/..")):
        with pytest.raises(UserError, match="this is the folder that you are in") as caught:
            refuse_taken(output)
        assert caught.value.hint is not None and caught.value.hint.endswith(f"--output {output / 'merged'}")
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    with pytest.raises(UserError, match=r"mounted: .* this is a mount point"):
        refuse_taken(Path("mounted"))


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_folder.shutil, "disk_usage", lambda place: SimpleNamespace(free=5_200_000_000))
    refuse_full_disk(tmp_path / "not" / "there", 5_000_000_000)
    with pytest.raises(UserError, match=r"out: needs 5\.2 GB on the disk, and 5\.2 GB are free"):
        refuse_full_disk(tmp_path / "out", 5_200_000_000)
