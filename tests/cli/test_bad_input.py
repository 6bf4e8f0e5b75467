"""A user's mistakes: a line that says what and where, one that says what to do, exit code 2, nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Result, write_rows

Train = Callable[..., Result]


def assert_refused(result: Result, *words: str, folder: Path | None = None) -> None:
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert "Traceback" not in result.err + result.out
    for word in words:
        assert word in result.err, (word, result.err)
    if folder is not None:
        assert not folder.exists(), "something was written"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


GOOD = json.dumps({"prompt": "a", "completion": "b"}) + "\n"

BAD_FILES: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    "empty": ("d.jsonl", "", ("d.jsonl",)),
    "only blank lines": ("d.jsonl", "\n\n", ("d.jsonl",)),
    "not json": ("d.jsonl", GOOD + '{"prompt": "a\n', ("d.jsonl", "line 2", "not JSON")),
    "not an object": ("d.jsonl", GOOD + "[1]\n", ("d.jsonl", "line 2")),
    "unknown format": ("d.jsonl", '{"foo": "a", "bar": "b"}\n', ("d.jsonl", "foo")),
    "mixed formats": ("d.jsonl", GOOD + '{"text": "a"}\n', ("d.jsonl", "line 2")),
    "number as text": ("d.jsonl", GOOD + '{"prompt": 3, "completion": "b"}\n', ("line 2", "prompt")),
    "null answer": ("d.jsonl", GOOD + '{"prompt": "a", "completion": null}\n', ("line 2", "completion")),
    "empty answer": ("d.jsonl", GOOD + '{"prompt": "a", "completion": ""}\n', ("line 2", "completion")),
    "no answer": ("d.jsonl", GOOD + '{"prompt": "a"}\n', ("line 2", "completion")),
    "no assistant": ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', ("line 1",)),
    "one row": ("d.jsonl", GOOD, ("validation",)),
    "not utf-8": ("d.jsonl", GOOD.encode() + b'{"prompt": "\xff\xfe", "completion": "b"}\n', ("d.jsonl", "line 2")),
    "bad extension": ("d.docx", GOOD, ("d.docx",)),
    "broken csv": ("d.csv", 'prompt,completion\n"a,b\n', ("d.csv",)),
    "not parquet": ("d.parquet", GOOD, ("d.parquet",)),
    "json of a string": ("d.json", '"hello"', ("d.json",)),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data(train: Train, tmp_path: Path, name: str) -> None:
    file, content, words = BAD_FILES[name]
    data = write(tmp_path / file, content)
    assert_refused(train("--data", data), *words, folder=tmp_path / "run")


def test_missing_data_and_folder_without_train_file(train: Train, tmp_path: Path) -> None:
    assert_refused(train("--data", "nowhere.jsonl"), "nowhere.jsonl", folder=tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert_refused(train("--data", "./empty"), "empty", folder=tmp_path / "run")


def test_field_mapping_that_fits_nothing(train: Train, tmp_path: Path) -> None:
    result = train("--set", "data.fields={prompt: question, completion: answer}")
    assert_refused(result, "question", folder=tmp_path / "run")


BAD_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "batch larger than the data": (("--batch-size", "64"), ("train.batch_size 64", "19 training rows")),
    "rank zero": (("--rank", "0"), ("lora.rank",)),
    "negative rate": (("--lr", "-1"), ("optim.lr",)),
    "infinite rate": (("--lr", "inf"), ("optim.lr",)),
    "dropout of one": (("--dropout", "1"), ("lora.dropout",)),
    "unknown field": (("--set", "lora.rnk=3"), ("lora.rnk", "lora.rank")),
    "a peer's name": (("--set", "learning_rate=3"), ("learning_rate", "optim.lr")),
    "unknown preset": (("--preset", "quickstrat"), ("quickstrat", "quickstart")),
    "8-bit sgd": (("--set", "optim.state_bits=8", "--set", "optim.name=sgd"), ("optim.state_bits", "sgd")),
    "paged 32-bit": (("--set", "optim.paged=true"), ("optim.paged",)),
    "minimum above the peak": (("--set", "schedule.min_lr=1"), ("schedule.min_lr", "optim.lr")),
    "grades that fall": (("--set", "guard.grades=[0.3,0.2,0.1]"), ("guard.grades",)),
    "no rows left": (("--set", "data.validation=0.6", "--set", "data.test=0.5"), ("data.validation", "data.test")),
    "no validation": (("--set", "data.validation=0"), ("data.validation",)),
    "bits": (("--bits", "5"), ("model.bits",)),
    "missing config": (("--config", "none.yaml"), ("none.yaml",)),
    "targets that match nothing": (("--set", "lora.targets=[q_prj]"), ("q_prj", "q_proj")),
    "trackers": (("--set", "log.trackers=[wandbb]"), ("log.trackers", "wandbb")),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(train: Train, tmp_path: Path, name: str) -> None:
    arguments, words = BAD_SETTINGS[name]
    assert_refused(train(*arguments), *words, folder=tmp_path / "run")


def test_unknown_backend_and_device(train: Train, tmp_path: Path) -> None:
    assert_refused(train("--backend", "tpu"), "backend", "tpu", folder=tmp_path / "run")
    assert_refused(train("--device", "npu"), "device", folder=tmp_path / "run")


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("safetensors",)),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ("tokenizer.json",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json",)),
    "damaged config": (lambda f: write(f / "config.json", "{"), ("config.json", "JSON")),
    "unknown architecture": (lambda f: edit(f, model_type="gpt9"), ("gpt9", "llama")),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 5000), ("safetensors",)),
    "another shape": (lambda f: edit(f, intermediate_size=256), ("shape",)),
    "missing tensors": (lambda f: edit(f, num_hidden_layers=3), ("layers.2",)),
    "smaller vocabulary": (lambda f: edit(f, vocab_size=100), ()),
}


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("backend", ["mlx", "cuda"])
@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(train: Train, model: Path, tmp_path: Path, backend: str, name: str) -> None:
    spoil, words = BAD_MODELS[name]
    shutil.copytree(model, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    result = train("--backend", backend, "--model", "./spoilt")
    assert_refused(result, *words, folder=tmp_path / "run")


def test_missing_model_folder(train: Train, tmp_path: Path) -> None:
    assert_refused(train("--model", "./nowhere"), "nowhere", folder=tmp_path / "run")


def test_hub_model_out_of_reach(train: Train, tmp_path: Path) -> None:
    assert_refused(train("--model", "someone/some-model"), "someone/some-model", folder=tmp_path / "run")


def test_run_folder_that_exists(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    keep = write(tmp_path / "run" / "mine.txt", "mine")
    assert_refused(train(), "run", "already exists")
    assert keep.read_text() == "mine" and len(list((tmp_path / "run").iterdir())) == 1


def test_resume_of_what_is_no_run_and_of_a_finished_run(train: Train, run_cli: Train, tmp_path: Path) -> None:
    assert_refused(run_cli("train", "--resume"), "no runs yet")
    assert_refused(run_cli("train", "--resume", tmp_path), "not a run folder")
    assert train().code == 0
    assert_refused(run_cli("train", "--resume", "run"), "already finished")
    assert_refused(run_cli("train", "--resume", "run", "--lr", "1"), "--lr")
    assert_refused(run_cli("monitor", "elsewhere"), "not a run folder")


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Makes the next run stop as if by a signal."""
    from core.signals import InterruptFlag
    from core.trainer import Trainer

    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs | {"should_interrupt": lambda: self.progress.step >= step})

    original = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", init)
    monkeypatch.setattr(InterruptFlag, "exit_code", property(lambda self: 130))


def test_resume_with_changed_data_model_or_settings(
    train: Train, run_cli: Train, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    shutil.copytree(model, tmp_path / "model")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert train("--data", data, "--model", "./model").code == 130
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    content = data.read_text()
    data.write_text(content.replace("red 0", "rot 0"))
    assert_refused(run_cli("train", "--resume", "run"), "the data changed since step 2", "rows.jsonl")
    data.write_text(content)
    config = (tmp_path / "model" / "config.json").read_text()
    edit(tmp_path / "model", rms_norm_eps=1e-4)
    assert_refused(run_cli("train", "--resume", "run"), "the model changed since step 2")
    (tmp_path / "model" / "config.json").write_text(config)
    settings = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(settings.replace("lr: 0.0002", "lr: 0.0004"))
    assert_refused(run_cli("train", "--resume", "run"), "the settings changed since step 2", "config.yaml")
    (tmp_path / "run" / "config.yaml").write_text(settings)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == checkpoints, "nothing was lost"
    assert run_cli("train", "--resume", "run").code == 0


def test_full_disk(train: Train, run_cli: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    calls = 0

    def full(descriptor: int, content: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        result = train("--set", "log.every=1", "--set", "checkpoint.every=1")
    assert_refused(result, "the disk is full")
    state = json.loads((tmp_path / "run" / "training_state.json").read_text())
    assert state["status"] == "failed" and "disk is full" in state["error"]
    assert run_cli("train", "--resume", "run").code == 0


@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_a_loss_that_is_not_a_number(train: Train, tmp_path: Path, backend: str) -> None:
    result = train("--backend", backend, "--lr", "1e38", "--set", "optim.name=sgd", "--set", "schedule.name=constant",
                   "--set", "optim.max_grad_norm=null", "--set", "log.every=1", "--dropout", "0")  # fmt: skip
    assert_refused(result, "became", "colours.jsonl:", "--lr")
    state = json.loads((tmp_path / "run" / "training_state.json").read_text())
    assert state["status"] == "failed" and "step" in state["error"]
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["status"] == "failed"


def test_out_of_memory_says_which_setting_to_lower(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.cuda.learner import CudaLearner
    from core.errors import OutOfMemoryError

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OutOfMemoryError("the device is out of memory in a training step")

    monkeypatch.setattr(CudaLearner, "train_step", fail)
    assert_refused(train("--backend", "cuda"), "out of memory", "--batch-size 1 --accumulation 4")


def test_interrupted_before_the_first_step(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    import core.workflow.job

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(core.workflow.job, "load_rows", interrupt)
    result = train()
    assert result.code == 130 and "interrupted" in result.err
