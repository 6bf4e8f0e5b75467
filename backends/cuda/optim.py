"""Optimisers of the adapter: float32 parameters, moments that cross the boundary as NumPy.

AdamW is torch's own, and bitsandbytes' with 8-bit state on a GPU. Lion, SGD and Adafactor are written out here,
because torch's SGD couples its weight decay with the momentum and torch's Adafactor scales the rate by the parameter.
Decay is decoupled everywhere (Loshchilov and Hutter, arXiv:1711.05101): p *= 1 - lr * weight_decay, first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from core.config import OptimConfig
from core.errors import UserError
from core.optimizer_state import BLOCK_SIZE, MOMENTS, dequantised, is_adamw
from core.protocols import Tensors

Array = npt.NDArray[np.generic]
Slots = dict[str, dict[str, torch.Tensor]]
"""Slot name -> tensor name -> state."""

MIN_8BIT_SIZE = 4096
"""Elements below which bitsandbytes keeps a tensor's state in float32 (its own default)."""


class Optimizer(ABC):
    """Updates named parameters from their `.grad`, at the rate it is given."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: OptimConfig) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.num_steps = 0
        """Updates applied so far."""

    def step(self, lr: float) -> None:
        """One update at rate `lr`. Every parameter must have a gradient."""
        self.num_steps += 1
        with torch.no_grad():
            self._update(lr)

    def export_slots(self) -> dict[str, Array]:
        """State as `<slot>/<tensor name>` -> NumPy copy; empty before the first step."""
        return {
            f"{slot}/{name}": to_numpy(tensor)
            for slot, tensors in self._slots().items()
            for name, tensor in tensors.items()
        }

    def import_slots(self, arrays: Tensors, *, num_steps: int) -> None:
        """Takes over what `export_slots` gave, bit for bit; nothing at all means a fresh optimiser.

        AdamW also takes moments in the precision that it does not keep itself, and converts them.

        Raises:
            UserError: the state of another optimiser, or of other tensors.
        """
        slots: dict[str, dict[str, Array]] = {}
        for key, array in self._in_own_precision(arrays).items():
            slot, _, name = key.partition("/")
            if name not in self.parameters:
                raise UserError(
                    f"the optimiser state has {key!r}, but this adapter has no such tensor",
                    hint="resume with the lora settings that the checkpoint was made with",
                )
            slots.setdefault(slot, {})[name] = array
        if (num_steps > 0 or slots) and not self._is_whole(slots):
            found, wanted = ", ".join(sorted(slots)) or "nothing", ", ".join(self._slot_names())
            raise UserError(
                f"the optimiser state holds {found}, not the {wanted or 'nothing'} of "
                f"optim.name {self.config.name} with optim.state_bits {self.config.state_bits}",
                hint="resume with the optim settings and the lora settings of the checkpoint",
            )
        self._load(slots, num_steps)
        self.num_steps = num_steps

    def _in_own_precision(self, arrays: Tensors) -> Tensors:
        return arrays

    def _is_whole(self, slots: Mapping[str, Mapping[str, Array]]) -> bool:
        wanted = self._slot_names()
        complete = all(self.parameters.keys() == tensors.keys() for tensors in slots.values())
        return complete and set(slots) == set(wanted)

    @abstractmethod
    def _slot_names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _slots(self) -> Slots: ...

    @abstractmethod
    def _load(self, slots: Mapping[str, Mapping[str, Array]], num_steps: int) -> None: ...

    @abstractmethod
    def _update(self, lr: float) -> None: ...


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], config: OptimConfig, *, device: torch.device
) -> Optimizer:
    """The optimiser that `config.name` means; 8-bit state only on a GPU, elsewhere 32-bit."""
    if config.name == "adamw":
        if config.state_bits == 8 and device.type == "cuda":
            return AdamW8bit(parameters, config)
        return AdamW(parameters, config)
    kinds: dict[str, type[Optimizer]] = {"lion": Lion, "sgd": Sgd, "adafactor": Adafactor}
    return kinds[config.name](parameters, config)


class AdamW(Optimizer):
    """`torch.optim.AdamW`, with bias correction, in its fused form: one pass over each tensor, one kernel on a GPU."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: OptimConfig) -> None:
        super().__init__(parameters, config)
        self.torch = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def _in_own_precision(self, arrays: Tensors) -> Tensors:
        return dequantised(arrays)

    def _slot_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _slots(self) -> Slots:
        state = self.torch.state
        return {
            slot: {name: state[p][slot] for name, p in self.parameters.items() if p in state}
            for slot in self._slot_names()
        }

    def _load(self, slots: Mapping[str, Mapping[str, Array]], num_steps: int) -> None:
        fresh: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        for name, parameter in self.parameters.items() if slots else ():
            # torch counts the steps in a float32 tensor, which is on the device where the update is fused
            count = torch.tensor(float(num_steps), dtype=torch.float32, device=parameter.device)
            state: dict[str, torch.Tensor] = {"step": count}
            for slot, tensors in slots.items():
                state[slot] = from_numpy(tensors[name], like=parameter)
            fresh[parameter] = state
        self.torch.state.clear()
        self.torch.state.update(fresh)

    def _update(self, lr: float) -> None:
        for group in self.torch.param_groups:
            group["lr"] = lr
        self.torch.step()


class AdamW8bit(Optimizer):
    """bitsandbytes' AdamW with block-wise 8-bit moments (arXiv:2110.02861), on a GPU; paged if asked for.

    Its state crosses as it is: `state1` and `state2` in uint8 with `absmax1`, `absmax2` (float32, one for 256 values)
    and `qmap1`, `qmap2` (the 256 levels), or `state1` and `state2` in float32 where a tensor is small.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: OptimConfig) -> None:
        super().__init__(parameters, config)
        import bitsandbytes.optim

        kind = bitsandbytes.optim.PagedAdamW8bit if config.paged else bitsandbytes.optim.AdamW8bit
        self.bnb: Any = kind(
            list(self.parameters.values()),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            min_8bit_size=MIN_8BIT_SIZE,
        )

    def _in_own_precision(self, arrays: Tensors) -> Tensors:
        return quantised(arrays) if is_adamw(arrays) else arrays

    def _slot_names(self) -> tuple[str, ...]:
        large = any(p.numel() >= MIN_8BIT_SIZE for p in self.parameters.values())
        extra = ("absmax1", "absmax2", "qmap1", "qmap2") if large else ()
        return ("state1", "state2", *extra)

    def _is_whole(self, slots: Mapping[str, Mapping[str, Array]]) -> bool:
        small = {n for n, p in self.parameters.items() if p.numel() < MIN_8BIT_SIZE}
        return set(slots) == set(self._slot_names()) and all(
            tensors.keys() == self.parameters.keys() - (set() if slot[:5] == "state" else small)
            for slot, tensors in slots.items()
        )

    def _slots(self) -> Slots:
        if any(p.is_cuda for p in self.parameters.values()):
            torch.cuda.synchronize()  # paged: the moments lie in managed memory that a kernel may still write
        slots: Slots = {}
        for name, parameter in self.parameters.items():
            for slot, value in self.bnb.state.get(parameter, {}).items():
                if slot in self._slot_names():
                    slots.setdefault(slot, {})[name] = value
        return slots

    def _load(self, slots: Mapping[str, Mapping[str, Array]], num_steps: int) -> None:
        self.bnb.state.clear()
        if not slots:
            return
        for group_index, group in enumerate(self.bnb.param_groups):
            for index, (name, parameter) in enumerate(self.parameters.items()):
                # init_state makes the buffers where they belong (paged ones included); then they are filled in place
                self.bnb.init_state(group, parameter, group_index, index)
                state = self.bnb.state[parameter]
                state["step"] = num_steps
                for slot, tensors in slots.items():
                    # the levels are one shared constant, and stay that
                    if name in tensors and not slot.startswith("qmap"):
                        state[slot].copy_(from_numpy(tensors[name], like=state[slot]))

    def _update(self, lr: float) -> None:
        for group in self.bnb.param_groups:
            group["lr"] = lr
        self.bnb.step()


def quantised(moments: Tensors) -> dict[str, Array]:
    """AdamW's 32-bit moments as `AdamW8bit` exports its own, by bitsandbytes' blockwise quantisation.

    Args:
        moments: `exp_avg/<name>` and `exp_avg_sq/<name>`, float32.
    """
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    arrays: dict[str, Array] = {}
    for own, slot in MOMENTS.items():
        number, levels = own[-1], create_dynamic_map(signed=own == "state1")
        for name, moment in _of_slot(moments, slot):
            if moment.size < MIN_8BIT_SIZE:
                arrays[f"{own}/{name}"] = moment
                continue
            values = torch.from_numpy(np.array(moment, np.float32, order="C", copy=True))
            codes, state = quantize_blockwise(values, code=levels, blocksize=BLOCK_SIZE)
            arrays[f"{own}/{name}"] = to_numpy(codes.reshape(values.shape))
            arrays[f"absmax{number}/{name}"] = to_numpy(state.absmax)
            arrays[f"qmap{number}/{name}"] = to_numpy(levels)
    return arrays


def _of_slot(arrays: Tensors, slot: str) -> list[tuple[str, Array]]:
    return [(key.removeprefix(f"{slot}/"), array) for key, array in arrays.items() if key.startswith(f"{slot}/")]


class SlotOptimizer(Optimizer):
    """An optimiser whose state is plain tensors, zero at first."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: OptimConfig) -> None:
        super().__init__(parameters, config)
        self.state = self._zeros()

    @abstractmethod
    def _zeros(self) -> Slots: ...

    def _slot_names(self) -> tuple[str, ...]:
        return tuple(self.state)

    def _slots(self) -> Slots:
        return self.state if self.num_steps > 0 else {}

    def _load(self, slots: Mapping[str, Mapping[str, Array]], num_steps: int) -> None:
        if not slots:
            self.state = self._zeros()
            return
        # in the parameters' order, whatever order the file had
        self.state = {
            slot: {name: from_numpy(slots[slot][name], like=old) for name, old in tensors.items()}
            for slot, tensors in self.state.items()
        }

    def _lists(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Parameters and gradients, in order."""
        parameters: list[torch.Tensor] = list(self.parameters.values())
        return parameters, [gradient(p) for p in self.parameters.values()]

    def _zeros_like_parameters(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(p.data) for name, p in self.parameters.items()}


class Lion(SlotOptimizer):
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2."""

    def _zeros(self) -> Slots:
        return {"exp_avg": self._zeros_like_parameters()}

    def _update(self, lr: float) -> None:
        parameters, gradients = self._lists()
        averages = list(self.state["exp_avg"].values())
        beta1, beta2 = self.config.betas
        torch._foreach_mul_(parameters, 1.0 - lr * self.config.weight_decay)
        direction = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(direction, gradients, alpha=1.0 - beta1)
        torch._foreach_sign_(direction)
        torch._foreach_add_(parameters, direction, alpha=-lr)
        torch._foreach_mul_(averages, beta2)
        torch._foreach_add_(averages, gradients, alpha=1.0 - beta2)


class Sgd(SlotOptimizer):
    """Gradient descent with heavy-ball momentum: b = momentum * b + g; p -= lr * b."""

    def _zeros(self) -> Slots:
        return {"momentum": self._zeros_like_parameters()} if self.config.momentum > 0.0 else {}

    def _update(self, lr: float) -> None:
        parameters, gradients = self._lists()
        torch._foreach_mul_(parameters, 1.0 - lr * self.config.weight_decay)
        direction = gradients
        if self.config.momentum > 0.0:
            direction = list(self.state["momentum"].values())
            torch._foreach_mul_(direction, self.config.momentum)
            torch._foreach_add_(direction, gradients)
        torch._foreach_add_(parameters, direction, alpha=-lr)


class Adafactor(SlotOptimizer):
    """Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4, at a fixed rate and without a first moment.

    The second moment is kept as its row and column means (over the last and the second-last axis).
    """

    DECAY_POWER = -0.8
    EPS = 1e-30
    CLIP_RMS = 1.0

    def _zeros(self) -> Slots:
        return {
            "row_var": {n: p.data.new_zeros(p.shape[:-1]) for n, p in self.parameters.items()},
            "col_var": {n: p.data.new_zeros((*p.shape[:-2], p.shape[-1])) for n, p in self.parameters.items()},
        }

    def _update(self, lr: float) -> None:
        decay = 1.0 - float(self.num_steps) ** self.DECAY_POWER
        for name, parameter in self.parameters.items():
            grad = gradient(parameter)
            row, col = self.state["row_var"][name], self.state["col_var"][name]
            square = grad.square() + self.EPS
            row.mul_(decay).add_(square.mean(-1), alpha=1.0 - decay)
            col.mul_(decay).add_(square.mean(-2), alpha=1.0 - decay)
            scale = (row / row.mean(-1, keepdim=True)).rsqrt()[..., None] * col.rsqrt()[..., None, :]
            update = grad * scale
            # stays on the device: a comparison in Python would wait for it
            clip = (update.square().mean().sqrt() / self.CLIP_RMS).clamp(min=1.0)
            parameter.mul_(1.0 - lr * self.config.weight_decay)
            parameter.add_(update / clip, alpha=-lr)


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "an adapter tensor got no gradient"
    return parameter.grad


def add_gradients(parameters: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor]) -> None:
    """To what is in `.grad`."""
    for parameter, found in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            # in the parameter's order in memory, which a fused update takes for granted
            parameter.grad = torch.empty_like(parameter).copy_(found)
        else:
            parameter.grad += found


def to_numpy(tensor: torch.Tensor) -> Array:
    """A copy on the host (device-to-host synchronisation)."""
    array: Array = tensor.detach().cpu().numpy()
    return array.copy()


def from_numpy(array: Array, *, like: torch.Tensor) -> torch.Tensor:
    """A copy with the device of `like`, whose dtype and shape it must have.

    Raises:
        UserError: another shape or dtype.
    """
    tensor = torch.from_numpy(np.array(array, order="C", copy=True))
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise UserError(
            f"a saved tensor is {tuple(tensor.shape)} {tensor.dtype}, but {tuple(like.shape)} {like.dtype} is needed",
            hint="resume with the lora and optim settings that the checkpoint was made with",
        )
    return tensor.to(like.device)
