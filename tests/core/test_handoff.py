"""A saved adapter that does nothing, or something else than the trained one, is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.adapter import Adapter, LoraModule
from core.adapter_files import MLX_WEIGHTS, PEFT_WEIGHTS, read_saved, write_adapter
from core.handoff import NUM_BATCHES, HandoffReport, check_rows, check_saved, without_effect
from core.protocols import IGNORE, Batch, RowLosses, TrainState
from tests.fakes import NAME, VOCAB, FakeData, FakeLearner

MODULE = NAME.rsplit(".", 1)[0]
T = TypeVar("T")


class LoraLearner(FakeLearner):
    """A fake whose logits are a real `scale * B @ A`: 0 for a B of zeros."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def import_state(self, state: TrainState) -> None:
        product = state.adapter[f"{MODULE}.lora_B"] @ state.adapter[f"{MODULE}.lora_A"]
        self.logits = np.asarray(self.scale * product, np.float32)


def make_adapter(*, alpha: float = 8.0) -> Adapter:
    rng = np.random.default_rng(0)
    tensors = {
        f"{MODULE}.lora_A": rng.normal(size=(2, VOCAB)).astype(np.float32),
        f"{MODULE}.lora_B": rng.normal(size=(1, 2)).astype(np.float32),
    }
    return Adapter(modules={MODULE: LoraModule(2, alpha)}, tensors=tensors, num_layers=1)


@dataclasses.dataclass
class Setting:
    """A trained adapter, its learner, and what was measured in training."""

    folder: Path
    adapter: Adapter
    learner: LoraLearner
    batches: list[Batch]
    trained: RowLosses

    def check(self) -> HandoffReport:
        return check_saved(
            self.folder,
            self.adapter,
            learner=self.learner,
            batches=self.batches,
            trained=self.trained,
        )


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    adapter = make_adapter()
    data = FakeData(num_rows=30, batch_size=3)
    batches = list(data.epoch(0))
    learner = LoraLearner(adapter.scale_of(MODULE))
    learner.import_state(TrainState(adapter.tensors, {}))
    trained = learner.evaluate(batches)
    write_adapter(tmp_path, adapter, base_model="base")
    return Setting(tmp_path, adapter, learner, batches, trained)


def counted(method: Callable[[Iterable[Batch]], T], seen: list[int]) -> Callable[[Iterable[Batch]], T]:
    """The same method, which also adds to `seen` how many batches it was given."""

    def watched(batches: Iterable[Batch]) -> T:
        chosen = list(batches)
        seen.append(len(chosen))
        return method(chosen)

    return watched


def test_a_good_adapter_is_the_same_and_moves_the_output(setting: Setting) -> None:
    report = setting.check()
    assert report.problem() is None
    assert report.max_difference < 1e-12  # summed in another order
    assert report.num_rows == 3 * NUM_BATCHES
    assert report.greedy_agreement == 1.0
    rows = slice(0, report.num_rows)
    assert report.num_targets == setting.trained.num_targets[rows].sum()
    expected = setting.trained.nll[rows].sum() / report.num_targets
    assert report.source_loss == report.target_loss == pytest.approx(expected)
    # the effect is the largest change of a target's loss: its logit against those of a B of zeros, which are equal
    logits = (4.0 * setting.adapter.tensors[f"{MODULE}.lora_B"] @ setting.adapter.tensors[NAME])[0].astype(np.float64)
    losses = np.log(np.exp(logits).sum()) - logits
    seen = {int(t) for batch in setting.batches[:NUM_BATCHES] for t in batch.targets.flat if t != IGNORE}
    assert report.max_effect == pytest.approx(max(abs(losses[t] - np.log(VOCAB)) for t in seen), rel=1e-5)


def test_only_the_first_batches_are_replayed(setting: Setting) -> None:
    seen: list[int] = []
    setting.learner.replay = counted(setting.learner.replay, seen)  # type: ignore[method-assign]
    setting.check()
    assert seen == [NUM_BATCHES] * 3  # as trained, as saved, and the base


def test_what_was_measured_before_is_not_measured_again(setting: Setting) -> None:
    """With the losses of training and of the base model known, the saved adapter alone is run."""
    setting.learner.import_state(TrainState(without_effect(setting.adapter).tensors, {}))
    base = setting.learner.evaluate(setting.batches)
    known: dict[str, Any] = {"learner": setting.learner, "batches": setting.batches, "trained": setting.trained}
    runs: list[int] = []
    setting.learner.evaluate = counted(setting.learner.evaluate, runs)  # type: ignore[method-assign]
    report = check_saved(setting.folder, setting.adapter, **known, base=base)
    assert runs == [NUM_BATCHES]
    assert report.problem() is None and report.max_effect > 0.1
    zeros = {n: t * 0 if n.endswith("lora_B") else t for n, t in setting.adapter.tensors.items()}
    write_adapter(setting.folder, setting.adapter.with_tensors(zeros), base_model="base")
    lost = check_saved(setting.folder, setting.adapter, **known, base=base)
    assert lost.problem() == "the adapter does not change the output of the base model"


def test_an_adapter_that_does_nothing_is_found(setting: Setting) -> None:
    zeros = {n: t * 0 if n.endswith("lora_B") else t for n, t in setting.adapter.tensors.items()}
    write_adapter(setting.folder, setting.adapter.with_tensors(zeros), base_model="base")
    report = setting.check()
    assert not report.moves_output
    assert report.problem() == "the adapter does not change the output of the base model"


def test_a_wrong_scale_is_found(setting: Setting) -> None:
    setting.learner.scale /= 2  # as if alpha had been divided by the rank twice
    report = setting.check()
    assert report.moves_output
    assert not report.is_same
    assert f"{report.max_difference:.2g} nats" in (report.problem() or "")


def test_a_single_changed_value_is_found(setting: Setting) -> None:
    tensors = {name: tensor.copy() for name, tensor in setting.adapter.tensors.items()}
    tensors[NAME][0, 15] += 0.5
    write_adapter(setting.folder, setting.adapter.with_tensors(tensors), base_model="base")
    assert not setting.check().is_same


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_numbers_are_a_problem(value: float) -> None:
    for effect in (1.0, value):
        report = HandoffReport(
            num_rows=1,
            num_targets=1,
            source_loss=1.0,
            target_loss=value,
            max_difference=value,
            greedy_agreement=1.0,
            max_effect=effect,
        )
        assert report.problem() is not None


def test_one_report_for_both_kinds_of_check(setting: Setting) -> None:
    """Rows held against losses from elsewhere: the same numbers as a replay, without the tokens."""
    report = check_rows(setting.learner, setting.adapter, setting.batches, setting.trained)
    whole = setting.check()
    assert report.greedy_agreement is None and report.problem() is None
    assert (report.num_rows, report.num_targets) == (whole.num_rows, whole.num_targets)
    assert report.target_loss == pytest.approx(whole.target_loss) and report.max_difference == 0.0
    assert 0.0 < report.max_effect <= whole.max_effect, "a row's mean moves no more than its targets"
    setting.learner.scale *= 2
    report = check_rows(setting.learner, setting.adapter, setting.batches, setting.trained)
    assert "a row's loss differs by" in (report.problem() or "") and report.problem(exact=False) is None


def test_a_first_adapter_may_leave_the_base_model_alone(setting: Setting) -> None:
    first = without_effect(setting.adapter)
    setting.learner.import_state(TrainState(first.tensors, {}))
    measured = setting.learner.evaluate(setting.batches)
    report = check_rows(setting.learner, first, setting.batches, measured)
    assert not report.moves_output and not report.does_nothing and report.problem() is None
    setting.learner.scale = 0.0
    assert check_rows(setting.learner, setting.adapter, setting.batches, measured).does_nothing


def test_rows_are_compared_by_their_number_not_their_place(setting: Setting) -> None:
    """Validation batches may come in another order than the losses that were measured."""
    order = np.random.default_rng(0).permutation(len(setting.trained.nll))
    losses = setting.trained
    setting.trained = RowLosses(losses.row_ids[order], losses.nll[order], losses.num_targets[order])
    assert setting.check().max_difference < 1e-12


def _drop(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return dict(list(tensors.items())[1:])


def _rename(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {name.replace("layers.0", "layers.1"): tensor for name, tensor in tensors.items()}


def _change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {name: tensor + 1 for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        (PEFT_WEIGHTS, _drop),
        (PEFT_WEIGHTS, _rename),
        (PEFT_WEIGHTS, _change),
        (MLX_WEIGHTS, _drop),
        (MLX_WEIGHTS, _rename),
        (MLX_WEIGHTS, _change),
    ],
)
def test_files_that_disagree_are_a_bug_of_ours(setting: Setting, file: str, spoil: object) -> None:
    assert callable(spoil)
    path = setting.folder / file
    save_file(spoil(load_file(path)), path)
    with pytest.raises(AssertionError):
        read_saved(setting.folder, setting.adapter)


def test_what_is_read_is_what_was_saved(setting: Setting) -> None:
    saved = read_saved(setting.folder, setting.adapter)
    for name, tensor in setting.adapter.tensors.items():
        np.testing.assert_array_equal(saved.tensors[name], tensor)
    assert saved.scale_of(MODULE) == setting.adapter.scale_of(MODULE) == 4.0
