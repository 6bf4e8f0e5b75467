"""Products of float32 numbers that keep all their bits.

GPUs may round the factors to TF32's 11 bits, and MLX lets them by default. Where two sides are compared in float32,
that would be the largest difference by far. Both libraries read their setting when they are loaded.
"""

from __future__ import annotations

import os

WHOLE_FLOAT32 = {"MLX_ENABLE_TF32": "0", "NVIDIA_TF32_OVERRIDE": "0"}
"""Environment of a process that compares in float32."""


def use_whole_float32() -> None:
    """For this process and those it starts; has to be called before a tensor library is loaded."""
    os.environ |= WHOLE_FLOAT32
