"""Layers whose weights are not kept: read when it is their turn, gone after it.

The layers below the first adapter, to fill the prefix store (`model.low_memory`), and those above it, forward and
backward (`model.stream_layers`). What these functions do waits for the device after every layer.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from backends.mlx.cores import num_cores, num_streams, on_streams
from backends.mlx.packing import Layout
from backends.mlx.routers import Routed
from core.portions import portions
from core.protocols import TokenArray

if TYPE_CHECKING:
    from backends.mlx.model import Network

Arrays = Mapping[str, mx.array]
States = tuple[mx.array, mx.array | None]
"""Of a row: what enters the first layer with an adapter, [T, D]; of a mixture, `core.protocols.Prefix.routed`."""


def prefixes(network: Network, rows: Sequence[TokenArray]) -> Generator[States, None, None]:
    """Of each row, token ids [T], its states; one row at a time, without padding.

    Where the layers' weights are absent they are read one layer at a time, and a whole portion of the rows goes through
    a layer before the next one is read.
    """
    if network.read_again is None:
        if network.packs_rows:
            work = functools.partial(_states_of_row, network)
            # As many cores for each product whatever the number of rows, on which a row's bits must not depend.
            cores_each = num_cores() // num_streams()
            with closing(on_streams(work, rows, count=num_streams(), blas=cores_each)) as found:
                yield from found
            return
        for row in rows:
            yield _of_row(*_below(network, network.module.layers, network.frozen, _embedded(network, row)))
        return
    for portion in portions(rows, bytes_per_token=network.module.model.norm.weight.nbytes):
        yield from _portion(network, _read_again(network), [_embedded(network, row) for row in portion])


def _states_of_row(network: Network, row: TokenArray) -> States:
    return _of_row(*_below(network, network.module.layers, network.frozen, _embedded(network, row)))


def _portion(network: Network, layers: list[Any], waiting: list[mx.array]) -> Iterator[States]:
    routed: list[list[mx.array]] = [[] for _ in waiting]
    for number in network.frozen:
        for index, entering in enumerate(waiting):
            waiting[index], found = _below(network, layers, [number], entering)
            routed[index] += found
            mx.async_eval(waiting[index], found)
        mx.eval(waiting, routed)
        layers[number] = None  # its weights go
    for states, found in zip(waiting, routed, strict=True):
        yield _of_row(states, found)


def _of_row(states: mx.array, routed: list[mx.array]) -> States:
    """Of states [1, T, D], or [T, D]."""
    return states.reshape(-1, states.shape[-1]), mx.stack(routed, axis=1) if routed else None


def _embedded(network: Network, row: TokenArray) -> mx.array:
    """[1, T, D]; where positions are packed, [T, D]."""
    tokens = mx.array(row.astype(np.int32))
    return network.module.model.embed_tokens(tokens if network.packs_rows else tokens[None])


def _below(
    network: Network, layers: list[Any], numbers: Iterable[int], states: mx.array
) -> tuple[mx.array, list[mx.array]]:
    """The states after frozen layers, and of a mixture for each of these [2, experts]."""
    if network.packs_rows:
        layout = (0, ((1, len(states)),))
        return network.run(numbers, states, {}, layers=layers, layout=layout)[0], []
    is_token = mx.ones(states.shape[:2], mx.float32) if network.is_mixture else None
    states, found = network.run(numbers, states, {}, layers=layers, is_token=is_token)
    return states, [mx.stack([counts, probabilities]) for counts, probabilities in found]


def run_streamed(
    network: Network,
    numbers: Iterable[int],
    hidden: mx.array,
    parameters: Arrays,
    *,
    layout: Layout | None,
    is_token: mx.array | None,
) -> tuple[mx.array, list[Routed]]:
    """As `Network.run`, without a gradient."""
    layers = _read_again(network)
    routed: list[Routed] = []
    for number in numbers:
        with _filled(network, number, layers):
            hidden, found = network.run([number], hidden, parameters, layout=layout, is_token=is_token)
            mx.eval(hidden, found)
        routed += found
    return hidden, routed


@dataclass(slots=True)
class StreamedPart:
    """Rows whose gradient is taken together."""

    tokens: mx.array
    layout: Layout | None
    keys: mx.array | None
    """These three are as of `Network.routed_states`."""
    loss: Callable[[mx.array], tuple[mx.array, mx.array]]
    """Of hidden states after the final norm the objective and what to report."""

    @property
    def num_positions(self) -> int:
        return math.prod(self.tokens.shape[: 2 if self.layout is None else 1])


def streamed_gradients(
    network: Network, parameters: Arrays, parts: Sequence[StreamedPart]
) -> list[tuple[mx.array, dict[str, mx.array]]]:
    """What each part's `loss` says, and the gradient of its objective with respect to `parameters`; a layer at a time.

    Forward, only each layer's inputs are kept; backward, from the last layer down, its weights are read again and its
    gradients are taken at once. So one layer's weights and activations are in memory at a time. All layers are read
    once for as many parts as have room for these inputs together (`core.portions`).
    """
    num_bytes = network.module.model.norm.weight.nbytes * len(network.module.layers)
    positions = [np.broadcast_to(np.int32(0), part.num_positions) for part in parts]
    rest, found = iter(parts), []
    for portion in portions(positions, bytes_per_token=num_bytes):
        found += _gradients_together(network, parameters, list(itertools.islice(rest, len(portion))))
    return found


def _gradients_together(
    network: Network, parameters: Arrays, parts: Sequence[StreamedPart]
) -> list[tuple[mx.array, dict[str, mx.array]]]:
    entered = [network.entering(part.tokens) for part in parts]
    states, numbers = [hidden for hidden, _ in entered], entered[0][1]
    assert all(others == numbers for _, others in entered), "parts that enter at different layers"
    layers = _read_again(network)
    entering: list[list[mx.array]] = []
    for number in numbers:
        entering.append(states)
        with _filled(network, number, layers):
            states = [
                network.run([number], hidden, parameters, layout=part.layout, keys=part.keys)[0]
                for part, hidden in zip(parts, states, strict=True)
            ]
            mx.eval(states)
    reported, slopes = [], []
    for part, hidden in zip(parts, states, strict=True):
        (_, said), slope = mx.value_and_grad(functools.partial(_loss_of, network, part))(hidden)
        mx.eval(said, slope)
        reported.append(said)
        slopes.append(slope)
    gradients: list[dict[str, mx.array]] = [{} for _ in parts]
    layers = _read_again(network)
    for number in reversed(numbers):
        before = entering.pop()
        with _filled(network, number, layers):
            for index, part in enumerate(parts):
                own, slopes[index] = _layer_gradient(network, number, parameters, part, before[index], slopes[index])
                mx.eval(own, slopes[index])
                gradients[index] |= own
    return [(said, {name: own[name] for name in parameters}) for said, own in zip(reported, gradients, strict=True)]


def _loss_of(network: Network, part: StreamedPart, hidden: mx.array) -> tuple[mx.array, mx.array]:
    return part.loss(network.module.model.norm(hidden))


def _layer_gradient(
    network: Network, number: int, parameters: Arrays, part: StreamedPart, entering: mx.array, slope: mx.array
) -> tuple[dict[str, mx.array], mx.array]:
    """Of the layer's parameters, and of what enters it."""
    names = network.names_of(number)

    def layer(*arrays: mx.array) -> list[mx.array]:
        *own, states = arrays
        given = dict(zip(names, own, strict=True))
        return [network.run([number], states, given, layout=part.layout, keys=part.keys)[0]]

    _, slopes = mx.vjp(layer, [*(parameters[name] for name in names), entering], [slope])
    *own, below = slopes
    return dict(zip(names, own, strict=True)), below


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
