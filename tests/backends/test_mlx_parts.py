"""The MLX backend's parts: rows on several cores, without padding, a shared start once. Nothing may change a result."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core import portions
from core.protocols import FILLER_ROW, IGNORE, Batch, Prefix
from tests.backends.conftest import LR, assert_same_state, make_batch, microbatches, missing_package, open_learner
from tests.backends.test_mlx_models import make_folder
from tests.backends.test_prefix import stored
from tests.tiny import PAD_ID, make_model

if missing := missing_package("mlx"):
    pytest.skip(f"mlx: {missing} is not installed", allow_module_level=True)

from backends.mlx import absent_layers, cores, layers, parts
from backends.mlx import learner as learner_module
from backends.mlx import model as model_module
from backends.mlx.learner import MlxLearner
from backends.mlx.loss import cpu_chunk
from backends.mlx.model import Network
from backends.mlx.packing import Layout, pack
from core.prefix import rows_of

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral"},
    "window": {"model_type": "mistral", "sliding_window": 5},
}
"""Settings of `make_model`; the window is shorter than a shared start."""

SGD = {"name": "sgd", "momentum": 0.5}
"""AdamW would make a difference of rounding in a gradient near zero as large as a step."""


@pytest.fixture(scope="session")
def backend() -> str:
    return "mlx"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    return {name: make_model(root / name, num_layers=3, **settings) for name, settings in MODELS.items()}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, opened: Callable[..., MlxLearner]) -> Callable[..., MlxLearner]:
    """Opens a learner that does it mlx-lm's way: padded rows through mlx-lm's own layers, whole rows of logits, on one
    stream."""

    def open_plain(*args: Any, **kwargs: Any) -> MlxLearner:
        with monkeypatch.context() as patch:
            patch.setattr(Network, "packs", False)
            learner = opened(*args, **kwargs)
        learner.network.__class__ = type("Plain", (Network,), {"packs": False, "vocabulary": None})
        return learner

    return open_plain


def with_start(batch: Batch, length: int) -> Batch:
    """All rows begin with the first row's tokens, none of which is a target."""
    inputs, targets = batch.inputs.copy(), batch.targets.copy()
    inputs[:, :length] = inputs[0, :length]
    targets[:, :length] = IGNORE
    return replace(batch, inputs=inputs, targets=targets)


def with_filler(batch: Batch) -> Batch:
    width = batch.inputs.shape[1]
    return Batch(
        np.append(FILLER_ROW, batch.row_ids),
        np.vstack([np.full((1, width), PAD_ID, np.int32), batch.inputs]),
        np.vstack([np.full((1, width), IGNORE, np.int32), batch.targets]),
    )


def unlike(batch: Batch) -> Batch:
    inputs = batch.inputs.copy()
    inputs[:, 0] = np.arange(10, 10 + len(inputs))
    return replace(batch, inputs=inputs)


BATCHES: dict[str, Callable[[], list[Batch]]] = {
    "start": lambda: [with_start(make_batch((21, 14, 12, 17)), 9)],
    "fillers": lambda: [with_filler(with_start(make_batch((14, 12, 16), width=20), 8))],
    "one row": lambda: [make_batch((13,), width=16)],
    "no start": lambda: [unlike(make_batch((15, 6, 9)))],
    "several": lambda: [with_start(make_batch((18, 14), seed=4), 8), with_filler(unlike(make_batch((9, 13, 8))))],
}


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", list(BATCHES))
def test_nothing_changes_a_result(models: dict[str, Path], opened: Any, plain: Any, kind: str, name: str) -> None:
    one, two = plain(models[kind], optim=SGD), opened(models[kind], optim=SGD)
    compare(one, two, BATCHES[name]())


@pytest.mark.parametrize("settings", [{"model": {"bits": 4}}, {"lora": {"frozen_fraction": 0.4}}])
def test_nor_in_four_bits_or_with_frozen_layers(
    models: dict[str, Path], opened: Any, plain: Any, settings: dict[str, Any]
) -> None:
    one, two = (each(models["llama"], optim=SGD, **settings) for each in (plain, opened))
    compare(one, two, BATCHES["start"]())


def compare(one: MlxLearner, two: MlxLearner, batches: list[Batch]) -> None:
    """Losses, gradients (their norm, and the momentum) and everything that evaluates."""
    before, after = one.evaluate(batches), two.evaluate(batches)
    np.testing.assert_array_equal(after.row_ids, before.row_ids)
    np.testing.assert_array_equal(after.num_targets, before.num_targets)
    np.testing.assert_allclose(after.nll, before.nll, rtol=1e-6)
    np.testing.assert_array_equal(two.replay(batches).greedy, one.replay(batches).greedy)
    for batch in batches:
        np.testing.assert_allclose(two.target_logits(batch), one.target_logits(batch), rtol=1e-4, atol=1e-6)
    for step in (1, 2):
        expected = one.train_step(batches, step=step, lr=LR)
        found = two.train_step(batches, step=step, lr=LR)
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-6)
        assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=2e-6)
    moments, others = one.export_state().optimizer, two.export_state().optimizer
    for key, array in moments.items():
        wide = array.astype(np.float64)
        np.testing.assert_allclose(others[key].astype(np.float64), wide, rtol=0, atol=1e-5 * np.abs(wide).max())


def test_where_shapes_are_compiled_the_start_is_apart_too(
    models: dict[str, Path], opened: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Metal: padded rows, and a start whose length is a multiple of 16."""
    init = MlxLearner.__init__
    layouts: list[Layout] = []
    one = plain(models["llama"], optim=SGD)
    monkeypatch.setattr(
        MlxLearner, "__init__", lambda self, *args, **kwargs: init(self, *args, **{**kwargs, "compiled": True})
    )
    monkeypatch.setattr(mx, "compile", lambda function: function)
    run = layers.run_packed

    def noting(layer: Any, hidden: mx.array, common: layers.Common) -> mx.array:
        layouts.append(common.layout)
        return run(layer, hidden, common)

    monkeypatch.setattr(model_module, "run_packed", noting)
    two = opened(models["llama"], optim=SGD)
    batch = with_filler(with_start(make_batch((30, 28, 25), width=32), 21))
    compare(one, two, [batch])
    assert set(layouts) == {(16, ((4, 16),))}


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions that went into a layer, for each time that one was run."""
    found: list[int] = []
    run = layers.run_packed

    def counting(layer: Any, hidden: mx.array, **kwargs: Any) -> mx.array:
        found.append(hidden.shape[0])
        return run(layer, hidden, **kwargs)

    monkeypatch.setattr(model_module, "run_packed", counting)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_start_is_computed_once_and_padding_not_at_all(
    models: dict[str, Path], opened: Any, monkeypatch: pytest.MonkeyPatch, entered: list[int], dropout: float
) -> None:
    """Rows of 21, 14, 12 and 17 with 9 in common: 64 - 27 positions on one core; in two parts, 64 - 18."""
    batch = with_start(make_batch((21, 14, 12, 17)), 9)
    for num_streams, positions in ((1, [37]), (2, [24, 22])):
        monkeypatch.setattr("backends.mlx.learner.num_streams", lambda n=num_streams: n)
        learner = opened(models["llama"], lora={"dropout": dropout})
        entered.clear()
        learner.train_step([batch], step=1, lr=LR)
        assert sorted(entered, reverse=True) == [n for n in positions for _ in range(3)]
        entered.clear()
        learner.evaluate([batch])
        assert sum(entered) == 3 * sum(positions)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_has_the_same_bits(models: dict[str, Path], opened: Any, dropout: float) -> None:
    steps = [[with_start(batch, 3) for batch in microbatches(step)] for step in (1, 2, 3, 4)]
    whole, first, second = (opened(models["llama"], lora={"dropout": dropout}) for _ in range(3))
    for step, batches in enumerate(steps, start=1):
        whole.train_step(batches, step=step, lr=LR)
        if step == 3:
            second.import_state(first.export_state())
        (first if step < 3 else second).train_step(batches, step=step, lr=LR)
    assert_same_state(second.export_state(), whole.export_state())


def test_states_have_the_same_bits_on_any_number_of_cores(
    models: dict[str, Path], opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(make_batch((16, 9, 3, 12, 5)))
    found = []
    for count in (1, 3):
        monkeypatch.setattr("backends.mlx.absent_layers.num_streams", lambda count=count: count)
        found.append(list(opened(models["llama"], lora={"frozen_fraction": 0.7}).prefixes(rows)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.states, other.states)


# --- how a batch is laid out


def test_packing_by_hand() -> None:
    inputs = np.array([[7, 7, 7, 7], [1, 2, 3, 0], [1, 2, 4, 5]], np.int32)
    targets = np.array([[IGNORE] * 4, [IGNORE, IGNORE, 9, IGNORE], [IGNORE, IGNORE, 5, 6]], np.int32)
    batch = Batch(np.array([FILLER_ROW, 3, 5]), inputs, targets)
    packed = pack(batch, by_row=True, share=True)
    assert packed.layout == (2, ((1, 1), (1, 2)))
    assert packed.entering.tolist() == [1, 2, 3, 4, 5]
    assert packed.targets.tolist() == [IGNORE, IGNORE, 9, 5, 6]
    assert packed.row.tolist() == [1, 1, 1, 2, 2]
    apart = pack(batch, by_row=True, share=False)
    assert apart.layout == (0, ((1, 3), (1, 4)))
    assert apart.entering.tolist() == [1, 2, 3, 1, 2, 4, 5]
    padded = pack(batch, by_row=False, share=True)  # a start of 2 is below 16
    assert padded.layout == (0, ((3, 4),))
    assert padded.entering.tolist() == inputs.ravel().tolist()


def test_a_start_that_spares_little_is_not_taken_apart() -> None:
    batch = with_start(make_batch((40, 40)), 4)
    assert batch.num_shared == 4
    assert pack(batch, by_row=True, share=True).layout[0] == 4  # 4 of 80 positions: a twentieth
    batch = with_start(make_batch((45, 40)), 4)
    assert pack(batch, by_row=True, share=True).layout[0] == 0


def test_an_evaluation_takes_batches_together_in_even_parts(models: dict[str, Path], opened: Any) -> None:
    """Rows of 9, 7, 8 and 4, then 9 and 7, and then as many batches as are left."""
    network = opened(models["llama"]).network
    cutter = parts.Cutter(network, compiled=False, num_streams=2)
    batches = [make_batch((9, 7)), make_batch((8, 4), first_row=2), make_batch((6, 5), first_row=4)]
    found = [
        (batch.row_ids.tolist(), sorted([length for _, length in part.layout[1]] for part in some if part.layout))
        for batch, some in cutter.for_evaluation(batches)
    ]
    assert found == [([0, 1, 2, 3], [[7, 8], [9, 4]]), ([4, 5], [[5], [6]])]


def test_batches_of_two_kinds_stay_apart(models: dict[str, Path], opened: Any) -> None:
    one, two = make_batch((9, 7), width=11), make_batch((5,), first_row=2)
    two = replace(two, prefix=Prefix(np.zeros((*two.inputs.shape, 4), np.float32)))
    cutter = parts.Cutter(opened(models["llama"]).network, compiled=False, num_streams=2)
    mixed = [batch for batch, _ in cutter.for_evaluation([one, two])]
    assert mixed[0] is one
    assert mixed[1] is two


def test_more_cores_train_no_more_rows_at_once(
    models: dict[str, Path], opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.mlx.learner.num_streams", lambda: 4)
    counts: list[int] = []

    def noting(*args: Any, count: int, **kwargs: Any) -> Any:
        counts.append(count)
        return cores.on_streams(*args, count=count, **kwargs)

    monkeypatch.setattr("backends.mlx.learner.on_streams", noting)
    learner = opened(models["llama"])
    learner.train_step([make_batch((9, 7, 8)), make_batch((6,)), make_batch((5, 5))], step=1, lr=LR)
    learner.train_step([make_batch((9,), first_row=n) for n in range(4)], step=2, lr=LR)
    assert counts == [3, 2]


@pytest.mark.parametrize("name", ["theta-old", "llama3-new", "yarn"])
def test_what_all_layers_take_is_made_once(
    tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made: list[str] = []
    for function in ("_rotation", "_mask"):
        original = getattr(layers, function)
        monkeypatch.setattr(
            layers, function, lambda *args, f=function, o=original, **kwargs: made.append(f) or o(*args, **kwargs)
        )
    monkeypatch.setattr("backends.mlx.learner.num_streams", lambda: 1)
    learner = opened(make_folder(tmp_path / name, name))
    learner.evaluate([with_start(make_batch((21, 14, 12, 14)), 9)])
    assert sorted(made) == ["_mask"] * 4 + ["_rotation"]  # the start, and rows of three lengths


# --- several cores


def fail(*_: Any) -> Any:
    raise ZeroDivisionError


def test_an_error_between_two_results_gives_blas_its_cores_back(
    models: dict[str, Path], opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    @contextlib.contextmanager
    def noting(count: int) -> Iterator[None]:
        held.append(count)
        try:
            yield
        finally:
            held.pop()

    monkeypatch.setattr(cores, "blas_threads", noting)
    monkeypatch.setattr("backends.mlx.learner.num_streams", lambda: 2)
    learner = opened(models["llama"], lora={"frozen_fraction": 0.4})
    batches = [make_batch((9, 7)), make_batch((8, 6))]
    uses: list[tuple[str, Callable[[], object]]] = [
        ("summed_by_row", lambda: learner.evaluate(batches)),
        ("to_prefix", lambda: list(learner.prefixes(rows_of(batches[0])))),
        ("_added", lambda: learner.train_step(batches, step=1, lr=LR)),
    ]
    for name, use in uses:
        monkeypatch.setattr(learner_module, name, fail)
        try:
            use()
        except ZeroDivisionError:
            assert not held  # here, while the traceback still has the generator
        else:
            pytest.fail("no error")


def test_stored_bfloat16_states_reach_the_other_streams(
    models: dict[str, Path], opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.mlx.learner.num_streams", lambda: 2)
    half = {"model": {"dtype": "bfloat16"}, "lora": {"frozen_fraction": 0.4}, "optim": SGD}
    plain, other = opened(models["llama"], **half), opened(models["llama"], **half)
    batch = with_start(make_batch((21, 14, 12, 17)), 9)
    fast, _ = stored(other, [batch])
    one, two = plain.train_step([batch], step=1, lr=LR), fast.train_step([batch], step=1, lr=LR)
    assert float(two.loss) == pytest.approx(float(one.loss), rel=1e-2)
    assert float(two.grad_norm) == pytest.approx(float(one.grad_norm), rel=5e-2)
    np.testing.assert_allclose(fast.evaluate([batch]).nll, plain.evaluate([batch]).nll, rtol=1e-2)


def test_streamed_layers_in_portions_have_the_same_bits(
    models: dict[str, Path], opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    compute = absent_layers._gradients_together

    def noting(network: Network, parameters: Any, some: Any) -> Any:
        together.append(len(some))
        return compute(network, parameters, some)

    monkeypatch.setattr(absent_layers, "_gradients_together", noting)
    monkeypatch.setattr("backends.mlx.learner.num_streams", lambda: 2)
    batches, found = [make_batch((9, 7)), make_batch((8, 6)), make_batch((5,))], []
    for num_bytes in (portions.PORTION_BYTES, 20 * 64 * 4 * 3, 1):  # positions, hidden size, float32, layers
        monkeypatch.setattr(portions, "PORTION_BYTES", num_bytes)
        learner = opened(models["llama"], model={"stream_layers": True})
        learner.train_step(batches, step=1, lr=LR)
        found.append(learner.export_state())
    assert together == [5, 2, 3, 1, 1, 1, 1, 1]
    for other in found[1:]:
        assert_same_state(other, found[0])


def test_closed_it_lets_go_of_the_model(models: dict[str, Path]) -> None:
    learner: Any = open_learner("mlx", models["llama"])
    learner.train_step([make_batch((9, 7))], step=1, lr=LR)
    module = weakref.ref(learner.network.module)
    learner.close()
    assert module() is None
    learner.close()


# --- what is not plain


def test_a_nan_shows(models: dict[str, Path], opened: Any) -> None:
    learner = opened(models["llama"])
    state, batch = learner.export_state(), make_batch((9, 7, 8))
    name = next(name for name in state.adapter if name.endswith("lora_B"))
    state.adapter[name][0, 0] = np.nan
    learner.import_state(state)
    assert not np.isfinite(learner.evaluate([batch]).nll).any()
    out = learner.train_step([batch], step=1, lr=LR)
    assert not np.isfinite(float(out.loss))
    assert not np.isfinite(float(out.grad_norm))


@pytest.mark.parametrize("num_streams", [1, 2, 4])
def test_a_batch_without_targets_in_an_evaluation(
    models: dict[str, Path], opened: Any, monkeypatch: pytest.MonkeyPatch, num_streams: int
) -> None:
    monkeypatch.setattr("backends.mlx.learner.num_streams", lambda: num_streams)
    learner = opened(models["llama"])
    some, other = make_batch((9, 7)), make_batch((8, 6), first_row=2)
    none = replace(other, targets=np.full_like(other.targets, IGNORE))
    found, expected = learner.evaluate([none, some, none]), learner.evaluate([some])
    assert found.row_ids.tolist() == [2, 3, 0, 1, 2, 3]
    assert found.num_targets.tolist() == [0, 0, 6, 5, 0, 0]
    np.testing.assert_allclose(found.nll, [0, 0, *expected.nll, 0, 0], rtol=1e-6)
    assert learner.evaluate([none]).nll.tolist() == [0, 0]


def test_attention_with_biases(tmp_path: Path, opened: Any, plain: Any) -> None:
    folder = make_model(tmp_path / "biased", num_layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if "self_attn" in name]:
        bias = rng.normal(0, 0.3, len(tensors[name])).astype(np.float32)
        tensors[name.replace(".weight", ".bias")] = bias
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    one, two = plain(folder, optim=SGD), opened(folder, optim=SGD)
    assert two.network.packs
    compare(one, two, BATCHES["start"]())


@pytest.mark.parametrize("change", ["q_norm", "use_sliding"])
def test_what_a_layer_has_beside_the_plain_parts_is_not_left_out(
    models: dict[str, Path], opened: Any, change: str
) -> None:
    network = opened(models["llama"]).network
    layer = network.module.layers[0]
    assert network.packs and layers.is_plain(layer)
    if change == "use_sliding":
        layer.use_sliding = True
    else:
        layer.self_attn.q_norm = nn.RMSNorm(16)
    assert not layers.is_plain(layer)


def test_a_large_vocabularys_logits_come_in_smaller_chunks() -> None:
    # 32 MB hold 65 positions of 128,256 float32, 170 of 49,152
    assert [cpu_chunk(size) for size in (1_000, 49_152, 128_256, 2_000_000)] == [128, 128, 64, 16]
