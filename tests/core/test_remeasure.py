"""A run that goes on with other weights: what it compares with is measured again there, by hand-worked values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.adapter import Adapter
from core.checkpoint import Checkpoint
from core.early_stopping import EarlyStopping
from core.errors import NonFiniteLossError
from core.protocols import TrainState
from core.remeasure import Remeasured, remeasure
from tests.core.test_trainer import Run, make_config
from tests.fakes import NAME, VOCAB, FakeData, FakeLearner

CONFIG = make_config(guard={"patience": 3}, lora={"dropout": 0.0})


class OtherBase(FakeLearner):
    """The same model in another rounding: one token is likelier, whatever the adapter says."""

    def import_state(self, state: TrainState) -> None:
        super().import_state(state)
        self.logits[0, 3] += 2.0


def initial() -> Adapter:
    return Adapter(modules={}, tensors={NAME: np.zeros((1, VOCAB), np.float32)}, num_layers=1)


def loss_on(learner: FakeLearner, tensors: Any, *, probe: bool = False) -> float:
    learner.import_state(TrainState(tensors, {}))
    data = FakeData()
    return learner.evaluate(data.probe if probe else data.validation).mean


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve steps; evaluated at 5 and 10, of which the second is the best."""
    run = Run(tmp_path_factory.mktemp("run") / "run", CONFIG, stop_at=12)
    run.run()
    return run


def remeasured(run: Run, learner: FakeLearner, *, gone: bool = False, **more: Any) -> tuple[Checkpoint, Remeasured]:
    checkpoint = run.checkpointer.latest()
    assert checkpoint is not None
    trainer = {**checkpoint.trainer, **more}
    checkpoint = replace(checkpoint, trainer=trainer)
    found = remeasure(
        checkpoint,
        read_best=lambda step: None if gone else run.checkpointer.read(step),
        initial=initial(),
        learner=learner,
        data=FakeData(),
        config=CONFIG,
    )
    return checkpoint, found


def test_base_and_best_are_those_of_the_new_weights(trained: Run) -> None:
    before, found = remeasured(trained, OtherBase())
    best = trained.checkpointer.read(10)
    assert best is not None
    old, new = before.trainer["progress"], found.checkpoint.trainer["progress"]
    assert new["base_val_loss"] == loss_on(OtherBase(), initial().tensors) != old["base_val_loss"]
    val_loss, probe_loss = (loss_on(OtherBase(), best.state.adapter, probe=probe) for probe in (False, True))
    assert (new["best_gap"]["val_loss"], new["best_gap"]["probe_loss"]) == (val_loss, probe_loss)
    assert new["best_gap"]["low"] != old["best_gap"]["low"]
    stopping = found.checkpoint.trainer["early_stopping"]
    assert stopping["best_loss"] == val_loss and stopping["best_step"] == 10
    assert stopping["reference_loss"] == pytest.approx(val_loss)
    kept = {name: value for name, value in new.items() if name not in ("base_val_loss", "best_gap")}
    assert kept == {name: old[name] for name in kept}, "all else is as it was"
    (line,) = found.lines
    assert f"base model {new['base_val_loss']:.3f} here ({old['base_val_loss']:.3f} before)" in line
    assert f"best adapter, of step 10, {val_loss:.3f} ({old['best_gap']['val_loss']:.3f})" in line
    assert found.warnings == ()


def test_on_the_same_weights_nothing_changes(trained: Run) -> None:
    before, found = remeasured(trained, FakeLearner())
    assert found.checkpoint.trainer["progress"] == before.trainer["progress"]
    assert found.checkpoint.trainer["early_stopping"] == before.trainer["early_stopping"]


def test_a_best_checkpoint_that_is_gone_is_warned_of_by_its_numbers(trained: Run) -> None:
    before, found = remeasured(trained, OtherBase(), gone=True)
    loss = before.trainer["early_stopping"]["best_loss"]
    (warning,) = found.warnings
    assert f"best validation loss {loss:.3f} (step 10" in warning and "measured on other weights" in warning
    assert found.checkpoint.trainer["early_stopping"] == before.trainer["early_stopping"]
    assert "best adapter" not in found.lines[0]


def test_before_the_first_evaluation_there_is_no_best_one(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", CONFIG, stop_at=3)
    run.run()
    before, found = remeasured(run, OtherBase())
    assert found.checkpoint.trainer["early_stopping"] == before.trainer["early_stopping"]
    assert found.warnings == () and "best adapter" not in found.lines[0]


def test_a_mixtures_routing_is_that_of_the_new_weights(trained: Run) -> None:
    _, found = remeasured(trained, FakeLearner(routes=True))
    progress = found.checkpoint.trainer["progress"]
    assert progress["base_routing"]["experts_per_token"] == 2
    assert progress["best_routing"]["moved_max"] == 0.0, "here it does not depend on the adapter"


def test_a_loss_that_is_not_finite_is_refused(trained: Run) -> None:
    class Overflowing(FakeLearner):
        def import_state(self, state: TrainState) -> None:
            self.logits = np.full((1, VOCAB), np.nan, np.float32)

    with pytest.raises(NonFiniteLossError, match="loss of the base model is nan here"):
        remeasured(trained, Overflowing())


def test_patience_counts_on_from_the_new_loss() -> None:
    """Best 2.0, renewed at 2.1. On the new weights the best one has 3.0: 2.9 is an improvement, 3.05 none."""
    stopping = EarlyStopping(patience=2, min_delta=0.15)
    for step, loss in enumerate((2.1, 2.0), start=1):
        stopping.update(loss, step=step)
    stopping.rebase(3.0)
    assert (stopping.best_loss, stopping.best_step, stopping.num_bad) == (3.0, 2, 1)
    assert stopping.reference_loss == pytest.approx(3.1)
    assert stopping.update(2.9, step=3).is_best and stopping.num_bad == 0
    assert not stopping.update(3.05, step=4).is_best
