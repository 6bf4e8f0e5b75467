"""The general texts through a trained run's model, without its adapter and with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from core.general import GeneralReport, TargetScores, make_report, score_targets
from core.protocols import IGNORE, Batch, IntArray
from core.workflow.after import OpenedRun
from data.general import load_general

_GROUP_BYTES = 512_000_000
"""Logits of one side that are in memory at a time, unless a single batch has more."""


def measure_general(opened: OpenedRun) -> GeneralReport:
    """Scores base model and adapter; the learner holds the adapter afterwards.

    A group of batches is scored at a time, so that memory stays bounded whatever the vocabulary.

    Raises:
        OutOfMemoryError: a batch did not fit.
        UserError: the tokenizer is another model's.
    """
    vocab_size = opened.run.architecture.vocab_size
    rows = load_general(opened.tokenizer, vocab_size=vocab_size)
    parts, row_ids = [], []
    for group in _groups(rows.batches, bytes_per_target=4 * vocab_size):
        logits = {side: [opened.use(side).target_logits(batch) for batch in group] for side in ("base", "adapter")}
        for batch, base, adapter in zip(group, logits["base"], logits["adapter"], strict=True):
            parts.append(score_targets(base, adapter, batch.targets[batch.targets != IGNORE]))
            row_ids.append(_row_of_targets(batch))
    config = opened.run.config
    return make_report(
        rows.texts,
        np.concatenate(row_ids),
        TargetScores.joined(parts),
        confidence=config.guard.confidence,
        least=config.guard.grades[0],
        seed=config.train.seed,
    )


def _groups(batches: Sequence[Batch], *, bytes_per_target: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    num_bytes = 0
    for batch in batches:
        needed = batch.num_targets * bytes_per_target
        if group and num_bytes + needed > _GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(batch)
        num_bytes += needed
    if group:
        yield group


def _row_of_targets(batch: Batch) -> IntArray:
    """int64 [targets]: the row id of each target, in the order of the flattened batch."""
    return np.repeat(batch.row_ids, np.count_nonzero(batch.targets != IGNORE, axis=1))
