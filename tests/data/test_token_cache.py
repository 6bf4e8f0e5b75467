"""Tokenised rows kept on the disk: the same rows, or none."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import core.workflow.job as job
from core.architecture import read_architecture
from core.config import DataConfig, RunConfig
from core.models import ResolvedModel
from data import array_store, pipeline, token_cache
from data.batches import TokenRows
from data.dataset import SPLITS, Prepared, TokenizedData, split_data, tokenize_data
from data.keys import RowKeys
from data.token_cache import cached_rows, rows_key
from data.tokenize import Tokenizer, load_tokenizer
from tests.tiny import make_model, make_tokenizer

Write = Callable[..., str]
PAIRS = [{"prompt": f"How much is {number} + 1?", "completion": str(number + 1)} for number in range(30)]
KEY = "0" * 64


def same(one: TokenRows, other: TokenRows) -> bool:
    return (
        one.origin == other.origin
        and one.row_ids.tolist() == other.row_ids.tolist()
        and all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one.ids, other.ids, strict=True))
        and all(
            np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one.is_target, other.is_target, strict=True)
        )
    )


class Maker:
    """Makes rows and counts how often."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.num_calls = 0
        self.made = tokenize_data(config, tokenizer)
        self.prepared = self.split(self.made)

    def __call__(self, folder: Path | None) -> TokenizedData:
        self.num_calls += 1
        return tokenize_data(self.config, self.tokenizer, folder=folder)

    def split(self, data: TokenizedData) -> Prepared:
        return split_data(data, self.config, seed=0)


@pytest.fixture
def make(write: Write, tmp_path: Path, chatml: Tokenizer) -> Maker:
    write(PAIRS[:3], "set/valid.jsonl")
    write([*PAIRS[3:], PAIRS[4]], "set/train.jsonl")
    write(PAIRS[:2], "set/test.jsonl")
    config = DataConfig(path=str(tmp_path / "set"), max_tokens=200, group="prompt", stratify="completion")
    return Maker(config, chatml)


def test_the_same_rows_come_back(make: Maker, tmp_path: Path) -> None:
    made, kept = (cached_rows(tmp_path / "tokens", KEY, make, worth_seconds=0) for _ in range(2))
    assert make.num_calls == 1
    first, second = make.split(made), make.split(kept)
    for split in SPLITS:
        assert same(getattr(first, split), getattr(second, split))
        for key in dataclasses.fields(RowKeys):
            one, other = (getattr(data.split(split).keys(seed=0), key.name) for data in (made, kept))
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
        assert first.inspections[split].to_json() == second.inspections[split].to_json()
    assert second.findings == first.findings != ()
    assert (second.fingerprint, second.name) == (first.fingerprint, "set")
    assert second.is_given == {"train", "validation", "test"}
    assert second.train.origin[0] == "train.jsonl:1"
    # a map of the file, which nobody writes to
    assert not second.train.ids[0].flags.writeable
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [KEY]


def test_what_is_quick_is_not_kept(make: Maker, tmp_path: Path) -> None:
    for _ in range(2):
        cached_rows(tmp_path / "tokens", KEY, make, worth_seconds=1e6)
    cached_rows(tmp_path / "tokens", None, make, worth_seconds=0)
    assert make.num_calls == 3
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("name", ["rows.json", "train-ids.bin", "validation-targets.bin", "train-signature.bin"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_entry_is_made_again(make: Maker, tmp_path: Path, name: str, damage: str) -> None:
    cached_rows(tmp_path, KEY, make, worth_seconds=0)
    path = tmp_path / KEY / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[-90] ^= 1
        path.write_bytes(content[:-7] if damage == "cut" else content)
    for _ in range(2):
        found = make.split(cached_rows(tmp_path, KEY, make, worth_seconds=0))
        assert same(found.train, make.prepared.train)
        assert make.num_calls == 2


def test_what_was_used_longest_ago_goes_first(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tmp_path / "tokens"
    for number in range(3):
        cached_rows(tokens, str(number) * 64, make, worth_seconds=0)
        os.utime(tokens / (str(number) * 64) / "rows.json", (1000 + number, 1000 + number))
    cached_rows(tokens, "0" * 64, make, worth_seconds=0)  # used again
    size = sum(path.stat().st_size for path in (tokens / ("0" * 64)).iterdir())
    monkeypatch.setattr(token_cache, "MAX_BYTES", 3 * size)
    (tokens / ".making-old").mkdir()
    os.utime(tokens / ".making-old", (1000, 1000))
    cached_rows(tokens, "3" * 64, make, worth_seconds=0)
    assert sorted(path.name[0] for path in tokens.iterdir() if path.is_dir()) == ["0", "2", "3"]
    monkeypatch.setattr(token_cache, "MAX_BYTES", size // 2)
    cached_rows(tokens, "4" * 64, make, worth_seconds=0)
    assert not [path for path in tokens.iterdir() if path.is_dir()]


def test_a_place_that_cannot_be_written_to_is_no_failure(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = cached_rows(tmp_path / "file" / "tokens", KEY, make, worth_seconds=0)
    assert same(make.split(found).train, make.prepared.train)


@pytest.mark.parametrize("name", ["train-digest.bin", "train-ids.bin"])
def test_rows_of_a_disk_that_fills_up_are_kept_whole(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The disk is full while rows are made, and has room again when they are kept."""
    monkeypatch.setattr(array_store, "SPILL_BYTES", 1)
    monkeypatch.setattr(pipeline, "CHUNK_ROWS", 8)
    real_open, num_opened = open, 0

    def full(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        nonlocal num_opened
        if mode == "ab" and Path(path).name == name:
            num_opened += 1
            if num_opened == 2:
                with real_open(path, "ab") as file:
                    file.write(b"a piece, not all")
                raise OSError(28, "No space left on device")
        return real_open(path, mode, *args, **options)

    monkeypatch.setattr("builtins.open", full)
    made, kept = (cached_rows(tmp_path / "tokens", KEY, make, worth_seconds=0) for _ in range(2))
    assert (make.num_calls, num_opened) == (1, 2)
    for data in (made, kept):
        assert data.arrays.keys() == make.made.arrays.keys()
        for column, array in make.made.arrays.items():
            assert np.array_equal(data.arrays[column], array), column


def test_the_key_follows_everything_that_decides_the_rows(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make_tokenizer(folder)

    def key(path: str = "", **settings: Any) -> str | None:
        return rows_key(DataConfig(path=path or write(PAIRS), **settings), tokenizer=folder)

    first = key()
    assert first is not None
    assert key() == first
    (folder / "model.safetensors").write_bytes(b"weights")
    assert key() == first
    # what only splits them is decided each time
    for setting in ({"validation": 0.3}, {"test": 0.1}, {"folds": 5, "fold": 2}, {"near_duplicates": None}):
        assert key(**setting) == first
    others = [
        key(max_tokens=100),
        key(train_on="all"),
        key(group="prompt"),
        key(stratify="prompt"),
        key(skip_bad=True),
        key(fields={"prompt": "completion"}),
        key(write(PAIRS[:-1])),
        key(write(PAIRS, "other.jsonl")),  # the rows' names
        key(str(Path(write(PAIRS, "set/train.jsonl")).parent)),
    ]
    write(PAIRS[:3], "set/valid.jsonl")
    others.append(key(str(tmp_path / "set")))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        with open(folder / name, "a", encoding="utf-8") as file:
            file.write(" ")
        others.append(key(write(PAIRS)))
    assert None not in others
    assert len({first, *others}) == len(others) + 1
    assert key(str(tmp_path / "nothing.jsonl")) is None
    (tmp_path / "empty").mkdir()
    assert key(str(tmp_path / "empty")) is None


def test_a_data_set_of_the_hub_is_known_by_its_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = ModuleType("datasets")
    fake.exceptions = SimpleNamespace(DatasetsError=OSError)  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)

    def key(print_: str | None) -> str | None:
        split = SimpleNamespace() if print_ is None else SimpleNamespace(_fingerprint=print_)
        fake.load_dataset = lambda name, config: {"train": split}  # type: ignore[attr-defined]
        return rows_key(DataConfig(path="owner/name"), tokenizer=tmp_path)

    assert key("a") == key("a") != key("b")
    assert key(None) is None


def test_a_second_start_loads_no_tokenizer_and_says_the_same(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TWINKEEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "WORTH_SECONDS", 0.0)
    folder = make_model(tmp_path / "model")
    model = ResolvedModel(path=folder, name="tiny", revision=None, source="folder", note="", parameters=0)
    config = RunConfig.model_validate({"data": {"path": write([*PAIRS, PAIRS[1]]), "max_tokens": 200}})
    calls = []

    def load(path: Path, *, trust_remote_code: bool) -> Tokenizer:
        calls.append(path)
        return load_tokenizer(path)

    monkeypatch.setattr(job, "load_tokenizer", load)

    def load_rows(config: RunConfig) -> tuple[Any, list[str]]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "twinkeel"):
            data = job.load_rows(config, model, read_architecture(folder))
        return data, [record.getMessage() for record in caplog.records]

    (first, said), (second, said_again) = load_rows(config), load_rows(config)
    assert len(calls) == 1
    assert said == said_again != []
    assert first.fingerprint == second.fingerprint
    assert all(np.array_equal(a.inputs, b.inputs) for a, b in zip(first.epoch(1), second.epoch(1), strict=True))
    # another seed and another share are another split of the same rows
    other = config.model_copy(
        update={
            "train": config.train.model_copy(update={"seed": 5}),
            "data": config.data.model_copy(update={"validation": 0.4}),
        }
    )
    third, _ = load_rows(other)
    assert len(calls) == 1
    assert third.num_val_rows > first.num_val_rows
    assert third.fingerprint != first.fingerprint
    # what a tokenizer's own code does can't be told from its files
    load_rows(config.model_copy(update={"model": config.model.model_copy(update={"trust_remote_code": True})}))
    assert len(calls) == 2
    shutil.rmtree(tmp_path / "cache")
    load_rows(config)
    assert len(calls) == 3
