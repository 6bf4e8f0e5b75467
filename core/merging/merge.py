"""Puts an adapter into the weights of its base model: W' = W + scale * B @ A, tensor by tensor.

The sum is taken in float32 and rounded once, to the type that is written. A tensor passes through in blocks of rows, so
neither the model's size nor that of its largest tensor decides the memory that is needed: a block, and the adapter.
What has no adapter is copied bit for bit, unless another type is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.adapter import HEAD, Adapter
from core.architecture import Architecture
from core.errors import UserError
from core.files import disk_errors, to_json, write_atomic
from core.merging.names import Place, places
from core.merging.stored_weights import FLOATS, SIZES, Stored, Values, WeightReader, from_float32, stored_tensors

BLOCK_VALUES = 1 << 21
"""Weights that are in memory at a time: 8 MiB in float32, and a few copies."""
INDEX = "model.safetensors.index.json"
_TYPES = {name: stored for stored, name in FLOATS.items()}


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the merged model."""

    source: Stored
    dtype: str
    """As it is written, by safetensors' name."""
    places: tuple[Place, ...]
    """Where an adapter changes it, in the order of the rows; empty: nowhere."""

    @property
    def num_bytes(self) -> int:
        if self.dtype == self.source.dtype:
            return self.source.num_bytes
        return self.source.num_values * SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What is written where; nothing is read yet but the headers."""

    shards: tuple[tuple[Target, ...], ...]
    adapter: Adapter

    @property
    def targets(self) -> list[Target]:
        return [target for shard in self.shards for target in shard]

    @property
    def num_bytes(self) -> int:
        """Of the weights that are written, headers left out."""
        return sum(target.num_bytes for target in self.targets)

    @property
    def num_changed(self) -> int:
        """Tensors that the adapter changes."""
        return sum(bool(target.places) for target in self.targets)

    @property
    def dtype(self) -> str:
        """The type of most of the weights, as `config.json` names it."""
        sizes: dict[str, int] = {}
        for target in self.targets:
            sizes[target.dtype] = sizes.get(target.dtype, 0) + target.source.num_values
        most = max(sizes, key=lambda dtype: sizes[dtype])
        return FLOATS.get(most, most)

    @property
    def files(self) -> list[str]:
        """Names of the shards."""
        count = len(self.shards)
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def plan_merge(
    folder: Path, adapter: Adapter, architecture: Architecture, *, dtype: str, max_shard_bytes: int, name: str
) -> MergePlan:
    """Finds the adapter's modules among the tensors of a 16-bit base model.

    Args:
        dtype: `auto` keeps each tensor's own; else `float32`, `bfloat16` or `float16`.
        max_shard_bytes: of a file; a tensor that is larger gets one of its own.
        name: what the user calls the base model.

    Raises:
        UserError: damaged files, a module that the base lacks or has in another shape, or weights of a type that can't
            be calculated with.
    """
    if HEAD in adapter.modules and architecture.tied_embeddings:
        raise UserError(
            f"{name}: the adapter is on {HEAD}, which this model shares with its embeddings",
            hint="an adapter without lm_head can be merged",
        )
    targets = [_target(tensor, adapter, architecture, dtype) for tensor in stored_tensors(folder, name=name)]
    for target in targets:
        _check(target, adapter, name)
    _refuse_lacking(targets, adapter, name)
    return MergePlan(_shards(targets, max_shard_bytes), adapter)


def _target(tensor: Stored, adapter: Adapter, architecture: Architecture, dtype: str) -> Target:
    found = tuple(place for place in places(tensor.name, tensor.shape, architecture) if place.module in adapter.modules)
    written = tensor.dtype if dtype == "auto" or tensor.dtype not in FLOATS else _TYPES[dtype]
    return Target(tensor, written, found)


def _check(target: Target, adapter: Adapter, name: str) -> None:
    if target.places and target.source.dtype not in FLOATS:
        raise UserError(
            f"{name}: {target.source.name} is {target.source.dtype}, which can't be merged into",
            hint="give the original 16-bit model with --model",
        )
    for place in target.places:
        a, b = adapter.matrices(place.module)
        if place.expert is not None and place.expert >= len(a):
            raise _misfit(name, f"{target.source.name}: expert {place.expert} of {len(a)}")
        if (place.num_rows, target.source.width) != (b.shape[-2], a.shape[-1]):
            raise _misfit(
                name,
                f"{target.source.name} has shape {list(target.source.shape)}, the adapter's update "
                f"{[b.shape[-2], a.shape[-1]]}",
            )


def _misfit(name: str, what: str) -> UserError:
    return UserError(f"{name}: {what}", hint="give the base model that the adapter was trained on with --model")


def _refuse_lacking(targets: Sequence[Target], adapter: Adapter, name: str) -> None:
    """Every matrix of the adapter, of every expert, must go somewhere."""
    found = {(place.module, place.expert) for target in targets for place in target.places}
    for module in adapter.modules:
        a, _ = adapter.matrices(module)
        for expert in range(len(a)) if a.ndim == 3 else (None,):
            if (module, expert) not in found:
                of = "" if expert is None else f" of expert {expert}"
                raise _misfit(name, f"no weight for {module}{of}")


def _shards(targets: Sequence[Target], max_bytes: int) -> tuple[tuple[Target, ...], ...]:
    """Filled in the base's order."""
    shards: list[list[Target]] = [[]]
    room = max_bytes
    for target in targets:
        if shards[-1] and target.num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(target)
        room -= target.num_bytes
    return tuple(tuple(shard) for shard in shards)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_merged(folder: Path, plan: MergePlan, *, on_bytes: Callable[[int], None] = lambda count: None) -> None:
    """Writes the shards, and their index if there are several, into `folder`, which exists.

    Args:
        on_bytes: told of every block that was written, in bytes.

    Raises:
        UserError: a full disk, a damaged base, or a value that the type can't hold.
    """
    weight_map: dict[str, str] = {}
    with WeightReader() as reader:
        for name, shard in zip(plan.files, plan.shards, strict=True):
            with disk_errors(folder / name), open(folder / name, "wb") as file:
                file.write(_header(shard))
                for target in shard:
                    for block in merged_blocks(target, plan.adapter, reader):
                        file.write(block)
                        on_bytes(len(block))
                    weight_map[target.source.name] = name
                file.flush()
                os.fsync(file.fileno())
    if len(plan.shards) > 1:
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomic(folder / INDEX, to_json(index))


def _header(shard: Sequence[Target]) -> bytes:
    """safetensors' head: the length of what follows, then JSON, padded so that the data begin at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks which library's layout it is
    begin = 0
    for target in shard:
        end = begin + target.num_bytes
        entries[target.source.name] = {
            "dtype": target.dtype,
            "shape": list(target.source.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def merged_blocks(target: Target, adapter: Adapter, reader: WeightReader) -> Iterator[bytes]:
    """The bytes of a merged tensor, a block of rows at a time.

    Raises:
        UserError: a value that the type can't hold.
    """
    source = target.source
    if not target.places and target.dtype == source.dtype:
        step = BLOCK_VALUES * 4  # bytes
        for begin in range(0, source.num_bytes, step):
            yield reader.read_bytes(source, begin, min(step, source.num_bytes - begin))
        return
    step = max(BLOCK_VALUES // max(source.width, 1), 1)
    for first in range(0, source.num_rows, step):
        last = min(first + step, source.num_rows)
        values = reader.read_rows(source, first, last)
        for place in target.places:
            _add_update(values, place, adapter, first=first)
        rounded = from_float32(values, target.dtype)
        _refuse_infinite(values, rounded, target)
        yield rounded.tobytes()


def _add_update(values: Values, place: Place, adapter: Adapter, *, first: int) -> None:
    """Adds scale * B @ A to those rows of `values` that are the module's; `values` begins at row `first`."""
    begin = max(place.first_row, first)
    end = min(place.first_row + place.num_rows, first + len(values))
    if begin >= end:
        return
    a, b = adapter.matrices(place.module)
    if place.expert is not None:
        a, b = a[place.expert], b[place.expert]
    update = b[begin - place.first_row : end - place.first_row] @ a
    update *= np.float32(adapter.scale_of(place.module))
    values[begin - first : end - first] += update


def _refuse_infinite(values: Values, rounded: npt.NDArray[Any], target: Target) -> None:
    is_half = target.dtype == "F16"
    if bool(np.isfinite(rounded if is_half else values).all()):
        return
    raise UserError(
        f"{target.source.name}: a merged weight of {float(np.abs(values).max()):.3g} does not fit into "
        f"{FLOATS[target.dtype]}",
        hint="merge with --dtype bfloat16" if is_half else "the base model or the adapter is damaged",
    )


def matrices_of(
    tensors: Sequence[Stored], architecture: Architecture
) -> Mapping[tuple[str, int | None], tuple[Stored, Place]]:
    """(module, expert) -> the tensor that holds its matrix, and where in it."""
    return {
        (place.module, place.expert): (tensor, place)
        for tensor in tensors
        for place in places(tensor.name, tensor.shape, architecture)
    }
