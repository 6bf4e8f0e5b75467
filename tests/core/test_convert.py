"""A conversion is only kept when the logits of every end agree; each way to differ is found and leaves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from core.adapter import Adapter, plan_adapter
from core.adapter_files import AdapterFolder, Form, find_adapter, write_adapter
from core.architecture import Architecture, read_architecture
from core.config import LoraConfig
from core.convert import Bench, Conversion, PeerLogits, convert, summary, unproven
from core.errors import UserError
from core.protocols import IGNORE, Batch
from tests.tiny import make_model

ROWS, WIDTH, VOCAB = 2, 5, 7
TARGETS = np.array([[1, 2, 3, IGNORE, IGNORE], [4, 5, 6, 1, 2]], np.int32)
BATCH = Batch(np.arange(ROWS), np.ones((ROWS, WIDTH), np.int32), TARGETS)
RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(8, VOCAB)).astype(np.float32)
EFFECT = RNG.normal(size=(8, VOCAB)).astype(np.float32)

Change = Callable[[Form], PeerLogits]


class Setting:
    """An adapter folder in PEFT's form, and libraries whose logits a test makes up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.architecture: Architecture = read_architecture(make_model(folder / "model"))
        adapter = plan_adapter(LoraConfig(rank=2, alpha=4), self.architecture, seed=0)
        rng = np.random.default_rng(1)
        self.adapter: Adapter = adapter.with_tensors(
            {name: rng.normal(size=tensor.shape).astype(np.float32) for name, tensor in adapter.tensors.items()}
        )
        write_adapter(folder / "given", self.adapter, base_model="tiny", forms=("peft",))
        self.source: AdapterFolder = find_adapter(folder / "given")

    def convert(self, logits: Change, **bench: object) -> tuple[Conversion, Bench]:
        def run(form: Form, folders: Sequence[Path]) -> list[PeerLogits]:
            assert all(folder.is_dir() for folder in folders)
            return [logits(form) for _ in folders]

        on = Bench(**{"batches": [BATCH], "dtype": "float32", "left_out": {}, "run": run, **bench})  # type: ignore[arg-type]
        out = self.folder / "written"
        more = {"base_model": "tiny", "architecture": self.architecture, "bench": on}
        return convert(self.source, self.adapter, out, to="mlx", **more), on  # type: ignore[arg-type]

    def refused(self, logits: Change, words: str) -> None:
        with pytest.raises(UserError, match=words):
            self.convert(logits)
        assert sorted(path.name for path in self.folder.iterdir()) == ["given", "model"]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def library(base: np.ndarray = BASE, effect: np.ndarray = EFFECT) -> PeerLogits:
    return PeerLogits([base], [base + effect])


def test_equal_ends_are_kept_and_said(setting: Setting) -> None:
    done, bench = setting.convert(lambda form: library())
    assert [end.form for end in done.ends] == ["peft", "mlx"]
    assert done.ends[1].max_difference == 0.0
    assert done.ends[1].effect == pytest.approx(np.abs(EFFECT).max(), abs=1e-6)
    written = find_adapter(setting.folder / "written").read(setting.architecture)
    for name in setting.adapter.modules:
        a, b = setting.adapter.matrices(name)
        found_a, found_b = written.matrices(name)
        np.testing.assert_allclose(written.scale_of(name) * found_b @ found_a, 2.0 * b @ a, rtol=1e-5, atol=1e-5)
    text = "\n".join(summary(done, bench))
    assert "PEFT, given" in text
    assert "mlx-lm, written" in text
    assert "8 tokens of 2 rows" in text


def test_the_loss_it_says_is_the_cross_entropy(setting: Setting) -> None:
    done, _ = setting.convert(lambda form: library())
    logits = (BASE + EFFECT).astype(np.float64)
    chosen = logits[np.arange(8), TARGETS[TARGETS != IGNORE]]
    assert done.ends[0].report.target_loss == pytest.approx(np.mean(np.log(np.exp(logits).sum(1)) - chosen), abs=1e-6)


def test_an_adapter_that_does_nothing_at_one_end(setting: Setting) -> None:
    setting.refused(lambda form: library(effect=EFFECT * (form == "peft")), "mlx-lm loads it, and it does nothing")


def test_another_effect(setting: Setting) -> None:
    setting.refused(lambda form: library(effect=EFFECT * (1.0 if form == "peft" else 1.001)), "a logit differs by")


def test_a_weak_adapter_of_which_half_is_skipped(setting: Setting) -> None:
    """All of its effect is below the tolerance for logits."""
    half = np.where(np.arange(8)[:, None] < 4, EFFECT, 0.0).astype(np.float32)
    setting.refused(lambda form: library(effect=3e-5 * (EFFECT if form == "peft" else half)), "more or less than")


def test_libraries_that_read_the_base_differently(setting: Setting) -> None:
    setting.refused(lambda form: library(base=BASE + (form == "mlx")), "read the base model differently")


def test_logits_that_are_not_numbers(setting: Setting) -> None:
    setting.refused(lambda form: library(effect=EFFECT * (1.0 if form == "peft" else np.nan)), "not numbers")


def test_a_library_that_is_not_here_is_said(setting: Setting) -> None:
    done, bench = setting.convert(lambda form: library(), left_out={"mlx": "it is not installed here"})
    assert [end.form for end in done.ends] == ["peft"]
    assert unproven(done, bench) == ["not proven in mlx-lm: it is not installed here"]


def test_nothing_is_written_where_nothing_can_prove_it(setting: Setting) -> None:
    reasons = {"mlx": "it is not installed here", "peft": "the base model needs 94 GB, of 16 here"}
    with pytest.raises(UserError, match="nothing here can prove the conversion: mlx-lm: it is not installed"):
        setting.convert(lambda form: library(), left_out=reasons)
    assert not (setting.folder / "written").exists()


def test_a_folder_that_is_taken_stays(setting: Setting) -> None:
    (setting.folder / "written").mkdir()
    (setting.folder / "written" / "mine").touch()
    with pytest.raises(UserError, match="exists already"):
        setting.convert(lambda form: library())
    assert [path.name for path in (setting.folder / "written").iterdir()] == ["mine"]
