"""Going on with an adapter that was trained before, here or by a peer's tool: `train --init-adapter DIR`.

The adapter decides its modules, ranks and scales; settings that say otherwise give way, or are refused where they were
typed. The run keeps a copy, so that it can be resumed when the folder is gone. The optimiser starts fresh.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.adapter import HEAD, LORA_A, LORA_B, Adapter, LoraModule, first_layer, target_keys
from core.adapter_files import AdapterFolder
from core.architecture import Architecture
from core.config import LoraConfig
from core.errors import UserError
from core.files import disk_errors, read_json, to_json, write_atomic
from core.models import ResolvedModel
from core.models.fingerprint import model_fingerprint
from core.models.reference import original_of

FLAG = "--init-adapter"
COPY = "init_adapter"
"""Folder in the run that holds the copy."""
_TENSORS, _SETTINGS = "adapter.safetensors", "adapter.json"
_DECIDED = ("rank", "alpha", "targets", "frozen_fraction", "rslora")


def keep(folder: Path, adapter: Adapter) -> None:
    """Writes the adapter as it is, not in a peer's form: those fuse and rescale, and the run is bound to its values."""
    from safetensors.numpy import save

    plain = {
        "num_layers": adapter.num_layers,
        "rslora": adapter.rslora,
        "modules": {name: [lora.rank, lora.alpha] for name, lora in adapter.modules.items()},
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / _TENSORS, save(dict(adapter.tensors)), durable=True)
    write_atomic(folder / _SETTINGS, to_json(plain))


def read_kept(folder: Path, *, dropout: float) -> Adapter:
    """What `keep` wrote.

    Raises:
        UserError: it is gone or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    plain = read_json(folder / _SETTINGS)
    try:
        tensors = load_file(folder / _TENSORS)
        modules = {name: LoraModule(int(rank), float(alpha)) for name, (rank, alpha) in plain["modules"].items()}
        names = [f"{name}.{letter}" for name in modules for letter in (LORA_A, LORA_B)]
        return Adapter(
            modules=modules,
            tensors={name: tensors[name] for name in names},
            num_layers=plain["num_layers"],
            dropout=dropout,
            rslora=plain["rslora"],
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: the adapter that this run started from can't be read ({error})",
            hint="start a new run with: python cli.py train --init-adapter ADAPTER",
        ) from None


@dataclass(frozen=True, slots=True)
class InitAdapter:
    """An adapter to start from, and the settings that describe it."""

    adapter: Adapter
    lora: LoraConfig
    notes: tuple[str, ...]
    """What the user should know, a line each."""


def read_init_adapter(
    found: AdapterFolder, lora: LoraConfig, architecture: Architecture, *, sources: Mapping[str, str]
) -> InitAdapter:
    """Reads the adapter and settles `lora` with it.

    Args:
        sources: dotted name of a setting -> where its value came from, as in `core.settings.Settings`.

    Raises:
        UserError: no adapter, one that can't be carried or does nothing, or a typed setting that it contradicts.
    """
    adapter = replace(found.read(architecture), dropout=lora.dropout)
    if HEAD in adapter.modules:
        raise UserError(f"{found.path}: it adapts {HEAD}, which can't be trained here", hint="train one without it")
    settled = _settled(adapter, lora, architecture)
    notes = list(_differences(found.path, lora, settled, sources))
    return InitAdapter(adapter, settled, tuple(notes))


def other_base(found: AdapterFolder, model: ResolvedModel) -> str | None:
    """A line when the adapter was made for another base model, as far as the names and the files tell.

    Shapes alone do not: the versions of a model, or its base and its instruct form, have the same.
    """
    made_for = found.base_model
    if made_for is None or made_for == model.name or original_of(made_for) == model.name:
        return None
    there = Path(made_for)
    if there.is_dir():
        is_same = model_fingerprint(there) == model_fingerprint(model.path)
    else:
        is_same = there.name == Path(model.name).name or original_of(model.name) == made_for
    return None if is_same else f"{found.path}: made for {made_for}, not for {model.name}; is that what you mean?"


def _settled(adapter: Adapter, lora: LoraConfig, architecture: Architecture) -> LoraConfig:
    """The settings that come nearest to the adapter: exact for one of our own, else of its largest module.

    What the settings say of modules and layers stays as it is written where it means the same.
    """
    largest = max(adapter.modules.values(), key=lambda module: module.rank)
    update: dict[str, Any] = {"rank": largest.rank, "alpha": largest.alpha, "rslora": adapter.rslora}
    if set(target_keys(lora.targets, architecture)) != set(adapter.layer_keys):
        update["targets"] = list(adapter.layer_keys)
    if first_layer(lora, architecture) != adapter.layers[0]:
        update["frozen_fraction"] = adapter.layers[0] / adapter.num_layers
    return lora.model_copy(update=update)


def _differences(path: Path, asked: LoraConfig, settled: LoraConfig, sources: Mapping[str, str]) -> Iterator[str]:
    changed = []
    for name in _DECIDED:
        wanted, found, source = getattr(asked, name), getattr(settled, name), sources.get(f"lora.{name}")
        if source is None or wanted == found:
            continue
        if source.startswith("--"):
            raise UserError(
                f"lora.{name} = {_said(wanted)} (from {source}): the adapter in {path} has {_said(found)}",
                hint=f"leave it out, or start without {FLAG}",
            )
        changed.append(f"lora.{name} {_said(found)} (not {_said(wanted)}, from {source})")
    if changed:
        yield f"the adapter in {path} decides: {', '.join(changed)}"


def _said(value: object) -> str:
    return " ".join(str(name) for name in value) if isinstance(value, list) else f"{value}"
