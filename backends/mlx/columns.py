"""Cross-entropy on a CPU, some of the vocabulary's tokens at a time: a row of logits never exists.

What one pass over the tokens needs to know of those before it is their largest logit and the sum of the exponentials
(Milakov and Gimelshein 2018, arXiv:1805.02867); weighted sums of the output projection's rows, which are the gradient,
shrink along with it, as in FlashAttention (arXiv:2205.14135). What is computed stays in the processor's cache, and BLAS
is given matrices that it multiplies half again as fast as the whole vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from backends.mlx import fastmath

COLUMNS = 4096
"""Tokens of the vocabulary whose logits exist at a time."""
_ROWS = 256
"""Positions, at most: 4 MB of logits."""


class Vocabulary:
    """A plain output projection."""

    def __init__(self, weight: mx.array) -> None:
        self.weight = weight
        """float32 [V, D]"""

    @functools.cached_property
    def mean(self) -> mx.array:
        """float32 [D]: the mean of its rows; summed in float64, since V float32 numbers in a row lose digits."""
        return mx.array(np.array(self.weight, copy=False).mean(axis=0, dtype=np.float64).astype(np.float32))


def losses_of(vocabulary: Vocabulary, hidden: mx.array, ids: mx.array) -> mx.array:
    """Cross-entropy, float32 [M] in nats.

    Args:
        hidden: float32 [M, D] after the final norm; M is at least 1.
        ids: integers [M]: the targets.
    """
    found: list[mx.array] = []
    for states, targets in _pieces(hidden, ids):
        log_total, at_target, _ = _over_tokens(vocabulary.weight, _after(states, found[-1:]), targets, with_slope=False)
        found.append(log_total - at_target)
    return mx.concatenate(found)


def losses_and_slopes(
    vocabulary: Vocabulary, hidden: mx.array, ids: mx.array, *, label_smoothing: float
) -> tuple[mx.array, mx.array]:
    """As `losses_of`, and what is optimised differentiated with respect to the hidden states, float32 [M, D]: with
    label smoothing e (arXiv:1512.00567), (1 - e) * CE + e * mean over the vocabulary of -log p.

    There is no other gradient: the results are constants to MLX.
    """
    found: list[mx.array] = []
    slopes: list[mx.array] = []
    for states, targets in _pieces(mx.stop_gradient(hidden), ids):
        states = _after(states, found[-1:] + slopes[-1:])
        log_total, at_target, weighted = _over_tokens(vocabulary.weight, states, targets, with_slope=True)
        assert weighted is not None
        slope = weighted - (1 - label_smoothing) * vocabulary.weight[targets]
        found.append(log_total - at_target)
        slopes.append(slope - label_smoothing * vocabulary.mean if label_smoothing else slope)
    return mx.concatenate(found), mx.concatenate(slopes)


def _pieces(hidden: mx.array, ids: mx.array) -> Iterator[tuple[mx.array, mx.array]]:
    """Of equal size, but for rounding."""
    size = -(-len(hidden) // -(-len(hidden) // _ROWS))
    for start in range(0, len(hidden), size):
        yield hidden[start : start + size], ids[start : start + size]


def _after(array: mx.array, made: list[mx.array]) -> mx.array:
    """The array, but not before all of `made` is there, or what these are made of would be kept meanwhile."""
    waiting: mx.array = mx.depends(array, made) if made else array
    return waiting


def _over_tokens(
    vocabulary: mx.array, hidden: mx.array, ids: mx.array, *, with_slope: bool
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Logsumexp of the logits [M], the target's logit [M], and `with_slope` the mean of the projection's rows by their
    probability [M, D], which is the gradient of the first."""
    ids = ids.astype(mx.int32)[:, None]
    largest = mx.full((len(hidden), 1), -mx.inf)
    total, at_target = mx.zeros_like(largest), mx.zeros_like(largest)
    weighted = mx.zeros_like(hidden) if with_slope else None
    for start in range(0, len(vocabulary), COLUMNS):
        weight = vocabulary[start : start + COLUMNS]
        made = [total, at_target] if weighted is None else [total, at_target, weighted]
        states = _after(hidden, made if start else [])
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
