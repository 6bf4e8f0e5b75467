"""Rows -> examples -> tokens, keys and findings, in chunks of rows: a million rows never are in memory at once.

A chunk's result is a function of the chunk. Small data goes through it here; large data in worker processes, each with
a tokenizer of its own. The chunks' results are put together in the rows' order, so neither changes anything in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data.array_store import Array, ArrayStore
from data.formats import Example, RowParser
from data.keys import hash_text, hash_tokens, prompt_and_answer
from data.lines import Line
from data.sources import BadRows, Row, Source, and_more, count
from data.tokenize import RenderCounts, Renderer, Tokenized, Tokenizer, tokenize_examples

if TYPE_CHECKING:
    from data.check.inspection import Inspection

CHUNK_ROWS = 512
CHUNK_BYTES = 4 * 2**20
"""Of the files, about: rows that are long come fewer at a time."""
LARGE_ROWS = 20_000
LARGE_BYTES = 32 * 2**20
"""From so many rows, or bytes on the disk, worker processes pay: starting them takes some seconds."""
_NUM_NAMED = 3


@dataclass(frozen=True)
class ChunkSettings:
    """What decides the result of a chunk besides its rows and the tokenizer."""

    parser: RowParser
    max_tokens: int
    train_on: Literal["completions", "all"]
    skip_bad: bool


@dataclass(slots=True)
class Places:
    """Rows that something was done to: how many, and where the first are."""

    num_rows: int = 0
    named: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, places: Sequence[str]) -> Places:
        return cls(len(places), list(places[:_NUM_NAMED]))

    def add(self, later: Places) -> None:
        self.num_rows += later.num_rows
        self.named = [*self.named, *later.named][:_NUM_NAMED]

    def finding(self, kind: str, why: str) -> list[Line]:
        if not self.num_rows:
            return []
        text = f"{count(self.num_rows, 'row')} left out, {why}: {and_more(self.named, self.num_rows)}"
        return [Line(kind, text, self.num_rows)]


@dataclass
class Told:
    """What a person should know of rows, of one chunk or of many."""

    bad: BadRows
    num_trimmed: int = 0
    num_truncated: int = 0
    without_targets: Places = field(default_factory=Places)
    unplaced: Places = field(default_factory=Places)
    rendered: RenderCounts = field(default_factory=RenderCounts)

    def add(self, later: Told) -> None:
        self.bad.merge(later.bad.num_rows, later.bad.named)
        self.num_trimmed += later.num_trimmed
        self.num_truncated += later.num_truncated
        self.without_targets.add(later.without_targets)
        self.unplaced.add(later.unplaced)
        self.rendered.add(later.rendered)


@dataclass(frozen=True)
class ChunkResult:
    """What became of a chunk of rows. It can be sent to another process."""

    arrays: dict[str, Array]
    """By column, as `COLUMNS` says."""
    inspection: Inspection
    told: Told


COLUMNS: dict[str, Array] = {
    "ids": np.empty(0, np.int32),
    "targets": np.empty(0, np.bool_),
    "lengths": np.empty(0, np.int64),
    "numbers": np.empty(0, np.int64),
    "content": np.empty(0, np.uint64),
    "digest": np.empty(0, np.uint64),
    "equal": np.empty(0, np.uint64),
    "prompt": np.empty(0, np.uint64),
    "answer": np.empty(0, np.uint64),
    "group": np.empty(0, np.uint64),
    "stratum": np.empty(0, np.uint64),
    "signature": np.empty((0, 128), np.uint32),
}
"""Array -> what it is of. `ids` and `targets` have a value for each token, `lengths` and what follows one for each row:
`numbers` is the row's number in its file, `content` a hash of what it says, `digest` one of its tokens and targets, and
the rest as in `RowKeys`. `group` and `stratum` are there only if they are asked for."""


class ChunkWorker:
    """Makes results of chunks, in any process."""

    def __init__(self, settings: ChunkSettings, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._renderer = Renderer(tokenizer)

    def __call__(self, rows: Sequence[Row]) -> ChunkResult:
        """Raises: UserError: the first bad row, unless such rows are left out, or one that the template refuses."""
        settings = self._settings
        bad = BadRows(skip=settings.skip_bad)
        examples, num_trimmed = settings.parser.parse(rows, bad)
        self._renderer.counts = RenderCounts()
        done = tokenize_examples(examples, self._renderer, max_tokens=settings.max_tokens, train_on=settings.train_on)
        told = Told(
            bad,
            num_trimmed,
            done.num_truncated,
            Places.of(done.without_targets),
            Places.of(done.unplaced),
            self._renderer.counts,
        )
        return ChunkResult(self._arrays(done), done.inspection, told)

    def _arrays(self, done: Tokenized) -> dict[str, Array]:
        rows, examples = done.rows, done.examples
        prompts, answers = zip(*map(prompt_and_answer, examples), strict=True) if examples else ((), ())
        content = _hashes(hash_text(example.content) for example in examples)
        arrays: dict[str, Array] = {
            "ids": rows.flat_ids,
            "targets": rows.flat_targets,
            "lengths": rows.lengths,
            "numbers": rows.origin.numbers,
            "content": content,
            "digest": _hashes(map(hash_tokens, rows.ids, rows.is_target)),
            "equal": _hashes(map(hash_tokens, rows.ids)),
            "prompt": _hashes(prompts),
            "answer": _hashes(answers),
            "signature": _signatures(examples),
        }
        if self._settings.parser.group is not None:
            arrays["group"] = _hashes(
                own if example.group is None else hash_text(example.group)
                for example, own in zip(examples, content.tolist(), strict=True)
            )
        if self._settings.parser.stratify is not None:
            arrays["stratum"] = _hashes(
                0 if example.stratum is None else hash_text(example.stratum) for example in examples
            )
        return arrays


def _hashes(values: Iterable[int]) -> Array:
    return np.fromiter(values, np.uint64)


def _signatures(examples: Sequence[Example]) -> Array:
    if not examples:
        return COLUMNS["signature"]
    from data.near import compared_text, signatures

    return signatures([compared_text(example) for example in examples])


@dataclass(frozen=True)
class Converted:
    """All rows of a source."""

    arrays: dict[str, Array]
    """`train-ids`, …: by split and column."""
    inspections: dict[str, Inspection]
    files: dict[str, str]
    """Split -> the file that its rows were read from, as `Row.file`."""
    told: Told


def convert_source(
    source: Source, settings: ChunkSettings, tokenizer: Tokenizer, *, num_rows: int, bad: BadRows, folder: Path | None
) -> Converted:
    """Goes over the rows of a source, which `survey` has gone over before.

    Args:
        num_rows: in all.
        bad: what could not be read; rows that can't be used are added.
        folder: for arrays that are too large for memory.

    Raises:
        UserError: as `ChunkWorker`, for the first row in the order of the rows; a worker process ended.
    """
    from data.check.inspection import Inspection
    from data.workers import in_order

    is_large = num_rows >= LARGE_ROWS or source.num_bytes >= LARGE_BYTES
    chunk_rows = max(min(CHUNK_ROWS, CHUNK_BYTES * num_rows // max(source.num_bytes, 1)), 1)
    store, told = ArrayStore(folder), Told(bad)
    inspections = {split: Inspection() for split in source.splits}
    files: dict[str, str] = {}

    def chunks() -> Iterator[tuple[str, list[Row]]]:
        for split, rows in source.splits.items():
            again = rows.read(BadRows(skip=True))  # what can't be read was told the first time
            while chunk := list(islice(again, chunk_rows)):
                files[split] = chunk[0].file
                yield split, chunk

    worker = ChunkWorker(settings, tokenizer)
    for split, result in in_order(worker, chunks(), parallel=is_large):
        store.append({f"{split}-{column}": array for column, array in result.arrays.items()})
        inspections[split].merge(result.inspection)
        told.add(result.told)
    return Converted(store.finish(), inspections, files, told)


def findings(told: Told, renderer: Renderer, *, max_tokens: int) -> list[Line]:
    """What a person should know of the rows."""
    from data.formats import trimmed_findings

    found = [Line("bad-rows", text, told.bad.num_rows) for text in told.bad.findings()]
    found += [Line("last-question", text, told.num_trimmed) for text in trimmed_findings(told.num_trimmed)]
    if num := told.num_truncated:
        found.append(Line("truncated", f"{count(num, 'row')} cut off at data.max_tokens {max_tokens}", num))
    none_left = f"no target within the first {max_tokens} tokens (data.max_tokens)"
    found += told.without_targets.finding("no-targets", none_left)
    changed = "the chat template changes an answer, which then can't be found in its text"
    found += told.unplaced.finding("answer-not-found", changed)
    renderer.counts = told.rendered
    return found + renderer.findings()
