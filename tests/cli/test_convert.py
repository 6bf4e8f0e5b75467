"""`convert` on adapters that the peers' own commands made, proven a second time with the peers' own libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends import peer as peer_process
from core.adapter_files import MLX_WEIGHTS, PEFT_WEIGHTS, write_adapter
from tests.cli.conftest import Result, filled_adapter, write_rows
from tests.tiny import VOCAB_SIZE, make_model
from tests.warm import WarmPython

for package in ("torch", "peft", "mlx_lm"):
    pytest.importorskip(package)

TOKENS = [[int(token) for token in np.random.default_rng(5).integers(3, VOCAB_SIZE, 40)]]
TOLERANCE = 1e-4

# Nothing of ours: a library, its model, adapters ("" for none), the logits.
IN_PEFT = """
import json, sys, numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model, tokens, out, *adapters = sys.argv[1:]
found = []
for adapter in adapters:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(loaded, adapter) if adapter else loaded
    with torch.no_grad():
        found.append(loaded.eval()(torch.tensor(json.loads(tokens))).logits.numpy())
np.save(out, found)
"""
IN_MLX = """
import json, sys, numpy as np, mlx.core as mx
from mlx_lm import load
mx.set_default_device(mx.cpu)
model, tokens, out, *adapters = sys.argv[1:]
found = []
for adapter in adapters:
    loaded = load(model, adapter_path=adapter or None)[0]
    loaded.eval()
    found.append(np.array(loaded(mx.array(json.loads(tokens))).astype(mx.float32)))
np.save(out, found)
"""
IN = {"peft": IN_PEFT, "mlx": IN_MLX}
LOADED = {
    "peft": ("peft", *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mixtral"))),
    "mlx": ("mlx_lm.lora", "mlx_lm.models.llama", "mlx_lm.models.mixtral"),
}
Warm = Mapping[str, WarmPython]

MLX_ALL = ["--num-layers", "-1"]
TRL = ["--lora_r", "4", "--lora_alpha", "9"]
EXPERTS_IN_TRL = ["--lora_dropout", "0", "--lora_target_modules", "q_proj", "k_proj", "--lora_target_parameters"]
EXPERTS_IN_TRL += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PEERS: dict[str, tuple[str, str, list[str]]] = {
    "mlx-lm, all linear of two layers": ("mlx", "llama", ["--num-layers", "2"]),
    "mlx-lm, experts and router": ("mlx", "mixtral", MLX_ALL),
    "mlx-lm, its own keys": ("mlx", "llama", [*MLX_ALL, "-c", "keys.yaml"]),
    "TRL, rsLoRA": ("peft", "llama", [*TRL, "--use_rslora", "--lora_target_modules", "q_proj", "down_proj"]),
    "TRL, experts": (
        "peft",
        "mixtral",
        [*TRL, *EXPERTS_IN_TRL],
    ),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a data set, for all tests."""
    folder = tmp_path_factory.mktemp("bench")
    make_model(folder / "llama", num_layers=3)
    make_model(folder / "mixtral", model_type="mixtral", num_layers=2)
    rows = write_rows(folder / "rows.jsonl")
    (folder / "data").mkdir()
    for split in ("train", "valid"):
        (folder / "data" / f"{split}.jsonl").write_text(rows.read_text(encoding="utf-8"), encoding="utf-8")
    keys = {"lora_parameters": {"rank": 3, "scale": 4.0, "dropout": 0.0, "keys": ["self_attn.v_proj", "mlp.up_proj"]}}
    (folder / "keys.yaml").write_text(json.dumps(keys), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """A process with each library, as loading them takes longer than all that these tests do with them."""
    with ExitStack() as stack:
        trl = ("trl", "trl.scripts.sft", "trl.trainer.sft_trainer") if importlib.util.find_spec("trl") else ()
        yield {
            form: stack.enter_context(WarmPython(*LOADED[form], *(trl if form == "peft" else ())))
            for form in ("peft", "mlx")
        }


@pytest.fixture
def proven_in_warm_processes(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """`convert` starts no interpreter for its proof."""

    def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        backend = json.loads(command[-1])["backend"]
        form = next(form for form, name in peer_process.BACKENDS.items() if name == backend)
        return warm[form].run(command, **options)

    monkeypatch.setattr(peer_process, "subprocess", SimpleNamespace(run=run))


def in_process(warm: WarmPython, *command: object, cwd: Path) -> None:
    done = warm.run(
        [sys.executable, *(str(part) for part in command)], cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def train_with_peer(form: str, model: str, options: list[str], *, warm: Warm, bench: Path, out: Path) -> Path:
    """Eight steps of `mlx_lm.lora`, or four of the script that `trl sft` starts: the peers' own commands."""
    if form == "mlx":
        command = ["-m", "mlx_lm", "lora", "--train", "--model", model, "--data", "data"]
        command += ["--iters", "8", "--batch-size", "2", "--learning-rate", "1e-2", "--val-batches", "1"]
        command += ["--adapter-path", str(out), *options]
    else:
        pytest.importorskip("trl")
        command = ["-m", "trl.scripts.sft", "--model_name_or_path", model, "--dataset_name", "data"]
        command += ["--use_peft", "--max_steps", "4", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2"]
        command += ["--output_dir", str(out), "--report_to", "none", "--use_cpu", "--bf16", "false"]
        command += ["--dtype", "float32", *options]
    in_process(warm[form], *command, cwd=bench)
    return out


def logits_in(form: str, model: Path, *adapters: Path | None, warm: Warm, scratch: Path) -> np.ndarray:
    """float32 [adapters, 1, T, V]"""
    out = scratch / f"logits-{form}.npy"
    folders = [adapter or "" for adapter in adapters]
    in_process(warm[form], "-c", IN[form], model, json.dumps(TOKENS), out, *folders, cwd=scratch)
    found: np.ndarray = np.load(out)
    return found


@pytest.mark.usefixtures("proven_in_warm_processes")
@pytest.mark.parametrize("peer", PEERS)
def test_adapter_of_a_peer_there_and_back(
    peer: str, bench: Path, warm: Warm, tmp_path: Path, run_cli: Callable[..., Result]
) -> None:
    form, name, options = PEERS[peer]
    other = "mlx" if form == "peft" else "peft"
    model = bench / name
    given = train_with_peer(form, name, options, warm=warm, bench=bench, out=tmp_path / "given")
    rows = ("--model", model, "--data", bench / "rows.jsonl")

    there = run_cli("convert", given, "--to", other, "--output", "there", *rows)
    assert there.code == 0, there.err
    back = run_cli("convert", "there", "--to", form, *rows)
    assert back.code == 0, back.err
    assert "python cli.py train --init-adapter there-" in back.out

    base, expected, again = logits_in(form, model, None, given, tmp_path / f"there-{form}", warm=warm, scratch=tmp_path)
    (elsewhere,) = logits_in(other, model, tmp_path / "there", warm=warm, scratch=tmp_path)
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(elsewhere, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(again, expected, rtol=0, atol=TOLERANCE)


def test_rank_patterns_and_chosen_layers_of_peft(
    bench: Path, warm: Warm, tmp_path: Path, run_cli: Callable[..., Result]
) -> None:
    """Its `convert` starts interpreters for the proof, as a user's does."""
    model, given = bench / "llama", tmp_path / "given"
    in_process(warm["peft"], "-c", MADE_BY_PEFT, model, given, cwd=tmp_path)
    options = ("--model", model, "--data", bench / "rows.jsonl")
    result = run_cli("convert", given, "--to", "mlx", "--output", "there", *options)
    assert result.code == 0, result.err
    base, expected = logits_in("peft", model, None, given, warm=warm, scratch=tmp_path)
    (found,) = logits_in("mlx", model, tmp_path / "there", warm=warm, scratch=tmp_path)
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


MADE_BY_PEFT = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model, out = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
config = LoraConfig(
    r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2],
    rank_pattern={"layers.2.mlp.up_proj": 2}, alpha_pattern={"q_proj": 3}, task_type="CAUSAL_LM",
)
peft = get_peft_model(base, config)
torch.manual_seed(0)
for name, parameter in peft.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.3)
peft.save_pretrained(out)
"""


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(bench: Path, tmp_path: Path) -> Path:
    write_adapter(tmp_path / "ours", filled_adapter(bench / "llama"), base_model=str(bench / "llama"))
    return tmp_path / "ours"


def refused(result: Result, *words: str) -> None:
    assert result.code == 2
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, ("DoRA",)),
        ({"bias": "all"}, ("bias",)),
        ({"modules_to_save": ["lm_head"]}, ("modules_to_save",)),
        ({"init_lora_weights": "pissa"}, ("pissa",)),
        ({"peft_type": "VERA"}, ("VERA",)),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(
    ours: Path, run_cli: Callable[..., Result], change: dict[str, Any], words: tuple[str, ...]
) -> None:
    config = json.loads((ours / "adapter_config.json").read_text())
    (ours / "adapter_config.json").write_text(json.dumps(config | change))
    refused(run_cli("convert", ours, "--to", "mlx"), *words)
    assert not list(ours.parent.glob("*ours-mlx*"))


def test_an_adapter_of_zeros_is_an_error(ours: Path, run_cli: Callable[..., Result], bench: Path) -> None:
    (ours / PEFT_WEIGHTS).unlink()
    zeros = {name: np.zeros_like(tensor) for name, tensor in load_file(ours / MLX_WEIGHTS).items()}
    save_file(zeros, ours / MLX_WEIGHTS)
    refused(run_cli("convert", ours, "--to", "peft", "--data", bench / "rows.jsonl"), "does nothing")


def test_another_base_model(ours: Path, bench: Path, run_cli: Callable[..., Result]) -> None:
    refused(run_cli("convert", ours, "--model", bench / "mixtral"), "mixtral")
    refused(run_cli("convert", ours, "--model", "nowhere/at-all"), "nowhere/at-all")


def test_folders_that_are_none(ours: Path, tmp_path: Path, run_cli: Callable[..., Result]) -> None:
    refused(run_cli("convert", "missing"), "missing: no such folder")
    (tmp_path / "empty").mkdir()
    refused(run_cli("convert", "empty"), "adapter_config.json")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    refused(run_cli("convert", ours, "--output", "taken"), "taken", "exists")
