"""A run that goes on with another backend, in another folder or in another precision: `train --resume`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from core.adapter_files import write_adapter
from core.checkpoint import Checkpointer
from core.optimizer_state import is_eight_bit
from core.protocols import DeviceReport, TrainState
from tests.backends.conftest import skip_without
from tests.cli.conftest import Result, filled_adapter, write_rows
from tests.cli.test_bad_input import assert_refused, interrupt_after
from tests.cli.test_without_the_other import MLX, ROOT, TORCH, packages_without
from tests.tiny import make_model

Train = Callable[..., Result]
Stop = Callable[..., None]
LONG = ("--lr", "1e-2", "--max-steps", "20", "--epochs", "8", "--eval-every", "5", "--set", "log.every=1")
OTHER = {"mlx": "cuda", "cuda": "mlx"}


@pytest.fixture(autouse=True)
def both_backends() -> None:
    for backend in OTHER:
        skip_without(backend)


@pytest.fixture(scope="module")
def stopped_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where copies of the runs lie that tests stopped: the next test that wants the same run need not train."""
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture
def stopped(train: Train, stopped_before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stop:
    """A run of 20 steps that is interrupted after the tenth; a patched one is for no other test."""

    def run(*arguments: object, step: int = 10, is_patched: bool = False) -> None:
        kept = stopped_before / hashlib.sha256(repr([step, *map(str, arguments)]).encode()).hexdigest()
        if kept.exists() and not is_patched:
            shutil.copytree(kept, tmp_path / "run")
            return
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            result = train(*LONG, *arguments)
        assert result.code == 130, result
        if not is_patched:
            shutil.copytree(tmp_path / "run", kept)

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def stretches(moves: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(move["backend"], move["from_step"]) for move in moves]


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.partition("step")[2]))


# --- the same training, whichever backend computes it -----------------------------------------------------------------


@pytest.mark.parametrize("first", ["mlx", "cuda"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_ten_steps_and_ten_on_the_other_backend_are_twenty(
    train: Train, stopped: Stop, run_cli: Train, tmp_path: Path, first: str, optimizer: str
) -> None:
    settings = ("--dropout", 0, "--set", f"optim.name={optimizer}", "--set", "optim.label_smoothing=0.1")
    assert train(*LONG, *settings, "--backend", first, "--output", "whole").code == 0
    stopped(*settings, "--backend", first)
    result = run_cli("train", "--resume", "run", "--backend", OTHER[first])
    assert result.code == 0, result
    run, whole = tmp_path / "run", tmp_path / "whole"
    ours, theirs = (read(folder / "training_metrics.json") for folder in (run, whole))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == list(range(21))
    for name in ("loss", "grad_norm", "val_loss", "probe_loss", "lr"):
        wanted = [record[name] for record in theirs if record.get(name) is not None]
        assert [record[name] for record in ours if record.get(name) is not None] == pytest.approx(wanted, rel=1e-4)
    assert theirs[-1]["val_loss"] < theirs[0]["val_loss"] - 0.5, "it learned"
    check_adapters(newest_checkpoint(run), newest_checkpoint(whole))
    check_verdict(run, whole, first)
    assert f"moved    from {first} on" in result.out and "differs" not in result.out
    assert "hand-off step 10: validation loss" in result.out and "warning: hand-off" not in result.out


def check_adapters(ours: Path, theirs: Path) -> None:
    left, right = (load_file(folder / "adapter.safetensors") for folder in (ours, theirs))
    assert left.keys() == right.keys()
    for name, wanted in right.items():
        assert np.linalg.norm(left[name] - wanted) <= 1e-3 * np.linalg.norm(wanted), name


def check_verdict(run: Path, whole: Path, first: str) -> None:
    ours, theirs = (read(folder / "training_summary.json") for folder in (run, whole))
    for name in ("base_val_loss", "best_val_loss", "gap", "gap_low", "gap_high", "final_val_loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    for name in ("best_step", "best_epoch", "grade", "steps", "num_target_tokens", "status"):
        assert ours[name] == theirs[name], name
    assert stretches(ours["moves"]) == [(first, 0), (OTHER[first], 10)]
    assert stretches(theirs["moves"]) == [(first, 0)]
    assert ours["backend"] == OTHER[first]


def test_there_and_back_again(stopped: Stop, run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stretches; patience counts on through all of them; `monitor` and config.yaml say where the run is."""
    stopped("--backend", "mlx", "--patience", 1, "--set", "guard.min_delta=50", step=4)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        result = run_cli("train", "--resume", "run", "--backend", "cuda", "--device", "auto")
    assert result.code == 130, result
    assert "hand-off base model: validation loss" in result.out, "no evaluation with a checkpoint by step 4"
    state = read(tmp_path / "run" / "training_state.json")
    assert stretches(state["moves"]) == [("mlx", 0), ("cuda", 4)]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["backend"], config["device"]) == ("cuda", "auto")
    assert "mlx to step 4, cuda" in run_cli("monitor", "run", "--once").out
    result = run_cli("train", "--resume", "run", "--backend", "mlx")
    assert result.code == 0, result
    assert "hand-off step 5: validation loss" in result.out and "on cuda, " in result.out
    summary = read(tmp_path / "run" / "training_summary.json")
    assert stretches(summary["moves"]) == [("mlx", 0), ("cuda", 4), ("mlx", 6)]
    # of a fall of 50 nats, which never comes, the second evaluation is the last that is waited for
    assert (summary["status"], summary["steps"]) == ("early_stopped", 10)


def test_steps_that_were_lost_are_in_no_stretch(
    stopped: Stop, run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA takes over at step 10, dies before it saves anything, and MLX goes on at step 10."""
    import core.session

    def die(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no power")

    stopped("--backend", "mlx")
    before = newest_checkpoint(tmp_path / "run").name
    with monkeypatch.context() as patch:
        patch.setattr(core.session.Trainer, "_train_step", die)
        with pytest.raises(RuntimeError):
            run_cli("train", "--resume", "run", "--backend", "cuda")
    assert stretches(read(tmp_path / "run" / "training_state.json")["moves"]) == [("mlx", 0), ("cuda", 10)]
    assert newest_checkpoint(tmp_path / "run").name == before
    result = run_cli("train", "--resume", "run", "--backend", "mlx")
    assert result.code == 0 and result.out.count("  moved ") == 1, "only the move before, whose output was left over"
    assert stretches(read(tmp_path / "run" / "training_summary.json")["moves"]) == [("mlx", 0)]


def test_before_the_first_checkpoint_it_starts_where_it_is(stopped: Stop, run_cli: Train, tmp_path: Path) -> None:
    stopped("--backend", "mlx", step=0)
    result = run_cli("train", "--resume", "run", "--backend", "cuda")
    assert result.code == 0 and "no checkpoint yet" in result.out and "hand-off" not in result.out
    assert stretches(read(tmp_path / "run" / "training_summary.json")["moves"]) == [("cuda", 0)]


def test_a_run_from_an_adapter_moves(stopped: Stop, run_cli: Train, model: Path, tmp_path: Path) -> None:
    """Before its first evaluation after a step, the rows are replayed with the adapter that it started from."""
    initial = filled_adapter(model)
    write_adapter(tmp_path / "initial", initial, base_model=str(model))
    stopped("--backend", "mlx", "--init-adapter", tmp_path / "initial", step=2)
    shutil.rmtree(tmp_path / "initial")
    result = run_cli("train", "--resume", "run", "--backend", "cuda")
    assert result.code == 0, result
    assert "hand-off initial adapter: validation loss" in result.out and "warning: hand-off" not in result.out


# --- what is said, and what is checked --------------------------------------------------------------------------------


def test_dropout_and_four_bits_are_named(stopped: Stop, run_cli: Train) -> None:
    """Two roundings of the base: the losses differ, which is said and is no warning."""
    stopped("--backend", "mlx", "--bits", 4, "--dropout", 0.1)
    result = run_cli("train", "--resume", "run", "--backend", "cuda")
    assert result.code == 0, result
    assert "differs  dropout masks: PyTorch draws others than MLX" in result.out
    assert "differs  4-bit base: MLX's affine groups of 64 there, NF4 here" in result.out
    assert "hand-off step 10: validation loss" in result.out and "warning: hand-off" not in result.out
    assert "compute type" not in result.out


def test_the_best_adapter_of_another_base_is_no_mistake_at_the_end(
    stopped: Stop, run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured on MLX's 4-bit weights is not held against NF4's when the best adapter is saved and checked."""
    from core.early_stopping import EarlyStopping

    stopped("--backend", "mlx", "--bits", 4)
    real = EarlyStopping.update
    monkeypatch.setattr(EarlyStopping, "update", lambda self, loss, *, step: real(self, loss + 100, step=step))
    result = run_cli("train", "--resume", "run", "--backend", "cuda")
    assert result.code == 0 and "where the adapter comes from" not in result.out
    assert read(tmp_path / "run" / "training_summary.json")["best_step"] == 10


def test_what_is_compared_with_is_measured_again_on_another_base(
    stopped: Stop, run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and best loss, gap and patience are those of NF4 from then on: in the verdict and in every checkpoint.

    The losses on MLX's weights are made a nat too low: had they stayed, no step after would be the best, and the run
    would stop early.
    """
    from core import trainer as module

    real = module.measure_gap
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure_gap", lambda *args, **more: lowered(real(*args, **more)))
        patience = ("--dropout", 0, "--patience", 1, "--set", "guard.min_delta=0.01")
        stopped("--backend", "mlx", "--bits", 4, *patience, is_patched=True)
    before = read(newest_checkpoint(tmp_path / "run") / "trainer.json")
    result = run_cli("train", "--resume", "run", "--backend", "cuda")
    assert result.code == 0, result
    assert "  measured base model " in result.out and "best adapter, of step 10, " in result.out
    base, best = measured_with_nf4(tmp_path / "run", before)
    summary = read(tmp_path / "run" / "training_summary.json")
    assert summary["base_val_loss"] == pytest.approx(base, rel=1e-5)
    assert summary["status"] == "finished" and summary["best_step"] > 10 and summary["best_val_loss"] < best
    after = read(newest_checkpoint(tmp_path / "run") / "trainer.json")
    assert after["progress"]["base_val_loss"] == summary["base_val_loss"]
    records = read(tmp_path / "run" / "training_metrics.json")
    assert before["early_stopping"]["best_loss"] < best - 0.9
    assert [record["val_loss"] for record in records if record["step"] == 10] == [before["early_stopping"]["best_loss"]]


def lowered(gap: Any) -> Any:
    return replace(gap, val_loss=gap.val_loss - 1.0)


def measured_with_nf4(run: Path, before: dict[str, Any]) -> tuple[float, float]:
    """Validation loss of the base model and of the adapter of step 10, by the CUDA backend alone."""
    from core.settings import load_config
    from core.workflow.job import opened, prepare

    saved = Checkpointer(run, keep=9).read(before["early_stopping"]["best_step"])
    assert saved is not None
    job = prepare(load_config(run / "config.yaml"), choose_bits=False)
    with opened(job) as learner:
        base = learner.evaluate(job.data.validation).mean
        learner.import_state(TrainState(saved.state.adapter, {}))
        return base, learner.evaluate(job.data.validation).mean


def test_on_the_same_base_nothing_is_measured_again(stopped: Stop, run_cli: Train) -> None:
    stopped("--backend", "mlx")
    assert "  measured " not in run_cli("train", "--resume", "run", "--backend", "cuda").out


def test_a_compute_type_that_differs_is_named(stopped: Stop, run_cli: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that says it comes from an accelerator: bfloat16 there, float32 here."""
    from core.moves import Place

    real = Place.to_dict
    with monkeypatch.context() as patch:
        patch.setattr(
            Place, "to_dict", lambda self, moves: {**real(self, moves), "accelerator": True, "compute": "bfloat16"}
        )
        stopped("--backend", "mlx", is_patched=True)
    result = run_cli("train", "--resume", "run", "--backend", "cuda")
    assert result.code == 0 and "differs  compute type: bfloat16 there, float32 here" in result.out
    assert "  measured base model " in result.out


def test_a_new_end_that_computes_something_else_is_warned_of(
    stopped: Stop, run_cli: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's scale is another one on the new backend, as by another reading of alpha."""
    from core.adapter import Adapter

    stopped("--backend", "mlx")
    real = Adapter.scale_of
    monkeypatch.setattr(Adapter, "scale_of", lambda self, module: 1.2 * real(self, module))
    result = run_cli("train", "--resume", "run", "--backend", "cuda")
    assert "warning: hand-off: a row's loss differs by" in result.out


def test_an_adapter_that_does_nothing_at_the_new_end_is_warned_of(
    stopped: Stop, run_cli: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that are silently skipped look like a healthy base model."""
    from backends.mlx.learner import MlxLearner

    stopped("--backend", "cuda", "--bits", 4, "--lr", 2e-4)
    monkeypatch.setattr(MlxLearner, "import_state", lambda self, state: None)
    result = run_cli("train", "--resume", "run", "--backend", "mlx")
    assert "warning: hand-off: the adapter does not change the output of the base model" in result.out


def test_a_damaged_proof_does_not_stop_the_run(stopped: Stop, run_cli: Train, tmp_path: Path) -> None:
    stopped("--backend", "mlx")
    (tmp_path / "run" / "row_losses" / "step10.safetensors").write_bytes(b"")
    result = run_cli("train", "--resume", "run", "--backend", "cuda")
    assert result.code == 0 and "hand-off step 5: validation loss" in result.out


def test_eight_bit_moments_are_dequantised(stopped: Stop, run_cli: Train, tmp_path: Path) -> None:
    """A checkpoint as a GPU leaves it goes on with MLX, near to where 32 bits lead."""
    pytest.importorskip("bitsandbytes")
    from backends.cuda.optim import quantised

    stopped("--backend", "cuda", "--set", "optim.state_bits=8", "--rank", 64, "--dropout", 0)
    shutil.copytree(tmp_path / "run", tmp_path / "plain")
    checkpointer = Checkpointer(tmp_path / "run", keep=3)
    saved = checkpointer.latest()
    assert saved is not None
    optimizer = quantised(saved.state.optimizer)
    assert is_eight_bit(optimizer) and any(array.dtype == np.uint8 for array in optimizer.values())
    state = TrainState(saved.state.adapter, optimizer, saved.state.optimizer_steps)
    checkpointer.save(state, saved.trainer, step=10, epoch=2, best_step=10)
    result = run_cli("train", "--resume", "run", "--backend", "mlx")
    assert result.code == 0, result
    assert "differs  optim.state_bits 8: the moments of step 10 were dequantised to 32 bits" in result.out
    assert run_cli("train", "--resume", "plain", "--backend", "mlx").code == 0
    ours, theirs = (read(tmp_path / name / "training_metrics.json")[-1] for name in ("run", "plain"))
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=2e-2) and ours["val_loss"] != theirs["val_loss"]


# --- where things are -------------------------------------------------------------------------------------------------


def test_a_run_folder_model_and_data_in_other_places(
    stopped: Stop, run_cli: Train, model: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    shutil.copytree(model, tmp_path / "model")
    # a revision says where a model is, like its path: a folder has none
    stopped("--backend", "mlx", "--model", "./model", "--data", data, "--set", "model.revision=main")
    there = tmp_path / "elsewhere"
    there.mkdir()
    for name in ("run", "model", "rows.jsonl"):
        shutil.move(tmp_path / name, there / name)
    assert_refused(run_cli("train", "--resume", there / "run"), "no such model folder")
    places = ("--model", there / "model", "--data", there / "rows.jsonl", "--backend", "cuda")
    result = run_cli("train", "--resume", there / "run", *places)
    assert result.code == 0, result
    config = yaml.safe_load((there / "run" / "config.yaml").read_text())
    assert config["model"]["path"] == str(there / "model") and config["model"]["revision"] is None
    assert config["data"]["path"] == str(there / "rows.jsonl")
    assert run_cli("generate", there / "run", "--prompt", "Say red 0.", "--max-tokens", 2).code == 0


def test_another_model_other_data_or_other_settings_are_refused_and_leave_all_as_it_was(
    stopped: Stop, run_cli: Train, model: Path, tmp_path: Path
) -> None:
    stopped("--backend", "mlx")
    other = make_model(tmp_path / "other", seed=5)
    rows = write_rows(tmp_path / "others.jsonl", num_rows=20)
    kept = contents(tmp_path / "run")
    resume = ("train", "--resume", "run", "--backend", "cuda")
    assert_refused(run_cli(*resume, "--model", other), "the model changed since step 10")
    assert_refused(run_cli(*resume, "--data", rows), "the data changed since step 10")
    assert_refused(run_cli(*resume, "--lr", "1"), "--lr", "--backend, --device, --model, --data")
    assert_refused(run_cli(*resume, "--preset", "quickstart"), "--preset")
    assert_refused(run_cli("train", "--resume", "run", "--backend", "tpu"), "backend", "tpu")
    assert contents(tmp_path / "run") == kept


def test_a_missing_backend_gives_way(
    stopped: Stop, run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backends.mlx.backend import MlxBackend

    stopped("--backend", "mlx")
    absent = DeviceReport("mlx", False, "x86_64", False, 0, problem="mlx is not installed")
    monkeypatch.setattr(MlxBackend, "probe", lambda self, device="auto": absent)
    result = run_cli("train", "--resume", "run")
    assert result.code == 0, result
    assert "backend mlx: mlx is not installed; going on with cuda" in result.out
    assert stretches(read(tmp_path / "run" / "training_summary.json")["moves"]) == [("mlx", 0), ("cuda", 10)]


@pytest.mark.parametrize(("first", "left_out"), [("mlx", MLX), ("cuda", TORCH)])
def test_a_run_goes_on_where_its_backend_is_not_installed(
    stopped: Stop, tmp_path: Path, first: str, left_out: tuple[str, ...]
) -> None:
    """The same command on a machine with the other backend only, in a process that can't import this one."""
    stopped("--backend", first)
    ran = subprocess.run(
        [sys.executable, "-S", "cli.py", "train", "--resume", str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(packages_without(left_out, tmp_path / "packages"))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"backend {first}: " in ran.stdout and f"going on with {OTHER[first]}" in ran.stdout
    assert "hand-off step 10: validation loss" in ran.stdout and "warning: hand-off" not in ran.stdout
    assert stretches(read(tmp_path / "run" / "training_summary.json")["moves"]) == [(first, 0), (OTHER[first], 10)]


# --- MLX's own 4-bit weights ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as mlx-lm quantises it: other files, the same architecture."""
    from mlx_lm.utils import load_model, quantize_model, save

    made = tmp_path_factory.mktemp("quantised") / "mlx-4bit"
    module, raw = load_model(model, model_config={"tie_word_embeddings": False})
    module, raw = quantize_model(module, raw, group_size=64, bits=4)
    shutil.copytree(model, made)
    (made / "model.safetensors").unlink()
    save(made, model, module, SimpleNamespace(save_pretrained=lambda _: None), raw)
    return made


def test_from_a_quantised_folder_to_the_original_model(
    stopped: Stop, run_cli: Train, model: Path, quantised_model: Path, tmp_path: Path
) -> None:
    stopped("--backend", "mlx", "--model", quantised_model, "--bits", 4)
    assert_refused(run_cli("train", "--resume", "run", "--backend", "cuda"), "which only MLX can read", "--model")
    wider = make_model(tmp_path / "wider", intermediate_size=192)
    refused = run_cli("train", "--resume", "run", "--backend", "cuda", "--model", wider)
    assert_refused(refused, "the model changed since step 10")
    result = run_cli("train", "--resume", "run", "--backend", "cuda", "--model", model)
    assert result.code == 0, result
    assert "accepted as another rounding of the model" in result.out
    assert "differs  4-bit base: MLX's affine groups of 64 there, NF4 here" in result.out
    assert "hand-off step 10: validation loss" in result.out and "warning: hand-off" not in result.out


def test_another_model_of_the_same_shape_is_refused_by_its_losses(
    stopped: Stop, run_cli: Train, quantised_model: Path, tmp_path: Path
) -> None:
    stopped("--backend", "mlx", "--model", quantised_model, "--bits", 4)
    kept = contents(tmp_path / "run")
    other = make_model(tmp_path / "other", seed=5)
    refused = run_cli("train", "--resume", "run", "--backend", "cuda", "--model", other)
    assert_refused(refused, "nats apart, more than the 0.5 that another rounding explains", "--model", "--backend mlx")
    assert "hand-off step 10: validation loss " in refused.err
    assert contents(tmp_path / "run") == kept


def test_a_model_whose_files_say_something_else_is_refused(
    stopped: Stop, run_cli: Train, quantised_model: Path, tmp_path: Path
) -> None:
    stopped("--backend", "mlx", "--model", quantised_model, "--bits", 4)
    other = make_model(tmp_path / "other", rope_theta=50000.0, new_rope_style=True)
    refused = run_cli("train", "--resume", "run", "--backend", "cuda", "--model", other)
    assert_refused(refused, "not another rounding", "rope theta 10000 there, 50000 here", "--model")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_on_one_backend_other_weights_stay_refused(
    stopped: Stop, run_cli: Train, model: Path, quantised_model: Path
) -> None:
    stopped("--backend", "mlx", "--model", quantised_model, "--bits", 4)
    refused = run_cli("train", "--resume", "run", "--backend", "mlx", "--model", model)
    assert_refused(refused, "the model changed since step 10")


def test_a_checkpoint_that_does_not_say_its_architecture(
    stopped: Stop, run_cli: Train, model: Path, quantised_model: Path, tmp_path: Path
) -> None:
    """As older versions wrote them: the model's files must be the same; then it moves as any other."""
    stopped("--backend", "mlx", "--model", quantised_model, "--bits", 4)
    forget_places(tmp_path / "run")
    refused = run_cli("train", "--resume", "run", "--backend", "cuda", "--model", model)
    assert_refused(refused, "the model changed since step 10")


def test_an_older_checkpoint_moves(stopped: Stop, run_cli: Train, tmp_path: Path) -> None:
    stopped("--backend", "mlx")
    forget_places(tmp_path / "run")
    result = run_cli("train", "--resume", "run", "--backend", "cuda")
    assert result.code == 0 and "hand-off step 10: validation loss" in result.out
    assert stretches(read(tmp_path / "run" / "training_summary.json")["moves"]) == [("mlx", 0), ("cuda", 10)]


def forget_places(run: Path) -> None:
    checkpointer = Checkpointer(run, keep=3)
    saved = checkpointer.latest()
    assert saved is not None
    trainer = {name: value for name, value in saved.trainer.items() if name != "place"}
    checkpointer.save(saved.state, trainer, step=saved.step, epoch=2, best_step=10)
