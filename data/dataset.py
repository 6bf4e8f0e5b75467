"""A data set, ready to train on: `load_data`.

First its rows are tokenised (`tokenize_data`), which takes long, depends on no seed and can be kept (`token_cache`);
then they are split (`split_data`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from core.config import DataConfig
from core.errors import UserError
from core.protocols import IntArray
from data.array_store import Array
from data.formats import survey
from data.keys import HashArray, RowKeys, positions
from data.lines import Line
from data.pipeline import ChunkSettings, convert_source, findings
from data.sources import SKIP_HINT, BadRows, Row, Source, count, open_source
from data.split import Cut, cut_rows, overlap
from data.token_rows import Origins, TokenRows
from data.tokenize import Renderer, Tokenizer

if TYPE_CHECKING:
    from data.check.inspection import Inspection

SPLITS = ("train", "validation", "test")
_UNEVEN = 0.5
"""A split is uneven when its share of the rows is this far from the one asked for, relative to it; below
`_UNEVEN_ROWS` rows chance alone does that."""
_UNEVEN_ROWS = 40
_FORMAT = 3
"""Raise it when the same rows give other batches: a run from before is then refused, not continued on other ones."""


@dataclass(frozen=True)
class Prepared:
    """Token rows by split; row ids are indices into the split."""

    train: TokenRows
    validation: TokenRows
    test: TokenRows
    """Empty unless the data brings a test split or `data.test` asks for one."""
    inspections: Mapping[str, Inspection]
    """Of the rows as they were read, before the split: by the split that the data brings them as."""
    is_given: frozenset[str]
    """The splits that the data brings itself."""
    lines: tuple[Line, ...]
    """What was left out, cut off or written in another way."""
    fingerprint: str
    """SHA-256, in hex, of the token rows, their targets, their order and their split."""
    name: str
    """For the screen: `expert.jsonl`."""

    @property
    def findings(self) -> tuple[str, ...]:
        """The texts of `lines`, for people."""
        return tuple(line.text for line in self.lines)


@dataclass(frozen=True)
class TokenizedSplit:
    """The rows of a split as the data brings it."""

    rows: TokenRows
    content: HashArray
    """uint64 [N]: hash of what each row says."""
    digest: HashArray
    """uint64 [N]: hash of each row's tokens and targets."""
    columns: Mapping[str, HashArray | None]
    """The fields of `RowKeys` that do not depend on the seed."""
    inspection: Inspection

    def keys(self, *, seed: int) -> RowKeys:
        columns: dict[str, Any] = dict(self.columns)
        return RowKeys(position=positions(self.content, seed=seed), **columns)


@dataclass(frozen=True)
class TokenizedData:
    """A data set's rows before they are split."""

    arrays: Mapping[str, Array]
    """`train-ids`, …: by split and by column, as `data.pipeline.COLUMNS` says."""
    inspections: Mapping[str, Inspection]
    files: Mapping[str, str]
    """Split -> name of the file that its rows were read from."""
    lines: tuple[Line, ...]
    name: str

    @property
    def findings(self) -> tuple[str, ...]:
        """The texts of `lines`, for people."""
        return tuple(line.text for line in self.lines)

    def split(self, name: str) -> TokenizedSplit:
        """One of `inspections`."""
        start = f"{name}-"
        columns = {key.removeprefix(start): array for key, array in self.arrays.items() if key.startswith(start)}
        numbers = columns["numbers"]
        origin = Origins((self.files[name],), np.zeros(len(numbers), np.int32), numbers)
        rows = TokenRows.over(columns["ids"], columns["targets"], columns["lengths"], origin)
        keys = {key: columns.get(key) for key in ("equal", "prompt", "answer", "group", "stratum", "signature")}
        return TokenizedSplit(rows, columns["content"], columns["digest"], keys, self.inspections[name])


def load_data(config: DataConfig, tokenizer: Tokenizer, *, seed: int) -> Prepared:
    """Reads, converts, tokenises and splits a data set. A split that the data brings goes before the ratios.

    Raises:
        UserError: anything in the data or in `config` that a person has to mend; see the other modules.
    """
    return split_data(tokenize_data(config, tokenizer), config, seed=seed)


def tokenize_data(config: DataConfig, tokenizer: Tokenizer, *, folder: Path | None = None) -> TokenizedData:
    """Reads, converts and tokenises a data set, in bounded memory if there is a folder for what is large.

    Raises:
        UserError: anything in the data or in `config` that a person has to mend; see the other modules.
    """
    bad = BadRows(skip=config.skip_bad)
    source = open_source(config.path)
    counted = _Counted(source, bad)
    parser = survey(counted, name=source.name, fields=config.fields, group=config.group, stratify=config.stratify)
    settings = ChunkSettings(parser, config.max_tokens, config.train_on, config.skip_bad)
    done = convert_source(source, settings, tokenizer, num_rows=counted.num_rows, bad=bad, folder=folder)
    found = findings(done.told, Renderer(tokenizer), max_tokens=config.max_tokens)
    for split in source.splits:
        if not len(done.arrays[f"{split}-lengths"]):
            raise UserError(f"{config.path}: no usable {split} row: {found[0].text}", hint=_hint(bad))
    files = {split: PurePath(file).name for split, file in done.files.items()}
    return TokenizedData(done.arrays, done.inspections, files, tuple(found), source.name)


class _Counted:
    """Goes over the rows of a source once, and counts them."""

    def __init__(self, source: Source, bad: BadRows) -> None:
        self._rows = source.read(bad)
        self.num_rows = 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.num_rows += 1
            yield row


def _hint(bad: BadRows) -> str:
    return SKIP_HINT.partition(",")[0] if bad.num_rows else "raise data.max_tokens, or shorten the prompts"


def split_data(data: TokenizedData, config: DataConfig, *, seed: int) -> Prepared:
    """Train, validation and test rows: what the data brings, and the rest cut from its training rows.

    Raises:
        UserError: a split would have no rows.
    """
    if "validation" not in data.inspections and config.validation == 0 and config.folds is None:
        raise UserError(
            f"data.validation is 0 and {config.path} brings no validation rows: overfitting could not be seen",
            hint="set data.validation, such as 0.2, or give a folder with a valid file",
        )
    if "validation" in data.inspections and config.folds is not None:
        raise UserError(
            f"data.folds {config.folds}: {config.path} brings validation rows of its own",
            hint="give data.path the training file alone",
        )
    found, near = list(data.lines), config.near_duplicates
    parts = {name: _Part.of(data.split(name), seed) for name in data.inspections}
    train = parts.pop("train")
    if "validation" in parts and "test" in parts:
        parts["validation"] = _without_copies("validation", parts["validation"], [parts["test"]], near, found)
    train = _without_copies("training", train, list(parts.values()), near, found)
    if extra := len(train.rows) - len(np.unique(train.keys.equal)):
        text = f"{count(extra, 'training row')} the same as another; copies stay on one side of the split"
        found.append(Line("exact-copies", text, extra))
    if config.stratify is not None and "validation" in parts and ("test" in parts or not config.test):
        text = "data.stratify has no effect on the split: the data brings validation rows of its own"
        found.append(Line("stratify-unused", text))
    cut = cut_rows(
        train.keys,
        validation=0.0 if "validation" in parts else config.validation,
        test=0.0 if "test" in parts else config.test,
        seed=seed,
        near_duplicates=config.near_duplicates,
        folds=config.folds,
        fold=config.fold,
    )
    if config.folds is None and config.group is not None:
        found += _uneven(cut, parts, config)
    # without keys, whose signatures are half a kilobyte a row once they are copied from their file
    sides = {side: parts[side].side() if side in parts else train.side(getattr(cut, side)) for side in SPLITS}
    return Prepared(
        train=sides["train"].rows,
        validation=sides["validation"].rows,
        test=sides["test"].rows,
        inspections=data.inspections,
        is_given=frozenset(data.inspections),
        lines=tuple(found),
        fingerprint=_fingerprint(sides, config),
        name=data.name,
    )


def _uneven(cut: Cut, given: Collection[str], config: DataConfig) -> Iterator[Line]:
    """Sides that are far from the share that was asked for, as whole groups make them."""
    total = len(cut.train) + len(cut.validation) + len(cut.test)
    for side, ratio in (("validation", config.validation), ("test", config.test)):
        num, share = len(getattr(cut, side)), len(getattr(cut, side)) / total
        if side not in given and ratio and abs(share - ratio) > _UNEVEN * ratio and total >= _UNEVEN_ROWS:
            yield Line(
                "uneven-split",
                f"{num} of {total:,} rows ({share:.0%}) are held out for {side}, and data.{side} is {ratio:g}: "
                "a group's rows stay together",
                num,
            )


@dataclass(frozen=True)
class _Side:
    """The rows of a split."""

    rows: TokenRows
    digest: HashArray

    def side(self, indices: Sequence[int] | IntArray | None = None) -> _Side:
        """All of the rows, or some."""
        if indices is None:
            return _Side(self.rows, self.digest)
        chosen = np.asarray(indices, np.int64)
        return _Side(self.rows.select(chosen).renumbered(), self.digest[chosen])


@dataclass(frozen=True)
class _Part(_Side):
    """Some rows with what is known of them."""

    keys: RowKeys

    @classmethod
    def of(cls, split: TokenizedSplit, seed: int) -> _Part:
        return cls(split.rows, split.digest, split.keys(seed=seed))

    def select(self, indices: IntArray) -> _Part:
        some = self.side(indices)
        return _Part(some.rows, some.digest, self.keys.select(indices))


def _without_copies(
    side: str, part: _Part, held_out: Sequence[_Part], near_duplicates: float | None, found: list[Line]
) -> _Part:
    """The rows that are not held out as well, nor nearly: files that overlap would make the gap look small."""
    is_copy = np.zeros(len(part.rows), np.bool_)
    is_grouped = np.zeros(len(part.rows), np.bool_)
    for other in held_out:
        is_copy[overlap(part.keys, other.keys, near_duplicates=near_duplicates)] = True
        if part.keys.group is not None and other.keys.group is not None:
            is_grouped |= np.isin(part.keys.group, other.keys.group)
    if num_grouped := int(np.count_nonzero(is_grouped & ~is_copy)):
        text = f"{count(num_grouped, f'{side} row')} in a group (data.group) that another file holds out in part"
        found.append(Line("groups-across", text, num_grouped))
    if is_copy.all():
        raise UserError(f"every {side} row is also in another file of the data", hint="give the files different rows")
    if not (num := int(np.count_nonzero(is_copy))):
        return part
    like = "the same rows" if near_duplicates is None else "the same rows, or near copies,"
    kind = "copies-across" if near_duplicates is None else "near-copies-across"
    text = f"{count(num, f'{side} row')} left out: {like} are held out in another file"
    found.append(Line(kind if side == "training" else "held-out-twice", text, num))
    return part.select(np.flatnonzero(~is_copy))


def _fingerprint(sides: Mapping[str, _Side], config: DataConfig) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, config.max_tokens, config.train_on]).encode())
    for side, part in sides.items():
        digest.update(json.dumps([side, len(part.rows)]).encode())
        digest.update(part.digest.astype("<u8").tobytes())
    return digest.hexdigest()
