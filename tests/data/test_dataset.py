from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.config import DataConfig
from core.errors import UserError
from data.batches import TokenRows
from data.dataset import Prepared, load_data, split_data, tokenize_data
from data.keys import RowKeys
from data.tokenize import Tokenizer
from tests.data.conftest import MakeTokenizer

Write = Callable[..., str]


def pairs(numbers: range) -> list[dict[str, Any]]:
    return [{"prompt": f"How much is {number} + 1?", "completion": str(number + 1)} for number in numbers]


def answers(rows: TokenRows, tokenizer: Tokenizer) -> list[int]:
    decode = tokenizer.decode  # type: ignore[attr-defined]
    return [
        int(decode(ids[is_target], skip_special_tokens=True))
        for ids, is_target in zip(rows.ids, rows.is_target, strict=True)
    ]


def load(path: str, tokenizer: Tokenizer, *, seed: int = 0, **settings: Any) -> Prepared:
    return load_data(DataConfig(path=path, **settings), tokenizer, seed=seed)


def test_a_file_is_cut_by_ratio(write: Write, chatml: Tokenizer) -> None:
    prepared = load(write(pairs(range(219))), chatml)
    assert (len(prepared.train), len(prepared.validation), len(prepared.test)) == (169, 50, 0)
    assert prepared.name == "rows.jsonl"
    assert prepared.findings == ()
    assert sorted(answers(prepared.train, chatml) + answers(prepared.validation, chatml)) == list(range(1, 220))
    assert prepared.validation.row_ids.tolist() == list(range(50))
    for origin, answer in zip(prepared.validation.origin, answers(prepared.validation, chatml), strict=True):
        assert origin == f"rows.jsonl:{answer}"


def test_given_files_go_before_the_ratios(write: Write, tmp_path: Path, chatml: Tokenizer) -> None:
    write(pairs(range(100)), "set/train.jsonl")
    write(pairs(range(200, 207)), "set/valid.jsonl")
    prepared = load(str(tmp_path / "set"), chatml, validation=0.5, test=0.1)
    assert answers(prepared.validation, chatml) == list(range(201, 208))
    assert (len(prepared.train), len(prepared.test)) == (89, 11)
    prepared = load(str(tmp_path / "set"), chatml, validation=0.0)
    assert answers(prepared.train, chatml) == list(range(1, 101))

    write(pairs(range(300, 303)), "set/test.jsonl")
    prepared = load(str(tmp_path / "set"), chatml, test=0.5)
    assert answers(prepared.test, chatml) == [301, 302, 303]
    assert len(prepared.train) == 100


def test_rows_that_are_held_out_are_not_trained_on(write: Write, tmp_path: Path, chatml: Tokenizer) -> None:
    write(pairs(range(10)) + pairs(range(2)), "set/train.jsonl")
    write(pairs(range(4, 12)), "set/valid.jsonl")
    write(pairs(range(11, 13)), "set/test.jsonl")
    prepared = load(str(tmp_path / "set"), chatml)
    assert answers(prepared.train, chatml) == [1, 2, 3, 4, 1, 2]
    assert answers(prepared.validation, chatml) == list(range(5, 12))
    assert prepared.findings == (
        "1 validation row left out: the same rows, or near copies, are held out in another file",
        "6 training rows left out: the same rows, or near copies, are held out in another file",
        "2 training rows the same as another; copies stay on one side of the split",
    )
    write(pairs(range(4, 6)), "set/train.jsonl")
    with pytest.raises(UserError, match="every training row is also in another file"):
        load(str(tmp_path / "set"), chatml)


def test_near_copies_of_held_out_rows_are_not_trained_on(write: Write, tmp_path: Path, chatml: Tokenizer) -> None:
    question = "Which metal rings the loudest when a hammer of oak falls on it in the cold"
    write([{"prompt": question + "?", "completion": "7"}, *pairs(range(5))], "set/train.jsonl")
    write([{"prompt": question + ", tell me?", "completion": "7"}, *pairs(range(50, 55))], "set/valid.jsonl")
    assert answers(load(str(tmp_path / "set"), chatml).train, chatml) == [1, 2, 3, 4, 5]
    assert len(load(str(tmp_path / "set"), chatml, near_duplicates=None).train) == 6


@pytest.mark.parametrize("validation", ["cut", "given"])
def test_the_split_holds_no_keys_of_the_rows(write: Write, tmp_path: Path, chatml: Tokenizer, validation: str) -> None:
    """A signature is half a kilobyte a row, in memory as soon as it is copied from the file of the tokenised rows."""
    write(pairs(range(50)), "set/train.jsonl")
    if validation == "given":
        write(pairs(range(45, 60)), "set/valid.jsonl")
    data = tokenize_data(DataConfig(path=str(tmp_path / "set")), chatml)
    gc.collect()
    before = sum(type(thing) is RowKeys for thing in gc.get_objects())
    prepared = split_data(data, DataConfig(path=str(tmp_path / "set")), seed=0)
    gc.collect()
    assert sum(type(thing) is RowKeys for thing in gc.get_objects()) == before
    assert len(prepared.train) + len(prepared.validation) >= 50


def test_groups_on_both_sides_of_given_files_are_said(write: Write, tmp_path: Path, chatml: Tokenizer) -> None:
    for name, rows in (("train", range(6)), ("valid", range(4, 9))):
        write(
            [row | {"ward": str(index // 2)} for index, row in zip(rows, pairs(rows), strict=True)], f"set/{name}.jsonl"
        )
    prepared = load(str(tmp_path / "set"), chatml, group="ward")
    assert len(prepared.train) == 4
    assert prepared.findings == (
        "2 training rows left out: the same rows, or near copies, are held out in another file",
    )
    write(
        [{"prompt": "Another?", "completion": "1", "ward": "3"}, *(row | {"ward": "9"} for row in pairs(range(3)))],
        "set/train.jsonl",
    )
    found = load(str(tmp_path / "set"), chatml, group="ward").findings
    assert found == ("1 training row in a group (data.group) that another file holds out in part",)


def test_validation_rows_are_needed(write: Write, chatml: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.validation is 0 and .* brings no validation rows") as caught:
        load(write(pairs(range(20))), chatml, validation=0.0)
    assert "set data.validation" in str(caught.value.hint)


def test_findings_say_what_was_left_out(write: Write, chatml: Tokenizer) -> None:
    rows: list[Any] = pairs(range(10, 30))
    rows[3] = {"prompt": "Hi", "completion": ""}
    rows[5] = {"prompt": "x" * 100, "completion": "2"}
    rows[7] = {"prompt": "Hi", "completion": "y" * 100}
    path = write(rows)
    prepared = load(path, chatml, max_tokens=60, skip_bad=True)
    assert len(prepared.train) + len(prepared.validation) == 18
    assert prepared.findings == (
        f"1 bad row left out: {path}, line 4: completion is empty",
        "1 row cut off at data.max_tokens 60",
        f"1 row left out, no target within the first 60 tokens (data.max_tokens): {path}, line 6",
    )
    with pytest.raises(UserError, match="line 4: completion is empty"):
        load(path, chatml)


def test_no_row_left(write: Write, chatml: Tokenizer) -> None:
    with pytest.raises(UserError, match="no usable train row: 20 rows left out, no target within") as caught:
        load(write(pairs(range(20))), chatml, max_tokens=12)
    assert "raise data.max_tokens" in str(caught.value.hint)


def test_fingerprint_follows_everything_that_decides_the_rows(write: Write, chatml: Tokenizer) -> None:
    rows = pairs(range(50))
    first = load(write(rows, "a.jsonl"), chatml)
    assert load(write(rows, "elsewhere.jsonl"), chatml).fingerprint == first.fingerprint
    others = [
        load(write(rows, "a.jsonl"), chatml, seed=1),
        load(write(rows, "a.jsonl"), chatml, max_tokens=40),
        load(write(rows, "a.jsonl"), chatml, max_tokens=4096),
        load(write(rows, "a.jsonl"), chatml, train_on="all"),
        load(write(rows, "a.jsonl"), chatml, validation=0.3),
        load(write(rows[::-1], "a.jsonl"), chatml),
        load(write(rows[:-1], "a.jsonl"), chatml),
        load(write([*rows[:-1], rows[-1] | {"completion": "51"}], "a.jsonl"), chatml),
    ]
    prints = {first.fingerprint, *(other.fingerprint for other in others)}
    assert len(prints) == 9
    assert all(len(digest) == 64 for digest in prints)


def test_fingerprint_follows_the_targets(write: Write, make: MakeTokenizer) -> None:
    tokenizer = make(None)
    whole = [{"text": f"{number}\n{number + 1}"} for number in range(20)]
    halves = [{"prompt": f"{number}\n", "completion": f"{number + 1}"} for number in range(20)]
    folders = []
    for name, rows in (("whole", whole), ("halves", halves)):
        write(rows[:15], f"{name}/train.jsonl")
        folders.append(Path(write(rows[15:], f"{name}/valid.jsonl")).parent)
    texts, pairs_ = (load(str(folder), tokenizer) for folder in folders)
    assert all(np.array_equal(one, other) for one, other in zip(texts.train.ids, pairs_.train.ids, strict=True))
    assert texts.fingerprint != pairs_.fingerprint


def test_the_split_does_not_depend_on_the_order_of_the_file(write: Write, chatml: Tokenizer) -> None:
    rows = pairs(range(50))
    sides = [
        set(answers(load(write(some), chatml).validation, chatml)) for some in (rows, rows[::-1], rows[20:] + rows[:20])
    ]
    assert sides[0] == sides[1] == sides[2]


def test_train_on_changes_the_targets_only(write: Write, chatml: Tokenizer) -> None:
    path = write(pairs(range(20)))
    prepared = load(path, chatml, train_on="all")
    assert prepared.train.num_targets == prepared.train.num_tokens - len(prepared.train)
    completions = load(path, chatml).train
    assert completions.num_targets < prepared.train.num_targets / 5
    for short, long in zip(completions.ids, prepared.train.ids, strict=True):
        assert np.array_equal(short, long[: len(short)])


def test_loading_imports_no_tensor_library(write: Write) -> None:
    """In a fresh interpreter where torch and mlx can't be imported."""
    path = write(pairs(range(10)))
    code = f"""
import sys, tempfile, pathlib
for name in ("torch", "mlx", "mlx.core", "datasets"):
    sys.modules[name] = None
import data.dataset, data.batches, data.tokenize
assert not {{"transformers", "pandas"}} & set(sys.modules), "imported at the top"
from core.config import DataConfig
from tests.tiny import make_tokenizer
folder = pathlib.Path(tempfile.mkdtemp())
make_tokenizer(folder)
prepared = data.dataset.load_data(DataConfig(path={path!r}), data.tokenize.load_tokenizer(folder), seed=0)
assert (len(prepared.train), len(prepared.validation)) == (7, 3)
assert not any(name.startswith("backends") for name in sys.modules)
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_split_far_from_the_share_asked_for_is_said(write: Write, chatml: Tokenizer) -> None:
    """One of two groups has most of the rows; wherever it goes, validation is far from a fifth."""
    rows = [row | {"ward": "large" if index < 55 else str(index)} for index, row in enumerate(pairs(range(60)))]
    path = write(rows, "rows.jsonl")
    prepared = load(path, chatml, group="ward", near_duplicates=None)
    num = len(prepared.validation)
    assert num <= 5  # the large group is more than half, and trains
    (line,) = prepared.findings
    assert line.startswith(f"{num} of 60 rows ({num / 60:.0%}) are held out for validation, and data.validation is 0.2")
    assert load(path, chatml, near_duplicates=None).findings == ()
