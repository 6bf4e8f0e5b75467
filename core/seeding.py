"""Random numbers without random state.

Every draw is a function of the run's seed and of what it is for: the order of an epoch's rows of (seed, "order",
epoch), the first value of an adapter tensor of (seed, "adapter", name). So resuming needs a step number, not a
generator's insides, and both backends start from the same adapter.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stable_hash(*parts: object) -> int:
    """A 128-bit number that depends on `parts` only: the same on every platform, version and process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def generator(seed: int, *purpose: object) -> np.random.Generator:
    """A generator for one purpose: Philox, a counter-based generator that NumPy keeps stable, keyed by a hash."""
    return np.random.Generator(np.random.Philox(key=stable_hash(seed, *purpose)))


def step_seed(seed: int, step: int, microbatch: int = 0) -> int:
    """Seed of the dropout masks of one micro-batch, below 2**63 so that every library takes it."""
    return stable_hash(seed, "dropout", step, microbatch) % 2**63
