"""Forgotten: what training on one thing did to everything else.

Short general texts (`data.general`) are scored with and without the adapter: the loss on their answers, how far the
next-token distribution moved away from the base model's (Kullback and Leibler 1951), and how many of the tokens that
the model finds most likely are others now. A new style of answering shows here as well as lost knowledge: both are
things that the model did before and does otherwise now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.config import GuardConfig
from core.evaluation.bootstrap import Interval, resamples
from core.protocols import Batch, BoolArray, FloatArray, IntArray, Learner

NUM_WORST = 5
_BLOCK_BYTES = 64_000_000
"""Float64 log-probabilities of one side at a time."""
_SHOWN_CHARACTERS = 40


class Text(Protocol):
    """A general text, for a person."""

    @property
    def category(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...


# --- target by target -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TargetScores:
    """Base model and adapter at M targets."""

    base_nll: FloatArray
    """float64 [M]: negative log-likelihood in nats; likewise `adapter_nll`."""
    adapter_nll: FloatArray
    kl: FloatArray
    """float64 [M]: KL(base || adapter) = sum over the vocabulary of p_base (log p_base - log p_adapter), in nats."""
    flipped: BoolArray
    """bool [M]: whether another token is the most likely one."""

    @classmethod
    def joined(cls, parts: Sequence[TargetScores]) -> TargetScores:
        return cls(
            np.concatenate([part.base_nll for part in parts]),
            np.concatenate([part.adapter_nll for part in parts]),
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.flipped for part in parts]),
        )


def score_targets(
    base: npt.NDArray[np.float32], adapter: npt.NDArray[np.float32], targets: npt.NDArray[np.integer]
) -> TargetScores:
    """Compares the two sides at each target, in float64 and in blocks.

    Args:
        base: logits, float32 [M, vocabulary]; likewise `adapter`.
        targets: token ids [M].
    """
    assert base.shape == adapter.shape and len(targets) == len(base)
    size = max(_BLOCK_BYTES // (8 * base.shape[1]), 1)
    parts = [
        _score_block(base[start : start + size], adapter[start : start + size], targets[start : start + size])
        for start in range(0, len(targets), size)
    ]
    return TargetScores.joined(parts)


def _score_block(
    base: npt.NDArray[np.float32], adapter: npt.NDArray[np.float32], targets: npt.NDArray[np.integer]
) -> TargetScores:
    log_base, log_adapter = _log_softmax(base), _log_softmax(adapter)
    rows = np.arange(len(targets))
    # below zero only by rounding
    kl = np.maximum((np.exp(log_base) * (log_base - log_adapter)).sum(axis=1), 0.0)
    return TargetScores(
        base_nll=-log_base[rows, targets],
        adapter_nll=-log_adapter[rows, targets],
        kl=kl,
        flipped=base.argmax(axis=1) != adapter.argmax(axis=1),
    )


def _log_softmax(logits: npt.NDArray[np.float32]) -> FloatArray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CategoryScores:
    """The texts of one category. Losses, rise and KL in nats per target token."""

    num_rows: int
    num_targets: int
    base_loss: float
    adapter_loss: float
    rise: float
    rise_low: float
    """Lower end of the rise's interval, a paired percentile bootstrap over the texts. A category's is wider than that
    of all texts: as many as there are hold together with the report's confidence (Bonferroni)."""
    rise_high: float
    kl: float
    flipped: float
    """Share of the targets whose most likely token is another with the adapter."""


@dataclass(frozen=True, slots=True)
class WorstText:
    """A text whose loss rose; losses in nats per target token."""

    category: str
    prompt: str
    answer: str
    base_loss: float
    adapter_loss: float
    rise: float
    kl: float


@dataclass(frozen=True, slots=True)
class GeneralReport:
    """What the adapter did to the general texts. Losses, rise and KL in nats per target token."""

    num_rows: int
    num_targets: int
    base_loss: float
    adapter_loss: float
    rise: float
    """`adapter_loss - base_loss`; below 0 where the adapter helps."""
    rise_low: float
    """Lower end of the rise's interval, a paired percentile bootstrap over the texts."""
    rise_high: float
    confidence: float
    kl: float
    flipped: float
    categories: dict[str, CategoryScores]
    worst: list[WorstText]
    """The texts whose loss rose most, the worst first."""
    least: float = GuardConfig().grades[0]
    """Smallest rise that is called forgotten, whatever its interval."""

    @property
    def interval(self) -> tuple[float, float]:
        return self.rise_low, self.rise_high

    @property
    def verdict(self) -> str:
        """`forgotten`, `unchanged` (the interval holds 0, or the rise is too small to matter) or `improved`."""
        if self._has_suffered(self):
            return "forgotten"
        return "improved" if self.rise_high < 0 else "unchanged"

    def _has_suffered(self, scores: GeneralReport | CategoryScores) -> bool:
        return scores.rise_low > 0 and scores.rise >= self.least

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, **asdict(self)}

    @property
    def lines(self) -> list[str]:
        """For people: the answer first, then the numbers."""
        return [
            self._headline(),
            f"  general loss      {self.base_loss:.3f} → {self.adapter_loss:.3f}   "
            f"({self.num_rows} texts, {self.num_targets:,} target tokens)",
            f"  most likely       {_percent(self.flipped)} of the tokens are others now; KL(base||adapter) "
            f"{self.kl:.3f} nats per token",
            f"  by category       {', '.join(self._ordered())}",
            *self._worst_lines(),
        ]

    def _headline(self) -> str:
        interval = f"[{self.rise_low:+.3f}, {self.rise_high:+.3f}] nats per token"
        if self.verdict == "forgotten":
            return f"Forgotten: the loss on general texts rose by {self.rise:.3f} {interval}"
        worse = [name for name, scores in self.categories.items() if self._has_suffered(scores)]
        start = f"On the whole nothing forgotten, but {' and '.join(worse)}" if worse else "Nothing forgotten"
        if self.verdict == "improved":
            return f"{start}: the loss on general texts fell by {-self.rise:.3f} {interval}"
        if not worse:
            start += " that matters" if self.rise_low > 0 else " that shows"
        return f"{start}: the loss on general texts moved by {self.rise:+.3f} {interval}"

    def _ordered(self) -> list[str]:
        ranked = sorted(self.categories.items(), key=lambda item: -item[1].rise)
        return [f"{name} {scores.rise:+.2f}" for name, scores in ranked]

    def _worst_lines(self) -> Iterator[str]:
        for number, text in enumerate(self.worst[:3]):
            name = "  " + ("" if number else "rose most")
            yield f'{name:<20}{text.rise:+.2f}  "{_short(text.prompt)}" → "{_short(text.answer)}"'


def make_report(
    texts: Sequence[Text],
    row_ids: IntArray,
    scores: TargetScores,
    *,
    confidence: float = 0.95,
    least: float = GuardConfig().grades[0],
    seed: int = 0,
) -> GeneralReport:
    """Sums up the targets' scores.

    Args:
        texts: by row id.
        row_ids: int64 [M]: the row of each target.
        confidence: level of the interval; the categories' intervals hold together at this level.
        least: the smallest rise that matters, in nats per token.
    """
    rows = np.unique(row_ids)
    place = np.searchsorted(rows, row_ids)
    counts = np.bincount(place).astype(np.int64)
    measured = (scores.base_nll, scores.adapter_nll, scores.kl, scores.flipped)
    sums: list[FloatArray] = [np.bincount(place, weights=values).astype(np.float64) for values in measured]
    base, adapter, kl, flips = sums
    everything = np.ones(len(rows), np.bool_)

    def summed(chosen: BoolArray, level: float) -> CategoryScores:
        interval = _interval((adapter - base)[chosen], counts[chosen], confidence=level, seed=seed)
        return _summed(counts[chosen], base[chosen], adapter[chosen], kl[chosen], flips[chosen], interval=interval)

    named = [texts[row] for row in rows]
    names = list(dict.fromkeys(text.category for text in named))
    each = 1 - (1 - confidence) / len(names)
    categories = {name: summed(np.array([text.category == name for text in named]), each) for name in names}
    rises = (adapter - base) / counts
    worst = [
        WorstText(
            category=named[index].category,
            prompt=named[index].prompt,
            answer=named[index].answer,
            base_loss=float(base[index] / counts[index]),
            adapter_loss=float(adapter[index] / counts[index]),
            rise=float(rises[index]),
            kl=float(kl[index] / counts[index]),
        )
        for index in np.argsort(-rises, kind="stable")[:NUM_WORST]
        if rises[index] > 0
    ]
    whole = asdict(summed(everything, confidence))
    return GeneralReport(**whole, confidence=confidence, categories=categories, worst=worst, least=least)


def _summed(
    counts: IntArray,
    base: FloatArray,
    adapter: FloatArray,
    kl: FloatArray,
    flips: FloatArray,
    *,
    interval: Interval,
) -> CategoryScores:
    """Of rows' sums: means over their targets."""
    total = int(counts.sum())
    return CategoryScores(
        num_rows=len(counts),
        num_targets=total,
        base_loss=float(base.sum() / total),
        adapter_loss=float(adapter.sum() / total),
        rise=interval.value,
        rise_low=interval.low,
        rise_high=interval.high,
        kl=float(kl.sum() / total),
        flipped=float(flips.sum() / total),
    )


def _interval(rises: FloatArray, counts: IntArray, *, confidence: float, seed: int) -> Interval:
    """Rise per target token, of rows' sums."""
    draws = np.concatenate([weights @ rises / (weights @ counts) for weights in resamples(len(rises), seed=seed)])
    return Interval.of(rises.sum() / counts.sum(), draws, confidence)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


# --- while it trains --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GeneralStart:
    """The general texts before the first step; part of every checkpoint."""

    loss: float
    greedy: list[int]
    """The most likely token at every target."""


@dataclass(frozen=True, slots=True)
class GeneralLoss:
    """The general texts at an evaluation."""

    loss: float
    """Nats per target token."""
    flipped: float
    """Share of the targets whose most likely token is not the one before the first step."""

    @property
    def mean(self) -> float:
        """As `RowLosses` has it."""
        return self.loss


def look_at_general(
    learner: Learner, batches: Sequence[Batch], start: GeneralStart | None
) -> tuple[GeneralLoss, GeneralStart]:
    """Measures the general texts at the present weights. Without a `start` these weights are it."""
    replay = learner.replay(batches)
    loss = float(replay.nll.sum() / len(replay.nll))
    if start is None:
        start = GeneralStart(loss, replay.greedy.tolist())
    assert len(start.greedy) == len(replay.greedy), "other general texts than before the first step"
    return GeneralLoss(loss, float(np.mean(replay.greedy != np.array(start.greedy)))), start
