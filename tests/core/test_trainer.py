"""The loop with a fake learner: order, arithmetic, stopping, and resume that leaves the same bits."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoint import Checkpointer
from core.config import RunConfig
from core.errors import NonFiniteLossError
from core.journal import JSON_EXPORT, MACHINE_FIELDS, Journal
from core.run import ROW_LOSSES
from core.schedule import plan_steps
from core.trainer import Status, Trainer
from tests.fakes import NAME, FakeData, FakeLearner, SilentScreen


def make_config(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "optim": {"lr": 0.3},
        "train": {"epochs": 4, "accumulation": 2},
        "eval": {"every": 5},
        "guard": {"patience": None},
        "checkpoint": {"every": 3, "keep": 2},
        "log": {"every": 4},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return RunConfig.model_validate(base)


class Run:
    """One trainer over one folder, as `core.workflow` puts it together."""

    def __init__(
        self, folder: Path, config: RunConfig, *, learner: FakeLearner | None = None, stop_at: int | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.learner, self.screen = folder, learner or FakeLearner(), SilentScreen()
        self.saved: list[np.ndarray[Any, Any]] = []
        self.checkpointer = Checkpointer(folder, keep=config.checkpoint.keep)
        self.checkpoint = self.checkpointer.latest()
        kept = self.checkpoint.trainer["journal_bytes"] if self.checkpoint else 0
        self.journal = Journal(folder, keep_bytes=kept)
        self.trainer = Trainer(
            config=config,
            learner=self.learner,
            data=FakeData(),
            folder=folder,
            journal=self.journal,
            checkpointer=self.checkpointer,
            screen=self.screen,
            save_best=lambda tensors: self.saved.append(np.array(tensors[NAME])),
            heartbeat=lambda values: None,
            should_interrupt=lambda: stop_at is not None and self.trainer.progress.step >= stop_at,
        )

    def run(self) -> Status:
        try:
            return self.trainer.run(self.checkpoint)
        finally:
            self.journal.close()

    def records(self) -> list[dict[str, Any]]:
        """The journal without what measures the machine."""
        records = json.loads((self.folder / JSON_EXPORT).read_text())
        return [{k: v for k, v in record.items() if k not in MACHINE_FIELDS} for record in records]


def test_plan_counts_a_short_last_group() -> None:
    config = make_config(train={"epochs": 2.5, "accumulation": 4})
    plan = plan_steps(config, batches_per_epoch=7)  # groups of 4 and 3
    assert (plan.steps_per_epoch, plan.total_steps) == (2, 5)
    assert [plan.epoch_of(step) for step in (0, 1, 2, 3, 4, 5)] == [0, 1, 1, 2, 2, 3]
    assert plan_steps(make_config(train={"max_steps": 3}), batches_per_epoch=100).total_steps == 3


def test_order_of_a_step_boundary(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"epochs": 1}, eval={"every": 2}))
    assert run.run() == "finished"
    # 20 rows in batches of 3 are 7 batches, 4 steps; the base is evaluated first, the end last;
    # each new best is exported for adapters/ and again for its checkpoint
    assert run.learner.calls == [
        *("evaluate", "evaluate"),
        *("step 1", "step 2", "evaluate", "evaluate", "export", "export"),
        *("step 3", "export"),
        *("step 4", "evaluate", "evaluate", "export", "export"),
    ]


def test_every_row_once_an_epoch_and_losses_weighted_by_tokens(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"epochs": 3}, log={"every": 100}, eval={"every": 100}))
    run.run()
    assert Counter(run.learner.seen) == dict.fromkeys(range(20), 3)
    data = FakeData()
    assert run.trainer.progress.num_target_tokens == 3 * sum(map(len, data.rows))
    base, last = run.records()
    # the base model is uniform over 16 tokens
    assert base["val_loss"] == pytest.approx(np.log(16)) and base["loss"] is None
    assert last["val_loss"] < base["val_loss"]


def test_logged_loss_is_the_mean_over_the_window(tmp_path: Path) -> None:
    config = make_config(train={"epochs": 1}, eval={"every": 100}, optim={"lr": 1e-30}, log={"every": 2})
    run = Run(tmp_path, config, learner=FakeLearner(dropout=0.0))
    run.run()
    # the weights do not move, so every window's mean is the uniform model's loss, whatever its steps' sizes
    losses = [record["loss"] for record in run.records()[1:]]
    assert losses == pytest.approx([np.log(16)] * len(losses))
    assert [record["step"] for record in run.records()] == [0, 2, 4]


def test_best_adapter_is_the_one_with_the_lowest_validation_loss(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(optim={"lr": 3.0}, train={"epochs": 8}, eval={"every": 1}))
    run.run()
    losses = {r["step"]: r["val_loss"] for r in run.records() if r.get("val_loss") is not None and r["step"] > 0}
    best = min(losses, key=lambda step: (losses[step], step))
    assert run.trainer.stopping.best_step == best
    checkpoint = run.checkpointer.read(best)
    assert checkpoint is not None, "the best checkpoint is never removed"
    assert np.array_equal(checkpoint.state.adapter[NAME], run.saved[-1])


def test_early_stopping_ends_the_run(tmp_path: Path) -> None:
    config = make_config(optim={"lr": 1e-30}, train={"epochs": 50}, eval={"every": 2}, guard={"patience": 3})
    run = Run(tmp_path, config)
    assert run.run() == "early_stopped"
    # a float32 uniform model does not move: the first evaluation is the best, three more are not
    assert run.trainer.progress.step == 8
    assert run.trainer.stopping.best_step == 2


@pytest.mark.parametrize("stop_at", range(1, 16))
def test_interrupted_anywhere_and_resumed_leaves_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    config = make_config(guard={"patience": 2})
    whole = Run(tmp_path / "whole", config)
    status = whole.run()
    first = Run(tmp_path / "parts", config, stop_at=stop_at)
    assert first.run() == "interrupted"
    second = Run(tmp_path / "parts", config)
    assert second.run() == status
    assert_same(whole, second)


@pytest.mark.parametrize("killed_at", range(4, 16))
def test_killed_after_a_checkpoint_and_resumed_leaves_the_same_bits(tmp_path: Path, killed_at: int) -> None:
    config = make_config()
    whole = Run(tmp_path / "whole", config)
    whole.run()

    class Killed(FakeLearner):
        def train_step(self, microbatches: Any, *, step: int, lr: float) -> Any:
            if step == killed_at:
                raise SystemError("killed")
            return super().train_step(microbatches, step=step, lr=lr)

    with pytest.raises(SystemError):
        Run(tmp_path / "parts", config, learner=Killed()).run()
    second = Run(tmp_path / "parts", config)
    assert second.checkpoint is not None and second.checkpoint.step < killed_at
    second.run()
    assert_same(whole, second)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path: Path) -> None:
    config = make_config()
    whole = Run(tmp_path / "whole", config)
    whole.run()
    Run(tmp_path / "parts", config, stop_at=11).run()
    newest = max((tmp_path / "parts" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("step")[1]))
    (newest / "optimizer.safetensors").write_bytes(b"damaged")
    second = Run(tmp_path / "parts", config)
    assert second.checkpoint is not None and second.checkpoint.step == 10
    second.run()
    assert_same(whole, second)


def assert_same(one: Run, other: Run) -> None:
    assert np.array_equal(one.learner.logits, other.learner.logits)
    assert np.array_equal(one.learner.momentum, other.learner.momentum)
    assert one.records() == other.records()
    assert one.trainer.stopping == other.trainer.stopping
    assert one.trainer.progress.num_target_tokens == other.trainer.progress.num_target_tokens
    left, right = ({p.name: p.read_bytes() for p in (run.folder / ROW_LOSSES).iterdir()} for run in (one, other))
    assert left == right


def test_a_nan_stops_names_the_rows_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(log={"every": 6}), learner=FakeLearner(fail_at=5))
    with pytest.raises(NonFiniteLossError, match=r"step 5: the loss became nan on rows fake:\d+") as caught:
        run.run()
    assert caught.value.hint is not None and "--lr 0.1" in caught.value.hint
    rows = {int(name.split(":")[1]) for name in caught.value.what.split("on rows ")[1].split(", ")}
    assert rows == set(run.learner.seen[2 * 6 * 2 - 4 - 4 : 24]) or rows <= set(range(20))
    latest = run.checkpointer.latest()
    assert latest is not None and latest.step == 3
    assert all(record["step"] < 5 for record in run.records())


def test_a_checkpoint_is_never_taken_of_contaminated_weights(tmp_path: Path) -> None:
    config = make_config(log={"every": 100}, eval={"every": 100}, checkpoint={"every": 3})
    run = Run(tmp_path, config, learner=FakeLearner(fail_at=6))
    with pytest.raises(NonFiniteLossError, match="step 6"):
        run.run()
    assert run.checkpointer.steps() == [3]


def test_resuming_does_not_need_the_files_that_a_checkpoint_does_not_hold(tmp_path: Path) -> None:
    config = make_config()
    Run(tmp_path / "parts", config, stop_at=7).run()
    shutil.rmtree(tmp_path / "parts" / ROW_LOSSES)
    second = Run(tmp_path / "parts", config)
    assert second.run() == "finished"


def mixture(folder: Path, *, stop_at: int | None = None) -> Run:
    return Run(folder, make_config(), learner=FakeLearner(routes=True), stop_at=stop_at)


def test_routing_is_in_the_records_of_evaluations(tmp_path: Path) -> None:
    run = mixture(tmp_path / "run")
    run.run()
    found = {record["step"]: record["routing"] for record in run.records() if "routing" in record}
    assert list(found) == [0, 5, 10, 15, 16]
    tokens = sum(batch.num_real_tokens for batch in FakeData().validation)
    assert found[0]["moved_max"] == 0.0
    assert found[10]["moved_max"] == pytest.approx(2 * 10 / (2 * tokens))
    assert found[10]["moved_max_layer"] == 0
    assert found[10]["entropy_min"] == pytest.approx(0.5)  # two of four, used alike
    assert found[10]["entropy_min_layer"] == 1
    assert found[10]["shares"][1] == [0.5, 0.5, 0.0, 0.0]
    assert run.screen.routings == [0, 5, 10, 15, 16]
    best = run.trainer.stopping.best_step
    kept = {name: value for name, value in found[best].items() if name not in ("shares", "collapsed")}
    assert run.trainer.progress.best_routing == {**kept, "collapse": None}


def test_aux_loss_is_the_mean_over_the_windows_tokens(tmp_path: Path) -> None:
    run = mixture(tmp_path / "run")
    run.run()
    record = next(record for record in run.records() if record["step"] == 4)
    data, config = FakeData(), make_config()
    size = config.train.accumulation
    tokens = [sum(b.num_real_tokens for b in data.epoch(0)[i : i + size]) for i in range(0, 8, size)]
    weighted = sum(count * (step + count) for step, count in enumerate(tokens, start=1))
    assert record["aux_loss"] == pytest.approx(weighted / sum(tokens))
    assert "aux_loss" not in run.records()[0]


@pytest.mark.parametrize("stop_at", [2, 7, 15])
def test_a_resumed_mixture_still_knows_its_first_routing(tmp_path: Path, stop_at: int) -> None:
    whole = mixture(tmp_path / "whole")
    whole.run()
    mixture(tmp_path / "parts", stop_at=stop_at).run()
    resumed = mixture(tmp_path / "parts")
    resumed.run()
    assert resumed.records() == whole.records()
    assert resumed.trainer.progress.base_routing == whole.trainer.progress.base_routing
    assert resumed.trainer.progress.best_routing == whole.trainer.progress.best_routing


def test_a_dense_model_has_no_such_fields(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", make_config())
    run.run()
    assert not [record for record in run.records() if {"routing", "aux_loss"} & record.keys()]
    assert run.trainer.progress.best_routing is None
