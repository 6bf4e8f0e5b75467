"""Rows that are as they should be: all different, none alike."""

from __future__ import annotations

import random
from typing import Any


def words(rng: random.Random, number: int) -> str:
    """Made-up words of two to four syllables."""
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    return " ".join("".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(number))


def clean_rows(num_rows: int = 120, *, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts and completions of 8 to 14 words each."""
    rng = random.Random(seed)
    return [
        {"prompt": words(rng, rng.randint(8, 14)) + "?", "completion": words(rng, rng.randint(8, 14)) + "."}
        for _ in range(num_rows)
    ]


def clean_pairs(num_rows: int = 120, *, seed: int = 0) -> list[dict[str, Any]]:
    """Premises and hypotheses, as many of each label."""
    rng = random.Random(seed)
    labels = ("entailment", "neutral", "contradiction")
    return [
        {"premise": words(rng, 9), "hypothesis": words(rng, 6), "label": labels[index % 3]} for index in range(num_rows)
    ]
