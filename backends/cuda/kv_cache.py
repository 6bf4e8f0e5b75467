"""Keys and values of the tokens so far, in memory that seldom has to grow."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 256
"""Slots that are added when there are no more."""


class KeyValueCache(Cache):  # type: ignore[misc]
    """transformers' `DynamicCache` without its copy of everything at every token.

    It keeps all tokens until it is told to forget some; a sliding window is the mask's business.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_Layer() for _ in range(num_layers)])

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all rows but these."""
        for slots in self._slots():
            slots.replace(slots.used[rows])

    def forget(self, count: int) -> None:
        """Drops the first `count` tokens of every row."""
        for slots in self._slots():
            slots.replace(slots.used[:, :, count:])

    def _slots(self) -> list[_Slots]:
        return [slots for layer in self.layers for slots in (layer.key_slots, layer.value_slots)]


class _Layer(DynamicLayer):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.key_slots, self.value_slots = _Slots(), _Slots()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values [rows, heads, tokens, head size]; returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self.key_slots.append(key_states), self.value_slots.append(value_states)
        return self.keys, self.values


class _Slots:
    """A tensor [rows, heads, tokens, head size] that grows at the end, with room for more."""

    def __init__(self) -> None:
        self._all = torch.empty(0, 0, 0, 0)
        self._num_used = 0

    @property
    def used(self) -> torch.Tensor:
        return self._all[:, :, : self._num_used]

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Returns what is used then."""
        start, end = self._num_used, self._num_used + new.shape[2]
        if end > self._all.shape[2]:
            rows, heads, _, size = new.shape
            larger = new.new_empty(rows, heads, end + ROOM, size)
            if start:
                larger[:, :, :start] = self.used
            self._all = larger
        self._all[:, :, start:end] = new
        self._num_used = end
        return self.used

    def replace(self, used: torch.Tensor) -> None:
        """Makes this all that is used, in memory of its own."""
        self._num_used = 0
        self._all = used[:, :, :0]
        self.append(used)
