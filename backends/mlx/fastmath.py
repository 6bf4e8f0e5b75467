"""Exponentials and what is made of them, for MLX on a CPU.

MLX's exponential is scalar code on x86: 15 to 25 ns a number, where a sum takes 0.3. SwiGLU, attention's softmax and
the cross-entropy are made of it, and cost as much as the matrix products. Here it is put together from MLX's own sums
and products, which compilers vectorise; and each function has its gradient by hand, so that no exponential is
taken again on the way back. On Metal nothing of this is used.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

BLOCK = 256
"""Numbers of a vocabulary that are summed at a time: about its square root."""

_PER_LN2 = 1 / math.log(2)
_ROUND = 1.5 * 2**23 + 127
"""Added to a float32 below 2**21, leaves no place for a fraction: the sum's lowest bits are the nearest integer, with
the bias of a float32's exponent."""
_MANTISSA_BITS = 23
_SMALLEST = -127.0
_LARGEST = 87.0
_POWERS = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472614891827)
"""2**f - 1 = f * (these, times 1, f, f**2, ...), for f within a half of 0; relative error of 2**f up to 1e-7."""


def on_cpu() -> bool:
    """Whether what is written now will be computed by the CPU."""
    return bool(mx.default_device() == mx.cpu)


def is_wanted(array: mx.array) -> bool:
    """Whether these functions beat MLX's own for this array."""
    return bool(array.dtype == mx.float32) and on_cpu()


def exp(x: mx.array, *, scale: float = 1.0) -> mx.array:
    """exp(scale * x) of float32, without a gradient: relative error 2e-7 around 0, growing with |x| like MLX's own.

    2**n * 2**f as MLX has it (and Cephes, `exp2f.c`); of less than 2**-127 it makes 0. scale * x must be at most 87.
    """
    powers = mx.maximum(x * (scale * _PER_LN2), _SMALLEST)
    rounded = powers + _ROUND
    fraction = powers - (rounded - _ROUND)
    mantissa = _POWERS[-1] * fraction
    for coefficient in reversed(_POWERS[:-1]):
        mantissa = (mantissa + coefficient) * fraction
    mantissa = mantissa + 1.0
    # The exponent is the field above the mantissa. A product, because of a NaN it makes a NaN, whatever its bits.
    return mantissa * mx.left_shift(rounded.view(mx.int32), _MANTISSA_BITS).view(mx.float32)


@mx.custom_function  # type: ignore[untyped-decorator]
def _swiglu(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    share = 1.0 / (1.0 + exp(mx.maximum(gate, -_LARGEST), scale=-1.0))
    return gate * share * up, share


@_swiglu.vjp  # type: ignore[untyped-decorator]
def _swiglu_slope(
    given: tuple[mx.array, mx.array], cotangents: tuple[mx.array, mx.array], made: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    (gate, up), slope, share = given, cotangents[0], made[1]
    active = gate * share
    return slope * up * (share + active * (1.0 - share)), slope * active


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate * sigmoid(gate) * up (arXiv:2002.05202)."""
    made: Any = _swiglu(gate, up)
    product: mx.array = made[0]
    return product


def softmax(scores: mx.array) -> mx.array:
    """Over the last axis, which is short: the exponentials are summed one after the other. -inf makes 0."""
    made: Any = _softmax(scores)
    shares: mx.array = made
    return shares


@mx.custom_function  # type: ignore[untyped-decorator]
def _softmax(scores: mx.array) -> mx.array:
    exponentials = exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@_softmax.vjp  # type: ignore[untyped-decorator]
def _softmax_slope(_: mx.array, slope: mx.array, shares: mx.array) -> mx.array:
    weighted = slope * shares
    return weighted - shares * weighted.sum(axis=-1, keepdims=True)


@mx.custom_function  # type: ignore[untyped-decorator]
def _log_sum_exp(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = exp(logits - largest)
    total = blocks(exponentials, fill=0.0).sum(axis=-1).sum(axis=-1, keepdims=True)
    return (largest + mx.log(total)).squeeze(-1), exponentials, total


@_log_sum_exp.vjp  # type: ignore[untyped-decorator]
def _log_sum_exp_slope(
    _: mx.array, cotangents: tuple[mx.array, ...], made: tuple[mx.array, mx.array, mx.array]
) -> mx.array:
    _, exponentials, total = made
    return exponentials * (cotangents[0][:, None] / total)


def log_sum_exp(logits: mx.array) -> mx.array:
    """log(sum(exp)) over the vocabulary: [M, V] to [M].

    On a CPU MLX adds one float32 after the other: over 49,152 tokens the loss would come out 1e-4 nats too low, and
    the gradients with it. Blocks are summed first, as torch does.
    """
    made: Any = _log_sum_exp(logits)
    total: mx.array = made[0]
    return total


def blocks(logits: mx.array, *, fill: float) -> mx.array:
    """[M, V] to [M, blocks, BLOCK]; the last block is filled up with `fill`."""
    missing = -logits.shape[-1] % BLOCK
    if missing:
        logits = mx.pad(logits, [(0, 0), (0, missing)], constant_values=fill)
    return logits.reshape(logits.shape[0], -1, BLOCK)
