"""Short general texts that ship with the product: what a model could do before it was trained on something else.

Questions and short answers on facts, arithmetic, code, instructions, JSON, other languages, dialogue and reasoning, put
through the model's own chat template. Their batches depend on nothing but the texts and the tokenizer, so that every
run with the same model is measured on the same targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from data.batches import Batches, eval_batches
from data.formats import Example, Message
from data.shapes import Limit, eval_shapes
from data.tokenize import Renderer, Tokenizer, tokenize_examples

_FILE = Path(__file__).parent / "samples" / "general.jsonl"
_MAX_TOKENS = 512
"""More than any of the texts has, byte by byte."""
_POSITIONS = 512
"""Positions in a batch: small enough for every device that trains."""


@dataclass(frozen=True, slots=True)
class GeneralText:
    """One of the texts, for a person."""

    category: str
    prompt: str
    """The last question."""
    answer: str


@dataclass(frozen=True)
class GeneralRows:
    """The texts as a model reads them."""

    texts: tuple[GeneralText, ...]
    """By row id."""
    batches: Batches


def load_general(tokenizer: Tokenizer, *, vocab_size: int | None = None) -> GeneralRows:
    """The texts as batches for this tokenizer; the losses are taken on the answers.

    Args:
        vocab_size: of the model.

    Raises:
        UserError: the tokenizer makes tokens that the model does not know, or no text fits its chat template.
    """
    examples = [_example(number, values) for number, values in enumerate(_read(), start=1)]
    done = tokenize_examples(examples, Renderer(tokenizer), max_tokens=_MAX_TOKENS, train_on="completions")
    if not len(done.rows):
        raise UserError(
            "the chat template of this model takes none of the general texts",
            hint="leave them out: evaluate without --general and --gate, train without eval.general",
        )
    if vocab_size is not None and done.rows.largest_id >= vocab_size:
        raise UserError(
            f"the tokenizer makes token {done.rows.largest_id}, but the model knows only {vocab_size}",
            hint="use the tokenizer that belongs to the model",
        )
    shapes = eval_shapes([done.rows.lengths], Limit(positions=_POSITIONS))[0]
    texts = tuple(
        GeneralText(example.stratum or "", example.messages[-2].content, example.messages[-1].content)
        for example in done.examples
    )
    return GeneralRows(texts, eval_batches(done.rows, shapes))


def general_fingerprint() -> str:
    """SHA-256 of the texts, in hex: losses on other texts can't be compared."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest()


def _read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]


def _example(number: int, values: Mapping[str, Any]) -> Example:
    """A row of the file: `prompt` and `completion`, or `messages`; and its `category`."""
    place, origin = f"{_FILE.name}, line {number}", f"{_FILE.name}:{number}"
    if "messages" in values:
        messages = tuple(Message(turn["role"], turn["content"]) for turn in values["messages"])
    else:
        messages = (Message("user", values["prompt"]), Message("assistant", values["completion"]))
    return Example(place, origin, messages, is_pair="prompt" in values, stratum=values["category"])
