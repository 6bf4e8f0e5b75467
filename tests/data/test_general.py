"""The shipped general texts: what is in the file, and what a model reads of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from core.protocols import IGNORE
from data.general import general_fingerprint, load_general
from data.tokenize import load_tokenizer
from tests.tiny import END_ID, make_tokenizer

FILE = Path(__file__).parents[2] / "data" / "samples" / "general.jsonl"
CATEGORIES = {"facts", "arithmetic", "code", "instructions", "json", "languages", "dialogue", "reasoning"}


def rows() -> list[dict[str, object]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def test_the_file() -> None:
    found = rows()
    assert len(found) >= 200
    counts = Counter(str(row["category"]) for row in found)
    assert set(counts) == CATEGORIES and min(counts.values()) >= 15
    assert len({json.dumps(row, sort_keys=True) for row in found}) == len(found)
    for row in found:
        assert row.keys() in ({"category", "prompt", "completion"}, {"category", "messages"})
        if "completion" in row:
            assert 0 < len(str(row["completion"])) < 120 and str(row["completion"]).strip() == row["completion"]


def test_json_answers_are_json_and_sums_are_right() -> None:
    for row in rows():
        if row["category"] == "json":
            json.loads(str(row["completion"]))
    assert {"prompt": "What is 15 + 27?", "completion": "15 + 27 = 42", "category": "arithmetic"} in rows()


@pytest.mark.parametrize("template", [True, False])
def test_what_the_model_reads(tmp_path: Path, template: bool) -> None:
    """Each row's targets are its answers with the end token, whatever the template; every row comes once."""
    make_tokenizer(tmp_path, **({} if template else {"chat_template": None}))
    tokenizer = load_tokenizer(tmp_path)
    general = load_general(tokenizer, vocab_size=320)
    source = rows()
    assert [text.category for text in general.texts] == [row["category"] for row in source]
    seen = []
    for batch in general.batches:
        assert batch.num_tokens <= 512
        for row_id, targets in zip(batch.row_ids, batch.targets, strict=True):
            seen.append(int(row_id))
            answer = tokenizer.decode(targets[targets != IGNORE].tolist(), skip_special_tokens=True)  # type: ignore[attr-defined]
            row = source[int(row_id)]
            if "completion" in row:
                assert answer.strip() == row["completion"]
                assert general.texts[int(row_id)].prompt == row["prompt"]
                assert targets[targets != IGNORE][-1] == END_ID
            else:
                assert general.texts[int(row_id)].answer in answer
    assert sorted(seen) == list(range(len(source)))


def test_batches_depend_on_nothing_else(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    one, other = (load_general(load_tokenizer(tmp_path)).batches for _ in range(2))
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left.inputs, right.inputs)
        np.testing.assert_array_equal(left.row_ids, right.row_ids)
    assert len(general_fingerprint()) == 64


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    with pytest.raises(UserError, match="the model knows only 100"):
        load_general(load_tokenizer(tmp_path), vocab_size=100)


def test_a_template_that_takes_none(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, chat_template="{{ 'always the same' }}")
    with pytest.raises(UserError, match="takes none of the general texts"):
        load_general(load_tokenizer(tmp_path))
