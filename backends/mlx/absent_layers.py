"""Layers whose weights are not kept: read when it is their turn, gone after it.

The layers below the first adapter, to fill the prefix store (`model.low_memory`), and those above it, forward and
backward (`model.stream_layers`). What these functions do waits for the device after every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from backends.mlx.routers import Routed
from core.portions import portions
from core.protocols import TokenArray

if TYPE_CHECKING:
    from backends.mlx.model import Network

Arrays = Mapping[str, mx.array]
States = tuple[mx.array, mx.array | None]
"""Of a row: what enters the first layer with an adapter, [T, D]; of a mixture, `core.protocols.Prefix.routed`."""


def prefixes(network: Network, rows: Sequence[TokenArray]) -> Iterator[States]:
    """Of each row, token ids [T], its states; one row at a time, without padding.

    Where the layers' weights are absent they are read one layer at a time, and a whole portion of the rows goes through
    a layer before the next one is read.
    """
    if network.read_again is None:
        frozen = range(network.num_prefix_layers)
        for row in rows:
            states, routed = _below(network, network.module.layers, frozen, _embedded(network, row))
            yield states[0], mx.stack(routed, axis=1) if routed else None
        return
    for portion in portions(rows, bytes_per_token=network.module.model.norm.weight.nbytes):
        yield from _portion(network, _read_again(network), [_embedded(network, row) for row in portion])


def _portion(network: Network, layers: list[Any], waiting: list[mx.array]) -> Iterator[States]:
    routed: list[list[mx.array]] = [[] for _ in waiting]
    for number in range(network.num_prefix_layers):
        for index, entering in enumerate(waiting):
            waiting[index], found = _below(network, layers, [number], entering)
            routed[index] += found
            mx.async_eval(waiting[index], found)
        mx.eval(waiting, routed)
        layers[number] = None  # its weights go
    for states, found in zip(waiting, routed, strict=True):
        yield states[0], mx.stack(found, axis=1) if found else None


def _embedded(network: Network, row: TokenArray) -> mx.array:
    """[1, T, D]"""
    return network.module.model.embed_tokens(mx.array(row.astype(np.int32))[None])


def _below(
    network: Network, layers: list[Any], numbers: Iterable[int], states: mx.array
) -> tuple[mx.array, list[mx.array]]:
    """The states after frozen layers, and of a mixture for each of these [2, experts]."""
    is_token = mx.ones(states.shape[:2], mx.float32) if network.is_mixture else None
    states, found = network.run(numbers, states, {}, layers=layers, is_token=is_token)
    return states, [mx.stack([counts, probabilities]) for counts, probabilities in found]


def run_streamed(
    network: Network, numbers: Iterable[int], hidden: mx.array, parameters: Arrays, *, is_token: mx.array | None
) -> tuple[mx.array, list[Routed]]:
    """As `Network.run`, without a gradient."""
    layers = _read_again(network)
    routed: list[Routed] = []
    for number in numbers:
        with _filled(network, number, layers):
            hidden, found = network.run([number], hidden, parameters, is_token=is_token)
            mx.eval(hidden, found)
        routed += found
    return hidden, routed


def streamed_gradients(
    network: Network,
    parameters: Arrays,
    tokens: mx.array,
    loss: Callable[[mx.array], tuple[mx.array, mx.array]],
    *,
    keys: mx.array | None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """What `loss` says, and the gradient of its objective with respect to `parameters`; a layer at a time.

    Forward, only each layer's input is kept; backward, from the last layer down, its weights are read again and its
    gradient is taken at once. So one layer's weights and activations are in memory at a time.

    Args:
        tokens, keys: as of `Network.routed_states`.
        loss: of hidden states [B, T, D] after the final norm the objective and what to report.
    """
    hidden, numbers = network.entering(tokens)
    layers = _read_again(network)
    entering: list[mx.array] = []
    for number in numbers:
        entering.append(hidden)
        with _filled(network, number, layers):
            hidden, _ = network.run([number], hidden, parameters, keys=keys)
            mx.eval(hidden)
    norm = network.module.model.norm
    (_, reported), slope = mx.value_and_grad(lambda states: loss(norm(states)))(hidden)
    mx.eval(reported, slope)
    gradients: dict[str, mx.array] = {}
    layers = _read_again(network)
    for number in reversed(numbers):
        names = network.names_of(number)

        def layer(*arrays: mx.array, number: int = number, names: list[str] = names) -> list[mx.array]:
            *own, states = arrays
            return [network.run([number], states, dict(zip(names, own, strict=True)), keys=keys)[0]]

        with _filled(network, number, layers):
            _, slopes = mx.vjp(layer, [*(parameters[name] for name in names), entering.pop()], [slope])
            mx.eval(slopes)
        *own, slope = slopes
        gradients |= dict(zip(names, own, strict=True))
    return reported, {name: gradients[name] for name in parameters}


def _read_again(network: Network) -> list[Any]:
    """All layers, nothing of them read yet."""
    assert network.read_again is not None
    layers: list[Any] = network.read_again().layers
    return layers


@contextmanager
def _filled(network: Network, number: int, layers: list[Any]) -> Iterator[None]:
    """Within it the network's layer has the weights of the one in `layers`, which is used up."""
    places = []
    for path, module in layers[number].named_modules():
        mine = network.module.layers[number]
        for part in path.split(".") if path else ():
            mine = mine[int(part)] if isinstance(mine, list) else mine[part]
            mine = mine.linear if hasattr(mine, "lora_a") else mine
        for name, array in module.items():
            if isinstance(array, mx.array):
                places.append((mine, name, mine[name]))
                mine[name] = array
    layers[number] = None
    try:
        yield
    finally:
        for mine, name, unread in places:
            mine[name] = unread
