"""`RunData`: the settings become batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.config import RunConfig
from core.errors import UserError
from core.trainer import StepSource
from data.dataset import load_data
from data.tokenize import Tokenizer
from data.training import RunData, all_to_train

Write = Callable[..., str]
MakeData = Callable[..., RunData]


@pytest.fixture
def make_data(write: Write, chatml: Tokenizer) -> MakeData:
    """Rows of 17 to 73 tokens; the first four are `longest` letters longer."""

    def make(*, longest: int = 0, num_rows: int = 50, eval_size: int | None = None, **train: Any) -> RunData:
        rows = [{"prompt": "x" * (index % 7 * 8 + 1), "completion": f"{index}"} for index in range(1, num_rows + 1)]
        for row in rows[:4] if longest else ():
            row["completion"] += "y" * longest
        config = RunConfig.model_validate(
            {"data": {"path": write(rows), "max_tokens": 1000}, "train": train, "eval": {"batch_size": eval_size}}
        )
        return RunData(load_data(config.data, chatml, seed=0), config)

    return make


@pytest.mark.parametrize("train", [{"batch_size": 4}, {"batch_tokens": 300}], ids=str)
def test_every_epoch_has_the_same_number_of_batches(make_data: MakeData, train: dict[str, int]) -> None:
    data = make_data(**train)
    config = RunConfig.model_validate({"train": {**train, "accumulation": 3, "epochs": 3}})
    source = StepSource(config, data)
    shapes = []
    for epoch in range(3):
        batches = data.epoch(epoch)
        assert len(batches) == data.batches_per_epoch
        shapes.append(Counter(batch.inputs.shape for batch in batches))
        first = epoch * source.plan.steps_per_epoch + 1
        steps = [source.microbatches(step) for step in range(first, first + source.plan.steps_per_epoch)]
        assert all(steps)
        seen = np.concatenate([batch.row_ids for step in steps for batch in step])
        assert sorted(seen) == list(range(data.num_train_rows))
    assert shapes[0] == shapes[1] == shapes[2]
    assert data.largest_batch == max(shapes[0], key=lambda shape: shape[0] * shape[1])


def test_a_budget_of_tokens_instead_of_rows(make_data: MakeData) -> None:
    data = make_data(batch_tokens=300, batch_size=64)  # the size is not used: no word about 64 rows
    batches = [*data.epoch(0), *data.validation, *data.probe]
    assert max(batch.num_tokens for batch in batches) <= 300
    by_width = sorted((batch.inputs.shape[1], len(batch.row_ids)) for batch in data.epoch(0))
    assert by_width[0][1] > by_width[-1][1] > 1  # short rows go more at a time
    assert data.warnings() == []


def test_evaluation_batches_may_have_a_size_of_their_own(make_data: MakeData) -> None:
    sizes = Counter(len(batch.row_ids) for batch in make_data(batch_tokens=300, eval_size=2).validation)
    assert sizes == {2: 6}
    assert Counter(len(batch.row_ids) for batch in make_data(batch_size=4).validation) == {4: 3}


def test_a_row_longer_than_the_budget_is_said_once(make_data: MakeData) -> None:
    data = make_data(batch_tokens=200, longest=400)
    (warning,) = data.warnings()
    alone = [batch for batch in data.epoch(0) if batch.num_tokens > 200]
    assert [len(batch.row_ids) for batch in alone] == [1, 1, 1]  # the fourth is held out
    assert warning == (
        "3 training rows longer than train.batch_tokens 200: each is a micro-batch of its own, "
        f"of up to {max(batch.num_tokens for batch in alone)} positions"
    )


def test_padding_is_what_the_batches_have(make_data: MakeData) -> None:
    data = make_data(batch_size=4)
    for epoch in range(2):
        batches = data.epoch(epoch)
        computed = sum(batch.num_tokens for batch in batches)
        assert data.padding == pytest.approx(1 - sum(batch.num_real_tokens for batch in batches) / computed)
    assert 0 < data.padding < 0.14


def test_a_batch_larger_than_the_data_is_refused(make_data: MakeData) -> None:
    with pytest.raises(UserError, match=r"train\.batch_size 64 is more than the 38 training rows"):
        make_data(batch_size=64)


def test_the_run_after_the_folds_trains_on_all_rows(write: Write, chatml: Tokenizer) -> None:
    rows = [{"prompt": f"How much is {number} + 1?", "completion": f"{number + 1}"} for number in range(30)]
    settings = {"path": write(rows), "folds": 3, "fold": 2, "validation": 0.0}
    config = RunConfig.model_validate({"data": settings, "train": {"batch_size": 4}})
    prepared = load_data(config.data, chatml, seed=0)
    assert len(prepared.validation) > 0
    whole = all_to_train(prepared)
    assert [*whole.train.origin] == [*prepared.train.origin, *prepared.validation.origin]
    assert (len(whole.train), len(whole.validation)) == (30, 0)
    assert whole.fingerprint != prepared.fingerprint
    data = RunData(prepared, config)
    assert (data.num_train_rows, data.num_val_rows, data.fingerprint) == (30, 0, whole.fingerprint)
    assert sorted(row for batch in data.epoch(0) for row in batch.row_ids) == list(range(30))
