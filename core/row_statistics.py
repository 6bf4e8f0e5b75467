"""What `core.row_history` reckons with: how far rows fall, how much they jump, what is chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core.protocols import BoolArray, FloatArray, IntArray

_FITS = 4
"""Rounds of fitting line and scatter in turn; it settles in two or three."""
_DEGREES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 30.0, 1000.0)
"""Degrees of freedom that are tried; the last is the normal distribution."""
_SCALES = 30
"""Rounds of fitting a scale."""
_ALLOWED = 1.645**2 / 2
"""How far below the best a log-likelihood may be: a one-sided 95 % interval."""


@dataclass(frozen=True, slots=True)
class FallLine:
    """fall = intercept + slope * (start - centre), with scatter of variance between + within / tokens."""

    coefficients: FloatArray
    """float64 [2]: intercept and slope."""
    covariance: FloatArray
    """float64 [2, 2], of the coefficients."""
    centre: float
    between: float
    within: float

    @classmethod
    def fit(cls, start: FloatArray, fall: FloatArray, num_targets: IntArray) -> FallLine:
        centre = float(np.average(start, weights=num_targets))
        design = np.stack([np.ones_like(start), start - centre], axis=1)
        between, within = 1.0, 0.0
        for _ in range(_FITS):
            weights = 1.0 / (between + within / num_targets)
            # pinv: rows that all began alike have no slope
            covariance: FloatArray = np.asarray(np.linalg.pinv(design.T @ (weights[:, None] * design)), np.float64)
            coefficients: FloatArray = covariance @ (design.T @ (weights * fall))
            residuals = fall - design @ coefficients
            between, within = _variances(residuals, num_targets, weights)
        return cls(coefficients, covariance, centre, between, within)

    def at(self, start: FloatArray) -> FloatArray:
        line: FloatArray = self.coefficients[0] + self.coefficients[1] * (start - self.centre)
        return line

    def scatter(self, start: FloatArray, num_targets: IntArray) -> FloatArray:
        """Standard deviation of a row's fall around the line, with the line's own uncertainty."""
        design = np.stack([np.ones_like(start), start - self.centre], axis=1)
        own = np.einsum("ni,ij,nj->n", design, self.covariance, design)
        spread: FloatArray = np.sqrt(self.between + self.within / num_targets + own)
        return spread


def _variances(residuals: FloatArray, num_targets: IntArray, weights: FloatArray) -> tuple[float, float]:
    """`between` and `within`, neither below 0: squared residuals fitted over 1 / tokens by weighted least squares."""
    squares = residuals**2 * len(residuals) / (len(residuals) - 2)
    inverse, weight = 1.0 / num_targets, weights**2  # the variance of a square goes with the variance's square
    alone = float(np.average(squares, weights=weight))
    design = np.stack([np.ones_like(inverse), inverse], axis=1)
    between, within = np.linalg.pinv(design.T @ (weight[:, None] * design)) @ (design.T @ (weight * squares))
    if within < 0:
        between, within = alone, 0.0
    elif between < 0:
        between, within = 0.0, float((weight * inverse * squares).sum() / (weight * inverse**2).sum())
    # falls on a line to the last digit have no scatter; a row may still not be called memorised for a rounding
    return max(float(between), 1e-12), float(within)


@dataclass(frozen=True, slots=True)
class Tail:
    """How far chance reaches: Student's t with a scale, around 0."""

    degrees: float
    scale: float

    @classmethod
    def fit(cls, distances: FloatArray) -> Tail:
        """The heaviest tail that distances from 0 allow: of the degrees of freedom in a one-sided 95 % likelihood
        interval the fewest, with the scale that is likeliest for them (EM; Lange, Little and Taylor 1989).

        Few rows can't show how heavy the tail is that they come from, and a tail that is taken for a lighter one makes
        every rare row look like a finding.
        """
        from scipy.special import gammaln  # type: ignore[import-untyped]

        squares, degrees = distances[None, :] ** 2, np.array(_DEGREES)[:, None]
        variance = np.full_like(degrees, max(float(np.median(squares)), 1e-18))
        for _ in range(_SCALES):
            weights = (degrees + 1) / (degrees + squares / variance)
            variance = np.maximum((weights * squares).mean(axis=1, keepdims=True), 1e-18)
        peak = gammaln((degrees + 1) / 2) - gammaln(degrees / 2) - np.log(degrees * variance) / 2
        likelihood = (peak - (degrees + 1) / 2 * np.log1p(squares / (degrees * variance))).sum(axis=1)
        heaviest = int(np.flatnonzero(likelihood >= likelihood.max() - _ALLOWED)[0])
        return cls(_DEGREES[heaviest], float(np.sqrt(variance[heaviest, 0])))

    def beyond(self, score: FloatArray) -> FloatArray:
        """P(a row of chance lies above the score)."""
        return t_tail(score / self.scale, self.degrees)


def false_discoveries(p_values: FloatArray, *, share: float) -> BoolArray:
    """bool [N]: the hypotheses to reject at an expected share of false ones `share`
    (Benjamini and Hochberg 1995)."""
    order = np.argsort(p_values)
    passes = p_values[order] <= share * np.arange(1, len(order) + 1) / len(order)
    rejected = np.zeros(len(order), np.bool_)
    if passes.any():
        rejected[order[: int(np.flatnonzero(passes)[-1]) + 1]] = True
    return rejected


def row_noise(nll: FloatArray, num_targets: IntArray) -> FloatArray | None:
    """float64 [N]: how much a row's loss jumps from one evaluation to the next, as a standard deviation.

    From the second differences of its distance to the split's mean, after the first step: a steady movement has none,
    and those of noise with variance s² have the variance 6 s². Two differences' worth of what rows of its length have
    is mixed in, for rows with few of their own. None with fewer than four evaluations.

    Args:
        nll: float64 [E, N]: summed over each row's targets, in nats.
        num_targets: int64 [N]
    """
    if len(nll) < 4:
        return None
    mean = nll.sum(axis=1) / num_targets.sum()
    distance = (nll / num_targets - mean[:, None])[1:]
    second = distance[2:] - 2 * distance[1:-1] + distance[:-2]
    own = (second**2).sum(axis=0) / 6
    pooled = float(np.average(own / len(second) * num_targets)) / num_targets
    noise: FloatArray = np.sqrt((own + 2 * pooled) / (len(second) + 2))
    return noise


def stands_out(rises: FloatArray, num_targets: IntArray, noise: FloatArray | None, *, times: float) -> BoolArray:
    """bool [N]: rises that are more than `times` the row's own noise, and than what rows of its length do here.

    Args:
        rises: float64 [N]: in nats per target token; likewise `noise`, None where it can't be told.
    """
    scaled = rises * np.sqrt(num_targets)
    middle = float(np.median(scaled))
    # the median distance to the median, as a normal distribution's standard deviation
    spread = 1.4826 * float(np.median(np.abs(scaled - middle)))
    found: BoolArray = scaled - middle > times * spread
    return found if noise is None else found & (rises > times * noise)


def sign_test(num_up: int, num_down: int) -> float:
    """Two-sided p-value of the sign test: both directions as likely, each row for itself; exact (binomial)."""
    from scipy.special import bdtrc  # type: ignore[import-untyped]

    total, most = num_up + num_down, max(num_up, num_down)
    return min(2 * float(bdtrc(most - 1, total, 0.5)), 1.0) if total else 1.0


def t_tail(score: FloatArray, degrees: float) -> FloatArray:
    """P(t > score) of Student's t with so many degrees of freedom."""
    from scipy.special import stdtr  # type: ignore[import-untyped]

    tail: FloatArray = stdtr(degrees, -score)
    return tail
