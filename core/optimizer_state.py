"""AdamW's moments in 8 bits and in 32: what they are called, and the way from the one to the other.

bitsandbytes keeps a large tensor's moments block-wise in 8 bits (arXiv:2110.02861): `state1` (the mean of the
gradients) and `state2` (of their squares) hold the number of a level in uint8, `qmap1` and `qmap2` the 256 levels in
float32, `absmax1` and `absmax2` (float32) the largest magnitude of each 256 values of the flattened tensor, of which
the last block may be short. A value is `qmap[state] * absmax[block]`. Small tensors have `state1` and `state2` in
float32. MLX and PyTorch on a CPU keep `exp_avg` and `exp_avg_sq` in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from core.protocols import Tensors

BLOCK_SIZE = 256
"""Values that share a scale."""
MOMENTS = {"state1": "exp_avg", "state2": "exp_avg_sq"}
"""Slot of bitsandbytes -> slot of the same moment in float32."""


def is_eight_bit(optimizer: Tensors) -> bool:
    """Whether this state was kept by 8-bit AdamW, its small tensors in float32 included."""
    return any(key.startswith(f"{slot}/") for key in optimizer for slot in MOMENTS)


def is_adamw(optimizer: Tensors) -> bool:
    """Whether this is AdamW's state in 32 bits."""
    return {key.partition("/")[0] for key in optimizer} == set(MOMENTS.values())


def dequantised(optimizer: Tensors) -> Tensors:
    """The same moments as `exp_avg` and `exp_avg_sq` in float32; a state that is not 8-bit is given back as it is.

    Args:
        optimizer: `<slot>/<tensor name>` -> array, as in `core.protocols.TrainState`.
    """
    if not is_eight_bit(optimizer):
        return optimizer
    moments: dict[str, npt.NDArray[np.generic]] = {}
    for key, values in optimizer.items():
        slot, _, name = key.partition("/")
        if slot not in MOMENTS:
            continue
        if values.dtype == np.uint8:
            number = slot[-1]
            values = dequantise_blockwise(
                values, levels=optimizer[f"qmap{number}/{name}"], absmax=optimizer[f"absmax{number}/{name}"]
            )
        moments[f"{MOMENTS[slot]}/{name}"] = values
    return moments


def dequantise_blockwise(
    codes: npt.NDArray[np.generic], *, levels: npt.NDArray[np.generic], absmax: npt.NDArray[np.generic]
) -> npt.NDArray[np.float32]:
    """Float32 values, in the shape of `codes`.

    Args:
        codes: uint8, of any shape.
        levels: float32 [256].
        absmax: float32 [ceil(codes.size / 256)].
    """
    flat: Any = codes.reshape(-1)
    scale = np.repeat(absmax.astype(np.float32), BLOCK_SIZE)[: flat.size]
    values: npt.NDArray[np.float32] = (levels.astype(np.float32)[flat] * scale).reshape(codes.shape)
    return values
