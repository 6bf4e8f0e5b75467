"""Loading piece by piece: a mixture in 4 bits, so that it never lies anywhere in 16, and models without some layers.

transformers reads a fused tensor of experts whole, in 16 bits, before anything can pack it. Here the model is built
without weights, and each matrix goes from its shard to the device, is packed there and forgotten. In host memory lies
one matrix at a time and what the system keeps of the open shard; on the device the packed model and one matrix.

Checkpoints name experts one by one (`block_sparse_moe.experts.3.w1.weight`, `mlp.experts.3.gate_proj.weight`) or fused
as transformers 5 does (`mlp.experts.gate_up_proj`).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open

from backends.cuda import packed_cache
from backends.cuda.experts import FUSED, IMPLEMENTATION, is_experts, put_packed, refuse_other_forms
from backends.cuda.nf4 import KIND, Nf4Matrix, keep_packing, packed_bytes
from core.config import ModelConfig
from core.errors import UserError
from core.models.folder import read_header, weight_files
from core.protocols import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from core.models import ResolvedModel

log = logging.getLogger("twinkeel")

Weights = dict[str, torch.Tensor | Nf4Matrix]
"""Name of a parameter, of an expert's matrix `…gate_up_proj.3`, -> its value."""
_EXPERT_NAMES = {"gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")), "down_proj": (("w2",), ("down_proj",))}
"""Fused tensor -> what checkpoints call its parts: Mixtral's, and the names of Qwen-MoE and OLMoE."""
_SAY_EVERY = 10.0
"""Seconds between lines of progress."""


class Source(Protocol):
    """Where unpacked weights come from, one matrix at a time."""

    name: str
    """Tells what it gives from what a model folder, or another source, gives: packed weights are kept under it."""

    def has(self, name: str) -> bool:
        """Whether it holds the parameter of this name, transformers' name."""
        ...

    def read(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The matrices of the parameter `name` one after the other, each gone before the next: of experts, with `shape`
        (experts, out, in), one for each, [out, in]; else the parameter itself. In any type, on any device."""
        ...


def load_in_pieces(
    model: ResolvedModel,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    source: Source | None = None,
    left_out: range = range(0),
    on_host: range = range(0),
) -> tuple[PreTrainedModel, Pieces]:
    """The frozen model on `device`, in 4 bits (linear layers and experts in NF4, the rest in `dtype`) or 16, and what
    reads its pieces again.

    Packed weights are kept on disk (`backends.cuda.packed_cache`) and read from there the next time.

    Args:
        source: where the weights come from; None: the model folder's safetensors.
        left_out: layers that stay without weights.
        on_host: layers whose weights stay in host memory; of a cache they are a map of its files.

    Raises:
        UserError: experts of another form, or missing or misshapen weights.
    """
    base = empty_model(model.path, config, dtype=dtype, attention=attention)
    plan = planned_weights(base) if config.bits == 4 else []
    cache = (
        packed_cache.open_cache(model.path, dtype, plan, source="" if source is None else source.name)
        if config.bits == 4 and config.cache_packed
        else None
    )
    reader = Pieces(base, model, cache, source=source, bits=config.bits, device=device, dtype=dtype)
    reader.load(base, left_out=set(map(_layer_piece, left_out)), on_host=set(map(_layer_piece, on_host)))
    _make_buffers(base, device)
    base.tie_weights()
    layers = tuple(f"model.layers.{layer}." for layer in left_out)
    still_empty = [
        name for name, tensor in _tensors(base) if tensor.device.type == "meta" and not name.startswith(layers)
    ]
    assert not still_empty, f"no values for {still_empty[:3]}"
    return base.eval(), reader


def empty_model(folder: Path, config: ModelConfig, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model without weights (on torch's meta device).

    Raises:
        UserError: experts of another form than this can pack.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    trust: dict[str, Any] = {"trust_remote_code": True} if config.trust_remote_code else {}
    settings = AutoConfig.from_pretrained(folder, local_files_only=True, **trust)
    experts = {"experts_implementation": IMPLEMENTATION} if config.bits == 4 else {}
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=attention, **experts, **trust
        )
    for name, module in base.named_modules():
        if config.bits == 4 and is_experts(module):
            refuse_other_forms(module, name)
    return base


def pieces(base: PreTrainedModel) -> dict[str, list[str]]:
    """The parameters in portions: each layer, then what is outside the layers. Name of the portion -> names."""
    found: dict[str, list[str]] = {}
    for name, _ in base.named_parameters():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        found.setdefault(_layer_piece(int(match[1])) if match else "rest", []).append(name)
    return found


def _layer_piece(layer: int) -> str:
    return f"layer-{layer:03d}"


def packed_names(base: PreTrainedModel) -> set[str]:
    """Names of the parameters that are held in 4 bits: of linear layers but the output head, and of experts."""
    head = base.get_output_embeddings()
    found = set()
    for path, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            found.add(f"{path}.weight")
        elif is_experts(module):
            found |= {f"{path}.{name}" for name in FUSED}
    return found


def planned_weights(base: PreTrainedModel) -> list[Weight]:
    """What a model from `empty_model` will consist of once it is loaded; no weight is needed for it."""
    packed = packed_names(base)
    found = []
    for name, parameter in base.named_parameters():
        matrices = parameter.shape[0] if parameter.dim() == 3 else 1
        num_bytes = matrices * packed_bytes(parameter.numel() // matrices)
        if name in packed:
            found.append(Weight(name, KIND, parameter.numel(), num_bytes))
        else:
            dtype = str(parameter.dtype).removeprefix("torch.")
            found.append(Weight(name, dtype, parameter.numel(), parameter.nbytes))
    return found


# --- reading and packing ----------------------------------------------------------------------------------------------


class Pieces:
    """A model's weights piece by piece, in the form that the loaded model has them."""

    def __init__(
        self,
        base: PreTrainedModel,
        model: ResolvedModel,
        cache: packed_cache.PackedCache | None,
        *,
        source: Source | None,
        bits: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`base`: without weights, as `empty_model` gives it."""
        self._model = model
        self._cache = cache
        self._given = source
        self._device = device
        self._dtype = dtype
        self._packed = packed_names(base) if bits == 4 else set()
        self._names = pieces(base)
        self._shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
        self._is_tied = bool(base.config.tie_word_embeddings)
        self._is_cached = False

    def load(self, base: PreTrainedModel, *, left_out: Collection[str] = (), on_host: Collection[str] = ()) -> None:
        """Puts all pieces but `left_out` into `base`; packs them, and keeps what was packed, unless that was done."""
        if self._cache is not None and self._cache.is_whole():
            log.info("4-bit weights as packed before, from %s", self._cache.folder)
            self._is_cached = True
            for piece in self._names:
                if piece not in left_out:
                    _install(base, self.read(piece, on_host=piece in on_host), self._dtype)
            return
        self._pack_all(base, left_out=left_out, on_host=on_host)
        self._is_cached = self._cache is not None and self._cache.folder.exists()

    def read(self, piece: str, *, on_host: bool = False) -> Weights:
        """A piece's values, on the device, or in host memory: there, from the cache, as a map of its file."""
        place = torch.device("cpu") if on_host else self._device
        if self._is_cached:
            assert self._cache is not None
            return self._cache.read(piece, place)
        with self._source() as source:
            return self._to(self._read_piece(source, piece), place)

    def install_layer(self, base: PreTrainedModel, layer: int) -> None:
        """Puts all of a layer into `base`, on the device."""
        _install(base, self.read(_layer_piece(layer)), self._dtype)

    @contextmanager
    def _source(self) -> Iterator[Source]:
        if self._given is not None:
            yield self._given
            return
        with _Checkpoint(self._model) as checkpoint:
            yield checkpoint

    def _pack_all(self, base: PreTrainedModel, *, left_out: Collection[str], on_host: Collection[str]) -> None:
        said = time.monotonic()
        with self._source() as source, nullcontext() if self._cache is None else self._cache.writing() as draft:
            for number, piece in enumerate(self._names, start=1):
                if piece in left_out and draft is None:
                    continue
                values = self._read_piece(source, piece)
                if draft is not None:
                    draft.write(piece, values)
                if piece not in left_out:
                    place = torch.device("cpu") if piece in on_host else self._device
                    _install(base, self._to(values, place), self._dtype)
                if self._packed and time.monotonic() - said > _SAY_EVERY:
                    said = time.monotonic()
                    log.info("  packed %d of %d layers in 4 bits", number, len(self._names) - 1)
            if isinstance(source, _Checkpoint) and not left_out:
                source.warn_of_the_rest()

    def _read_piece(self, source: Source, piece: str) -> Weights:
        values: Weights = {}
        for name in self._names[piece]:
            if name == "lm_head.weight" and not source.has(name) and self._is_tied:
                continue
            values |= self._read_one(source, name)
        return values

    def _read_one(self, source: Source, name: str) -> Weights:
        """A parameter in its final form on the device; of packed experts one matrix for each."""
        shape, packed = self._shapes[name], name in self._packed
        if len(shape) < 3:
            (value,) = source.read(name, shape)
            on_device = value.to(self._device, self._dtype)
            return {name: Nf4Matrix.of(on_device) if packed else on_device}
        matrices = (matrix.to(self._device, self._dtype) for matrix in source.read(name, shape))
        if not packed:
            return {name: torch.stack(list(matrices))}
        return {f"{name}.{expert}": Nf4Matrix.of(matrix) for expert, matrix in enumerate(matrices)}

    def _to(self, values: Weights, place: torch.device) -> Weights:
        if place == self._device:
            return values
        return {
            name: value.on(place) if isinstance(value, Nf4Matrix) else value.to(place) for name, value in values.items()
        }


class _Checkpoint:
    """The tensors of a model folder by name; one shard is open at a time."""

    name = ""

    def __init__(self, model: ResolvedModel) -> None:
        self._name = model.name
        self._files = {
            tensor: path
            for path in weight_files(Path(model.path), name=model.name)
            for tensor in read_header(path)
            if tensor != "__metadata__"
        }
        self._unused = set(self._files)
        self._open: tuple[Path, Any] | None = None

    def __enter__(self) -> _Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def has(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """As `Source.read`.

        Raises:
            UserError: it is missing, or has another shape.
        """
        if len(shape) < 3:
            return self._matrices(name, (1, *shape), [[name]])
        return self._matrices(name, shape, self._parts(name, shape[0]))

    def warn_of_the_rest(self) -> None:
        if self._unused:
            some = ", ".join(sorted(self._unused)[:3])
            log.warning("%s: %d tensors that this model has no use for: %s", self._name, len(self._unused), some)

    def _parts(self, name: str, num_experts: int) -> list[list[str]]:
        """For each expert the tensors that its matrix is stacked from; one entry for a fused tensor."""
        path, _, leaf = name.rpartition(".")
        if self._place(name) in self._files:
            return [[name]]
        for parts in _EXPERT_NAMES[leaf]:
            if self._place(f"{path}.0.{parts[0]}.weight") in self._files:
                return [[f"{path}.{expert}.{part}.weight" for part in parts] for expert in range(num_experts)]
        raise self._problem("have no", name)

    def _matrices(self, name: str, shape: tuple[int, ...], parts: list[list[str]]) -> Iterator[torch.Tensor]:
        """The matrices of a stack of `shape` (count, …), one after the other."""
        count, *one = shape
        if count > 1 and len(parts) == 1:  # fused
            stack = self._slice(name, parts[0][0])
            if tuple(stack.get_shape()) != shape:
                raise self._problem("have the wrong shape for", name)
            yield from (stack[index] for index in range(count))
            return
        for stacked in parts:
            tensors = [self._slice(name, part)[:] for part in stacked]
            # a wrong width would not stack, a wrong height shows in the sum
            widths = {tensor.shape[1:] for tensor in tensors}
            if len(widths) != 1 or (sum(len(tensor) for tensor in tensors), *next(iter(widths))) != tuple(one):
                raise self._problem("have the wrong shape for", stacked[0])
            yield torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    def _slice(self, name: str, part: str) -> Any:
        place = self._place(part)
        if place not in self._files:
            raise self._problem("have no", part if part != name else name)
        path = self._files[place]
        self._unused.discard(place)
        if self._open is None or self._open[0] != path:
            self._close()
            self._open = (path, safe_open(path, framework="pt").__enter__())
        return self._open[1].get_slice(place)

    def _place(self, name: str) -> str:
        """The name in the checkpoint: Mixtral's folders say `block_sparse_moe` where transformers 5 says `mlp`."""
        old = name.replace(".mlp.", ".block_sparse_moe.")
        return name if name in self._files else old

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None

    def _problem(self, what: str, name: str) -> UserError:
        return UserError(
            f"{self._name}: the weights {what} {name}",
            hint="download the model again, or check that config.json belongs to these weights",
        )


# --- putting it into the model ----------------------------------------------------------------------------------------


def _install(base: PreTrainedModel, values: Mapping[str, torch.Tensor | Nf4Matrix], dtype: torch.dtype) -> None:
    experts: dict[str, list[Nf4Matrix]] = {}
    # matrices first: a packed layer takes the place of the one that has the bias
    for name, value in sorted(values.items(), key=lambda item: not isinstance(item[1], Nf4Matrix)):
        path, _, leaf = name.rpartition(".")
        if isinstance(value, Nf4Matrix) and leaf.isdecimal():
            experts.setdefault(path, []).append(value)
        elif isinstance(value, Nf4Matrix):
            _put_linear(base, path, value, dtype)
        else:
            setattr(base.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False))
    for name, matrices in experts.items():
        path, _, leaf = name.rpartition(".")
        put_packed(base.get_submodule(path), leaf, matrices)


def _put_linear(base: PreTrainedModel, path: str, matrix: Nf4Matrix, dtype: torch.dtype) -> None:
    """bitsandbytes' own 4-bit layer around weights that are packed already."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    parent_path, _, leaf = path.rpartition(".")
    parent: Any = base.get_submodule(parent_path)
    old = getattr(parent, leaf)
    new = Linear4bit(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        compute_dtype=dtype,
        quant_type=KIND,
        device="meta",
    )
    new.weight = Params4bit(
        matrix.packed,
        requires_grad=False,
        quant_state=matrix.state,
        quant_type=KIND,
        compress_statistics=True,
        bnb_quantized=True,
        module=new,
    )
    new.quant_state = matrix.state
    keep_packing(new)  # layers that are read again come after the model was looked through
    setattr(parent, leaf, new)


def _make_buffers(base: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no checkpoint holds: the rotary frequencies, which the model's settings decide."""
    decoder: Any = base.model
    with torch.device(device):
        decoder.rotary_emb = type(decoder.rotary_emb)(config=base.config)


def _tensors(base: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from base.named_parameters()
    yield from base.named_buffers()
