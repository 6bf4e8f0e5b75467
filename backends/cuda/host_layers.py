"""Layers whose frozen weights stay in host memory and come to the device when it is their turn.

Forward, a layer's weights come, the layer runs without a graph, and they go; only its input is kept. Backward, from the
last layer down, they come again, the layer runs once more, with a graph and the same dropout, and its gradient is
taken at once. So one layer's weights and activations are on the device at a time. (torch's checkpointing would not do:
bitsandbytes keeps the packed weight of the first pass for the backward pass.)

On a CPU a batch comes in parts, each with a thread of its own: through each layer they go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from backends.cuda.dropout import Masks
from backends.cuda.halves import part_of
from backends.cuda.memory import GPU
from backends.cuda.nf4 import Nf4Matrix, state_on
from backends.cuda.optim import add_gradients
from backends.cuda.workers import Workers

PartStates = Sequence[torch.Tensor]
"""Of each part of a batch, [B, T, hidden], or [1, N, hidden] of rows that lie end to end."""
Options = Sequence[Mapping[str, Any]]
"""Of each part, `backends.cuda.layout.Flat.options`."""


class HostLayers:
    """Some consecutive layers of a decoder, adapters included, which stay on the device."""

    def __init__(self, decoder: Any, layers: Sequence[torch.nn.Module], device: torch.device, workers: Workers) -> None:
        self._device = device
        self._layers = [_HostLayer(layer, part_of(decoder, [layer]), device, workers) for layer in layers]

    def run(self, states: PartStates, options: Options) -> PartStates:
        """Through all layers, without a graph."""
        for layer in self._layers:
            states = layer.run(states, options)
        return states

    def run_to_train(
        self, states: PartStates, options: Options, masks: Sequence[Masks]
    ) -> tuple[PartStates, list[tuple[PartStates, Any]]]:
        """As `run`, and what `backward` needs: of each layer its inputs, and the random state that it began with.

        Args:
            masks: of each part.
        """
        kept = []
        for layer in self._layers:
            kept.append((states, self._random_state()))
            states = layer.run(states, options, masks)
        return states, kept

    def backward(
        self, kept: list[tuple[PartStates, Any]], gradients: PartStates, options: Options, masks: Sequence[Masks]
    ) -> None:
        """Adds the adapters' gradients to `.grad`, one part's after the other's.

        Args:
            gradients: of the objective, with respect to what `run_to_train` returned for these `options` and `masks`.
        """
        for index in reversed(range(len(self._layers))):
            states, random_state = kept.pop()
            self._set_random_state(random_state)
            gradients = self._layers[index].backward(states, gradients, options, masks, is_lowest=index == 0)

    def _random_state(self) -> Any:
        return torch.cuda.get_rng_state(self._device) if self._device.type == GPU else torch.get_rng_state()

    def _set_random_state(self, state: Any) -> None:
        if self._device.type == GPU:
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)


class _HostLayer:
    def __init__(self, layer: torch.nn.Module, part: Any, device: torch.device, workers: Workers) -> None:
        self._part, self._device, self._workers = part, device, workers
        self._trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        self._parameters = [
            (module, name, parameter)
            for module in layer.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and not parameter.requires_grad
        ]
        self._matrices = [(module, module.packed, module.state) for module in layer.modules() if _is_packed(module)]

    def run(self, states: PartStates, options: Options, masks: Sequence[Masks] | None = None) -> PartStates:
        def leaving(index: int) -> torch.Tensor:
            with nullcontext() if masks is None else masks[index].used():
                return self._leaving(states[index], options[index])

        with self._on_device(), torch.no_grad():
            return self._workers.spread(leaving, range(len(states)))

    def backward(
        self,
        states: PartStates,
        gradients: PartStates,
        options: Options,
        masks: Sequence[Masks],
        *,
        is_lowest: bool,
    ) -> PartStates:
        """Adds to `.grad`; returns the gradients of `states`, of the lowest layer nothing."""

        def of_part(index: int) -> tuple[torch.Tensor, ...]:
            entering = states[index].detach().requires_grad_(not is_lowest)
            wanted = self._trained if is_lowest else [*self._trained, entering]
            with masks[index].used():
                found: tuple[torch.Tensor, ...] = torch.autograd.grad(
                    self._leaving(entering, options[index]), wanted, gradients[index]
                )
            return found

        with self._on_device(), torch.enable_grad():
            found = self._workers.spread(of_part, range(len(states)))
        for of_one in found:
            add_gradients(self._trained, of_one[: len(self._trained)])
        return [] if is_lowest else [of_one[-1] for of_one in found]

    def _leaving(self, states: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        # entered anew for each pass: a cast that was made without a graph would be used again in one
        with self._workers.mode():
            found: torch.Tensor = self._part(inputs_embeds=states, use_cache=False, **options).last_hidden_state
        return found

    @contextmanager
    def _on_device(self) -> Iterator[None]:
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
