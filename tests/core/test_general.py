"""What was forgotten: divergence, flips and rises against values worked out by hand, in SciPy and in another order."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.config import RunConfig
from core.early_stopping import EarlyStopping
from core.general import (
    GeneralReport,
    GeneralStart,
    TargetScores,
    look_at_general,
    make_report,
    score_targets,
)
from core.progress import Progress
from core.protocols import FloatArray
from core.remeasure import remeasure
from core.verdict import verdict_lines
from core.workflow import general as workflow
from tests.fakes import FakeData, FakeLearner


@dataclass(frozen=True)
class Row:
    category: str
    prompt: str = "Why?"
    answer: str = "Because."


# --- target by target


def test_scores_by_hand() -> None:
    """Three tokens: base (1/2, 1/4, 1/4), adapter (1/4, 1/2, 1/4), and a second target where nothing moved."""
    base = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], np.float32))
    adapter = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]], np.float32)) + np.float32(
        3
    )  # logits, up to a constant
    found = score_targets(base, adapter, np.array([0, 2]))
    np.testing.assert_allclose(found.base_nll, [math.log(2), -math.log(0.6)], rtol=1e-6)
    np.testing.assert_allclose(found.adapter_nll, [math.log(4), -math.log(0.6)], rtol=1e-6)
    # 1/2 log 2 + 1/4 log 1/2 = 1/4 log 2
    np.testing.assert_allclose(found.kl, [math.log(2) / 4, 0.0], atol=1e-7)
    assert found.flipped.tolist() == [True, False]


def test_scores_agree_with_scipy_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.special import log_softmax, rel_entr

    rng = np.random.default_rng(0)
    base, adapter = (rng.normal(0, 4, (37, 50)).astype(np.float32) for _ in range(2))
    targets = rng.integers(50, size=37)
    whole = score_targets(base, adapter, targets)
    p, q = (np.exp(log_softmax(side.astype(np.float64), axis=1)) for side in (base, adapter))
    np.testing.assert_allclose(whole.kl, rel_entr(p, q).sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(whole.adapter_nll, -np.log(q[np.arange(37), targets]), rtol=1e-9)
    monkeypatch.setattr("core.general._BLOCK_BYTES", 8 * 50 * 4)
    for one, other in zip(asdict(whole).values(), asdict(score_targets(base, adapter, targets)).values(), strict=True):
        np.testing.assert_array_equal(one, other)


# --- the report

TEXTS = [Row("code", "Write a loop"), Row("facts"), Row("code")]
IDS = np.array([0, 0, 2, 1, 1, 1])
SCORES = TargetScores(
    base_nll=np.array([1.0, 2.0, 4.0, 1.0, 1.0, 1.0]),
    adapter_nll=np.array([2.0, 3.0, 3.0, 1.0, 1.0, 1.6]),
    kl=np.array([0.5, 0.1, 0.0, 0.0, 0.0, 0.6]),
    flipped=np.array([True, False, False, False, False, True]),
)


def test_report_by_hand() -> None:
    report = make_report(TEXTS, IDS, SCORES)
    assert (report.num_rows, report.num_targets) == (3, 6)
    assert report.base_loss == pytest.approx(10 / 6) and report.adapter_loss == pytest.approx(11.6 / 6)
    assert report.rise == pytest.approx(1.6 / 6) and report.kl == pytest.approx(0.2)
    assert report.flipped == pytest.approx(2 / 6)
    code = report.categories["code"]
    assert (code.num_rows, code.num_targets) == (2, 3)
    assert code.rise == pytest.approx(1 / 3) and code.flipped == pytest.approx(1 / 3)
    assert report.categories["facts"].rise == pytest.approx(0.2)
    # per token: row 0 rose by 1, row 1 by 0.2, row 2 fell
    assert [text.rise for text in report.worst] == pytest.approx([1.0, 0.2])
    assert report.worst[0].prompt == "Write a loop"
    assert report.rise_low < report.rise < report.rise_high and report.interval == (report.rise_low, report.rise_high)
    assert report.verdict == "unchanged"  # of three texts, one fell
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_interval_is_the_bootstraps() -> None:
    """Of rows of one target each, the mean's interval is what the normal distribution says, nearly."""
    rng = np.random.default_rng(1)
    rises = rng.normal(0.5, 1.0, 400)
    ones = np.ones(400)
    scores = TargetScores(ones, ones + rises, np.zeros(400), np.zeros(400, np.bool_))
    report = make_report([Row("facts")] * 400, np.arange(400), scores, confidence=0.9)
    half = 1.645 * rises.std() / 20
    assert report.rise_low == pytest.approx(rises.mean() - half, abs=0.01)
    assert report.rise_high == pytest.approx(rises.mean() + half, abs=0.01)
    assert report.verdict == "forgotten" and "rose by" in report.lines[0]
    again = make_report([Row("facts")] * 400, np.arange(400), scores, confidence=0.9)
    assert again == report
    better = TargetScores(ones + rises, ones, np.zeros(400), np.zeros(400, np.bool_))
    assert make_report([Row("facts")] * 400, np.arange(400), better).verdict == "improved"


def test_a_category_that_suffered_is_named_where_the_others_gained() -> None:
    rng = np.random.default_rng(2)
    rises = np.concatenate([rng.normal(-2, 0.5, 80), rng.normal(1, 0.5, 20)])
    base = np.full(100, 5.0)
    scores = TargetScores(base, base + rises, np.zeros(100), np.zeros(100, np.bool_))
    report = make_report([Row("code")] * 80 + [Row("json")] * 20, np.arange(100), scores)
    assert report.verdict == "improved" and report.lines[0].startswith("On the whole nothing forgotten, but json: ")
    json_scores = report.categories["json"]
    assert 0 < json_scores.rise_low < json_scores.rise < json_scores.rise_high
    assert report.categories["code"].rise_high < 0


def scores_of(rises: FloatArray) -> TargetScores:
    """Of texts of a token each."""
    base = np.full(len(rises), 5.0)
    return TargetScores(base, base + rises, np.zeros(len(rises)), np.zeros(len(rises), np.bool_))


def test_without_an_effect_hardly_a_category_is_accused() -> None:
    """Of 100 reports on eight categories each; 25 texts are not many."""
    texts = [Row(f"kind {row % 8}") for row in range(200)]
    rng = np.random.default_rng(3)
    reports = [make_report(texts, np.arange(200), scores_of(rng.normal(0, 1, 200)), seed=run) for run in range(100)]
    assert sum("but kind" in report.lines[0] for report in reports) <= 8
    assert sum(report.verdict == "forgotten" for report in reports) <= 5
    one = reports[0]
    widths = [scores.rise_high - scores.rise_low for scores in one.categories.values()]
    # 2.5 % and 2.5 % / 8 of the normal distribution lie beyond 1.96 and 2.73; a category has an eighth of the texts
    assert np.mean(widths) / (one.rise_high - one.rise_low) == pytest.approx(np.sqrt(8) * 2.73 / 1.96, rel=0.2)


def test_a_rise_that_is_sure_but_small_is_not_forgetting() -> None:
    texts = [Row("code")] * 50 + [Row("facts")] * 50
    small = scores_of(np.random.default_rng(0).normal(0.004, 0.001, 100))
    report = make_report(texts, np.arange(100), small)
    assert report.rise_low > 0 and report.verdict == "unchanged"
    assert report.lines[0].startswith("Nothing forgotten that matters: the loss on general texts moved by +0.004 ")
    assert make_report(texts, np.arange(100), small, least=0.002).lines[0].startswith("Forgotten: ")


def test_lines_name_the_categories_that_suffered_first() -> None:
    report = make_report(TEXTS, IDS, SCORES)
    text = "\n".join(report.lines)
    assert "1.667 → 1.933" in text and "33.3 %" in text and "code +0.33, facts +0.20" in text
    assert '+1.00  "Write a loop" → "Because."' in text


# --- the workflow


class TwoSides:
    """An opened run whose base and adapter give logits that tell them and the batch apart."""

    def __init__(self, vocab_size: int) -> None:
        config = RunConfig()
        self.run = SimpleNamespace(architecture=SimpleNamespace(vocab_size=vocab_size), config=config)
        self.tokenizer = None
        self.vocab_size = vocab_size
        self.used: list[str] = []

    def use(self, side: str) -> Any:
        self.used.append(side)
        seed = {"base": 0, "adapter": 1}[side]

        def target_logits(batch: Any) -> Any:
            rng = np.random.default_rng([seed, *batch.row_ids.tolist()])
            return rng.normal(size=(batch.num_targets, self.vocab_size)).astype(np.float32)

        return SimpleNamespace(target_logits=target_logits)


def measured(monkeypatch: pytest.MonkeyPatch, group_bytes: int) -> tuple[GeneralReport, list[str]]:
    data = FakeData(num_rows=7, batch_size=2)
    rows = SimpleNamespace(texts=[Row(f"kind {row % 2}") for row in range(7)], batches=data.epoch(0))
    monkeypatch.setattr(workflow, "load_general", lambda tokenizer, vocab_size: rows)
    monkeypatch.setattr(workflow, "_GROUP_BYTES", group_bytes)
    opened: Any = TwoSides(16)
    return workflow.measure_general(opened), opened.used


def test_groups_change_nothing_and_the_adapter_is_left_in(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, used = measured(monkeypatch, 10**9)
    assert used[-1] == "adapter"
    parts, used = measured(monkeypatch, 1)
    assert parts == whole and used[-1] == "adapter"
    assert whole.num_rows == 7 and {scores.num_rows for scores in whole.categories.values()} == {3, 4}


# --- while it trains


def test_looks_are_held_against_the_first() -> None:
    data, learner = FakeData(), FakeLearner()
    data.general_rows = [np.array([3, 3, 5]), np.array([7])]
    learner.logits[0, 3] = 1.0
    first, start = look_at_general(learner, data.general, None)
    norm = math.log(math.e + 15)
    assert first.loss == pytest.approx((2 * (norm - 1) + 2 * norm) / 4) and first.flipped == 0.0
    assert start.greedy == [3, 3, 3, 3] and start.loss == first.loss
    learner.logits[0, 9] = 2.0
    later, kept = look_at_general(learner, data.general, start)
    assert kept is start and later.flipped == 1.0 and later.loss > first.loss


def test_progress_with_it_survives_json() -> None:
    progress = Progress(general_start=GeneralStart(2.5, [1, 2, 3]))
    again = Progress.from_dict(json.loads(json.dumps(asdict(progress))))
    assert again == progress and Progress.from_dict(asdict(Progress())) == Progress()


def test_a_run_on_other_weights_measures_them_again() -> None:
    """What flipped is told from what the weights there say at the start."""
    data = FakeData()
    data.general_rows = [np.array([3, 3, 5])]
    learner: Any = FakeLearner()
    before = learner.export_state()
    from core.checkpoint import Checkpoint
    from tests.fakes import NAME

    progress = Progress(step=4, base_val_loss=3.0, general_start=GeneralStart(9.0, [1, 1, 1]))
    stopping = EarlyStopping(3)
    stopping.update(2.0, step=4)
    trainer = {"progress": asdict(progress), "early_stopping": stopping.state_dict()}
    best = np.zeros((1, 16), np.float32)
    best[0, 5] = 2.0
    kept = Checkpoint(path=None, step=4, state=type(before)({NAME: best}, {}, 4), trainer=trainer)  # type: ignore[arg-type]
    initial: Any = SimpleNamespace(
        tensors=before.adapter, with_tensors=lambda tensors: SimpleNamespace(tensors=tensors)
    )
    found = remeasure(
        kept, read_best=lambda step: kept, initial=initial, learner=learner, data=data, config=RunConfig()
    )
    again = Progress.from_dict(found.checkpoint.trainer["progress"])
    assert again.general_start is not None and again.general_start.loss == pytest.approx(math.log(16))
    assert again.general_start.greedy == [0, 0, 0]
    assert again.best_general is not None and again.best_general.flipped == 1.0


def test_the_verdict_says_it(tmp_path: Any) -> None:
    summary = {"not_judged": "every row was trained on", "status": "finished", "num_train_rows": 8, "num_val_rows": 0}
    summary |= {"num_target_tokens": 99, "wall_seconds": 3.0, "tokens_per_second": 10.0, "peak_memory_gb": 1.0}
    general = {"base_general_loss": 2.5, "general_loss": 2.75, "general_flipped": 0.041}

    def said(values: dict[str, Any]) -> str:
        return "\n".join(verdict_lines(values, gap=None, guard=RunConfig().guard, folder=tmp_path, next_command="x"))

    assert "2.500 → 2.750   (4.1 % of the most likely tokens" in said(summary | general)
    assert "general" not in said(summary | dict.fromkeys(general))
