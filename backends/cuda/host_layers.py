"""Layers whose frozen weights stay in host memory and come to the device when it is their turn.

Forward, a layer's weights come, the layer runs without a graph, and they go; only its input is kept. Backward, from the
last layer down, they come again, the layer runs once more, with a graph and the same dropout, and its gradient is
taken at once. So one layer's weights and activations are on the device at a time. (torch's checkpointing would not do:
bitsandbytes keeps the packed weight of the first pass for the backward pass.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from backends.cuda.halves import part_of
from backends.cuda.memory import GPU
from backends.cuda.nf4 import Nf4Matrix, state_on

Options = Mapping[str, Any]
"""`backends.cuda.layout.Flat.options`"""


class HostLayers:
    """Some consecutive layers of a decoder, adapters included, which stay on the device."""

    def __init__(self, decoder: Any, layers: Sequence[torch.nn.Module], device: torch.device) -> None:
        self._device = device
        self._layers = [_HostLayer(layer, part_of(decoder, [layer]), device) for layer in layers]

    def run(self, states: torch.Tensor, options: Options) -> torch.Tensor:
        """[B, T, hidden] through all layers, without a graph."""
        with torch.no_grad():
            for layer in self._layers:
                states = layer.run(states, options)
        return states

    def run_to_train(
        self, states: torch.Tensor, options: Options
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, Any]]]:
        """As `run`, and what `backward` needs: of each layer its input, and the random state that it began with."""
        kept = []
        with torch.no_grad():
            for layer in self._layers:
                kept.append((states, self._random_state()))
                states = layer.run(states, options)
        return states, kept

    def backward(self, kept: list[tuple[torch.Tensor, Any]], gradient: torch.Tensor, options: Options) -> None:
        """Adds the adapters' gradients to `.grad`.

        Args:
            gradient: of the objective, with respect to what `run_to_train` returned for the same `options`.
        """
        for index in reversed(range(len(self._layers))):
            states, random_state = kept.pop()
            entering = states.detach().requires_grad_(index > 0)
            self._set_random_state(random_state)
            with self._layers[index].on_device(), torch.enable_grad():
                torch.autograd.backward(self._layers[index].part(entering, options), gradient)
            if index > 0:
                assert entering.grad is not None
                gradient = entering.grad

    def _random_state(self) -> Any:
        return torch.cuda.get_rng_state(self._device) if self._device.type == GPU else torch.get_rng_state()

    def _set_random_state(self, state: Any) -> None:
        if self._device.type == GPU:
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)


class _HostLayer:
    def __init__(self, layer: torch.nn.Module, part: Any, device: torch.device) -> None:
        self._part, self._device = part, device
        self._parameters = [
            (module, name, parameter)
            for module in layer.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and not parameter.requires_grad
        ]
        self._matrices = [(module, module.packed, module.state) for module in layer.modules() if _is_packed(module)]

    def part(self, states: torch.Tensor, options: Options) -> torch.Tensor:
        found: torch.Tensor = self._part(inputs_embeds=states, use_cache=False, **options).last_hidden_state
        return found

    def run(self, states: torch.Tensor, options: Options) -> torch.Tensor:
        with self.on_device():
            return self.part(states, options)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it the weights are on the device, as copies; what still needs them afterwards keeps them alive."""
        try:
            for module, name, parameter in self._parameters:
                _put(module, name, _copied(parameter, self._device))
            for module, packed, state in self._matrices:
                module.packed, module.state = packed.to(self._device, copy=True), state_on(state, self._device)
            yield
        finally:
            for module, name, parameter in self._parameters:
                _put(module, name, parameter)
            for module, packed, state in self._matrices:
                module.packed, module.state = packed, state


def _is_packed(module: torch.nn.Module) -> bool:
    return isinstance(module, Nf4Matrix)


def _put(module: Any, name: str, parameter: torch.nn.Parameter) -> None:
    module._parameters[name] = parameter
    if (state := getattr(parameter, "quant_state", None)) is not None:
        module.quant_state = state


def _copied(parameter: Any, device: torch.device) -> torch.nn.Parameter:
    data = parameter.data.to(device, copy=True)
    if getattr(parameter, "quant_state", None) is None:
        return torch.nn.Parameter(data, requires_grad=False)
    return type(parameter)(
        data,
        requires_grad=False,
        quant_state=state_on(parameter.quant_state, device),
        blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        bnb_quantized=True,
    )
