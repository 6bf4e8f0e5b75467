"""Cross-entropy on a CPU, some of the vocabulary's tokens at a time: a row of logits never exists.

What one pass over the tokens needs to know of those before it is their largest logit and the sum of the exponentials
(Milakov and Gimelshein 2018, arXiv:1805.02867); weighted sums of the output projection's rows, which are the gradient,
shrink along with it, as in FlashAttention (arXiv:2205.14135). What is computed stays in the processor's cache, and BLAS
is given matrices that it multiplies half again as fast as the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from backends.mlx import fastmath

COLUMNS = 4096
"""Tokens of the vocabulary whose logits exist at a time."""
_ROWS = 256
"""Positions, at most: 4 MB of logits."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Of M positions; all float32."""

    nll: mx.array
    """[M]: cross-entropy in nats."""
    objective: mx.array
    """[M]: what is optimised: with label smoothing e, (1 - e) * CE + e * mean over the vocabulary of -log p."""
    slope: mx.array | None
    """[M, D]: the objective's gradient with respect to the hidden states."""


def losses_of(
    vocabulary: mx.array, hidden: mx.array, ids: mx.array, *, with_slope: bool, label_smoothing: float = 0.0
) -> Losses:
    """The losses of hidden states, without a gradient but the one in `Losses.slope`.

    Args:
        vocabulary: the output projection, float32 [V, D].
        hidden: float32 [M, D] after the final norm.
        ids: integers [M]: the targets.
    """
    hidden = mx.stop_gradient(hidden)
    pieces = -(-len(hidden) // _ROWS)
    size = -(-len(hidden) // max(1, pieces))
    found: list[Losses] = []
    for start in range(0, len(hidden), max(1, size)):
        states = hidden[start : start + size]
        if found:  # one piece after the other
            states = mx.depends(states, [found[-1].nll])
        found.append(_piece(vocabulary, states, ids[start : start + size], with_slope, label_smoothing))
    if len(found) == 1:
        return found[0]
    return Losses(
        mx.concatenate([one.nll for one in found]),
        mx.concatenate([one.objective for one in found]),
        mx.concatenate([one.slope for one in found if one.slope is not None]) if with_slope else None,
    )


def _piece(vocabulary: mx.array, hidden: mx.array, ids: mx.array, with_slope: bool, smoothing: float) -> Losses:
    log_total, at_target, weighted = _over_tokens(vocabulary, hidden, ids, with_slope)
    nll = log_total - at_target
    mean = vocabulary.mean(axis=0) if smoothing else None
    objective = nll if mean is None else (1 - smoothing) * nll + smoothing * (log_total - hidden @ mean)
    if weighted is None:
        return Losses(nll, objective, None)
    slope = weighted - (1 - smoothing) * vocabulary[ids]
    return Losses(nll, objective, slope if mean is None else slope - smoothing * mean)


def _over_tokens(
    vocabulary: mx.array, hidden: mx.array, ids: mx.array, with_slope: bool
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Logsumexp of the logits [M], the target's logit [M], and the mean of the projection's rows by their share [M, D],
    the gradient of the first."""
    ids = ids.astype(mx.int32)[:, None]
    largest = mx.full((len(hidden), 1), -mx.inf)
    total, at_target = mx.zeros_like(largest), mx.zeros_like(largest)
    weighted = mx.zeros_like(hidden) if with_slope else None
    for start in range(0, len(vocabulary), COLUMNS):
        weight = vocabulary[start : start + COLUMNS]
        # After everything that is made of the tokens before, or their logits would be kept for it.
        made = [total, at_target] if weighted is None else [total, at_target, weighted]
        states = mx.depends(hidden, made) if start else hidden
        logits = states @ weight.T
        place = ids - start
        is_here = mx.logical_and(place >= 0, place < len(weight))
        own = mx.take_along_axis(logits, mx.clip(place, 0, len(weight) - 1), axis=-1)
        at_target = mx.where(is_here, own, at_target)
        before, largest = largest, mx.maximum(largest, logits.max(axis=-1, keepdims=True))
        shrink = fastmath.exp(before - largest)
        powers = fastmath.exp(logits - largest)
        summed = fastmath.blocks(powers, fill=0.0).sum(axis=-1).sum(axis=-1, keepdims=True)
        total = total * shrink + summed
        if weighted is not None:
            weighted = mx.addmm(weighted * shrink, powers, weight)
    log_total = largest + mx.log(total)
    return log_total.squeeze(-1), at_target.squeeze(-1), None if weighted is None else weighted / total
