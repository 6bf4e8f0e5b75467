"""Free text against the expected answer: exact match and ROUGE-L.

Exact match compares in Unicode's NFC form, with every run of white space as one space; case and punctuation count.
ROUGE-L (Lin 2004) is the F-measure of the rouge-score package, without stemming. Its own tokenizer drops whatever is
not ASCII; ours gives the same tokens for ASCII, whole words in other alphabets, and single characters in scripts that
don't set words apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.evaluation.bootstrap import Difference, Interval, resamples
from core.protocols import FloatArray

_WITHOUT_SPACES = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")
"""How the names of characters begin whose scripts put no space between words."""


@dataclass(frozen=True, slots=True)
class TextScores:
    """Both sides' answers, as means over the rows, from 0 to 1."""

    exact_match: tuple[Interval, Interval]
    """Base and adapter."""
    rouge_l: tuple[Interval, Interval]
    rouge_difference: Difference
    per_row: tuple[FloatArray, FloatArray]
    """float64 [N]: ROUGE-L of each row, base and adapter."""

    def to_dict(self) -> dict[str, Any]:
        sides = {
            side: {
                "exact_match": self.exact_match[number].value,
                "exact_match_low": self.exact_match[number].low,
                "exact_match_high": self.exact_match[number].high,
                "rouge_l": self.rouge_l[number].value,
                "rouge_l_low": self.rouge_l[number].low,
                "rouge_l_high": self.rouge_l[number].high,
            }
            for number, side in enumerate(("base", "adapter"))
        }
        difference = self.rouge_difference
        return {
            **sides,
            "num_rows": len(self.per_row[0]),
            "rouge_l_gain": difference.value,
            "rouge_l_gain_low": difference.low,
            "rouge_l_gain_high": difference.high,
            "p_value": difference.p_value,
            "verdict": difference.verdict,
        }


def score_texts(
    expected: Sequence[str], base: Sequence[str], adapter: Sequence[str], *, seed: int, confidence: float
) -> TextScores:
    """Scores both sides' answers against the expected ones."""
    assert len(expected) == len(base) == len(adapter) > 0
    exact = [np.array([exact_match(*pair) for pair in zip(expected, side, strict=True)]) for side in (base, adapter)]
    rouge = [rouge_l(expected, side) for side in (base, adapter)]
    columns = np.stack([*exact, *rouge], axis=1).astype(np.float64)
    drawn = np.concatenate([weights @ columns / len(expected) for weights in resamples(len(expected), seed=seed)])
    means = [Interval.of(columns[:, at].mean(), drawn[:, at], confidence) for at in range(4)]
    difference = Difference.between(
        means[3].value - means[2].value,
        drawn[:, 3] - drawn[:, 2],
        num_unlike=int(np.count_nonzero(rouge[0] != rouge[1])),
        confidence=confidence,
    )
    return TextScores((means[0], means[1]), (means[2], means[3]), difference, (rouge[0], rouge[1]))


def exact_match(expected: str, answer: str) -> bool:
    return _plain(expected) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def rouge_l(expected: Sequence[str], answers: Sequence[str]) -> FloatArray:
    """float64 [N]: F-measure of the longest common subsequence of words."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    scores = [scorer.score(target, answer)["rougeL"].fmeasure for target, answer in zip(expected, answers, strict=True)]
    return np.array(scores, np.float64)


class Words:
    """A tokenizer as rouge-score takes one."""

    def tokenize(self, text: str) -> list[str]:
        """Runs of letters, digits and their marks, in small letters; characters alone in scripts without spaces."""
        words, word = [], ""
        for character in unicodedata.normalize("NFC", text.lower()):
            is_mark = unicodedata.category(character).startswith("M")
            if character.isascii() or not unicodedata.name(character, "").startswith(_WITHOUT_SPACES):
                if character.isalnum() or (is_mark and word):
                    word += character
                    continue
                alone = ""
            else:
                alone = character if character.isalnum() else ""
            words += [word] if word else []
            word = ""
            if is_mark and words:
                words[-1] += character  # a vowel sign belongs to the character before it
            words += [alone] if alone else []
        return [*words, word] if word else words
