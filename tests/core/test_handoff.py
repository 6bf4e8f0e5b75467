"""A saved adapter that does nothing, or something else than the trained one, is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.adapter import Adapter
from core.adapter_files import MLX_WEIGHTS, PEFT_WEIGHTS, write_adapter
from core.handoff import NUM_BATCHES, HandoffReport, check_saved, read_saved
from core.protocols import Batch, RowLosses, TrainState
from tests.fakes import NAME, VOCAB, FakeData, FakeLearner

MODULE = NAME.rsplit(".", 1)[0]


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
    return Adapter(
        rank=2, alpha=alpha, dropout=0.0, rslora=False, num_layers=1, first_layer=0, modules=(MODULE,), tensors=tensors
    )


@dataclasses.dataclass
class Setting:
    """A trained adapter, its learner, and what was measured in training."""

    folder: Path
    adapter: Adapter
    learner: LoraLearner
    batches: list[Batch]
    trained: RowLosses
    base: RowLosses

    def check(self) -> HandoffReport:
        return check_saved(
            self.folder,
            self.adapter,
            learner=self.learner,
            batches=self.batches,
            trained=self.trained,
            base=self.base,
        )


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    adapter = make_adapter()
    data = FakeData(num_rows=30, batch_size=3)
    batches = list(data.epoch(0))
    learner = LoraLearner(adapter.scale)
    base = learner.evaluate(batches)
    learner.import_state(TrainState(adapter.tensors, {}))
    trained = learner.evaluate(batches)
    write_adapter(tmp_path, adapter, base_model="base")
    return Setting(tmp_path, adapter, learner, batches, trained, base)


def test_a_good_adapter_is_the_same_and_moves_the_output(setting: Setting) -> None:
    report = setting.check()
    assert report.problem is None
    assert report.max_difference == 0.0
    assert report.num_rows == 3 * NUM_BATCHES
    # the effect is the largest change of a row's mean loss, worked out anew
    rows = slice(0, report.num_rows)
    means = [losses.nll[rows] / losses.num_targets[rows] for losses in (setting.trained, setting.base)]
    assert report.max_effect == pytest.approx(np.abs(means[0] - means[1]).max())
    assert report.max_effect > 0.01


def test_only_the_first_batches_are_replayed(setting: Setting) -> None:
    seen: list[int] = []
    evaluate = setting.learner.evaluate

    def watched(batches: Iterable[Batch]) -> RowLosses:
        chosen = list(batches)
        seen.append(len(chosen))
        return evaluate(chosen)

    setting.learner.evaluate = watched  # type: ignore[method-assign]
    setting.check()
    assert seen == [NUM_BATCHES]


def test_an_adapter_that_does_nothing_is_found(setting: Setting) -> None:
    zeros = {n: t * 0 if n.endswith("lora_B") else t for n, t in setting.adapter.tensors.items()}
    write_adapter(setting.folder, setting.adapter.with_tensors(zeros), base_model="base")
    report = setting.check()
    assert not report.moves_output
    assert report.problem == "the saved adapter does not change the output of the base model"


def test_a_wrong_scale_is_found(setting: Setting) -> None:
    setting.learner.scale /= 2  # as if alpha had been divided by the rank twice
    report = setting.check()
    assert report.moves_output
    assert not report.is_same
    assert f"{report.max_difference:.2g} nats" in (report.problem or "")


def test_a_single_changed_value_is_found(setting: Setting) -> None:
    tensors = {name: tensor.copy() for name, tensor in setting.adapter.tensors.items()}
    tensors[NAME][0, 15] += 0.5
    write_adapter(setting.folder, setting.adapter.with_tensors(tensors), base_model="base")
    assert not setting.check().is_same


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_numbers_are_a_problem(value: float) -> None:
    assert HandoffReport(num_rows=1, max_difference=value, max_effect=1.0).problem is not None
    assert HandoffReport(num_rows=1, max_difference=value, max_effect=value).problem is not None


def test_rows_are_compared_by_their_number_not_their_place(setting: Setting) -> None:
    """Validation batches may come in another order than the losses that were measured."""
    order = np.random.default_rng(0).permutation(len(setting.trained.nll))
    for name in ("trained", "base"):
        losses: RowLosses = getattr(setting, name)
        shuffled = RowLosses(losses.row_ids[order], losses.nll[order], losses.num_targets[order])
        setattr(setting, name, shuffled)
    assert setting.check().max_difference == 0.0


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
    assert saved.scale == setting.adapter.scale == 4.0
