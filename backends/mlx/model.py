"""The adapter on the frozen base model, and the forward pass over both.

Layers and loading are mlx-lm's. The forward pass is ours, for three reasons: mlx-lm's Mistral and Mixtral don't apply a
sliding window, its gradient checkpointing patches the layer class for the rest of the process and draws other dropout
masks in the recomputation, and logits are wanted at few positions only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from backends.mlx.absent_layers import run_streamed
from backends.mlx.columns import Vocabulary
from backends.mlx.fastmath import is_wanted, on_cpu
from backends.mlx.layers import Common, is_plain, run_packed
from backends.mlx.loading import Base
from backends.mlx.packing import Layout
from backends.mlx.routers import Routed, run_watched
from core.adapter import HEAD, LORA_A, LORA_B, Adapter, split_name
from core.adapter_mlx import module_name
from core.cutting import target_cost
from core.errors import UserError
from core.protocols import Weight

Arrays = Mapping[str, mx.array]


class KeyedDropout(nn.Module):  # type: ignore[misc]
    """Dropout whose mask is a function of a key, so that a recomputation draws the same one."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self._keep = 1.0 - p
        self._key: mx.array | None = None

    def use(self, key: mx.array | None) -> None:
        """The key of the next forward pass; None for no dropout."""
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        if self._key is None:
            return x
        mask = mx.random.bernoulli(self._keep, x.shape, key=self._key)
        return mx.where(mask, x * (1.0 / self._keep), 0.0).astype(x.dtype)


@dataclass(frozen=True, slots=True)
class _Slot:
    """An adapted module: where its two matrices go."""

    name: str
    index: int
    layer: int
    linear: Any
    """mlx-lm's LoRALinear or LoRASwitchLinear."""

    @property
    def names(self) -> tuple[str, str]:
        return f"{self.name}.{LORA_A}", f"{self.name}.{LORA_B}"

    def place(self, parameters: Arrays, keys: mx.array | None) -> None:
        a, b = (parameters[name] for name in self.names)
        # experts lie in mlx-lm as they do in the neutral form; dense matrices are transposed
        self.linear.lora_a, self.linear.lora_b = (a.T, b.T) if a.ndim == 2 else (a, b)
        self.linear.dropout.use(None if keys is None else keys[self.index])


def attach_adapter(module: nn.Module, adapter: Adapter) -> list[_Slot]:
    """Replaces each module of `adapter` with mlx-lm's LoRALinear (of experts: LoRASwitchLinear) around it.

    Raises:
        UserError: an adapter that was made for another model.
    """
    slots = [_attach(module, adapter, name, index=index) for index, name in enumerate(adapter.modules)]
    names = {name for slot in slots for name in slot.names}
    assert names == set(adapter.tensors), "an adapter tensor has no place in the model"
    return slots


def _attach(module: nn.Module, adapter: Adapter, name: str, *, index: int) -> _Slot:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    if name == HEAD:
        raise UserError(f"an adapter on {HEAD} can't be trained", hint="it can be carried, with: python cli.py convert")
    parent, leaf = _place(module, name)
    base = parent.get(leaf)
    kinds = {nn.Linear: LoRALinear, nn.QuantizedLinear: LoRALinear}
    kinds |= dict.fromkeys((SwitchLinear, QuantizedSwitchLinear), LoRASwitchLinear)
    if type(base) not in kinds:
        raise _unfit(f"it has no linear module {name}")
    linear = kinds[type(base)].from_base(base, r=adapter.modules[name].rank, scale=adapter.scale_of(name))
    for key, array in zip((LORA_A, LORA_B), (linear.lora_a, linear.lora_b), strict=True):
        found, expected = adapter.tensors[f"{name}.{key}"].shape, array.shape if array.ndim == 3 else array.shape[::-1]
        if found != expected:
            raise _unfit(f"{name}.{key} is {found} instead of {expected}")
    linear.dropout = KeyedDropout(adapter.dropout)
    parent[leaf] = linear
    return _Slot(name, index, split_name(name)[0], linear)


def _place(module: nn.Module, name: str) -> tuple[Any, str]:
    """The module that holds the one of this name, and its name in there; an empty dict when there is none."""
    layer, _ = split_name(name)
    if layer >= len(module.layers):
        return {}, name
    *parents, leaf = module_name(name).split(".")[3:]
    parent = module.layers[layer]
    for part in parents:
        parent = parent.get(part, {})
    return parent, leaf


def _unfit(why: str) -> UserError:
    return UserError(
        f"the adapter does not fit this model: {why}",
        hint="use the base model that the adapter was made for",
    )


class Network:
    """Base and adapter as a function of the adapter's parameters.

    `parameters` are float32 in the neutral orientation: `<module>.lora_A` (rank, in), `<module>.lora_B` (out, rank).
    Every call puts them into the modules first, so nothing depends on what an earlier call, or a trace, left there.
    """

    def __init__(self, base: Base, adapter: Adapter, *, checkpoint: bool) -> None:
        self._base = base
        self.module = base.module
        self._slots = attach_adapter(base.module, adapter)
        self._by_layer: list[list[_Slot]] = [[] for _ in base.module.layers]
        for slot in self._slots:
            self._by_layer[slot.layer].append(slot)
        self.num_prefix_layers = min(slot.layer for slot in self._slots)
        self.end_tokens = base.end_tokens
        self.has_dropout = adapter.dropout > 0.0
        self._checkpoint = checkpoint
        # Waits: frequencies of a scaled rotary embedding, which MLX would compute on first use, on this thread only.
        mx.eval([a for m in base.module.modules() for n, a in m.items() if n[0] == "_" and isinstance(a, mx.array)])

    def base_weights(self) -> list[Weight]:
        """The tensors of the base model; a quantised one with its scales and biases."""
        found = []
        for path, module in self.module.named_modules():
            own = {name: array for name, array in module.items() if isinstance(array, mx.array)}
            own = {name: array for name, array in own.items() if not name.startswith(("lora_", "_"))}
            name = path.removesuffix(".linear")  # within a LoRA layer
            if "scales" in own:
                parameters = own["scales"].size * int(module.group_size)
                num_bytes = sum(own.pop(part).nbytes for part in ("weight", "scales", "biases") if part in own)
                found.append(Weight(f"{name}.weight", f"affine {module.bits}-bit", parameters, num_bytes))
            for leaf, array in own.items():
                dtype = str(array.dtype).removeprefix("mlx.core.")
                found.append(Weight(f"{name}.{leaf}", dtype, array.size, array.nbytes))
        return found

    def dropout_keys(self, key: mx.array) -> mx.array | None:
        """A key per adapted module, uint32 [modules, 2]."""
        return mx.random.split(key, len(self._slots)) if self.has_dropout else None

    @property
    def frozen(self) -> range:
        """The layers below the first adapter."""
        return range(self.num_prefix_layers)

    @functools.cached_property
    def packs(self) -> bool:
        """Whether positions may be laid out one after the other (`packing.py`)."""
        # An absent layer has no parts to look at; it is taken to be as the others.
        return all(is_plain(layer) for layer in self.module.layers if type(layer) is not nn.Module)

    @property
    def packs_rows(self) -> bool:
        """Whether they are laid out without padding: on a CPU, where no shape has to be compiled."""
        return self.packs and on_cpu()

    @property
    def target_cost(self) -> float:
        """See `core.cutting.target_cost`."""
        return target_cost(self.module.args, num_layers=len(self.module.layers) - self.num_prefix_layers)

    @property
    def is_mixture(self) -> bool:
        return hasattr(self.module.layers[-1], "block_sparse_moe")

    def hidden_states(
        self,
        parameters: Arrays,
        tokens: mx.array,
        *,
        layout: Layout | None = None,
        keys: mx.array | None = None,
        cache: Sequence[Any] | None = None,
        training: bool = False,
    ) -> mx.array:
        """Hidden states [B, T, D] (packed: [N, D]) after the final norm; for the arguments see `routed_states`."""
        return self.routed_states(parameters, tokens, layout=layout, keys=keys, cache=cache, training=training)[0]

    def routed_states(
        self,
        parameters: Arrays,
        tokens: mx.array,
        *,
        layout: Layout | None = None,
        is_token: mx.array | None = None,
        keys: mx.array | None = None,
        cache: Sequence[Any] | None = None,
        training: bool = False,
    ) -> tuple[mx.array, list[Routed]]:
        """Hidden states [B, T, D] (packed: [N, D]) after the final norm, and what each layer's router did, when
        `is_token` is given.

        Args:
            tokens: int32 [B, T]; padding on the right needs no mask, since attention is causal. Or the states
                [B, T, D] that enter the first layer with an adapter: then only the layers from there on are run.
            layout: the tokens are packed positions [N] (or [N, D]) laid out like this, and so is the result [N, D].
            is_token: [B, T] of a number type, 0 for padding: the routers of a mixture are to be watched.
            keys: from `dropout_keys`; None for no dropout.
            cache: one key-value cache per layer, when generating.
            training: recompute the layers in the backward pass if the network was made so.
        """
        hidden, numbers = self.entering(tokens)
        if self.streams:
            assert cache is None and keys is None, "streamed layers neither generate nor train this way"
            hidden, routed = run_streamed(self, numbers, hidden, parameters, layout=layout, is_token=is_token)
        else:
            hidden, routed = self.run(
                numbers,
                hidden,
                parameters,
                layout=layout,
                is_token=is_token,
                keys=keys,
                cache=cache,
                training=training,
            )
        return self.module.model.norm(hidden), routed

    def entering(self, tokens: mx.array) -> tuple[mx.array, range]:
        """States [..., D] and the layers that they go through: of tokens [...] all, of states those above them."""
        num_layers = len(self.module.layers)
        if mx.issubdtype(tokens.dtype, mx.floating):
            return tokens, range(self.num_prefix_layers, num_layers)
        is_trained_throughout = self.streams and self.num_prefix_layers == 0
        is_whole = self.read_again is None
        assert is_whole or is_trained_throughout, "a batch without its prefix, and no weights to compute it"
        return self.module.model.embed_tokens(tokens), range(num_layers)

    @property
    def read_again(self) -> Callable[[], nn.Module] | None:
        """See `Base`: None when every layer has its weights."""
        return self._base.read_again

    @property
    def streams(self) -> bool:
        """Whether no layer's weights are kept: then `streamed_gradients` is how to train."""
        return self._base.streams

    def names_of(self, layer: int) -> list[str]:
        """The adapter's tensors in a layer."""
        return [name for slot in self._by_layer[layer] for name in slot.names]

    def run(
        self,
        numbers: Iterable[int],
        hidden: mx.array,
        parameters: Arrays,
        *,
        layers: Sequence[Any] | None = None,
        layout: Layout | None = None,
        is_token: mx.array | None = None,
        keys: mx.array | None = None,
        cache: Sequence[Any] | None = None,
        training: bool = False,
    ) -> tuple[mx.array, list[Routed]]:
        """The states after the layers of these numbers; for the arguments see `routed_states`.

        Args:
            layers: all layers; None: the model's own.
            layout: see `routed_states`; without `cache` and `is_token`.
        """
        model = self.module.model
        mask = None if layout is not None else self._mask(hidden, cache[0] if cache else None)
        common = None if layout is None else Common(layout, window=self._base.window)
        routed: list[Routed] = []
        for number in numbers:
            slots = self._by_layer[number]
            own = {name: parameters[name] for name in self.names_of(number)}
            layer, layer_cache = (layers or model.layers)[number], cache[number] if cache else None
            if common is not None:
                work = functools.partial(run_packed, layer, common=common)
                run = functools.partial(_run_packed_layer, work, slots, keys)
            else:
                run = functools.partial(_run_layer, layer, slots, mask, layer_cache, keys, is_token)
            if training and slots and number > self.num_prefix_layers and on_cpu():
                tied: Any = _at_once(*own.values(), hidden)
                own, hidden = dict(zip(own, tied[:-1], strict=True)), tied[-1]
            # Below the first adapter nothing is kept for the backward pass anyway.
            recompute = training and self._checkpoint and slots
            hidden, *found = (mx.checkpoint(run) if recompute else run)(own, hidden)
            if is_token is not None:
                routed.append((found[0], found[1]))
        return hidden, routed

    def _mask(self, hidden: mx.array, cache: Any) -> mx.array | str | None:
        from mlx_lm.models.base import create_attention_mask

        mask: mx.array | str | None = create_attention_mask(hidden, cache, window_size=self._base.window)
        if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[-2] > 1:
            # padding looks at itself: a softmax over nothing may be NaN, and of a NaN nothing is 0
            mask = mask | mx.eye(mask.shape[-2], mask.shape[-1], mask.shape[-1] - mask.shape[-2], dtype=mx.bool_)
        return mask

    def project(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of hidden states [..., D], in the compute type."""
        module = self.module
        return module.model.embed_tokens.as_linear(hidden) if self._base.tied else module.lm_head(hidden)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary | None:
        """What `project` multiplies by, if that is all it does, in float32 on a CPU; else None."""
        head = self.module.model.embed_tokens if self._base.tied else self.module.lm_head
        is_plain_matrix = type(head) in (nn.Embedding, nn.Linear) and set(head) == {"weight"}
        return Vocabulary(head.weight) if is_plain_matrix and is_wanted(head.weight) else None

    def make_cache(self, padding: Sequence[int]) -> list[Any]:
        """An empty key-value cache per layer, for as many rows as `padding` has numbers: tokens that the row is padded
        with on the left."""
        from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

        window, layers = self._base.window, self.module.layers
        if not any(padding):  # these have the faster masks
            return [RotatingKVCache(max_size=window) if window else KVCache() for _ in layers]
        left = list(padding)
        return [BatchRotatingKVCache(window, left) if window else BatchKVCache(left) for _ in layers]


@mx.custom_function  # type: ignore[untyped-decorator]
def _at_once(*arrays: mx.array) -> tuple[mx.array, ...]:
    """The arrays. On the way back the gradient of none is given on before all are there.

    In breadth-first order (`cores.py`) the adapter's gradients would otherwise all come last, and what each layer keeps
    for them would be kept together.
    """
    return arrays


@_at_once.vjp  # type: ignore[untyped-decorator]
def _at_once_back(
    _: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], __: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    given = list(cotangents)
    return tuple(mx.depends(given, given))


def keep_rows(cache: Any, rows: mx.array) -> None:
    """Drops all rows but these from a cache of `Network.make_cache` that has read something."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    if isinstance(cache, KVCache | RotatingKVCache):  # without padding; mlx-lm means it for one prompt
        cache.keys, cache.values = cache.keys[rows], cache.values[rows]
    else:
        cache.filter(rows)


def _run_packed_layer(
    work: Callable[[mx.array], mx.array],
    slots: Sequence[_Slot],
    keys: mx.array | None,
    parameters: Arrays,
    hidden: mx.array,
) -> tuple[mx.array, ...]:
    """As `_run_layer`, over packed positions."""
    for slot in slots:
        slot.place(parameters, keys)
    return (work(hidden),)


def _run_layer(
    layer: nn.Module,
    slots: Sequence[_Slot],
    mask: mx.array | str | None,
    cache: Any,
    keys: mx.array | None,
    is_token: mx.array | None,
    parameters: Arrays,
    hidden: mx.array,
) -> tuple[mx.array, ...]:
    """One decoder layer as a function of its adapter and its input: the last two are what `mx.checkpoint` keeps."""
    for slot in slots:
        slot.place(parameters, keys)
    if is_token is None:
        return (layer(hidden, mask, cache=cache),)
    return run_watched(layer, mask, cache, is_token, hidden)
