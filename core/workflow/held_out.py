"""The rows that an evaluation is about: of the run's own data those held out, or others."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np

from core.config import DataConfig
from core.errors import UserError
from core.protocols import BoolArray, IntArray
from core.run import SPLIT
from core.seeding import generator
from core.workflow.after import TrainedRun
from core.workflow.job import find_data, tokenise
from data.answers import has_column
from data.dataset import SPLITS, Prepared, TokenizedData, split_data
from data.keys import hash_tokens
from data.sources import count
from data.token_rows import TokenRows
from data.training import all_to_train, holds_nothing_out

_log = logging.getLogger("twinkeel")
_ALL = "all"
"""Name of the rows of data without splits of its own."""


@dataclass(frozen=True)
class HeldOut:
    """Rows to evaluate on."""

    config: DataConfig
    """With the path at which the rows were found."""
    name: str
    """Of the data, for the screen."""
    split: str
    rows: TokenRows
    """Row ids count from 0."""
    numbers: IntArray
    """int64 [N]: each row's number in its split."""
    num_available: int
    """Rows of the split, of which `rows` may be a selection."""
    notes: tuple[str, ...]
    """What a reader of the figures has to know."""
    trained_on: BoolArray
    """bool [N]: rows of which it is known that they were trained on."""
    known: TokenRows
    """All rows of the data, whatever their split: they show which answers there are."""
    label: str = ""
    """Names these rows where they are not those that are meant when nothing is said."""

    @property
    def num_trained_on(self) -> int:
        return int(np.count_nonzero(self.trained_on))

    def at_most(self, max_rows: int | None, *, seed: int) -> HeldOut:
        """A selection that depends on the seed and the number of rows alone, in the rows' order."""
        if max_rows is None or max_rows >= len(self.rows):
            return self
        chosen = np.sort(generator(seed, "evaluation-rows").choice(len(self.rows), max_rows, replace=False))
        rows = self.rows.select(chosen).renumbered()
        label = f"{self.label}-{max_rows}-rows".strip("-")
        return replace(self, rows=rows, numbers=self.numbers[chosen], trained_on=self.trained_on[chosen], label=label)


def find_rows(run: TrainedRun, *, data: str | None, split: str | None, reading: DataConfig | None = None) -> HeldOut:
    """The rows that are asked for: of the run's data the test split, else those for validation.

    Args:
        data: rows of another file, folder or hub data set: all, unless it brings a test or a validation split. The
            run's own data from another place is split as the run has split it.
        split: which rows instead.
        reading: how the rows of `data` are read (default: as the run's, as far as they have its columns).

    Raises:
        UserError: no such data, no such rows, or all of them were trained on.
    """
    held_out = _own(run, split) if data is None else _given(run, data, split, reading)
    largest = held_out.rows.largest_id
    if largest >= run.architecture.vocab_size:
        raise UserError(
            f"the tokenizer makes token {largest}, but the model knows only {run.architecture.vocab_size}",
            hint="use the tokenizer that belongs to the model",
        )
    return held_out


def _own(run: TrainedRun, split: str | None) -> HeldOut:
    config = run.config.data.model_copy(update={"path": find_data(run.config.data.path)})
    try:
        tokenised = _tokenise(run, config)
    except UserError as error:
        if Path(config.path).exists():
            raise
        raise UserError(
            f"{error.what}: the data that {run.folder} was trained on",
            hint="start from the folder where it was trained, or name the rows with --data",
        ) from None
    prepared = _prepared(run, tokenised, config)
    notes = []
    if _written_split(run.folder) not in (None, _places(prepared)):
        notes.append(f"{prepared.name} has changed since the run: rows of this split may have been trained on")
    return _of_prepared(run, prepared, config, split, notes)


def _prepared(run: TrainedRun, tokenised: TokenizedData, config: DataConfig) -> Prepared:
    """Split as the run has split it."""
    prepared = split_data(tokenised, config, seed=run.config.train.seed)
    return all_to_train(prepared) if holds_nothing_out(config) else prepared


def _of_prepared(
    run: TrainedRun, prepared: Prepared, config: DataConfig, split: str | None, notes: Iterable[str]
) -> HeldOut:
    parts: dict[str, TokenRows] = {name: getattr(prepared, name) for name in SPLITS}
    fallback = "test" if len(parts["test"]) else "validation"
    if split is None and not len(parts[fallback]):
        raise UserError(
            f"{run.folder}: every row of {prepared.name} was trained on: none is left to judge by",
            hint="give other rows with --data, or, to see how well it knows its own, --split train",
        )
    name = split or fallback
    rows = parts[name]
    if not len(rows):
        there = ", ".join(f"{other} {len(part):,}" for other, part in parts.items() if len(part))
        option = "data.test" if name == "test" else "data.validation"
        raise UserError(
            f"{run.folder}: {prepared.name} has no {name} rows (it has: {there})",
            hint=f"choose another --split, or hold some out in the next run: --set {option}=0.1",
        )
    notes = [*notes, *_doubts(name, is_chosen=split is not None)]
    return HeldOut(
        config,
        prepared.name,
        name,
        rows.renumbered(),
        numbers=np.arange(len(rows)),
        num_available=len(rows),
        notes=tuple(notes),
        trained_on=np.full(len(rows), name == "train"),
        known=reduce(TokenRows.followed_by, parts.values()),
        label="" if name == fallback else name,
    )


def _doubts(split: str, *, is_chosen: bool) -> list[str]:
    if split == "train":
        return ["these rows were trained on: the figures say nothing of others"]
    if split == "validation":
        none = "" if is_chosen else "no test split: "
        return [f"{none}these validation rows chose the best step, so the figures flatter the adapter"]
    return []


def _given(run: TrainedRun, path: str, split: str | None, reading: DataConfig | None) -> HeldOut:
    """Rows of other data; or the run's own, found somewhere else."""
    found = find_data(path)
    written = _written_split(run.folder)
    if reading is None:
        config = _with_columns_there(run.config.data.model_copy(update={"path": found}))
    else:
        config = reading.model_copy(update={"path": found, "group": None})
    tokenised = _tokenise(run, config)
    if written is not None and (moved := _moved(run, tokenised, config, written)) is not None:
        _log.info("%s is the data of the run: split as the run has split it", path)
        return _of_prepared(run, moved, config, split, [])
    for finding in tokenised.findings:
        _log.warning(finding)
    parts = {name: tokenised.split(name).rows for name in tokenised.inspections}
    if split is None:
        name = "test" if "test" in parts else "validation" if "validation" in parts else "train"
    elif split in parts:
        name = split
    else:
        raise UserError(
            f"--split {split}: {path} has no {split} rows of its own (it has: {', '.join(parts)})",
            hint="leave --split out to take all rows" if len(parts) == 1 else "choose another --split",
        )
    rows = parts[name]
    shown = _ALL if len(parts) == 1 else name
    trained_on = _trained_on(run, rows)
    return HeldOut(
        config,
        tokenised.name,
        shown,
        rows,
        numbers=np.arange(len(rows)),
        num_available=len(rows),
        notes=tuple(_said_of(trained_on)),
        trained_on=trained_on,
        known=reduce(TokenRows.followed_by, parts.values()),
        label="-".join([_word(tokenised.name), *([name] if split is not None else [])]),
    )


def _word(name: str) -> str:
    """For a folder's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name.split(".")[0]).strip("-") or "data"


def _with_columns_there(config: DataConfig) -> DataConfig:
    """Without what other data need not have: columns for splitting, which it is not, and the run's column names."""
    update: dict[str, object] = {"group": None}
    if config.fields and not any(has_column(config.path, column) for column in config.fields.values()):
        _log.info("%s has none of the columns of data.fields: read by its own names", config.path)
        update["fields"] = {}
    if config.stratify is not None and not has_column(config.path, config.stratify):
        _log.info("%s has no column %s (data.stratify)", config.path, config.stratify)
        update["stratify"] = None
    return config.model_copy(update=update)


def _moved(
    run: TrainedRun, tokenised: TokenizedData, config: DataConfig, written: list[tuple[str, str]]
) -> Prepared | None:
    """The data as the run has split it, if it is the run's own: the same rows on the same sides."""
    names = {origin.rpartition(":")[0] for _, origin in written}
    if names != set(tokenised.files.values()) or config.stratify != run.config.data.stratify:
        return None
    config = config.model_copy(update={"group": run.config.data.group})
    try:
        prepared = _prepared(run, _tokenise(run, config) if config.group else tokenised, config)
    except UserError:  # it can't be split like that, so it is another
        return None
    return prepared if _places(prepared) == written else None


def _trained_on(run: TrainedRun, rows: TokenRows) -> BoolArray:
    """bool [N]: which rows were trained on, as far as the run's own data is at hand."""
    config = run.config.data.model_copy(update={"path": find_data(run.config.data.path)})
    try:
        train = _prepared(run, _tokenise(run, config), config).train
    except UserError:
        return np.zeros(len(rows), np.bool_)
    trained = {hash_tokens(ids) for ids in train.ids}
    return np.array([hash_tokens(ids) in trained for ids in rows.ids], np.bool_)


def _said_of(trained_on: BoolArray) -> list[str]:
    num = int(np.count_nonzero(trained_on))
    return [f"{count(num, 'row')} of these {len(trained_on):,} were trained on"] if num else []


def _tokenise(run: TrainedRun, config: DataConfig) -> TokenizedData:
    return tokenise(config, run.model, runs_code=run.config.model.trust_remote_code)


def _places(prepared: Prepared) -> list[tuple[str, str]]:
    """Split and origin of each row, as in `split.csv`."""
    return [(split, origin) for split in SPLITS for origin in getattr(prepared, split).origin]


def _written_split(folder: Path) -> list[tuple[str, str]] | None:
    """What the run has written of its splits; None where that is missing."""
    try:
        with open(folder / SPLIT, encoding="utf-8", newline="") as file:
            return [(row["split"], row["origin"]) for row in csv.DictReader(file)]
    except (OSError, KeyError):
        return None
