"""Answers with labels: accuracy, precision, recall and F1 (scikit-learn's), and whether F1 differs by more than chance.

An answer without a label that could be read is wrong: it is a missed row of its class, and takes nothing from another.
Macro averages are over the labels that the rows have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from core.evaluation.bootstrap import Difference, Interval, Verdict, resamples
from core.evaluation.labels import LabelScheme, Reading
from core.protocols import FloatArray

UNREADABLE = "(unreadable)"


@dataclass(frozen=True, slots=True)
class SideScores:
    """One side's answers."""

    accuracy: float
    precision: float
    """Macro average, as recall and F1."""
    recall: float
    f1: Interval
    per_class: Mapping[str, Mapping[str, float]]
    """Label -> precision, recall, f1 and support."""
    confusion: npt.NDArray[np.int64]
    """int64 [labels, labels + 1]: rows of a label by what was answered; the last column is unreadable."""
    unreadable: float
    """Share of the answers without a label that could be read."""
    strict: float
    """Share of the answers that as a whole have the form that was asked for, with one of the labels."""

    def to_dict(self, *, is_json: bool) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1.value,
            "f1_low": self.f1.low,
            "f1_high": self.f1.high,
            "per_class": {label: dict(scores) for label, scores in self.per_class.items()},
            "confusion": self.confusion.tolist(),
            "unreadable": self.unreadable,
            "strict": self.strict,
            "strict_json": self.strict if is_json else None,
        }


@dataclass(frozen=True, slots=True)
class Classification:
    """Both sides' answers to the same rows."""

    scheme: LabelScheme
    base: SideScores
    adapter: SideScores
    difference: Difference
    """Of the macro F1s."""
    num_rows: int

    @property
    def verdict(self) -> Verdict:
        return self.difference.verdict

    @property
    def most_frequent(self) -> tuple[str, float]:
        """The label that most rows have, and their share: the accuracy of one who always says it."""
        label, scores = max(self.adapter.per_class.items(), key=lambda item: item[1]["support"])
        return label, scores["support"] / self.num_rows

    @property
    def is_guessing(self) -> bool:
        """Whether the adapter's accuracy is no better than that."""
        return self.adapter.accuracy <= self.most_frequent[1]

    def to_dict(self) -> dict[str, Any]:
        is_json = self.scheme.is_json
        label, share = self.most_frequent
        return {
            "most_frequent": {"label": label, "share": share},
            "labels": list(self.scheme.labels),
            "key": self.scheme.key,
            "num_rows": self.num_rows,
            "base": self.base.to_dict(is_json=is_json),
            "adapter": self.adapter.to_dict(is_json=is_json),
            "f1_gain": self.difference.value,
            "f1_gain_low": self.difference.low,
            "f1_gain_high": self.difference.high,
            "p_value": self.difference.p_value,
            "confidence": self.difference.confidence,
            "verdict": self.verdict,
        }


def classify(
    scheme: LabelScheme,
    expected: Sequence[str],
    base: Sequence[Reading],
    adapter: Sequence[Reading],
    *,
    seed: int,
    confidence: float,
) -> Classification:
    """Scores both sides.

    Args:
        expected: label of each row.
        base, adapter: what each side answered.
    """
    assert len(expected) == len(base) == len(adapter) > 0
    number = {label: index for index, label in enumerate(scheme.labels)}
    truth = np.array([number[label] for label in expected])
    answers = [
        np.array([len(number) if reading.label is None else number[reading.label] for reading in readings])
        for readings in (base, adapter)
    ]
    draws: list[list[FloatArray]] = [[], []]
    for weights in resamples(len(truth), seed=seed):
        for side, answered in enumerate(answers):
            draws[side].append(macro_f1(truth, answered, weights, num_labels=len(number)))
    base_draws, adapter_draws = (np.concatenate(parts) for parts in draws)
    sides = [
        _score(scheme, truth, answered, readings, drawn, confidence)
        for answered, readings, drawn in zip(answers, (base, adapter), (base_draws, adapter_draws), strict=True)
    ]
    difference = Difference.between(
        sides[1].f1.value - sides[0].f1.value,
        adapter_draws - base_draws,
        num_unlike=int(np.count_nonzero(answers[0] != answers[1])),
        confidence=confidence,
    )
    return Classification(scheme, sides[0], sides[1], difference, len(truth))


def _score(
    scheme: LabelScheme,
    truth: npt.NDArray[np.int64],
    answered: npt.NDArray[np.int64],
    readings: Sequence[Reading],
    draws: FloatArray,
    confidence: float,
) -> SideScores:
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    present = np.unique(truth)
    precision, recall, f1, support = precision_recall_fscore_support(truth, answered, labels=present, zero_division=0.0)
    per_class = {
        scheme.labels[label]: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for label, p, r, f, s in zip(present, precision, recall, f1, support, strict=True)
    }
    num_labels = len(scheme.labels)
    confusion = confusion_matrix(truth, answered, labels=np.arange(num_labels + 1))[:num_labels]
    return SideScores(
        accuracy=float(accuracy_score(truth, answered)),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=Interval.of(float(f1.mean()), draws, confidence),
        per_class=per_class,
        confusion=np.asarray(confusion, np.int64),
        unreadable=float(np.mean(answered == num_labels)),
        strict=float(np.mean([reading.is_strict for reading in readings])),
    )


def macro_f1(
    truth: npt.NDArray[np.int64], answered: npt.NDArray[np.int64], weights: FloatArray, *, num_labels: int
) -> FloatArray:
    """float64 [draws]: macro F1 of weighted rows, over the labels that have a row of any weight.

    F1 of a label is 2 TP / (rows of the label + answers of the label).

    Args:
        truth, answered: int64 [N]: label of each row and answer; `num_labels` for an answer that says none.
        weights: float64 [draws, N]
    """
    labels = np.arange(num_labels)
    is_true, is_answered = truth[:, None] == labels, answered[:, None] == labels  # bool [N, labels]
    hits, rows, said = (weights @ which.astype(np.float64) for which in (is_true & is_answered, is_true, is_answered))
    f1 = 2 * hits / np.maximum(rows + said, 1.0)
    averages: FloatArray = (f1 * (rows > 0)).sum(axis=1) / (rows > 0).sum(axis=1)
    return averages
