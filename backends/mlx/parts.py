"""What a learner's functions take of a batch: arrays on the device, of all its rows or of some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from backends.mlx.loss import Selection, select_packed, select_targets
from backends.mlx.model import Network
from backends.mlx.packing import Layout, pack
from core.cutting import cut, together
from core.protocols import Batch, IntArray, Prefix


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are computed together."""

    tokens: mx.array
    """What `Network.routed_states` takes."""
    layout: Layout | None
    selection: Selection
    position: mx.array
    target: mx.array
    weight: mx.array
    """[M] each, see `Selection`."""

    @property
    def arrays(self) -> tuple[Layout | None, mx.array, mx.array, mx.array, mx.array]:
        """What the learner's functions take, in their order."""
        return self.layout, self.tokens, self.position, self.target, self.weight


class Cutter:
    """How a learner lays out batches."""

    def __init__(self, network: Network, *, compiled: bool, num_streams: int) -> None:
        """
        Args:
            compiled: functions are compiled for each shape: there are to be few.
            num_streams: what a batch is cut for, where it can be cut.
        """
        self._network = network
        self._exact = not compiled
        self.by_row = network.packs_rows and not compiled
        self.num_streams = num_streams if self.by_row else 1

    def whole(self, batch: Batch) -> Part:
        """All rows; filler rows may be left out."""
        return self._part(batch, None)

    def parts(self, batch: Batch) -> list[Part]:
        """As many as there are streams to compute them, or rows; without those that have no target."""
        if not batch.num_targets:
            return []
        if self.num_streams == 1:
            found = [self._part(batch, None)]
        else:
            rows = cut(batch, self.num_streams, target_cost=self._network.target_cost)
            found = [self._part(batch, some) for some in rows]
        return [part for part in found if part.selection.num_targets]

    def for_evaluation(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[Part]]]:
        """As many batches together as there are streams, so that parts are even, and what of them to compute. Where
        layers are read anew for every part, a batch is one."""
        if self._network.streams:
            yield from ((batch, [self.whole(batch)]) for batch in batches)
            return
        rest = iter(batches)
        while some := list(islice(rest, self.num_streams)):
            alike = len({batch.prefix is None for batch in some}) == 1
            for batch in [together(some)] if alike else some:
                yield batch, self.parts(batch)

    def _part(self, batch: Batch, rows: IntArray | None) -> Part:
        shares = self._network.packs
        if self.by_row or (shares and batch.num_shared):
            packed = pack(batch, rows=rows, by_row=self.by_row, share=shares)
            if self.by_row or packed.layout[0]:
                selection = select_packed(packed, exact=self._exact)
                return _on_device(packed.entering, packed.layout, selection)
        entering = batch.inputs if batch.prefix is None else batch.prefix.states
        return _on_device(entering, None, select_targets(batch, exact=self._exact))


def _on_device(entering: npt.NDArray[np.generic], layout: Layout | None, selection: Selection) -> Part:
    return Part(
        tokens=_states(entering) if np.ndim(entering) > 1 + (layout is None) else mx.array(entering),
        layout=layout,
        selection=selection,
        position=mx.array(selection.position),
        target=mx.array(selection.target),
        weight=mx.array(selection.weight),
    )


def _states(states: npt.NDArray[np.generic]) -> mx.array:
    """bfloat16 comes as its bits."""
    array = mx.array(np.ascontiguousarray(states))
    return array.view(mx.bfloat16) if array.dtype == mx.uint16 else array


def to_prefix(states: mx.array, routed: mx.array | None) -> Prefix:
    """Waits for the device."""
    bits = states.view(mx.uint16) if states.dtype == mx.bfloat16 else states
    return Prefix(np.array(bits), None if routed is None else np.array(routed, np.float32))
