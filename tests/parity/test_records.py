"""Records: that they hold what the trainer would have done, survive the disk, and that damage is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint import Checkpointer
from core.errors import NonFiniteLossError, UserError
from core.journal import JSON_EXPORT, Journal
from core.parity_record import ADAPTER, RECORD, certified, read_record, sample_rows, write_record
from core.protocols import IGNORE, Batch
from core.trainer import Trainer
from tests.fakes import NAME, FakeData, FakeLearner, SilentScreen
from tests.parity.made import STEPS, make_record, make_settings


def test_a_record_holds_what_the_trainer_does(tmp_path: Path) -> None:
    """The same losses, norms and rates at each step, and the same adapter at the end."""
    config, _ = certified(make_settings(log={"every": 1}), steps=STEPS)
    learner, journal = FakeLearner(dropout=0.0), Journal(tmp_path)
    trainer = Trainer(
        config=config,
        learner=learner,
        data=FakeData(),
        folder=tmp_path,
        journal=journal,
        checkpointer=Checkpointer(tmp_path, keep=1),
        screen=SilentScreen(),
        save_best=lambda tensors: None,
        heartbeat=lambda values: None,
    )
    trainer.run()
    journal.close()
    trained = [line for line in json.loads((tmp_path / JSON_EXPORT).read_text()) if line["step"]]
    record = make_record()
    assert [(s.step, s.lr, s.loss, s.grad_norm) for s in record.steps] == [
        (line["step"], line["lr"], line["loss"], line["grad_norm"]) for line in trained
    ]
    np.testing.assert_array_equal(record.adapter[NAME], learner.logits)
    assert sum(record.rows.final_nll) / sum(record.rows.num_targets) == trained[-1]["val_loss"]
    assert sum(record.rows.base_nll) > sum(record.rows.final_nll)


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    record = make_record()
    write_record(tmp_path / "one", record)
    again = read_record(tmp_path / "one")
    assert replace(again, adapter={}) == replace(record, adapter={})
    np.testing.assert_array_equal(again.adapter[NAME], record.adapter[NAME])


def test_hashes_tell_steps_apart_and_repeat() -> None:
    one, again = make_record(), make_record()
    assert [step.inputs for step in one.steps] == [step.inputs for step in again.steps]
    assert one.initial_adapter == again.initial_adapter
    assert len({step.inputs for step in one.steps}) == len({step.targets for step in one.steps}) == STEPS


def test_a_step_that_is_not_finite_is_named() -> None:
    with pytest.raises(NonFiniteLossError, match=r"cuda, step 3: loss nan.* on rows fake:"):
        make_record(learner=FakeLearner(fail_at=3))


def _cut_json(folder: Path) -> None:
    text = (folder / RECORD).read_text()
    (folder / RECORD).write_text(text[: len(text) // 2])


def _drop_losses(folder: Path) -> None:
    plain = json.loads((folder / RECORD).read_text())
    plain["rows"]["final_nll"].pop()
    (folder / RECORD).write_text(json.dumps(plain))


def _drop_key(folder: Path) -> None:
    plain = json.loads((folder / RECORD).read_text())
    del plain["steps"][1]["grad_norm"]
    (folder / RECORD).write_text(json.dumps(plain))


def _other_format(folder: Path) -> None:
    plain = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(plain | {"format": 99}))


def _cut_adapter(folder: Path) -> None:
    (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-7])


def _other_adapter(folder: Path) -> None:
    raw = bytearray((folder / ADAPTER).read_bytes())
    raw[-2] ^= 1
    (folder / ADAPTER).write_bytes(raw)


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (_cut_json, "damaged"),
    (_drop_losses, "lists of different length"),
    (_drop_key, "grad_norm"),
    (_other_format, "format 99"),
    (_cut_adapter, ADAPTER),
    (_other_adapter, "SHA-256"),
    (lambda folder: (folder / ADAPTER).unlink(), "no such file"),
    (lambda folder: (folder / RECORD).unlink(), "not a parity record"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_record_is_refused(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    write_record(tmp_path / "one", make_record())
    damage(tmp_path / "one")
    with pytest.raises(UserError, match=words) as caught:
        read_record(tmp_path / "one")
    assert str(tmp_path / "one") in caught.value.what and caught.value.hint


def test_certified_settings_switch_off_what_cannot_be_equal() -> None:
    asked = make_settings(
        model={"bits": 4, "dtype": "bfloat16"},
        lora={"dropout": 0.1},
        optim={"state_bits": 8, "paged": True, "lr": 0.1},
        train={"max_steps": 700, "epochs": 0.5},
    )
    config, overridden = certified(asked, steps=7)
    assert (config.model.bits, config.model.dtype, config.lora.dropout) == (16, "float32", 0.0)
    assert (config.optim.state_bits, config.optim.paged, config.train.max_steps) == (32, False, 7)
    assert config.optim.lr == 0.1
    assert overridden == [
        "model.bits: 4 -> 16",
        "model.dtype: bfloat16 -> float32",
        "lora.dropout: 0.1 -> 0.0",
        "optim.state_bits: 8 -> 32",
        "optim.paged: True -> False",
        "train.max_steps: 700 -> 7",
    ]


def test_defaults_and_equal_values_are_not_called_overridden() -> None:
    assert certified(make_settings(model={"bits": 16}), steps=7)[1] == []


def test_there_are_as_many_steps_as_asked_for_however_few_the_epochs() -> None:
    assert len(make_record(train={"epochs": 0.1}).steps) == STEPS


def test_sampled_rows_are_spread_and_within_the_budget() -> None:
    """Ten rows of 8 positions, a budget of 30: every third row. A row without a target is none."""
    targets = np.full((10, 8), 5, np.int32)
    targets[9] = IGNORE
    batches = [
        Batch(np.arange(6), np.zeros((6, 8), np.int32), targets[:6]),
        Batch(np.arange(6, 10), np.zeros((4, 8), np.int32), targets[6:]),
    ]
    assert [batch.row_ids.tolist() for batch in sample_rows(batches, budget=30)] == [[0], [3], [6]]
    assert len(sample_rows(batches, budget=None)) == 9
    assert [batch.row_ids.tolist() for batch in sample_rows(batches, budget=1)] == [[0]]
