"""Runs the check: over a data set as it is read, or, for the start of a run, over rows that are prepared already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from core.config import DataConfig, RunConfig
from core.errors import UserError
from data.check.duplicates import Comparison, compare
from data.check.findings import Finding
from data.check.inspection import MAX_NAMED
from data.check.report import Report, SplitFacts, make_facts, make_report
from data.dataset import SPLITS, Prepared, TokenizedData, split_data
from data.formats import survey
from data.lines import Line
from data.sources import BadRows, open_source
from data.token_rows import TokenRows

_CHUNK = 512
_NUM_SURVEYED = 1000


Tokenise = Callable[[DataConfig], TokenizedData]
"""`data.dataset.tokenize_data` with a tokenizer, or what kept its result."""


@dataclass(frozen=True, slots=True)
class ReadRows:
    """A data set as a run would have it, rows that can't be read left out."""

    data: TokenizedData
    """As the data brings it."""
    settings: DataConfig
    """That it was read with."""
    splits: Mapping[str, TokenRows]
    """As a run would split it; as the data brings it, where that is not possible."""
    said: Sequence[Line]
    """`Prepared.lines`."""
    problem: UserError | None = None
    """Why it can't be split."""

    def place_of(self, origin: str) -> tuple[str, int] | None:
        """Split and number, counted from 1, of the row that was read there; None if it is left out."""
        number = int(origin.rpartition(":")[2])
        for split, rows in self.splits.items():
            for index in np.flatnonzero(rows.origin.numbers == number).tolist():
                if rows.origin[index] == origin:
                    return split, index + 1
        return None

    def lost_of(self, origin: str) -> str:
        """How many targets the cut took from this row, in words; empty where that is not known."""
        noted = (row for inspection in self.data.inspections.values() for row in inspection.of_kind("truncated").rows)
        return next((row.detail for row in noted if row.origin == origin), "")


def read_rows(config: RunConfig, tokenise: Tokenise) -> ReadRows:
    """Reads, tokenises and splits a data set.

    Raises:
        UserError: no such data, or not a row that can be used.
    """
    settings = config.data
    try:
        data = tokenise(settings)  # as a run does, which then finds the rows again
    except UserError:
        if settings.skip_bad:
            raise
        settings = settings.model_copy(update={"skip_bad": True})
        data = tokenise(settings)
    try:
        prepared = split_data(data, config.data, seed=config.train.seed)
    except UserError as error:
        whole = {split: data.split(split).rows for split in data.inspections}
        return ReadRows(data, settings, whole, data.lines, error)
    return ReadRows(data, settings, _splits(prepared), prepared.lines)


def check_rows(rows: ReadRows, config: RunConfig, *, num_parameters: int | None) -> Report:
    """Compares the rows and puts together what was found; rows that can't be read are a finding, not an error.

    Args:
        num_parameters: of the adapter.
    """
    data, problem = rows.data, rows.problem
    facts = make_facts(
        data.name,
        _format_name(rows.settings),
        _split_facts(rows.splits, data.inspections),
        data.inspections,
        config,
        num_parameters=num_parameters,
    )
    return make_report(
        facts,
        config,
        data.inspections,
        _compare(data, config.data, threshold=_threshold(config.data), seed=config.train.seed),
        said=rows.said,
        bad_rows=_bad_rows(rows.settings) if any(line.kind == "bad-rows" for line in data.lines) else (0, ()),
        others=[] if problem is None else [Finding("no-split", "problem", f"{problem.what}.", problem.hint or "")],
    )


def check_prepared(data: TokenizedData, prepared: Prepared, config: RunConfig, *, num_parameters: int | None) -> Report:
    """The check of rows that a run is about to train on: the same problems and warnings as of `check_rows`.

    Args:
        data: what `prepared` was split from.
    """
    # near copies that the split keeps on one side are a note, and looking for them takes long
    has_files = bool(prepared.is_given - {"train"})
    threshold = _threshold(config.data) if has_files or config.data.near_duplicates is None else None
    splits = _splits(prepared)
    facts = make_facts(
        prepared.name,
        "",
        _split_facts(splits, prepared.inspections),
        prepared.inspections,
        config,
        num_parameters=num_parameters,
    )
    comparison = _compare(data, config.data, threshold=threshold, seed=config.train.seed)
    return make_report(facts, config, prepared.inspections, comparison, said=prepared.lines)


def _threshold(config: DataConfig) -> float | None:
    """Near copies are looked for even if the split goes without."""
    return config.near_duplicates or DataConfig().near_duplicates


def _splits(prepared: Prepared) -> dict[str, TokenRows]:
    return {split: getattr(prepared, split) for split in SPLITS}


def _split_facts(splits: Mapping[str, TokenRows], brought: Iterable[str]) -> dict[str, SplitFacts]:
    given = set(brought) - {"train"}
    facts = {
        split: SplitFacts(len(rows), rows.num_tokens, rows.num_targets, split in given)
        for split, rows in splits.items()
    }
    return {split: facts.get(split, SplitFacts(0, 0, 0, False)) for split in SPLITS}


def _compare(data: TokenizedData, config: DataConfig, *, threshold: float | None, seed: int) -> Comparison:
    parts = {split: data.split(split) for split in data.inspections}
    return compare(
        {split: part.keys(seed=seed) for split, part in parts.items()},
        {split: part.rows.origin for split, part in parts.items()},
        threshold=threshold,
        validation=config.validation,
    )


class _NamedBadRows(BadRows):
    """Keeps the names of more rows than a message has room for."""

    def __init__(self) -> None:
        super().__init__(skip=True)
        self.first: list[tuple[str, str]] = []

    def add(self, place: str, what: str) -> None:
        super().add(place, what)
        if len(self.first) < MAX_NAMED:
            self.first.append((place, what))


def _bad_rows(config: DataConfig) -> tuple[int, Sequence[tuple[str, str]]]:
    """How many rows can't be used, and the first of them: place and reason. Goes over the source again."""
    bad, source = _NamedBadRows(), open_source(config.path)
    parser = survey(
        source.read(BadRows(skip=True)),
        name=source.name,
        fields=config.fields,
        group=config.group,
        stratify=config.stratify,
    )
    for rows in source.splits.values():
        reading = rows.read(bad)
        while chunk := list(islice(reading, _CHUNK)):
            parser.parse(chunk, bad)
    return bad.num_rows, bad.first


def _format_name(config: DataConfig) -> str:
    """Of the first rows, which decide it nearly always; empty where they don't."""
    source = open_source(config.path)
    try:
        return survey(
            islice(source.read(BadRows(skip=True)), _NUM_SURVEYED), name=source.name, fields=config.fields
        ).format_name
    except UserError:
        return ""
