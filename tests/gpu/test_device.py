"""What only a GPU can show, on tiny models: see docs/gpu.md. Importing this file imports no tensor library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends
import cli
from core.errors import OutOfMemoryError
from core.optimizer_state import dequantised
from core.protocols import Batch, Learner, TrainState
from tests.backends.conftest import (
    KINDS,
    ROOT,
    Open,
    assert_same_state,
    make_batch,
    make_config,
    microbatches,
)
from tests.cli.conftest import write_rows
from tests.gpu.conftest import memory_left, no_waiting

LR = 3e-3
MIB = 2**20
SHOWS_GRADIENT = {"optim": {"name": "sgd", "momentum": 0.5}}
"""With these settings the momentum after the first step is the gradient."""
EIGHT_BIT = {"optim": {"name": "adamw", "state_bits": 8}, "lora": {"rank": 64, "alpha": 64}}
"""Rank 64 on 64 features: tensors of 4096 elements, which get 8-bit moments, and of 2048, which do not."""
PAGED = {"optim": {"name": "adamw", "state_bits": 8, "paged": True}, "lora": {"rank": 512, "alpha": 512}}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "adamw": ("llama", {"optim": {"name": "adamw", "eps": 1e-6}}, 2e-2),
    "adamw 8-bit": ("llama", EIGHT_BIT, 5e-3),
    "adamw 8-bit paged": ("wide", PAGED, 1e-3),
    "lion": ("llama", {"optim": {"name": "lion"}}, 5e-3),
    "sgd": ("llama", {"optim": {"name": "sgd", "momentum": 0.7}}, 0.5),
    "adafactor": ("llama", {"optim": {"name": "adafactor"}}, 2e-2),
}
"""Model, settings, and a rate at which it learns."""


def with_settings(sections: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    names = sections.keys() | more.keys()
    return {name: {**sections.get(name, {}), **more.get(name, {})} for name in names}


def train(learner: Learner, steps: range, *, lr: float = LR) -> TrainState:
    for step in steps:
        learner.train_step(microbatches(step), step=step, lr=lr)
    return learner.export_state()


def gradient(learner: Learner, batches: list[Batch]) -> tuple[dict[str, np.ndarray], float, float]:
    """Gradient, loss and norm at the learner's first adapter; for a new learner that `SHOWS_GRADIENT`."""
    output = learner.train_step(batches, step=1, lr=0.0)
    return dict(learner.export_state().optimizer), float(output.loss), float(output.grad_norm)


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], *, rtol: float) -> None:
    """Within `rtol` of the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = float(np.abs(expected).max())
        assert scale > 0, name
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=rtol * scale, err_msg=name)


def distance(one: TrainState, other: TrainState, *, start: TrainState) -> float:
    """L2 distance of two adapters over the way from `start` to `other`."""

    def norm(left: TrainState, right: TrainState) -> float:
        gaps = [np.subtract(left.adapter[name], right.adapter[name], dtype=np.float64) for name in left.adapter]
        return float(np.sqrt(sum((gap**2).sum() for gap in gaps)))

    return norm(one, other) / norm(other, start)


# --- the backend sees the GPU


@pytest.mark.usefixtures("gpu")
def test_the_gpu_is_found_and_used(opened: Open, folders: dict[str, Path]) -> None:
    import torch

    name = torch.cuda.get_device_name()
    report = backends.get("cuda").probe("gpu")
    assert (report.available, report.accelerator, report.device) == (True, True, name)
    learner: Any = opened(folders["llama"])
    assert learner.description == f"16-bit weights, bfloat16 compute, {name}"
    assert {p.device.type for p in learner.model.parameters()} == {"cuda"}
    no_effect = backends.get("cuda").check(make_config(device="gpu", optim=PAGED["optim"]))
    assert [warning for warning in no_effect if warning.startswith("optim.")] == []


# --- training


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_lowers_the_loss(opened: Open, folders: dict[str, Path], device: str, name: str, bits: int) -> None:
    """In bfloat16 and with NF4; the adapter and its moments stay float32 or are truly 8-bit, and truly paged."""
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    kind, sections, lr = OPTIMIZERS[name]
    if "8-bit" in name:
        pytest.importorskip("bitsandbytes")
    learner: Any = opened(folders[kind], **with_settings(sections, model={"bits": bits}))
    losses = [float(learner.train_step(microbatches(), step=step, lr=lr).loss) for step in range(1, 13)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.3
    state = learner.export_state()
    assert {array.dtype.name for array in state.adapter.values()} == {"float32"}
    if device == "cpu":
        return
    moments = {array.dtype.name for slot, array in state.optimizer.items() if slot.startswith(("exp_avg", "state"))}
    assert moments <= {"float32", "uint8"} and ("uint8" in moments) == ("8-bit" in name)
    if name == "adamw":
        assert learner._optimizer.is_fused
    if name == "adamw 8-bit paged":
        states = learner._optimizer.bnb.state.values()
        assert any(getattr(slots["state1"], "is_paged", False) for slots in states)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "8-bit" not in name])
def test_optimizers_go_the_way_they_go_on_the_cpu(opened: Open, folders: dict[str, Path], name: str) -> None:
    """float32, five steps. Lion's step is a sign: where its average is near 0, rounding may turn it around."""
    kind, sections, lr = OPTIMIZERS[name]
    settings = with_settings(sections, model={"dtype": "float32"}, optim={"max_grad_norm": 1.0, "weight_decay": 0.1})
    here, there = opened(folders[kind], **settings), opened(folders[kind], **settings, device="cpu")
    start = here.export_state()
    assert_same_state(start, there.export_state())
    ends = [train(learner, range(1, 6), lr=lr / 10) for learner in (here, there)]
    assert distance(*ends, start=start) < (0.05 if name == "lion" else 1e-2)


@pytest.mark.usefixtures("exact_attention")
def test_8_bit_state_stays_near_32_bit_state_and_paging_changes_nothing(opened: Open, folders: dict[str, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    choices = ({"state_bits": 32, "paged": False}, {"paged": False}, {"paged": True})
    learners = [opened(folders["wide"], **with_settings(PAGED, optim=choice)) for choice in choices]
    start = learners[0].export_state()
    exact, eight, paged = (train(learner, range(1, 6), lr=1e-4) for learner in learners)
    assert distance(eight, exact, start=start) < 0.1
    assert_same_state(eight, paged)


# --- against the CPU


@pytest.mark.parametrize("kind", KINDS)
def test_float32_losses_and_gradients_equal_the_cpus(opened: Open, folders: dict[str, Path], kind: str) -> None:
    settings = with_settings(SHOWS_GRADIENT, model={"dtype": "float32"}, optim={"label_smoothing": 0.1})
    found = []
    for place in ({}, {"device": "cpu"}):
        learner = opened(folders[kind], **settings, **place)
        found.append((learner.evaluate(microbatches(9)), *gradient(learner, microbatches())))
    (rows, slope, loss, norm), (cpu_rows, cpu_slope, cpu_loss, cpu_norm) = found
    np.testing.assert_allclose(rows.nll, cpu_rows.nll, rtol=1e-4)
    assert rows.num_targets.tolist() == cpu_rows.num_targets.tolist()
    assert loss == pytest.approx(cpu_loss, rel=1e-4)
    assert norm == pytest.approx(cpu_norm, rel=1e-4)
    assert_close(slope, cpu_slope, rtol=1e-4)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_evaluation_is_near_the_cpus_float32(
    opened: Open, folders: dict[str, Path], kind: str, bits: int
) -> None:
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    rows, cpu_rows = (
        opened(folders[kind], model={"bits": bits}, **place).evaluate(microbatches())
        for place in ({}, {"device": "cpu"})
    )
    assert rows.row_ids.tolist() == cpu_rows.row_ids.tolist()
    np.testing.assert_allclose(rows.nll, cpu_rows.nll, rtol=2e-2)


# --- state


@pytest.mark.usefixtures("exact_attention")
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_new_learner_continues_to_the_same_bits(opened: Open, folders: dict[str, Path], name: str, bits: int) -> None:
    """With dropout, clipping and accumulation, in bfloat16."""
    if bits == 4 or "8-bit" in name:
        pytest.importorskip("bitsandbytes")
    kind, sections, _ = OPTIMIZERS[name]
    settings = with_settings(
        sections, model={"bits": bits}, lora={"dropout": 0.3}, optim={"max_grad_norm": 1.0, "weight_decay": 0.1}
    )
    learner, fresh = opened(folders[kind], **settings), opened(folders[kind], **settings)
    middle = train(learner, range(1, 3))
    end = train(learner, range(3, 5))
    fresh.import_state(middle)
    assert_same_state(fresh.export_state(), middle)
    assert_same_state(train(fresh, range(3, 5)), end)
    assert any(not np.array_equal(middle.adapter[tensor], end.adapter[tensor]) for tensor in end.adapter)


def test_continuing_with_the_fast_attention_kernel(opened: Open, folders: dict[str, Path]) -> None:
    """To the same bits where repeating the steps gives the same bits; else within 5 % of the way they went."""
    learner, fresh = (opened(folders["llama"], lora={"dropout": 0.3}) for _ in range(2))
    middle = train(learner, range(1, 3))
    end = train(learner, range(3, 9))
    learner.import_state(middle)
    again = train(learner, range(3, 9))
    fresh.import_state(middle)
    resumed = train(fresh, range(3, 9))
    if distance(again, end, start=middle) == 0.0:
        assert_same_state(resumed, end)
    assert distance(resumed, end, start=middle) < 0.05


@pytest.mark.usefixtures("gpu")
def test_moments_of_32_bits_go_on_in_8(opened: Open, folders: dict[str, Path]) -> None:
    """As for a run that comes from a Mac: quantised on import, and training goes on lowering the loss."""
    pytest.importorskip("bitsandbytes")
    wide, narrow = (opened(folders["llama"], **with_settings(EIGHT_BIT, optim={"state_bits": n})) for n in (32, 8))
    assert (wide.state_bits, narrow.state_bits) == (32, 8)
    middle = train(wide, range(1, 5))
    narrow.import_state(middle)
    held = narrow.export_state()
    assert {array.dtype.name for key, array in held.optimizer.items() if key[:5] == "state"} == {"uint8", "float32"}
    moments = dict(dequantised(held.optimizer))
    for name, wanted in middle.optimizer.items():
        assert np.abs(np.subtract(moments[name], wanted)).max() <= 0.02 * np.abs(wanted).max(), name
    losses = [float(narrow.train_step(microbatches(), step=step, lr=5e-3).loss) for step in range(5, 17)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3
    wide.import_state(narrow.export_state())
    assert {array.dtype.name for array in wide.export_state().optimizer.values()} == {"float32"}


# --- no waiting in a step


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in KINDS},
    **{name: (kind, sections) for name, (kind, sections, _) in OPTIMIZERS.items()},
    "nf4": ("llama", {"model": {"bits": 4}}),
    "checkpointing": ("llama", {"train": {"gradient_checkpointing": True}}),
    "float32": ("llama", {"model": {"dtype": "float32"}}),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", STEPS)
def test_nothing_in_a_step_waits_for_the_device(opened: Open, folders: dict[str, Path], name: str) -> None:
    """Excepted by name: bitsandbytes' 8-bit optimisers call `bitsandbytes.utils.sync_gpu` after every tensor."""
    kind, sections = STEPS[name]
    if name == "nf4" or "8-bit" in name:
        pytest.importorskip("bitsandbytes")
    learner = opened(
        folders[kind],
        **with_settings(sections, lora={"dropout": 0.1}, optim={"max_grad_norm": 1.0, "label_smoothing": 0.1}),
    )
    # the second is more targets than logits are made for at one time
    batches = [make_batch((12, 9)), make_batch((40,) * 48, width=64)]
    assert batches[1].num_targets > 1024
    for step in (1, 2):  # the first steps make handles, workspaces and moments
        float(learner.train_step(batches, step=step, lr=LR).loss)
    with no_waiting() as callers:
        output = learner.train_step(batches, step=3, lr=LR)
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(output.loss)
    assert callers == ({"bitsandbytes.utils"} if "8-bit" in name else set())
    assert np.isfinite(float(output.loss))


# --- memory


@pytest.mark.usefixtures("gpu", "exact_attention")
def test_out_of_memory_is_one_line_and_leaves_the_learner_usable(opened: Open, folders: dict[str, Path]) -> None:
    learner, undisturbed = (opened(folders["llama"], lora={"dropout": 0.3}) for _ in range(2))
    for each in (learner, undisturbed):
        train(each, range(1, 2))
    large = make_batch((500,) * 256, width=512)
    with memory_left(64 * MIB):
        for fails in (lambda: learner.train_step([large], step=2, lr=LR), lambda: learner.evaluate([large])):
            with pytest.raises(OutOfMemoryError) as caught:
                fails()
            assert "256 x 512 tokens" in caught.value.what
            assert "GiB were in use" in caught.value.what
            assert "\n" not in caught.value.what
            assert caught.value.__context__ is None, "the failed step's tensors would stay alive"
    assert_same_state(*(train(each, range(2, 4)) for each in (learner, undisturbed)))


@pytest.mark.usefixtures("gpu")
def test_out_of_memory_in_a_run_says_which_setting_to_lower(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "long.jsonl"
    line = {"prompt": "Say something long.", "completion": "word " * 90}
    rows.write_text("".join(json.dumps({**line, "completion": f"{i} {line['completion']}"}) + "\n" for i in range(400)))
    with memory_left(256 * MIB):
        code = cli.main(
            [
                *command("train", folders["llama"], rows, tmp_path / "run", device="gpu"),
                *("--bits", "16", "--max-tokens", "512", "--batch-size", "256", "--accumulation", "1"),
                *("--set", "eval.batch_size=1"),
            ]
        )
    error = capsys.readouterr().err
    assert code == 2, error
    assert "out of memory in a training step" in error
    assert "--batch-size 128 --accumulation 2" in error


def test_memory_figures(opened: Open, folders: dict[str, Path], device: str) -> None:
    learner = opened(folders["llama"])
    before = learner.memory()
    train(learner, range(1, 3))
    after = learner.memory()
    assert 0 < before.current_bytes <= before.peak_bytes <= after.peak_bytes
    assert after.current_bytes <= after.peak_bytes < after.total_bytes
    if device == "cpu":
        return
    import torch

    assert after.total_bytes == pytest.approx(torch.cuda.mem_get_info()[1], rel=0.01)
    held = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    assert learner.memory().current_bytes == after.current_bytes + 64 * MIB
    del held
    assert learner.memory().current_bytes == after.current_bytes
    assert learner.memory().peak_bytes >= after.current_bytes + 64 * MIB


def peak_of_a_step(learner: Learner, batch: Batch) -> int:
    """Bytes that a step takes beyond what was held before it, after one step to make workspaces."""
    import torch

    learner.train_step([batch], step=1, lr=0.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = learner.memory().current_bytes
    learner.train_step([batch], step=1, lr=0.0)
    torch.cuda.synchronize()
    return learner.memory().peak_bytes - held


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_lowers_the_peak_and_changes_no_gradient(
    opened: Open, folders: dict[str, Path], device: str, dropout: float
) -> None:
    settings = with_settings(SHOWS_GRADIENT, lora={"dropout": dropout}, model={"dtype": "float32"})
    plain, saving = (opened(folders["deep"], **settings, train={"gradient_checkpointing": on}) for on in (False, True))
    expected, loss, norm = gradient(plain, microbatches())
    found = gradient(saving, microbatches())
    assert found[1:] == pytest.approx((loss, norm), rel=1e-5)
    assert_close(found[0], expected, rtol=1e-5)
    if device == "gpu":
        batch = make_batch((200,) * 16, width=256)
        assert peak_of_a_step(saving, batch) < 0.6 * peak_of_a_step(plain, batch)


# --- the command line


def command(verb: str, model: Path, rows: Path, output: Path, *, device: str) -> list[str]:
    return [
        *(verb, "--backend", "cuda", "--device", device, "--model", str(model), "--data", str(rows)),
        *("--output", str(output), "--lr", "2e-2", "--max-steps", "20", "--epochs", "10", "--eval-every", "5"),
    ]


@pytest.mark.parametrize("bits", [16, 4])
def test_a_run_from_the_command_line_to_its_verdict(
    folders: dict[str, Path], tmp_path: Path, device: str, bits: int
) -> None:
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    rows, run = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    arguments = [*command("train", folders["llama"], rows, run, device=device), "--bits", str(bits)]
    out = run_cli(*arguments, "--max-tokens", "96")
    assert "Train/val loss difference: " in out
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["status"] in ("finished", "early_stopped")
    assert summary["grade"] in ("EXCELLENT", "GOOD", "MODERATE", "CRITICAL")
    assert summary["best_val_loss"] < summary["base_val_loss"] - 0.3
    assert summary["peak_memory_gb"] > 0
    state = json.loads((run / "training_state.json").read_text())
    report = backends.get("cuda").probe(device)
    assert state["device"] == report.device and report.accelerator == (device == "gpu")
    answers = run_cli("generate", str(run), "--prompt", "Say red 0.", "--max-tokens", "8")
    assert {"base", "adapter"} <= {line.split()[0] for line in answers.splitlines() if line.strip()}


def run_cli(*arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, "cli.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout
