"""The frozen base model, the adapter on it, and the forward pass over both.

Layers and loading are mlx-lm's. The forward pass is ours, for three reasons: mlx-lm's Mistral and Mixtral don't apply a
sliding window, its gradient checkpointing patches the layer class for the rest of the process and draws other dropout
masks in the recomputation, and logits are wanted at few positions only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from backends.mlx.memory import is_out_of_memory, translate_out_of_memory
from backends.mlx.routers import Routed, run_watched
from core.adapter import HEAD, LORA_A, LORA_B, Adapter, split_name
from core.adapter_mlx import module_name
from core.architecture import Architecture, read_architecture
from core.errors import UserError
from core.protocols import Weight

if TYPE_CHECKING:
    from core.models import ResolvedModel

logger = logging.getLogger("twinkeel")

GROUP_SIZE = 64
CHUNK_BYTES = 1 << 29
"""States that wait between one frozen layer and the next, when these are read one by one."""
_ROPE_TYPES = (None, "default", "linear", "llama3", "yarn")
_YARN_KEYS = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
"""What mlx-lm's YaRN reads the way that transformers does."""
_DEFAULT_THETA = {"llama": 1e4, "mistral": 1e4, "mixtral": 1e6}
"""transformers' defaults, by model_type."""

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True, slots=True)
class Base:
    """mlx-lm's model as loaded, and what mlx-lm does not keep."""

    module: nn.Module
    window: int | None
    """Positions that attention looks back over, the present one included; None for all."""
    tied: bool
    num_parameters: int
    end_tokens: frozenset[int]
    """Of the model's generation settings."""
    weights: str
    """For people: `16-bit weights`, `4-bit weights (affine, group 64)`."""
    read_again: Callable[[], nn.Module] | None = None
    """The whole model again, nothing of it read yet; set if some layers have no weights here."""
    streams: bool = False
    """Whether the layers with adapters are among these."""


def load_base(
    model: ResolvedModel,
    *,
    bits: int,
    dtype: mx.Dtype,
    trust_remote_code: bool = False,
    num_absent: int = 0,
    stream: bool = False,
) -> Base:
    """Loads a folder in Hugging Face or MLX layout, in `dtype`, and quantises it when `bits` is 4.

    Quantised as `mlx_lm.convert -q` does it: every linear layer, expert, router and embedding (tied ones, too) whose
    input width is a multiple of 64. Scales have the compute type, which on a CPU makes it usable. A folder that is
    MLX-quantised already is taken as it is.

    Args:
        num_absent: of so many layers from the lowest no weights are read.
        stream: read no weights of the other layers either, which are described and there to be filled.

    Raises:
        UserError: weights that are missing, damaged or of another shape, or a feature that mlx-lm would misread.
        OutOfMemoryError: it doesn't fit.
    """
    from mlx_lm.utils import get_total_parameters

    folder = Path(model.path)
    architecture = read_architecture(folder)
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check_quantization(model.name, raw, bits)
    settings = _mlx_settings(model.name, raw, architecture)

    def read(*, again: bool = False) -> tuple[nn.Module, dict[str, Any], int]:
        """The model as it is to be, but lazily; what mlx-lm reads of its settings; its parameters."""
        module, found = _read_weights(model, folder, settings, trust_remote_code)
        if architecture.model_type == "mixtral" and settings["rope_scaling"]:
            _scale_rope(module, architecture, settings)
        num_parameters = int(get_total_parameters(module))
        module.set_dtype(dtype)
        if bits == 4 and architecture.mlx_bits is None:
            _quantize(module, say=not again)
        module.freeze()
        module.eval()
        return module, found, num_parameters

    with translate_out_of_memory(f"loading {model.name}"):
        module, found, num_parameters = read()
        for number in range(num_absent):
            module.layers[number] = nn.Module()
        _materialise(module, model.name, layers=not stream)
    return Base(
        module=module,
        window=_window(raw),
        tied=architecture.tied_embeddings,
        num_parameters=num_parameters,
        end_tokens=_end_tokens(found.get("eos_token_id")),
        weights=_describe_weights(architecture, bits, dtype),
        read_again=(lambda: read(again=True)[0]) if num_absent or stream else None,
        streams=stream,
    )


def _describe_weights(architecture: Architecture, bits: int, dtype: mx.Dtype) -> str:
    if architecture.mlx_bits is not None:
        return f"{architecture.mlx_bits}-bit weights (as in the folder)"
    if bits == 4:
        return f"4-bit weights (affine, group {GROUP_SIZE})"
    return "32-bit weights" if dtype == mx.float32 else "16-bit weights"


def _check_quantization(name: str, raw: dict[str, Any], bits: int) -> None:
    if "quantization" in raw:
        if bits == 16:
            raise UserError(f"{name} is quantised already, and model.bits is 16", hint="set model.bits=4")
        return
    if foreign := raw.get("quantization_config"):
        method = foreign.get("quant_method") if isinstance(foreign, dict) else foreign
        raise UserError(
            f"{name} is quantised with {method}, which the mlx backend does not read",
            hint="give the 16-bit model, or an MLX folder made by mlx_lm.convert",
        )


def mlx_settings(folder: Path) -> dict[str, Any]:
    """What mlx-lm's loading has to be told of a model folder (`model_config`), so that it reads it as it is meant.

    Raises:
        UserError: a setting that mlx-lm does not know.
    """
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _mlx_settings(folder.name, raw, read_architecture(folder))


def _mlx_settings(name: str, raw: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """What mlx-lm would misread in a config.json, in the names that it knows.

    transformers 5 saves `rope_parameters`; mlx-lm reads `rope_theta` and `rope_scaling` and falls back to theta 10000
    in silence. Its default for `tie_word_embeddings` is the opposite of transformers'.
    """
    scaling = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    theta = scaling.pop("rope_theta", None) or raw.get("rope_theta") or _DEFAULT_THETA[architecture.model_type]
    old_name = scaling.pop("type", None)
    scaling.setdefault("rope_type", old_name)
    if unsupported := _unsupported(raw, scaling, architecture):
        field, value = unsupported
        raise UserError(
            f"{name}: {field} {value!r} is not supported by the mlx backend",
            hint="use --backend cuda (it runs on a CPU, too) or another model",
        )
    if architecture.max_positions:
        scaling.setdefault("original_max_position_embeddings", architecture.max_positions)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling if scaling["rope_type"] not in (None, "default") else None,
        "tie_word_embeddings": architecture.tied_embeddings,
        "layer_types": None,
    }


def _unsupported(raw: dict[str, Any], scaling: dict[str, Any], architecture: Architecture) -> tuple[str, object] | None:
    """The first setting that mlx-lm's three families don't know and would pass over."""
    natural_head_dim = architecture.hidden_size // architecture.num_heads
    if architecture.is_moe and architecture.head_dim != natural_head_dim:
        return "head_dim", architecture.head_dim
    if raw.get("hidden_act", "silu") != "silu":
        return "hidden_act", raw["hidden_act"]
    for values in (raw, scaling):
        if values.get("partial_rotary_factor") not in (None, 1.0):
            return "partial_rotary_factor", values["partial_rotary_factor"]
    if scaling["rope_type"] not in _ROPE_TYPES:
        return "rope_type", scaling["rope_type"]
    if scaling["rope_type"] == "yarn":
        for key in scaling.keys() - _YARN_KEYS:
            if scaling[key] is not None and (key, scaling[key]) != ("truncate", True):
                return f"rope_parameters.{key}", scaling[key]
    return None


def _window(raw: dict[str, Any]) -> int | None:
    """Sliding window as transformers reads it: Mistral's default is 4096, Mixtral's none, Llama has no such thing."""
    match raw["model_type"]:
        case "mistral":
            return raw.get("sliding_window", 4096)
        case "mixtral":
            return raw.get("sliding_window")
    return None


def _read_weights(
    model: ResolvedModel, folder: Path, settings: dict[str, Any], trust_remote_code: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model and the configuration as it reads it, generation settings included."""
    from mlx_lm.utils import load_model

    try:
        module, read = load_model(
            folder, lazy=True, strict=True, model_config=settings, trust_remote_code=trust_remote_code
        )
    except (FileNotFoundError, ValueError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise _damaged(model.name, error) from error
    return module, read


def _end_tokens(value: int | list[int] | None) -> frozenset[int]:
    listed = value if isinstance(value, list) else [value]
    return frozenset(int(token) for token in listed if token is not None)


def _damaged(name: str, error: Exception) -> UserError:
    text = "missing " * isinstance(error, KeyError) + " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:300] + "…"
    return UserError(
        f"{name}: the weights can't be loaded: {text}",
        hint="download the model again; it needs complete safetensors files that fit its config.json",
    )


def _scale_rope(module: nn.Module, architecture: Architecture, settings: dict[str, Any]) -> None:
    """mlx-lm's Mixtral knows no scaled rotary embedding."""
    from mlx_lm.models.rope_utils import initialize_rope

    for layer in module.layers:
        layer.self_attn.rope = initialize_rope(
            architecture.head_dim,
            settings["rope_theta"],
            False,
            settings["rope_scaling"],
            architecture.max_positions,
        )


def _quantize(module: nn.Module, *, say: bool) -> None:
    left: list[str] = []

    def fits(path: str, leaf: nn.Module) -> bool:
        if not hasattr(leaf, "to_quantized"):
            return False
        if leaf.weight.shape[-1] % GROUP_SIZE:
            left.append(path)
            return False
        return True

    nn.quantize(module, group_size=GROUP_SIZE, bits=4, class_predicate=fits)
    if left and say:
        logger.warning(
            "model.bits 4: %d modules stay in 16 bits, their input width is not a multiple of %d: %s",
            len(left),
            GROUP_SIZE,
            ", ".join(left[:4]) + (" …" if len(left) > 4 else ""),
        )


def _materialise(module: nn.Module, name: str, *, layers: bool = True) -> None:
    """Reads, casts and quantises layer by layer, so that the 16-bit model never exists whole in memory.

    Args:
        layers: False: only what is outside the layers.
    """
    try:
        for layer in module.layers if layers else ():
            mx.eval(layer.parameters())
        mx.eval(module.parameters() if layers else _outside_layers(module))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise _damaged(name, error) from error


def _outside_layers(module: nn.Module) -> list[mx.array]:
    return [array for name, array in tree_flatten(module.parameters()) if not name.startswith("model.layers.")]


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
        self._slots = attach_adapter(base.module, adapter)
        self._by_layer: list[list[_Slot]] = [[] for _ in base.module.layers]
        for slot in self._slots:
            self._by_layer[slot.layer].append(slot)
        self.num_prefix_layers = min(slot.layer for slot in self._slots)
        self.end_tokens = base.end_tokens
        self._dropout = adapter.dropout > 0.0
        self._checkpoint = checkpoint

    def base_weights(self) -> list[Weight]:
        """The tensors of the base model; a quantised one with its scales and biases."""
        found = []
        for path, module in self._base.module.named_modules():
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
        return mx.random.split(key, len(self._slots)) if self._dropout else None

    @property
    def is_mixture(self) -> bool:
        return hasattr(self._base.module.layers[-1], "block_sparse_moe")

    def hidden_states(
        self,
        parameters: Arrays,
        tokens: mx.array,
        *,
        keys: mx.array | None = None,
        cache: Sequence[Any] | None = None,
        training: bool = False,
    ) -> mx.array:
        """Hidden states [B, T, D] after the final norm; for the arguments see `routed_states`."""
        return self.routed_states(parameters, tokens, keys=keys, cache=cache, training=training)[0]

    def routed_states(
        self,
        parameters: Arrays,
        tokens: mx.array,
        *,
        is_token: mx.array | None = None,
        keys: mx.array | None = None,
        cache: Sequence[Any] | None = None,
        training: bool = False,
    ) -> tuple[mx.array, list[Routed]]:
        """Hidden states [B, T, D] after the final norm, and what each layer's router did, when `is_token` is given.

        Args:
            tokens: int32 [B, T]; padding on the right needs no mask, since attention is causal. Or the states
                [B, T, D] that enter the first layer with an adapter: then only the layers from there on are run.
            is_token: [B, T] of a number type, 0 for padding: the routers of a mixture are to be watched.
            keys: from `dropout_keys`; None for no dropout.
            cache: one key-value cache per layer, when generating.
            training: recompute the layers in the backward pass if the network was made so.
        """
        model = self._base.module.model
        if tokens.ndim == 3:
            hidden, numbers = tokens, range(self.num_prefix_layers, len(model.layers))
        else:
            hidden, numbers = self._embedded(tokens), range(len(model.layers))
        if self._base.streams:
            assert cache is None and keys is None, "streamed layers neither generate nor train this way"
            hidden, routed = self._run_streamed(numbers, hidden, parameters, is_token=is_token)
        else:
            hidden, routed = self._run(
                numbers, hidden, parameters, is_token=is_token, keys=keys, cache=cache, training=training
            )
        return model.norm(hidden), routed

    def _embedded(self, tokens: mx.array) -> mx.array:
        is_trained_throughout = self._base.streams and self.num_prefix_layers == 0
        assert self._is_whole or is_trained_throughout, "a batch without its prefix, and no weights to compute it"
        return self._base.module.model.embed_tokens(tokens)

    def prefixes(self, rows: Sequence[mx.array]) -> Iterator[tuple[mx.array, mx.array | None]]:
        """Of each row, int32 [T], the states [T, D] that enter the first layer with an adapter, and of a mixture
        float32 [2, layers, experts], `core.protocols.Prefix.routed`; one row at a time, without padding.

        Where the layers' weights are absent they are read one layer at a time, and many rows go through a layer before
        the next one is read: as many as `CHUNK_BYTES` hold.
        """
        frozen = range(self.num_prefix_layers)
        for chunk in [rows[index : index + 1] for index in range(len(rows))] if self._is_whole else self._chunks(rows):
            states = [self._base.module.model.embed_tokens(row[None]) for row in chunk]
            routed: list[list[mx.array]] = [[] for _ in chunk]
            layers = self._base.module.layers if self._base.read_again is None else self._base.read_again().layers
            for number in frozen:
                for index, entering in enumerate(states):
                    is_token = mx.ones(entering.shape[:2], mx.float32) if self.is_mixture else None
                    states[index], found = self._run([number], entering, {}, layers=layers, is_token=is_token)
                    routed[index] += [mx.stack([counts, probabilities]) for counts, probabilities in found]
                    if not self._is_whole:
                        mx.async_eval(states[index], routed[index])
                if not self._is_whole:
                    mx.eval(states, routed)
                    layers[number] = None  # its weights go
            for leaving, seen in zip(states, routed, strict=True):
                yield leaving[0], mx.stack(seen, axis=1) if seen else None

    @property
    def _is_whole(self) -> bool:
        return self._base.read_again is None

    # -- layers that are read when it is their turn

    @property
    def streams(self) -> bool:
        """Whether no layer's weights are kept: then `streamed_gradients` is how to train."""
        return self._base.streams

    def streamed_gradients(
        self,
        parameters: Arrays,
        tokens: mx.array,
        loss: Callable[[mx.array], tuple[mx.array, mx.array]],
        *,
        keys: mx.array | None,
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """What `loss` says, and the gradient of its objective with respect to `parameters`; a layer at a time.

        Forward, only each layer's input is kept; backward, from the last layer down, its weights are read again and its
        gradient is taken at once. So one layer's weights and activations are in memory at a time. Waits for the device.

        Args:
            tokens, keys: as of `routed_states`.
            loss: of hidden states [B, T, D] after the final norm the objective and what to report.
        """
        assert self._base.read_again is not None
        hidden = tokens if tokens.ndim == 3 else self._embedded(tokens)
        numbers = range(self.num_prefix_layers if tokens.ndim == 3 else 0, len(self._base.module.layers))
        layers = self._base.read_again().layers
        entering: list[mx.array] = []
        for number in numbers:
            entering.append(hidden)
            with self._filled(number, layers):
                hidden, _ = self._run([number], hidden, parameters, keys=keys)
                mx.eval(hidden)
        norm = self._base.module.model.norm
        (_, reported), slope = mx.value_and_grad(lambda states: loss(norm(states)))(hidden)
        mx.eval(reported, slope)
        gradients: dict[str, mx.array] = {}
        layers = self._base.read_again().layers
        for number in reversed(numbers):
            names = [name for slot in self._by_layer[number] for name in slot.names]

            def layer(*arrays: mx.array, number: int = number, names: list[str] = names) -> list[mx.array]:
                *own, states = arrays
                return [self._run([number], states, dict(zip(names, own, strict=True)), keys=keys)[0]]

            with self._filled(number, layers):
                _, slopes = mx.vjp(layer, [*(parameters[name] for name in names), entering.pop()], [slope])
                mx.eval(slopes)
            *own, slope = slopes
            gradients |= dict(zip(names, own, strict=True))
        return reported, {name: gradients[name] for name in parameters}

    def _run_streamed(
        self, numbers: Iterable[int], hidden: mx.array, parameters: Arrays, *, is_token: mx.array | None
    ) -> tuple[mx.array, list[Routed]]:
        assert self._base.read_again is not None
        layers = self._base.read_again().layers
        routed: list[Routed] = []
        for number in numbers:
            with self._filled(number, layers):
                hidden, found = self._run([number], hidden, parameters, is_token=is_token)
                mx.eval(hidden, found)
            routed += found
        return hidden, routed

    @contextlib.contextmanager
    def _filled(self, number: int, layers: list[Any]) -> Iterator[None]:
        """Within it our layer has the weights of the one in `layers`, which is used up."""
        places = []
        for path, module in layers[number].named_modules():
            mine = self._base.module.layers[number]
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

    def _chunks(self, rows: Sequence[mx.array]) -> Iterator[Sequence[mx.array]]:
        width = self._base.module.model.norm.weight.nbytes
        num_bytes, start = 0, 0
        for index, row in enumerate(rows):
            size = len(row) * width
            if index > start and num_bytes + size > CHUNK_BYTES:
                yield rows[start:index]
                num_bytes, start = 0, index
            num_bytes += size
        if start < len(rows):
            yield rows[start:]

    def _run(
        self,
        numbers: Iterable[int],
        hidden: mx.array,
        parameters: Arrays,
        *,
        layers: Sequence[Any] | None = None,
        is_token: mx.array | None = None,
        keys: mx.array | None = None,
        cache: Sequence[Any] | None = None,
        training: bool = False,
    ) -> tuple[mx.array, list[Routed]]:
        """The states after the layers of these numbers; for the arguments see `routed_states`.

        Args:
            layers: all layers; None: the model's own.
        """
        from mlx_lm.models.base import create_attention_mask

        model = self._base.module.model
        mask = create_attention_mask(hidden, cache[0] if cache else None, window_size=self._base.window)
        routed: list[Routed] = []
        for number in numbers:
            slots = self._by_layer[number]
            own = {name: parameters[name] for slot in slots for name in slot.names}
            layer, layer_cache = (layers or model.layers)[number], cache[number] if cache else None
            run = functools.partial(_run_layer, layer, slots, mask, layer_cache, keys, is_token)
            # Below the first adapter nothing is kept for the backward pass anyway.
            recompute = training and self._checkpoint and slots
            hidden, *found = (mx.checkpoint(run) if recompute else run)(own, hidden)
            if is_token is not None:
                routed.append((found[0], found[1]))
        return hidden, routed

    def project(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of hidden states [..., D], in the compute type."""
        module = self._base.module
        return module.model.embed_tokens.as_linear(hidden) if self._base.tied else module.lm_head(hidden)

    def make_cache(self) -> list[Any]:
        """An empty key-value cache per layer."""
        from mlx_lm.models.cache import KVCache, RotatingKVCache

        window = self._base.window
        layers = self._base.module.layers
        return [RotatingKVCache(max_size=window) if window else KVCache() for _ in layers]


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
