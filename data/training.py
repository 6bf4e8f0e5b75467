"""The rows of a run as the trainer wants them: batches by epoch, validation and probe."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from core.config import RunConfig
from core.errors import UserError
from core.protocols import Batch, IntArray
from data.batches import TokenRows, choose_widths, epoch_batches, eval_batches, padding_share
from data.dataset import Prepared
from data.split import probe_rows

_NAMED_ROWS = 8


class RunData:
    """Implements `core.trainer.TrainingData` over prepared rows; every answer is a function of (seed, epoch)."""

    def __init__(self, prepared: Prepared, config: RunConfig) -> None:
        self._prepared = prepared
        self._seed = config.train.seed
        self._batch_size = config.train.batch_size
        self._eval_batch_size = config.eval.batch_size or config.train.batch_size
        self._num_probe_rows = config.eval.probe_rows
        self.name = prepared.name
        self.fingerprint = prepared.fingerprint
        self.num_train_rows = len(prepared.train)
        self.num_val_rows = len(prepared.validation)
        if self._batch_size > self.num_train_rows:
            raise UserError(
                f"train.batch_size {self._batch_size} is more than the {self.num_train_rows} training rows",
                hint=f"use --batch-size {max(self.num_train_rows // 4, 1)}",
            )
        self._widths = choose_widths(prepared.train, prepared.validation)

    def epoch(self, epoch: int) -> Sequence[Batch]:
        return epoch_batches(
            self._prepared.train,
            batch_size=self._batch_size,
            seed=self._seed,
            epoch=epoch,
            widths=self._widths,
        )

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.num_train_rows // self._batch_size)

    @cached_property
    def validation(self) -> Sequence[Batch]:
        return self._eval_batches(self._prepared.validation)

    @cached_property
    def probe(self) -> Sequence[Batch]:
        rows = probe_rows(self._prepared.train, count=self._num_probe_rows, seed=self._seed)
        return self._eval_batches(rows)

    def name_rows(self, row_ids: IntArray) -> str:
        names = [self._prepared.train.origin[row] for row in row_ids if row >= 0]
        more = f" and {len(names) - _NAMED_ROWS} more" if len(names) > _NAMED_ROWS else ""
        return ", ".join(names[:_NAMED_ROWS]) + more

    @property
    def num_targets(self) -> int:
        """Target tokens of an epoch."""
        return self._prepared.train.num_targets

    @cached_property
    def padding(self) -> float:
        """Share of the first epoch's positions that are padding."""
        return padding_share(self.epoch(0), self._prepared.train)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest training row."""
        return max(len(ids) for ids in self._prepared.train.ids)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses token ids that the model has no embedding for: the tokenizer belongs to another model."""
        for rows in (self._prepared.train, self._prepared.validation):
            largest = max(int(ids.max()) for ids in rows.ids)
            if largest >= vocab_size:
                raise UserError(
                    f"the tokenizer makes token {largest}, but the model knows only {vocab_size}",
                    hint="use the tokenizer that belongs to the model",
                )

    def _eval_batches(self, rows: TokenRows) -> Sequence[Batch]:
        return eval_batches(rows, batch_size=self._eval_batch_size, widths=self._widths)
