"""Prompts for answers: the very tokens that stand before a row's last answer in training, whatever the format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.config import DataConfig
from data.answers import has_column, read_asked
from data.dataset import load_data, tokenize_data
from data.token_rows import TokenRows
from data.tokenize import Tokenizer
from tests.data.conftest import MakeTokenizer
from tests.data.test_tokenize import FORGETS_THOUGHTS, MISTRAL, NO_END, NO_GENERATION_PROMPT, OPENS_THOUGHT
from tests.tiny import CHAT_TEMPLATE

Write = Callable[..., str]

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say red."},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "Say it again."},
    {"role": "assistant", "content": "red again"},
]
FORMATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "messages": ({"messages": TURNS}, "Say it again.", "red again"),
    "without the last question": ({"messages": [*TURNS, TURNS[1]]}, "Say it again.", "red again"),
    "conversations": (
        {"conversations": [{"from": "human", "value": "Say red."}, {"from": "gpt", "value": "red"}]},
        "Say red.",
        "red",
    ),
    "prompt and completion": ({"prompt": "Say red.", "completion": "red"}, "Say red.", "red"),
    "instruction": ({"instruction": "Say it.", "input": "red", "output": "RED"}, "Say it.\n\nred", "RED"),
}
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "mistral": MISTRAL,
    "no template": None,
    "no generation prompt": NO_GENERATION_PROMPT,
    "thoughts": FORGETS_THOUGHTS,
    "opened thought": OPENS_THOUGHT,
    "no end": NO_END,
}


def all_rows(config: DataConfig, tokenizer: Tokenizer) -> TokenRows:
    return tokenize_data(config, tokenizer).split("train").rows


def last_run(is_target: np.ndarray) -> int:
    """Where the last targets begin."""
    return int(np.flatnonzero(~is_target)[-1]) + 1


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(("row", "question", "answer"), FORMATS.values(), ids=FORMATS)
def test_the_prompt_is_what_stands_before_the_answer_in_training(
    row: dict[str, Any], question: str, answer: str, template: str | None, make: MakeTokenizer, write: Write
) -> None:
    tokenizer = make(template, adds_bos=True)
    config = DataConfig(path=write([row]))
    rows = all_rows(config, tokenizer)
    (asked,) = read_asked(config, rows, tokenizer)
    assert (asked.question, asked.expected, asked.origin) == (question, answer, "rows.jsonl:1")
    ids, start = rows.ids[0], last_run(rows.is_target[0])
    assert asked.prompt_ids is not None
    assert asked.prompt_ids.tolist() == ids[:start].tolist()
    decode = tokenizer.decode  # type: ignore[attr-defined]
    # without a generation prompt the model learns to begin its turn itself
    head = "assistant\n" if template == NO_GENERATION_PROMPT else ""
    assert decode(ids[start:], skip_special_tokens=True).strip() == head + answer
    assert decode(ids[:start]).count("red again") == 0
    assert asked.stops == (("\n\nUser:\n",) if template is None and "messages" in row else asked.stops)


def test_a_premise_and_a_hypothesis_have_a_label(chatml: Tokenizer, write: Write) -> None:
    config = DataConfig(path=write([{"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}]))
    (asked,) = read_asked(config, all_rows(config, chatml), chatml)
    assert (asked.label, asked.expected) == ("entailment", '{"predicted_label": 0}')


def test_plain_text_has_no_prompt(chatml: Tokenizer, write: Write) -> None:
    config = DataConfig(path=write([{"text": "Once upon a time."}]))
    (asked,) = read_asked(config, all_rows(config, chatml), chatml)
    assert (asked.question, asked.expected, asked.prompt_ids) == ("Once upon a time.", None, None)


@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_a_row_that_was_cut_off_has_the_prompt_of_its_last_answer(
    train_on: Any, chatml: Tokenizer, write: Write
) -> None:
    path = write([{"messages": TURNS}])
    whole = all_rows(DataConfig(path=path), chatml)
    # behind the first answer, in the middle of the second question
    config = DataConfig(path=path, max_tokens=last_run(whole.is_target[0]) - 5, train_on=train_on)
    rows = all_rows(config, chatml)
    assert rows.lengths[0] < last_run(whole.is_target[0])
    (asked,) = read_asked(config, rows, chatml)
    assert asked.prompt_ids is not None
    assert asked.prompt_ids.tolist() == whole.ids[0][: last_run(whole.is_target[0])].tolist()
    assert asked.expected == "red again"


def test_rows_of_a_split_in_their_order(chatml: Tokenizer, write: Write) -> None:
    rows = [
        {"prompt": f"Say {word}.", "completion": word, "mood": f"m{index % 2}"} for index, word in enumerate("abcdefgh")
    ]
    config = DataConfig(path=write(rows), validation=0.25, test=0.25, stratify="mood", near_duplicates=None)
    test = load_data(config, chatml, seed=1).test
    assert 0 < len(test) < 8
    chosen = test.select(np.arange(len(test))[::-1])
    found = read_asked(config, chosen, chatml)
    assert [row.origin for row in found] == list(chosen.origin)
    for row in found:
        number = int(row.origin.partition(":")[2]) - 1
        assert (row.expected, row.label) == (rows[number]["completion"], rows[number]["mood"])


def test_bad_rows_are_left_out_as_they_were(chatml: Tokenizer, write: Write) -> None:
    config = DataConfig(
        path=write([{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "c"}]), skip_bad=True
    )
    (asked,) = read_asked(config, all_rows(config, chatml), chatml)
    assert (asked.origin, asked.expected) == ("rows.jsonl:2", "c")


def test_has_column(write: Write) -> None:
    path = write([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "meta": {"mood": 1}}])
    assert has_column(path, "prompt") and has_column(path, "meta.mood")
    assert not has_column(path, "mood")
