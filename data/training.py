"""The rows of a run as the trainer wants them: batches by epoch, validation and probe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from core.config import DataConfig, RunConfig
from core.errors import UserError
from core.protocols import Batch, IntArray
from data.batches import TokenRows, epoch_batches, eval_batches, padding_share
from data.dataset import Prepared
from data.shapes import Limit, Shapes, eval_shapes, train_shapes
from data.sources import count
from data.split import probe_rows

_NAMED_ROWS = 8


class RunData:
    """Implements `core.trainer.TrainingData` over prepared rows; every answer is a function of (seed, epoch)."""

    def __init__(self, prepared: Prepared, config: RunConfig) -> None:
        if holds_nothing_out(config.data):
            prepared = all_to_train(prepared)
        self._prepared = prepared
        self._seed = config.train.seed
        self._budget = config.train.batch_tokens
        self._limit = _limit(config.train.batch_size, config.train.batch_tokens)
        self._eval_limit = _limit(config.eval.batch_size) if config.eval.batch_size else self._limit
        self._general: Sequence[Batch] = ()
        self._num_probe_rows = config.eval.probe_rows
        self.name = prepared.name
        self.fingerprint = prepared.fingerprint
        self.num_train_rows = len(prepared.train)
        self.num_val_rows = len(prepared.validation)
        self.num_test_rows = len(prepared.test)
        if self._limit.rows is not None and self._limit.rows > self.num_train_rows:
            raise UserError(
                f"train.batch_size {self._limit.rows} is more than the {self.num_train_rows} training rows",
                hint=f"use --batch-size {max(self.num_train_rows // 4, 1)}",
            )
        self._shapes = train_shapes(prepared.train.lengths, self._limit)

    def warnings(self) -> list[str]:
        """For people, a line each: settings that the rows do not fit."""
        if self._budget is None:
            return []
        num_long = int((self._prepared.train.lengths - 1 > self._budget).sum())
        if not num_long:
            return []
        return [
            f"{count(num_long, 'training row')} longer than train.batch_tokens {self._budget}: each is a micro-batch "
            f"of its own, of up to {self.longest_row - 1} positions"
        ]

    def epoch(self, epoch: int) -> Sequence[Batch]:
        return epoch_batches(self._prepared.train, self._shapes, seed=self._seed, epoch=epoch)

    @property
    def batches_per_epoch(self) -> int:
        return len(self._shapes)

    @property
    def largest_batch(self) -> tuple[int, int]:
        """Rows and width of the micro-batch with the most positions, of any epoch."""
        shapes = zip(self._shapes.sizes, self._shapes.widths, strict=True)
        return max(shapes, key=lambda shape: shape[0] * shape[1])

    @cached_property
    def validation(self) -> Sequence[Batch]:
        return eval_batches(self._prepared.validation, self._eval_shapes[0])

    @cached_property
    def probe(self) -> Sequence[Batch]:
        return eval_batches(self._probe_rows, self._eval_shapes[1])

    @property
    def general(self) -> Sequence[Batch]:
        """Of `data.general`, if they are measured."""
        return self._general

    def with_general(self, batches: Sequence[Batch]) -> RunData:
        """Takes general texts in, to be measured at every evaluation."""
        self._general = batches
        return self

    def name_rows(self, row_ids: IntArray) -> str:
        names = [self._prepared.train.origin[row] for row in row_ids if row >= 0]
        more = f" and {len(names) - _NAMED_ROWS} more" if len(names) > _NAMED_ROWS else ""
        return ", ".join(names[:_NAMED_ROWS]) + more

    def split_rows(self) -> Iterator[tuple[str, int, str]]:
        """Split, number in the split and `file:line` of each row."""
        prepared = self._prepared
        for name, rows in (("train", prepared.train), ("validation", prepared.validation), ("test", prepared.test)):
            for number in range(len(rows)):
                yield name, number, rows.origin[number]

    @property
    def num_targets(self) -> int:
        """Target tokens of an epoch."""
        return self._prepared.train.num_targets

    @cached_property
    def padding(self) -> float:
        """Share of an epoch's positions that are padding; the same in every epoch."""
        return padding_share(epoch_batches(self._prepared.train, self._shapes, seed=self._seed, epoch=0))

    @property
    def longest_row(self) -> int:
        """Tokens of the longest training row."""
        return int(self._prepared.train.lengths.max())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses token ids that the model has no embedding for: the tokenizer belongs to another model."""
        for rows in filter(len, (self._prepared.train, self._prepared.validation)):
            if rows.largest_id >= vocab_size:
                raise UserError(
                    f"the tokenizer makes token {rows.largest_id}, but the model knows only {vocab_size}",
                    hint="use the tokenizer that belongs to the model",
                )

    @cached_property
    def _probe_rows(self) -> TokenRows:
        return probe_rows(self._prepared.train, count=self._num_probe_rows, seed=self._seed)

    @cached_property
    def _eval_shapes(self) -> list[Shapes]:
        return eval_shapes([self._prepared.validation.lengths, self._probe_rows.lengths], self._eval_limit)


def holds_nothing_out(config: DataConfig) -> bool:
    """Whether all folds train and none validates: the run after the folds, which have judged it."""
    return config.folds is not None and config.validation == 0


def all_to_train(prepared: Prepared) -> Prepared:
    """The same rows with those that validate put behind those that train; test rows stay where they are."""
    train, validation = prepared.train, prepared.validation
    rows = train.followed_by(validation)
    fingerprint = hashlib.sha256(f"all to train\n{prepared.fingerprint}".encode()).hexdigest()
    return replace(prepared, train=rows, validation=validation.select([]).renumbered(), fingerprint=fingerprint)


def _limit(batch_size: int, batch_tokens: int | None = None) -> Limit:
    return Limit(rows=batch_size) if batch_tokens is None else Limit(positions=batch_tokens)
