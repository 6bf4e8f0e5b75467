"""Which token comes next: the same draw on both backends."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pick_token(
    logits: npt.NDArray[np.float64],
    temperature: float,
    *,
    top_p: float,
    top_k: int,
    random: np.random.Generator,
) -> int:
    """Draws a token id from logits [V]: temperature first, then top-k, then top-p; the likeliest token always stays."""
    ids = np.argsort(-logits, kind="stable")[: top_k or None]
    scaled = logits[ids] / temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    probabilities[before >= top_p] = 0.0
    return int(random.choice(ids, p=probabilities / probabilities.sum()))
