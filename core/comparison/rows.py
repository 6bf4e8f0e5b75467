"""Two runs on the rows that both were judged by: how far their validation losses differ, and by how much that is luck.

The rows are found by where they were read (`split.csv`), their losses are those of each run's best step
(`row_losses/`). Rows that one run trained on are not among the shared ones. The interval is the paired bootstrap of
`core.evaluation`: the same resample for both sides, so that a row that is hard for both does not count as a difference.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from core.errors import NonFiniteLossError
from core.evaluation.bootstrap import NO_DIFFERENCE
from core.evaluation.losses import pair_losses
from core.files import read_json
from core.folds import fold_name, is_folds, read_folds
from core.protocols import FloatArray, IntArray, RowLosses
from core.row_losses import read_row_losses
from core.run import SPLIT

CONFIDENCE = 0.95
NEGLIGIBLE = 0.01
"""Nats per target token, 1 % of the perplexity: runs that surely differ by less are as good as each other. Of enough
rows, the interval leaves out 0 for the smallest difference, such as that of two backends that round otherwise."""
_OTHER_TEXT = 0.1
"""Median difference of the base model's loss, in nats per target token, from which rows of the same place and model
are other texts."""


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """The validation rows of a run at its best step; of folds, each row by the fold that did not train on it."""

    origins: tuple[str, ...]
    """Where each row was read: `train.jsonl:17`; of a run that did not write that down, `row 3`, its number."""
    row_ids: IntArray
    """int64 [N]: number of each row in its split."""
    is_named: bool
    """Whether the origins are known; else the rows are only those of another run with the same fingerprint."""
    nll: FloatArray
    """float64 [N]: nats, summed over the row's targets."""
    num_targets: IntArray
    """int64 [N]"""
    base_nll: FloatArray | None
    """float64 [N], before the first step; None where that was not kept."""
    fingerprint: str | None
    """Of rows, split and tokens, from a checkpoint."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Validation loss of one run less that of another, on the rows of both, in nats per target token."""

    value: float
    low: float
    high: float
    p_value: float
    is_clear: bool
    """Whether it is more than what luck with the rows would do."""
    is_negligible: bool
    """Whether it is surely smaller than `NEGLIGIBLE`: all of the interval, of rows enough to tell."""
    num_rows: int
    num_targets: int
    is_all: bool
    """Whether these are all validation rows of both."""

    def reversed(self) -> PairedDifference:
        """The other run's loss less this one's."""
        return replace(self, value=-self.value, low=-self.high, high=-self.low)


def read_judged(folder: Path, best_step: int | None) -> JudgedRows | None:
    """None where a run has not been judged, or its files don't say by which rows."""
    if is_folds(folder):
        return _of_folds(folder)
    if best_step is None:
        return None
    best, before = _validation(folder, best_step), _validation(folder, 0)
    origins = _origins(folder)
    if best is None or not len(best.row_ids):
        return None
    is_named = int(best.row_ids.max()) < len(origins)
    names = tuple(origins[row] if is_named else f"row {row}" for row in best.row_ids.tolist())
    base = None
    if before is not None and np.array_equal(before.row_ids, best.row_ids):
        base = before.nll
    return JudgedRows(names, best.row_ids, is_named, best.nll, best.num_targets, base, data_fingerprint(folder))


def _of_folds(parent: Path) -> JudgedRows | None:
    done = [result for result in read_folds(parent) if result.is_done]
    parts = [read_judged(parent / fold_name(result.fold), result.best_step) for result in done]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    bases = [part.base_nll for part in known if part.base_nll is not None]
    return JudgedRows(
        tuple(name for part in known for name in part.origins),
        np.concatenate([part.row_ids for part in known]),
        all(part.is_named for part in known),
        np.concatenate([part.nll for part in known]),
        np.concatenate([part.num_targets for part in known]),
        np.concatenate(bases) if len(bases) == len(known) else None,
        None,
    )


def _validation(folder: Path, step: int) -> RowLosses | None:
    from safetensors import SafetensorError

    try:
        losses = read_row_losses(folder, step)
    except (SafetensorError, KeyError, OSError):
        return None
    return None if losses is None else losses[0]


def _origins(folder: Path) -> list[str]:
    """Of the validation rows, by their number."""
    try:
        with open(folder / SPLIT, encoding="utf-8", newline="") as file:
            return [line["origin"] for line in csv.DictReader(file) if line.get("split") == "validation"]
    except (OSError, KeyError, csv.Error):
        return []


def data_fingerprint(folder: Path) -> str | None:
    """Of the data, as the newest checkpoint is bound to it."""
    for path in sorted(folder.glob("checkpoints/*/trainer.json"), reverse=True):
        content = read_json(path)
        identity = content.get("identity") if isinstance(content, dict) else None
        if isinstance(identity, dict) and isinstance(identity.get("data"), str):
            return str(identity["data"])
    return None


# --- two runs ---------------------------------------------------------------------------------------------------------


def difference(one: JudgedRows, other: JudgedRows, *, same_name: bool, same_model: bool) -> PairedDifference | str:
    """`one` less `other`; or why the losses can't be held against each other, in words.

    Args:
        same_name: whether the data are called the same.
        same_model: whether both started from the same weights, so that equal rows have equal losses there.
    """
    is_same = one.fingerprint is not None and one.fingerprint == other.fingerprint
    if not same_name and not is_same:
        return "they were judged by different data"
    if not is_same and not (one.is_named and other.is_named):
        return f"it is not known which rows judged them (no {SPLIT})"
    pairs = _shared(one, other) if one.is_named and other.is_named else _of_the_same_place(one, other)
    if not len(pairs):
        return "they have no validation row in common"
    left, right = pairs[:, 0], pairs[:, 1]
    if not is_same:
        if not np.array_equal(one.num_targets[left], other.num_targets[right]):
            return "their rows have other target tokens (tokenizer, data.max_tokens, data.train_on or other texts)"
        if same_model and _are_other_texts(one, other, left, right):
            return "the rows have other texts, though the data are called the same"
    counts = one.num_targets[left]
    try:
        paired = pair_losses(other.nll[right], one.nll[left], counts, seed=0, confidence=CONFIDENCE)
    except NonFiniteLossError:
        return "a row's loss is not a number"
    gain = paired.difference  # by how much the first lies below the second
    return PairedDifference(
        value=-gain.value,
        low=-gain.high,
        high=-gain.low,
        p_value=gain.p_value,
        is_clear=gain.verdict != NO_DIFFERENCE,
        is_negligible=max(abs(gain.low), abs(gain.high)) < NEGLIGIBLE and _can_tell(len(pairs)),
        num_rows=len(pairs),
        num_targets=int(counts.sum()),
        is_all=len(pairs) == len(one.origins) == len(other.origins),
    )


def _can_tell(num_rows: int) -> bool:
    """Whether a difference in so many rows could be clear at all: with fewer, the interval says nothing."""
    return 2.0 ** (1 - num_rows) <= 1 - CONFIDENCE


def _shared(one: JudgedRows, other: JudgedRows) -> IntArray:
    """int64 [pairs, 2]: places of the rows of both."""
    places = {name: place for place, name in enumerate(other.origins)}
    found = [(place, places[name]) for place, name in enumerate(one.origins) if name in places]
    return np.array(found, np.int64).reshape(-1, 2)


def _of_the_same_place(one: JudgedRows, other: JudgedRows) -> IntArray:
    """int64 [pairs, 2]: the rows of one split, which evaluations list in the same order or another."""
    places = {row: place for place, row in enumerate(other.row_ids.tolist())}
    found = [(place, places[row]) for place, row in enumerate(one.row_ids.tolist()) if row in places]
    return np.array(found, np.int64).reshape(-1, 2)


def _are_other_texts(one: JudgedRows, other: JudgedRows, left: IntArray, right: IntArray) -> bool:
    if one.base_nll is None or other.base_nll is None:
        return False
    differences = np.abs(one.base_nll[left] - other.base_nll[right]) / one.num_targets[left]
    return float(np.median(differences)) > _OTHER_TEXT
