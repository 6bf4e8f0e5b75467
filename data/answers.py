"""What rows ask and what they answer: the messages behind token rows, for models that are to answer them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from core.config import DataConfig
from core.protocols import TokenArray
from data.formats import Example, RowParser, survey
from data.pipeline import CHUNK_ROWS
from data.prompt import PromptRenderer
from data.sources import BadRows, Row, Source, open_source
from data.token_rows import TokenRows
from data.tokenize import Renderer, Tokenizer, tokenize_examples


@dataclass(frozen=True, slots=True)
class AskedRow:
    """A row as a person reads it, and the prompt that its last answer continues."""

    origin: str
    question: str
    """The last message before the answer; a row of plain text as a whole."""
    expected: str | None
    """The row's last answer; None for plain text."""
    label: str | None
    """As `Example.label`."""
    prompt_ids: TokenArray | None
    """int32 [n]: the row's tokens before its last answer, as in training; None for plain text."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer, beside the end token."""


def read_asked(config: DataConfig, rows: TokenRows, tokenizer: Tokenizer) -> list[AskedRow]:
    """What the given token rows were made of, in their order.

    Rows are found in the source by their origin, and tokenised whole, so that a prompt is as in training also where
    the row was cut off at `data.max_tokens`.

    Args:
        config: of the data that the rows are from.

    Raises:
        UserError: the source can't be read any more.
    """
    wanted = set(rows.origin)
    source = open_source(config.path)
    parser = survey(
        source.read(BadRows(skip=True)),
        name=source.name,
        fields=config.fields,
        group=config.group,
        stratify=config.stratify,
    )
    found: dict[str, AskedRow] = {}
    renderer = Renderer(tokenizer)
    for examples in _chunks(source, parser, wanted):
        found |= {asked.origin: asked for asked in _asked(examples, renderer)}
    return [found[origin] for origin in rows.origin]


def has_column(path: str, column: str, *, num_rows: int = 1000) -> bool:
    """Whether one of the first rows has a column, or what a dotted path begins with.

    Raises:
        UserError: the source can't be read.
    """
    rows = open_source(path).read(BadRows(skip=True))
    return any({column, column.split(".")[0]} & row.values.keys() for row in islice(rows, num_rows))


def _chunks(source: Source, parser: RowParser, wanted: set[str]) -> Iterator[list[Example]]:
    """Examples of the wanted rows, some at a time."""
    skipped = BadRows(skip=True)
    rows: list[Row] = []
    for split in source.splits.values():
        for row in split.read(BadRows(skip=True)):
            if row.origin in wanted:
                rows.append(row)
            if len(rows) == CHUNK_ROWS:
                yield parser.parse(rows, skipped)[0]
                rows = []
    if rows:
        yield parser.parse(rows, skipped)[0]


def _asked(examples: Sequence[Example], renderer: Renderer) -> Iterator[AskedRow]:
    done = tokenize_examples(examples, renderer, max_tokens=sys.maxsize, train_on="completions")
    prompts = PromptRenderer(renderer.tokenizer)
    for example, ids, is_target in zip(done.examples, done.rows.ids, done.rows.is_target, strict=True):
        if example.text is not None:
            yield AskedRow(example.origin, example.text, None, example.label, None)
            continue
        # the answer before it ends with a question between, so the last run of targets is the last answer
        behind_prompt = np.flatnonzero(~is_target)[-1] + 1
        question, answer = (turn.content for turn in example.messages[-2:])
        stops = prompts.stops(is_pair=example.is_pair)
        yield AskedRow(example.origin, question, answer, example.label, ids[:behind_prompt], stops)
