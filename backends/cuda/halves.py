"""The decoder cut at the first layer with an adapter: what is below gives a row the same states for ever."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from backends.cuda.routers import RouterWatch
from backends.cuda.workers import Workers
from core.portions import portions
from core.protocols import Prefix, TokenArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backends.cuda.streaming import Pieces

States = tuple[torch.Tensor, torch.Tensor | None]
"""Of a row: what enters the first layer with an adapter, [T, hidden]; of a mixture, `core.protocols.Prefix.routed`."""
Send = Callable[[TokenArray], torch.Tensor]
"""Token ids to int64 on the device."""
ROWS_AT_A_TIME = 16
"""Rows whose states wait on the device to be read."""


class FrozenLayers:
    """The layers below the first adapter, in memory with all others."""

    def __init__(self, decoder: Any, num_layers: int, workers: Workers) -> None:
        self._part = part_of(decoder, decoder.layers[:num_layers])
        self._routers = RouterWatch(self._part)
        self._workers = workers

    def run(self, rows: Sequence[TokenArray], *, send: Send) -> Iterator[States]:
        """Of each row, token ids [T], its states. In the caller's mode and compute type.

        Between one group of `ROWS_AT_A_TIME` and the next, nothing is under way.
        """
        if self._routers:
            yield from (self._watched(send(row[None])) for row in rows)
            return
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            yield from self._workers.map(
                lambda row: (self._states(send(row[None])), None), rows[start : start + ROWS_AT_A_TIME]
            )

    def _watched(self, tokens: torch.Tensor) -> States:
        with self._routers.watching():
            states = self._states(tokens)
        return states, self._routers.routed()

    def _states(self, tokens: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self._part(input_ids=tokens, use_cache=False).last_hidden_state[0]
        return states


class AbsentLayers:
    """The same, but for a layer's weights, which are read when its turn comes and gone after it.

    A whole portion of the rows goes through a layer before the next one is read.
    """

    def __init__(self, base: PreTrainedModel, pieces: Pieces, num_layers: int) -> None:
        """`base`: its first `num_layers` have no weights, and no hooks yet. `workers` are set before it runs."""
        whole: Any = base
        self._base, self._decoder, self._pieces = base, whole.model, pieces
        self._empty = [copy.deepcopy(layer) for layer in whole.model.layers[:num_layers]]
        self.workers: Workers | None = None

    def run(self, rows: Sequence[TokenArray], *, send: Send) -> Iterator[States]:
        """As `FrozenLayers.run`, and to the same bits: a row has as many cores as it has there."""
        assert self.workers is not None, "nobody to do the work"
        table = self._decoder.embed_tokens.weight
        for portion in portions(rows, bytes_per_token=table.shape[1] * table.element_size()):
            states = [self._decoder.embed_tokens(send(row[None])) for row in portion]
            routed: list[list[torch.Tensor]] = [[] for _ in portion]
            for number in range(len(self._empty)):
                with self._loaded(number) as part:
                    routers = RouterWatch(part)
                    if not routers:
                        states = list(self.workers.map(functools.partial(_after, part), states))
                        continue
                    for index, entering in enumerate(states):
                        with routers.watching():
                            states[index] = _after(part, entering)
                        routed[index].append(routers.routed())
            for leaving, found in zip(states, routed, strict=True):
                yield leaving[0], torch.cat(found, dim=1) if found else None

    @contextmanager
    def _loaded(self, number: int) -> Iterator[Any]:
        """The decoder with one layer only, its weights read."""
        layers = self._decoder.layers
        without = layers[number]
        layers[number] = copy.deepcopy(self._empty[number])
        try:
            self._pieces.install_layer(self._base, number)
            layers[number].requires_grad_(False)
            yield part_of(self._decoder, [layers[number]])
        finally:
            layers[number] = without


def _after(part: Any, entering: torch.Tensor) -> torch.Tensor:
    """States [1, T, hidden] after the layers of a part."""
    states: torch.Tensor = part(inputs_embeds=entering, use_cache=False).last_hidden_state
    return states


def changes_as_it_runs(decoder: Any) -> bool:
    """Whether its rotary embedding rewrites its own frequencies in a forward pass, for rows longer than it knew."""
    kind = getattr(decoder.rotary_emb, "rope_type", "default")
    return kind == "longrope" or "dynamic" in kind


def part_of(decoder: Any, layers: Iterable[torch.nn.Module], *, norm: torch.nn.Module | None = None) -> Any:
    """transformers' decoder with some of its layers only: they are shared, not copied.

    Args:
        norm: what follows the last of them; None: nothing.
    """
    part = copy.copy(decoder)
    part._modules = dict(decoder._modules)
    part.layers, part.norm = torch.nn.ModuleList(layers), norm or torch.nn.Identity()
    return part


def to_prefix(states: torch.Tensor, routed: torch.Tensor | None) -> Prefix:
    """From the device: states [T, hidden]; waits for it."""
    bits = states.view(torch.uint16) if states.dtype == torch.bfloat16 else states
    return Prefix(bits.cpu().numpy(), None if routed is None else routed.float().cpu().numpy())


def states_of(prefix: Prefix, dtype: torch.dtype) -> torch.Tensor:
    """The states [B, T, hidden] of a batch in the compute type, on the host."""
    values = np.ascontiguousarray(prefix.states)
    if dtype == torch.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    states = torch.from_numpy(values)
    assert states.dtype == dtype, f"stored states are {states.dtype}, not {dtype}"
    return states
