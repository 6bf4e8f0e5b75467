"""PEFT's form of an adapter: `adapter_config.json` and `adapter_model.safetensors`, in both directions.

A dense module is `base_model.model.<module>.lora_A.weight` (rank, in) and `.lora_B.weight` (out, rank). transformers 5
keeps a layer's experts in two fused parameters, `mlp.experts.gate_up_proj` and `down_proj`, which PEFT adapts through
`target_parameters` (see `ParamWrapper.get_delta_factors`): `lora_A` (experts * rank, in), the experts slowest, and
`lora_B` (out, rank * experts), the experts fastest. Two parameters of one module are nested: `down_proj` outside,
`gate_up_proj` under `base_layer`. Gate and up share the fused rank: A is stacked, B lies on the diagonal. Adapters
of transformers 4 name every expert: `block_sparse_moe.experts.<e>.w1` (gate), `w3` (up), `w2` (down).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from core.adapter import LORA_A, LORA_B, Adapter, LoraModule
from core.adapter_parts import Part, assemble
from core.architecture import EXPERTS, ROUTER, Architecture
from core.errors import UserError

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

Array = npt.NDArray[np.float32]

_CARRIED = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "init_lora_weights", "loftq_config", "eva_config", "megatron_core", "qalora_group_size"),
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "ensure_weight_tying"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("fine_tune_type", "num_layers", "lora_parameters"),  # mlx-lm's, in a folder for both
    }
)
"""Keys of `peft.LoraConfig` that the names, shapes and values of the tensors answer, or that need no answer."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of drawing the first values that change the base model's weights as well."""
_OLD_EXPERT = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])")
_OLD_NAMES = dict(zip(("w1", "w3", "w2"), EXPERTS, strict=True))
_TENSOR = re.compile(r"(.+)\.lora_([AB])\.weight")


# --- writing ----------------------------------------------------------------------------------------------------------


def weights(adapter: Adapter) -> dict[str, Array]:
    """Tensors by PEFT's names."""
    return {
        f"{_PREFIX}{place}.{letter}.weight": np.ascontiguousarray(matrix)
        for place, _, a, b in _written(adapter)
        for letter, matrix in ((LORA_A, a), (LORA_B, b))
    }


def config(adapter: Adapter) -> dict[str, Any]:
    """The keys of `peft.LoraConfig`; names of layers and modules are as short as they can be said truly."""
    written = [(target, lora) for _, target, lora in _targets(adapter)]
    dense = [target for target, _ in written if not _is_parameter(target)]
    usual = Counter((lora.rank, lora.alpha) for _, lora in written).most_common(1)[0][0]
    short = adapter.is_regular and dense
    layers = list(adapter.layers) if short and len(adapter.layers) < adapter.num_layers else None
    if short:
        dense = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in dense))
    parameters = [target for target, _ in written if _is_parameter(target)]
    plain: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": usual[0],
        "lora_alpha": usual[1],
        # PEFT refuses dropout where it adapts parameters
        "lora_dropout": 0.0 if parameters else adapter.dropout,
        "use_rslora": adapter.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": dense,
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else "layers",
    }
    if parameters:
        plain["target_parameters"] = parameters
    if ranks := {target: lora.rank for target, lora in written if lora.rank != usual[0]}:
        plain["rank_pattern"] = ranks
    if alphas := {target: lora.alpha for target, lora in written if lora.alpha != usual[1]}:
        plain["alpha_pattern"] = alphas
    return plain


def _is_parameter(target: str) -> bool:
    return ".mlp.experts." in target or target.endswith(f"{ROUTER}.weight")


def _targets(adapter: Adapter) -> Iterator[tuple[str, str, LoraModule]]:
    """Place of the tensors, name that the configuration targets, rank and alpha."""
    for place, target, a, _ in _written(adapter):
        names = [name for name in _sources(target) if name in adapter.modules]
        lora, rank = adapter.modules[names[0]], _fused_rank(adapter, target, a)
        scale = _shared_scale(adapter, names)
        if rank != lora.rank or (len(names) > 1 and scale != adapter.scale_of(names[0])):
            lora = LoraModule(rank, scale * (math.sqrt(rank) if adapter.rslora else rank))
        yield place, target, lora


def _sources(target: str) -> tuple[str, ...]:
    """The modules of ours that a target of PEFT stands for, in our order."""
    if target.endswith(".gate_up_proj"):
        stem = target.removesuffix("gate_up_proj")
        return (f"{stem}gate_proj", f"{stem}up_proj")
    return (target.removesuffix(".weight"),)


def _fused_rank(adapter: Adapter, target: str, a: Array) -> int:
    if ".mlp.experts." not in target:
        return len(a)
    num_experts = next(adapter.matrices(name)[0].shape[0] for name in _sources(target) if name in adapter.modules)
    return len(a) // int(num_experts)


def _written(adapter: Adapter) -> Iterator[tuple[str, str, Array, Array]]:
    """Place of the tensors, name that the configuration targets, and the two matrices in PEFT's shapes."""
    done: set[str] = set()
    for name in adapter.modules:
        if ".mlp.experts." not in name:
            target = f"{name}.weight" if name.endswith(f".{ROUTER}") else name
            yield name, target, *adapter.matrices(name)
            continue
        layer = name.split(".mlp.experts.")[0]
        if layer not in done:
            done.add(layer)
            yield from _written_experts(adapter, f"{layer}.mlp.experts")


def _written_experts(adapter: Adapter, experts: str) -> Iterator[tuple[str, str, Array, Array]]:
    gate, up, down = (f"{experts}.{key}" for key in ("gate_proj", "up_proj", "down_proj"))
    has_down = down in adapter.modules
    if gate in adapter.modules or up in adapter.modules:
        place = f"{experts}.base_layer" if has_down else experts
        yield place, f"{experts}.gate_up_proj", *_flattened(*_fused(adapter, gate, up))
    if has_down:
        yield experts, down, *_flattened(*adapter.matrices(down))


def _fused(adapter: Adapter, gate: str, up: str) -> tuple[Array, Array]:
    """A (experts, rank, in) and B (experts, 2 * out, rank) of gate and up together, at the scale of the first."""
    names = [name for name in (gate, up) if name in adapter.modules]
    num_experts, out, _ = adapter.matrices(names[0])[1].shape
    scale = _shared_scale(adapter, names)
    halves: list[tuple[Array, Array]] = []
    for name in (gate, up):
        if name in adapter.modules:
            a, b = adapter.matrices(name)
            factor = adapter.scale_of(name) / scale
            halves.append((a, b if factor == 1.0 else b * np.float32(factor)))
    if len(halves) == 1:
        a, b = halves[0]
        nothing = np.zeros_like(b)
        return a, np.concatenate([b, nothing] if names[0] == gate else [nothing, b], axis=1)
    (gate_a, gate_b), (up_a, up_b) = halves
    if np.array_equal(gate_a, up_a):  # they came from a fused adapter
        return gate_a, np.concatenate([gate_b, up_b], axis=1)
    both = np.zeros((num_experts, 2 * out, gate_b.shape[2] + up_b.shape[2]), np.float32)
    both[:, :out, : gate_b.shape[2]] = gate_b
    both[:, out:, gate_b.shape[2] :] = up_b
    return np.concatenate([gate_a, up_a], axis=1), both


def _shared_scale(adapter: Adapter, names: Sequence[str]) -> float:
    """The scale that a fused tensor is written at: of the first module that has one."""
    return next((scale for name in names if (scale := adapter.scale_of(name))), 1.0)


def _flattened(a: Array, b: Array) -> tuple[Array, Array]:
    """(experts, rank, in) -> (experts * rank, in); (experts, out, rank) -> (out, rank * experts)."""
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def tensors_like(adapter: Adapter, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """What `weights` wrote, as the tensors of `adapter`, whose modules and ranks it has.

    Raises:
        KeyError: a tensor is missing.
    """
    found: dict[str, Array] = {}
    for place, target, _, _ in _written(adapter):
        a, b = (tensors[f"{_PREFIX}{place}.{letter}.weight"] for letter in (LORA_A, LORA_B))
        names = [name for name in _sources(target) if name in adapter.modules]
        if target.endswith("_proj") and ".mlp.experts." in target:
            a, b = _unflattened(a, b, num_experts=adapter.matrices(names[0])[0].shape[0])
        fused = target.endswith(".gate_up_proj")
        begin = 0
        for name in names:
            rank, scale = adapter.modules[name].rank, adapter.scale_of(name) / _shared_scale(adapter, names)
            share = slice(begin, begin + rank) if a.shape[-2] > rank else slice(0, rank)
            begin += rank
            own = b
            if fused:
                half = b.shape[1] // 2
                own = b[:, :half] if name.endswith(".gate_proj") else b[:, half:]
            found[f"{name}.{LORA_A}"] = np.ascontiguousarray(a[..., share, :])
            found[f"{name}.{LORA_B}"] = np.ascontiguousarray(own[..., share]) / np.float32(scale)
    return found


def _unflattened(a: Array, b: Array, *, num_experts: int) -> tuple[Array, Array]:
    """The inverse of `_flattened`."""
    return a.reshape(num_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, num_experts).transpose(2, 0, 1)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(raw: Mapping[str, Any], tensors: Mapping[str, Array], architecture: Architecture, *, where: str) -> Adapter:
    """An adapter from PEFT's configuration and tensors.

    Args:
        where: the folder, for messages.

    Raises:
        UserError: a kind that can't be carried (named), or tensors that don't fit the configuration or the model.
    """
    _refuse_unknown(raw, where)
    pairs = _pairs(tensors, where)
    _refuse_untargeted(raw, pairs, where)
    rslora = bool(raw.get("use_rslora", False))
    parts: list[Part] = []
    old_experts: dict[str, dict[int, Part]] = {}
    for place, (a, b) in pairs.items():
        if match := _OLD_EXPERT.fullmatch(place):
            part = Part(f"{match[1]}.{_OLD_NAMES[match[3]]}", a, b, *_rank_and_alpha(raw, place, a.shape[0], where))
            old_experts.setdefault(part.name, {})[int(match[2])] = part
        elif ".mlp.experts" in place:
            parts += _unfused(raw, place, a, b, architecture, rslora=rslora, where=where)
        else:
            name = place.replace(".block_sparse_moe.gate", f".{ROUTER}")
            # a bare parameter in transformers 5, a linear layer in 4
            target = f"{place}.weight" if place.endswith(f".{ROUTER}") else place
            parts.append(Part(name, a, b, *_rank_and_alpha(raw, target, a.shape[0], where)))
    parts += [_stacked(found, architecture, where) for found in old_experts.values()]
    return assemble(parts, architecture, dropout=float(raw.get("lora_dropout") or 0.0), rslora=rslora, where=where)


def _refuse_unknown(raw: Mapping[str, Any], where: str) -> None:
    kind = str(raw.get("peft_type", "LORA")).removeprefix("PeftType.")
    if kind != "LORA":
        raise UserError(f"{where}: a {kind} adapter can't be carried", hint="only LoRA adapters can")
    if raw.get("use_dora"):
        raise UserError(f"{where}: a DoRA adapter (use_dora) can't be carried", hint=_MERGE)
    if raw.get("bias", "none") != "none" or raw.get("lora_bias"):
        raise UserError(f"{where}: trained biases (bias, lora_bias) can't be carried", hint=_MERGE)
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise UserError(
            f"{where}: init_lora_weights {start} changed the base model as well",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA",
        )
    for key, value in raw.items():
        if key not in _CARRIED and key not in ("bias", "use_dora", "lora_bias") and value not in (None, False, {}, []):
            raise UserError(f"{where}: {key} {value!r} can't be carried", hint=_MERGE)


def _refuse_untargeted(raw: Mapping[str, Any], places: Iterable[str], where: str) -> None:
    """PEFT puts LoRA where its configuration says and leaves other tensors of the file unused, without an error."""
    parameters = [str(name).rpartition(".")[0] for name in raw.get("target_parameters") or ()]
    for place in sorted(places):
        owner = place.removesuffix(".base_layer")
        if any(owner == name or owner.endswith(f".{name}") for name in parameters):
            continue
        if not _is_targeted(raw, owner):
            raise UserError(
                f"{where}: the file has an adapter for {owner}, which adapter_config.json does not target",
                hint="the two files belong to different adapters; copy both again",
            )


def _is_targeted(raw: Mapping[str, Any], module: str) -> bool:
    """PEFT's rule (`check_target_module_exists`), for modules of a decoder's layers."""
    targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    if not any(module == name or module.endswith(f".{name}") for name in targets or ()):
        return False
    match = re.search(r"\.layers\.(\d+)\.", module)
    if layers is None or layers == [] or match is None:
        return True
    return int(match[1]) in ([layers] if isinstance(layers, int) else layers)


_MERGE = "merge it into its base model with PEFT (merge_and_unload) and train a new LoRA on that"


def _pairs(tensors: Mapping[str, Array], where: str) -> dict[str, tuple[Array, Array]]:
    """Place -> A and B."""
    found: dict[str, dict[str, Array]] = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            what = (
                "DoRA magnitudes" if "magnitude" in key else "an embedding" if "embedding" in key else "a full weight"
            )
            raise UserError(f"{where}: {key} is {what}, which can't be carried", hint=_MERGE)
        found.setdefault(match[1], {})[match[2]] = tensor
    for place, letters in found.items():
        if len(letters) < 2:
            raise UserError(f"{where}: {place} has lora_{'AB'['A' in letters]} missing", hint="copy it again, whole")
    if not found:
        raise UserError(f"{where}: no LoRA tensors in {WEIGHTS}", hint="a silent no-op; look at how it was saved")
    return {place: (letters["A"], letters["B"]) for place, letters in found.items()}


def _rank_and_alpha(raw: Mapping[str, Any], target: str, rank: int, where: str) -> tuple[int, float]:
    """The tensor's rank, which the configuration must agree with (or PEFT could not load it), and alpha."""
    said = _by_pattern(raw.get("rank_pattern"), target, raw.get("r", 8))
    if said != rank:
        raise UserError(
            f"{where}: {target} has rank {rank}, but adapter_config.json says {said}",
            hint="the two files belong to different adapters; copy both again",
        )
    return rank, float(_by_pattern(raw.get("alpha_pattern"), target, raw.get("lora_alpha", 8)))


def _by_pattern(patterns: Mapping[str, Any] | None, target: str, default: Any) -> Any:
    """PEFT's rule (`get_pattern_key`): the first pattern that matches the end of the name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", target):
            return value
    return default


def _unfused(
    raw: Mapping[str, Any],
    place: str,
    a: Array,
    b: Array,
    architecture: Architecture,
    *,
    rslora: bool,
    where: str,
) -> Iterator[Part]:
    """A fused parameter's adapter as ours: of `down_proj`, or of gate and up, which share A."""
    layer, experts = place.split(".mlp.experts")[0], architecture.num_experts
    wide, hidden = architecture.intermediate_size, architecture.hidden_size
    if experts == 0 or a.shape[0] % experts or b.shape[1] != a.shape[0]:
        raise UserError(
            f"{where}: {place} does not fit a model with {experts} experts", hint="give the base model with --model"
        )
    rank = a.shape[0] // experts
    a, b = _unflattened(a, b, num_experts=experts)
    if (a.shape[2], b.shape[1]) == (wide, hidden):
        name = f"{layer}.{EXPERTS[2]}"
        yield Part(name, a, b, *_rank_and_alpha(raw, name, rank, where))
        return
    if (a.shape[2], b.shape[1]) != (hidden, 2 * wide):
        raise UserError(f"{where}: {place} has another shape than the experts of this model", hint=_MODEL)
    lora = _rank_and_alpha(raw, f"{layer}.mlp.experts.gate_up_proj", rank, where)
    yield from _halves(layer, a, b, lora, rslora=rslora)


_MODEL = "give the base model that it was made for with --model"


def _halves(layer: str, a: Array, b: Array, lora: tuple[int, float], *, rslora: bool) -> Iterator[Part]:
    """Gate and up of a fused adapter: each with its half of the rank if they lie on the diagonal, else both with all.

    One that is zero is no adapter.
    """
    (rank, alpha), wide = lora, b.shape[1] // 2
    shares = [slice(0, rank)] * 2
    if _is_diagonal(b):
        shares = [slice(0, rank // 2), slice(rank // 2, rank)]
        # the scale stays what it was at the whole rank
        alpha *= math.sqrt(0.5) if rslora else 0.5
    for key, own, share in zip(EXPERTS[:2], (b[:, :wide], b[:, wide:]), shares, strict=True):
        if np.any(own):
            yield Part(f"{layer}.{key}", a[:, share], own[:, :, share], share.stop - share.start, alpha)


def _is_diagonal(b: Array) -> bool:
    """Whether gate uses the first half of the rank only, and up the second."""
    wide, rank = b.shape[1] // 2, b.shape[2]
    return rank % 2 == 0 and not np.any(b[:, :wide, rank // 2 :]) and not np.any(b[:, wide:, : rank // 2])


def _stacked(found: Mapping[int, Part], architecture: Architecture, where: str) -> Part:
    """One module of all experts from one for each; an expert without an adapter has zeros."""
    first = next(iter(found.values()))
    if any((part.rank, part.alpha) != (first.rank, first.alpha) for part in found.values()):
        raise UserError(
            f"{where}: the experts of {first.name} have different ranks or alphas", hint="that can't be carried"
        )
    if max(found) >= architecture.num_experts:
        raise UserError(f"{where}: {first.name}: this model has no expert {max(found)}", hint=_MODEL)
    empty = Part(first.name, np.zeros_like(first.a), np.zeros_like(first.b), first.rank, first.alpha)
    rows = [found.get(expert, empty) for expert in range(architecture.num_experts)]
    return Part(
        first.name, np.stack([part.a for part in rows]), np.stack([part.b for part in rows]), first.rank, first.alpha
    )
