"""Where a mixture's routers send the tokens, and whether a layer has collapsed.

A router chooses k of a layer's experts for every token. What is judged here are the counts of one evaluation: how many
tokens each expert of each layer got, padding left out, a token that goes to k experts counted k times. An expert's
share is its part of the layer's choices: 1 / experts where all are used alike, at most 1 / k, when every token chooses
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.protocols import FloatArray, IntArray

DOMINANT = 0.90
"""A layer has collapsed when more than this part of its tokens choose the same expert."""
CONCENTRATED = 0.95
"""A layer has collapsed when k + 1 experts or fewer have this part of its choices; a single token needs k."""
ENOUGH_CHOICES = 20
"""Choices for each expert, on average, below which nothing is judged: chance alone can look like a collapse."""

SCALARS = ("entropy", "entropy_min", "entropy_min_layer", "moved_max", "moved_max_layer")
"""What a record's `routing` holds besides lists; the CSV has these."""


@dataclass(frozen=True, slots=True)
class Collapse:
    """A layer that uses hardly any of its experts."""

    layer: int
    why: str
    """For a person: `expert 3 gets 97 % of its tokens`."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The routing of one evaluation. Plain numbers, so that a checkpoint can hold it."""

    tokens: tuple[tuple[int, ...], ...]
    """[layers][experts]: how many tokens each expert got."""
    experts_per_token: int
    """k: experts that a token goes to."""

    @classmethod
    def measure(cls, expert_tokens: IntArray, *, num_tokens: int) -> Routing:
        """From the counts of an evaluation: int64 [layers, experts], over `num_tokens` tokens, padding left out."""
        chosen = expert_tokens.sum(axis=1)
        k = int(chosen[0]) // max(num_tokens, 1)
        assert (chosen == k * num_tokens).all(), "every token goes to k experts of every layer"
        return cls(tokens=tuple(tuple(map(int, layer)) for layer in expert_tokens), experts_per_token=k)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Routing:
        """From what `dataclasses.asdict` and JSON made of it."""
        return cls(tokens=tuple(map(tuple, values["tokens"])), experts_per_token=values["experts_per_token"])

    @property
    def num_experts(self) -> int:
        return len(self.tokens[0])

    @property
    def shares(self) -> FloatArray:
        """float64 [layers, experts]: each row sums to 1."""
        counts = np.array(self.tokens, float)
        shares: FloatArray = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
        return shares

    @property
    def entropy(self) -> FloatArray:
        """float64 [layers], 0..1: entropy of the shares over log(experts); 1 where all experts are used alike."""
        shares = self.shares
        nats = -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)), axis=1)
        normalised: FloatArray = nats / np.log(max(self.num_experts, 2))
        return normalised

    def distance(self, base: Routing) -> FloatArray:
        """float64 [layers], 0..1: total variation, the part of the choices that went to other experts in `base`."""
        moved: FloatArray = 0.5 * np.abs(self.shares - base.shares).sum(axis=1)
        return moved

    def collapsed(self) -> tuple[Collapse, ...]:
        """The layers that have collapsed, and why.

        Either an expert gets more than 90 % of the layer's tokens (judged where there are at least 2k experts, so that
        an even share is half of the tokens at most), or k + 1 experts or fewer have 95 % of its choices (judged where
        there are at least 4k, as in Mixtral; k experts alone can't have them without the first being so, too). A layer
        with fewer than 20 choices per expert is not judged.
        """
        found = (self._collapse(layer) for layer in range(len(self.tokens)))
        return tuple(collapse for collapse in found if collapse is not None)

    def _collapse(self, layer: int) -> Collapse | None:
        k, counts, shares = self.experts_per_token, self.tokens[layer], self.shares[layer]
        if sum(counts) < ENOUGH_CHOICES * self.num_experts:
            return None
        first, reached = int(shares.argmax()), float(shares.max()) * k
        if self.num_experts >= 2 * k and reached > DOMINANT:
            return Collapse(layer, f"expert {first} gets {100 * reached:.0f} % of its tokens")
        used = int(np.searchsorted(np.cumsum(np.sort(shares)[::-1]), CONCENTRATED - 1e-12)) + 1
        if self.num_experts >= 4 * k and used <= k + 1:
            return Collapse(
                layer, f"{used} of {self.num_experts} experts get {100 * CONCENTRATED:.0f} % of its choices"
            )
        return None


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """One evaluation's routing beside that before the first step."""

    routing: Routing
    base: Routing

    @property
    def collapses(self) -> tuple[Collapse, ...]:
        """Layers that collapsed in training: those that had before are not among them."""
        before = {collapse.layer for collapse in self.base.collapsed()}
        return tuple(collapse for collapse in self.routing.collapsed() if collapse.layer not in before)

    @property
    def scalars(self) -> dict[str, float | int]:
        """`SCALARS`: mean and lowest normalised entropy, largest distance from before the first step, their layers."""
        entropy, moved = self.routing.entropy, self.routing.distance(self.base)
        lowest, furthest = int(entropy.argmin()), int(moved.argmax())
        values = (float(entropy.mean()), float(entropy[lowest]), lowest, float(moved[furthest]), furthest)
        return dict(zip(SCALARS, values, strict=True))

    @property
    def summary(self) -> dict[str, Any]:
        """The scalars and, in words, the layers that collapsed: None if none did."""
        return {**self.scalars, "collapse": describe(self.collapses) or None}

    def to_record(self) -> dict[str, Any]:
        """What the journal keeps: the scalars, the layers that collapsed, and the shares to 4 digits."""
        shares = [[round(float(share), 4) for share in layer] for layer in self.routing.shares]
        return {**self.scalars, "collapsed": [one.layer for one in self.collapses], "shares": shares}


def shares_of(routing: object) -> FloatArray | None:
    """The shares in what `to_record` made, float64 [layers, experts]; None where there are none, or damaged ones."""
    try:
        shares = np.array(routing["shares"], float) if isinstance(routing, dict) else None
    except (KeyError, TypeError, ValueError):
        return None
    if shares is None or shares.ndim != 2 or not shares.size or not np.isfinite(shares).all():
        return None
    return shares


def routing_parts(routing: Mapping[str, Any], *, start: str | None) -> list[str]:
    """`experts: entropy 0.97 (lowest 0.91, layer 3)` and `moved 0.02 from the base model (layer 5)`.

    Args:
        routing: `SCALARS`.
        start: what there was before the first step; None at that step itself, which has no second part.
    """
    lowest = f"lowest {routing['entropy_min']:.2f}, layer {routing['entropy_min_layer']}"
    parts = [f"experts: entropy {routing['entropy']:.2f} ({lowest})"]
    if start is not None:
        parts.append(f"moved {routing['moved_max']:.2f} from the {start} (layer {routing['moved_max_layer']})")
    return parts


def describe(collapses: Sequence[Collapse], *, most: int = 3) -> str:
    """`layer 3: expert 0 gets 97 % of its tokens; layer 7: …`, with at most so many by name."""
    named = "; ".join(f"layer {one.layer}: {one.why}" for one in collapses[:most])
    return named + (f"; and {len(collapses) - most} more" if len(collapses) > most else "")
