"""Which token comes next: the same choice and the same draw on both backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.7
    """Logits are divided by it; 0 takes the most likely token, whatever the other settings but the penalty."""
    top_k: int = 50
    """Draw from the k most likely tokens; 0: from all."""
    top_p: float = 0.95
    """Draw from the fewest tokens that hold this probability (Holtzman et al., arXiv:1904.09751); 1: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the answer so far are divided by it where positive and multiplied where
    negative (Keskar et al., arXiv:1909.05858); 1: none."""
    seed: int = 0
    """The same seed and prompt give the same text on both backends, as far as their logits agree."""


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model made of one prompt."""

    ids: list[int]
    """New token ids, without the end token."""
    ended: bool
    """Whether the model ended it, and neither a limit of tokens nor who asked."""


def pick_token(
    logits: npt.NDArray[np.floating[Any]],
    temperature: float,
    *,
    top_p: float,
    top_k: int,
    random: np.random.Generator,
) -> int:
    """Draws a token id from logits [V]: temperature first, then top-k, then top-p; the likeliest token always stays.

    Takes one number of `random`. Of equal logits the lower token id counts as the likelier one. The largest logit is
    finite, and none is NaN; the temperature is above 0.
    """
    ids = _most_likely(logits, top_k)
    kept = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # at a temperature near 0 all but the likeliest are minus infinity
        probabilities = np.exp((kept - kept[0]) / temperature)
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    probabilities[before >= top_p] = 0.0
    return int(random.choice(ids, p=probabilities / probabilities.sum()))


def _most_likely(logits: npt.NDArray[np.floating[Any]], k: int) -> npt.NDArray[np.intp]:
    """Ids of the k largest logits (0: of all), the largest first; sorts few of them where k is small."""
    if not 0 < k < len(logits):
        return np.argsort(-logits, kind="stable")
    least = np.partition(logits, -k)[-k]
    ids = np.flatnonzero(logits >= least)
    return ids[np.argsort(-logits[ids], kind="stable")[:k]]


def penalise(logits: npt.NDArray[np.floating[Any]], ids: npt.NDArray[np.intp], penalty: float) -> None:
    """Makes the tokens `ids` less likely, in place, in logits [V]: see `Sampling.repetition_penalty`.

    As transformers' `RepetitionPenaltyLogitsProcessor`. A token counts once, however often it was there.
    """
    found = logits[ids]
    logits[ids] = np.where(found < 0, found * penalty, found / penalty)
