"""What a place where two sides of `parity` part usually means, or what to try next."""

from __future__ import annotations

from collections.abc import Sequence

from core.config import BASE_MODEL

STEADY = 0.05
"""A difference that had this part of its size by half of the way has grown since the start, and not of rounding.

An update that differs by a constant part moves the loss with the square of the steps, with the fourth power under a
warm-up: 1/16 of it is there by half of the way. Rounding that a steep loss magnifies grows tenfold every few steps."""
JUMP = 10.0
"""One that is more than so many times the largest before came with its step."""

_UPDATE = (
    "the first update differs: the optimiser's formula (bias correction, epsilon, momentum, a strong weight "
    "decay), the clipping or the rate it was given"
)
HINTS: dict[str, str] = {
    "base losses": (
        "the two read the model differently, before any training: rotary settings, sliding window, tied embeddings, "
        "norms, or which position predicts which token"
    ),
    "targets counted": "the targets are the same, but a side leaves some out or adds some: the mask, the padding",
    "loss of step 1": (
        "the losses before training agree, the one in training does not: which targets count, what they are divided "
        "by, or dropout that is on"
    ),
    "gradient norm of step 1": (
        "same loss, other gradient: the adapter's scale (alpha, rank, rslora), label smoothing, what the gradient is "
        "divided by, or a tensor that is not trained"
    ),
    "steady": (
        "it has grown steadily since the first steps: a small part of every update that one side has and the other "
        "lacks, such as weight decay; repeat with --set optim.weight_decay=0: if they agree then, that is it"
    ),
    "jump": (
        "every step before agrees far better: look at what is special in this step (its rows, the epoch's end, the "
        "schedule)"
    ),
    "drift": (
        "it was at rounding's size for long and then grew ever faster: rounding that grows; try a lower rate, or "
        "fewer steps"
    ),
    "shorter adapter": (
        "the tensors have one direction and two lengths: weight decay that one side lacks, or a scale at the export"
    ),
    "final adapter": (
        "every loss agrees, the tensors do not: directions that hardly move the loss. AdamW makes steps of rounding "
        "where a gradient is tiny: if a larger optim.eps mends it, that is all; else see how the adapter is exported"
    ),
    "final losses": "training agrees, its last update or the evaluation does not",
}


def hint_of_losses_before(start: str) -> str:
    """For the validation losses before the first step. `start` is what there was then."""
    if start == BASE_MODEL:
        return HINTS["base losses"]
    return f"{HINTS['base losses']}; or the {start}: its scale (alpha, rank, rslora), or a tensor that is not loaded"


def hint_of_step(place: str, differences: Sequence[float]) -> str:
    """For a step's `loss` or `gradient norm`; `differences` are those of every step up to it."""
    if len(differences) == 1:
        return HINTS[f"{place} of step 1"]
    if len(differences) == 2:
        return _UPDATE
    *before, last = differences
    if max(before) * JUMP < last:
        return HINTS["jump"]
    half = before[: (len(differences) + 1) // 2]
    return HINTS["steady" if max(half) >= STEADY * last else "drift"]
