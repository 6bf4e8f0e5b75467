"""Runs the check: over a data set as it is read, or, for the start of a run, over rows that are prepared already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, overload

import numpy as np

from core.config import DataConfig, RunConfig
from core.errors import UserError
from data.check.duplicates import Comparison, compare
from data.check.findings import Finding
from data.check.inspection import MAX_NAMED
from data.check.report import Report, SplitFacts, make_facts, make_report
from data.dataset import SPLITS, Prepared, TokenizedData, split_data
from data.formats import survey
from data.keys import RowKeys
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
    said: Sequence[str]
    """`Prepared.findings`."""
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
    # near copies are looked for even if the split goes without
    threshold = config.data.near_duplicates or DataConfig().near_duplicates
    settings = config.data.model_copy(update={"near_duplicates": threshold})
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
        return ReadRows(data, settings, whole, data.findings, error)
    return ReadRows(data, settings, _splits(prepared), prepared.findings)


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
        _compare_tokenized(data, rows.settings, seed=config.train.seed),
        said=rows.said,
        bad_rows=_bad_rows(rows.settings) if any("bad row" in line for line in data.findings) else (0, ()),
        others=[] if problem is None else [Finding("no-split", "problem", f"{problem.what}.", problem.hint or "")],
    )


def check_prepared(prepared: Prepared, config: RunConfig, *, num_parameters: int | None) -> Report:
    """The check of rows that a run is about to train on.

    Near copies are looked for only where the data brings its own validation or test rows: of what we split ourselves
    they are on one side.
    """
    splits = _splits(prepared)
    facts = make_facts(
        prepared.name,
        "",
        _split_facts(splits, prepared.inspections),
        prepared.inspections,
        config,
        num_parameters=num_parameters,
    )
    comparison = _compare_prepared(prepared, config)
    return make_report(facts, config, prepared.inspections, comparison, said=prepared.findings)


def _splits(prepared: Prepared) -> dict[str, TokenRows]:
    return {split: getattr(prepared, split) for split in SPLITS}


def _split_facts(splits: Mapping[str, TokenRows], brought: Iterable[str]) -> dict[str, SplitFacts]:
    given = set(brought) - {"train"}
    facts = {
        split: SplitFacts(len(rows), rows.num_tokens, rows.num_targets, split in given)
        for split, rows in splits.items()
    }
    return {split: facts.get(split, SplitFacts(0, 0, 0, False)) for split in SPLITS}


def _compare_tokenized(data: TokenizedData, config: DataConfig, *, seed: int) -> Comparison:
    parts = {split: data.split(split) for split in data.inspections}
    return compare(
        {split: part.keys(seed=seed) for split, part in parts.items()},
        {split: part.rows.origin for split, part in parts.items()},
        threshold=config.near_duplicates,
        validation=config.validation,
    )


def _compare_prepared(prepared: Prepared, config: RunConfig) -> Comparison:
    """Rows that we split ourselves are the training file's again."""
    given = prepared.is_given - {"train"}
    ours = [split for split in SPLITS if split not in given]
    splits = _splits(prepared)
    keys = {"train": joined([prepared.keys[split] for split in ours])}
    origins: dict[str, Sequence[str]] = {"train": _Joined([splits[split].origin for split in ours])}
    for split in sorted(given):
        keys[split], origins[split] = prepared.keys[split], splits[split].origin
    threshold = config.data.near_duplicates if given else None
    return compare(keys, origins, threshold=threshold, validation=config.data.validation)


def joined(keys: Sequence[RowKeys]) -> RowKeys:
    """The keys of several splits, one after the other."""
    columns: dict[str, Any] = {}
    for field in fields(RowKeys):
        parts = [getattr(some, field.name) for some in keys if len(some)]
        columns[field.name] = None if not parts or any(part is None for part in parts) else np.concatenate(parts)
    return RowKeys(**columns)


class _Joined(Sequence[str]):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


class _NamedBadRows(BadRows):
    """Keeps the names of more rows than a message has room for."""

    def __init__(self) -> None:
        super().__init__(skip=True)
        self.first: list[str] = []

    def add(self, place: str, what: str) -> None:
        super().add(place, what)
        if len(self.first) < MAX_NAMED:
            self.first.append(f"{place}: {what}")


def _bad_rows(config: DataConfig) -> tuple[int, Sequence[str]]:
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
