"""Cross-entropy at the target positions only, never as [B, T, V] logits.

Most positions of a training batch are prompt or padding. The positions with a target are gathered from the hidden
states first; the output projection and the float32 log-softmax see nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from backends.mlx import columns, fastmath
from backends.mlx.columns import Vocabulary
from backends.mlx.packing import Packed
from core.protocols import IGNORE, Batch, IntArray

Project = Callable[[mx.array], mx.array]
"""Hidden states [M, D] to logits [M, V]."""

CHUNK = 1024
"""Target positions whose float32 logits exist at a time: 131 MB at a vocabulary of 32,000."""
_CPU_CHUNK = 128
"""The most on a CPU: 25 MB at a vocabulary of 49,152."""
_CPU_CHUNK_BYTES = 32 << 20
"""What is larger, the allocator returns to the system at once, and getting it anew costs more than the arithmetic."""
_SMALLEST = 32


@dataclass(frozen=True, slots=True)
class Selection:
    """The target positions of a batch, where it is compiled padded to one of a few lengths M."""

    position: np.ndarray
    """int32 [M]: b * T + t, or the place among packed positions; 0 in the padding."""
    target: np.ndarray
    """int32 [M]: token ids; 0 in the padding."""
    weight: np.ndarray
    """float32 [M]: 1, and 0 in the padding."""
    row: np.ndarray
    """int64 [num_targets]: the row b of each position that is not padding."""

    @property
    def num_targets(self) -> int:
        return len(self.row)


def select_targets(batch: Batch, *, exact: bool = False) -> Selection:
    """The target positions of a batch.

    Args:
        exact: no padding: for functions that are not compiled.
    """
    rows, width = batch.targets.shape
    return _select(batch.targets.reshape(-1), np.arange(rows).repeat(width), exact=exact)


def select_packed(packed: Packed, *, exact: bool = False) -> Selection:
    """As `select_targets`, of packed positions [N]; rows are still the batch's."""
    return _select(packed.targets, packed.row, exact=exact)


def _select(targets: npt.NDArray[np.int32], rows: IntArray, *, exact: bool) -> Selection:
    (found,) = np.nonzero(targets != IGNORE)
    count = len(found)
    size = max(count, 1) if exact else padded_size(count)
    position, target = np.zeros(size, np.int32), np.zeros(size, np.int32)
    weight = np.zeros(size, np.float32)
    position[:count] = found
    target[:count] = targets[found]
    weight[:count] = 1.0
    return Selection(position, target, weight, rows[found])


def padded_size(count: int) -> int:
    """The next power of two from 32 up to `CHUNK`, then the next multiple of `CHUNK`."""
    if count > CHUNK:
        return -(-count // CHUNK) * CHUNK
    return max(_SMALLEST, 1 << (count - 1).bit_length()) if count else _SMALLEST


def summed_loss(
    project: Project,
    hidden: mx.array,
    position: mx.array,
    target: mx.array,
    weight: mx.array,
    *,
    vocabulary: Vocabulary | None,
    label_smoothing: float,
) -> tuple[mx.array, mx.array]:
    """Sums over the target positions of one micro-batch.

    Each chunk's gradient is taken at once, in the forward pass: its logits are computed once and are gone before the
    next chunk's come (as in Liger's fused linear cross-entropy, arXiv:2410.10989).

    Args:
        hidden: [B, T, D] (packed: [N, D]) after the final norm.
        position, target, weight: [M], see `Selection`.
        vocabulary: what `project` multiplies by, on a CPU; None: whatever `project` does.
        label_smoothing: share e of the probability spread over the vocabulary (arXiv:1512.00567):
            (1 - e) * CE + e * mean over the vocabulary of -log p.

    Returns:
        A float32 scalar that has the gradient of the optimised loss (and not its value), and the pure cross-entropy,
        a float32 scalar in nats.
    """

    def objective(selected: mx.array, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        logits, log_total = _logits(project, selected)
        loss = log_total - _picked(logits, ids)
        smoothed = loss
        if label_smoothing:
            uniform = log_total - _mean(logits)
            smoothed = (1 - label_smoothing) * loss + label_smoothing * uniform
        return (smoothed * weights).sum(), (loss * weights).sum()

    chosen = _flatten(hidden)[position]
    if vocabulary is not None:
        losses, slopes = columns.losses_and_slopes(vocabulary, chosen, target, label_smoothing=label_smoothing)
        return (slopes * weight[:, None] * chosen).sum(), (losses * weight).sum()
    slope_of = mx.value_and_grad(objective)
    carrier, total = mx.array(0.0), mx.array(0.0)
    for selected, ids, weights in _chunks(project, chosen, target, weight):
        start = mx.depends(mx.stop_gradient(selected), [total])
        (_, loss), slope = slope_of(start, ids, weights)
        loss, slope = mx.depends([loss, slope], [loss, slope])
        carrier = carrier + (mx.stop_gradient(slope) * selected).astype(mx.float32).sum()
        total = total + mx.stop_gradient(loss)
    return carrier, total


def token_losses(
    project: Project, hidden: mx.array, position: mx.array, target: mx.array, *, vocabulary: Vocabulary | None
) -> mx.array:
    """Cross-entropy of each selected position, float32 [M] in nats; the arguments are as of `summed_loss`."""
    if vocabulary is not None:
        return columns.losses_of(vocabulary, _flatten(hidden)[position], target)
    return token_replay(project, hidden, position, target)[0]


def token_replay(project: Project, hidden: mx.array, position: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
    """As `token_losses`, and the most likely token at each position: float32 [M] and uint32 [M]."""
    losses: list[mx.array] = []
    greedy: list[mx.array] = []
    for selected, ids in _chunks(project, _flatten(hidden)[position], target):
        logits, log_total = _logits(project, mx.depends(selected, losses[-1:]) if losses else selected)
        losses.append(log_total - _picked(logits, ids))
        greedy.append(mx.argmax(logits, axis=-1))
    return mx.concatenate(losses), mx.concatenate(greedy)


def host_logits(project: Project, hidden: mx.array, position: mx.array) -> np.ndarray:
    """The logits of each selected position themselves, float32 [M, V] on the host; on the device a chunk at a time.

    Waits for the device at every chunk. `hidden` is as of `summed_loss`.
    """
    chunks = _chunks(project, _flatten(hidden)[position])
    return np.concatenate([np.array(project(selected).astype(mx.float32)) for (selected,) in chunks])


def _flatten(hidden: mx.array) -> mx.array:
    return hidden.reshape(-1, hidden.shape[-1])


def _logits(project: Project, selected: mx.array) -> tuple[mx.array, mx.array]:
    """Float32 logits [M, V] and their logsumexp [M]."""
    logits = project(selected).astype(mx.float32)
    return logits, log_sum_exp(logits)


def log_sum_exp(logits: mx.array) -> mx.array:
    """log(sum(exp)) over the vocabulary: [M, V] to [M]."""
    return fastmath.log_sum_exp(logits) if fastmath.on_cpu() else mx.logsumexp(logits, axis=-1)


def _mean(logits: mx.array) -> mx.array:
    """Mean over the vocabulary, in blocks, because one float32 added after the other loses digits."""
    return fastmath.blocks(logits, fill=0.0).sum(axis=-1).sum(axis=-1) / logits.shape[-1]


def _picked(logits: mx.array, ids: mx.array) -> mx.array:
    return mx.take_along_axis(logits, ids[:, None], axis=-1).squeeze(-1)


def _chunks(project: Project, selected: mx.array, *others: mx.array) -> Iterator[tuple[mx.array, ...]]:
    size = CHUNK
    if fastmath.on_cpu():
        size = min(CHUNK, cpu_chunk(project(selected[:1]).shape[-1]))  # MLX is lazy: nothing is computed for a shape
    for start in range(0, len(selected), size):
        yield tuple(array[start : start + size] for array in (selected, *others))


def cpu_chunk(vocab_size: int) -> int:
    """Target positions whose float32 logits exist at a time on a CPU, a multiple of 16."""
    return min(_CPU_CHUNK, max(16, _CPU_CHUNK_BYTES // (4 * vocab_size) // 16 * 16))
