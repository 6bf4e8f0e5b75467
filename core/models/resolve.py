"""`model.path`, as the user writes it, to a checked folder on this machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.errors import UserError
from core.files import user_path
from core.models import hub, wheel
from core.models.folder import check_model_folder, count_parameters
from core.models.reference import QUICKSTART_MODEL, choose_reference

logger = logging.getLogger("twinkeel")

Source = Literal["folder", "hub", "package"]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine.

    path: the folder, in Hugging Face layout.
    name: the folder as the user wrote it, or the hub id; what screens and adapter_config.json say.
    revision: the commit on the hub, where there is one.
    source: where it came from.
    note: for `auto`, one line about which model was chosen and why; else empty.
    parameters: number of weights, counted from the files.
    """

    path: Path
    name: str
    revision: str | None
    source: Source
    note: str
    parameters: int


def resolve_model(
    path: str,
    *,
    revision: str | None,
    backend: str,
    bits: int,
    memory_bytes: int,
    accelerator: bool,
    offline: bool = False,
) -> ResolvedModel:
    """Finds or downloads the model that `path` names: a folder, a hub id, or `auto`.

    `memory_bytes` (what training may use on the device) and `accelerator` only matter for `auto`.
    `offline` forbids every download; HF_HUB_OFFLINE forbids only the hub. Raises UserError.
    """
    if path != "auto":
        if _means_folder(path):
            if revision is not None:
                logger.warning("model.revision %r has no effect: %s is a folder", revision, path)
            return _from_folder(path)
        return _from_hub_id(path, revision=revision, offline=offline, note="")
    if revision is not None:
        raise UserError(
            f"model.revision {revision!r} has no meaning with model.path auto",
            hint="name the model in model.path",
        )
    hub_id, note = choose_reference(
        backend=backend,
        bits=bits,
        memory_bytes=memory_bytes,
        accelerator=accelerator,
        problem_with=lambda candidate: _problem_with(candidate, offline=offline),
    )
    return _from_hub_id(hub_id, revision=None, offline=offline, note=note)


def _means_folder(path: str) -> bool:
    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1
    return looks_like_path or Path(path).exists()


def _from_folder(path: str) -> ResolvedModel:
    folder = user_path(path)
    if not folder.is_dir():
        what = f"no such model folder: {path}"
        if folder.is_file():
            what = f"{path} is a file, not a model folder"
        raise UserError(what, hint="give a folder with config.json, or a hub id such as org/name")
    check_model_folder(folder, name=path)
    return _resolved(folder.resolve(), name=path, source="folder")


def _from_hub_id(hub_id: str, *, revision: str | None, offline: bool, note: str) -> ResolvedModel:
    """From the hub or its cache; the quickstart model, failing both, from PyPI's package."""
    try:
        snapshot = hub.fetch_snapshot(hub_id, revision=revision, offline=offline)
    except hub.HubUnavailableError:
        # The package holds one version only, so it can't stand in for a revision asked for by name.
        if hub_id != QUICKSTART_MODEL or revision is not None:
            raise
        folder = wheel.packaged_model(offline=offline)
        return _resolved(folder, name=hub_id, source="package", note=note)
    commit = hub.commit_of(snapshot) or revision
    return _resolved(snapshot, name=hub_id, source="hub", revision=commit, note=note)


def _problem_with(hub_id: str, *, offline: bool) -> str | None:
    """Why `auto` can't have this model, in a few words; None if it can."""
    if hub.cached_snapshot(hub_id, revision=None) is not None:
        return None
    if offline or not hub.hub_reachable():
        return "is not in the cache, and the hub is unreachable"
    return hub.access_problem(hub_id)


def _resolved(folder: Path, *, name: str, source: Source, revision: str | None = None, note: str = "") -> ResolvedModel:
    return ResolvedModel(
        path=folder,
        name=name,
        revision=revision,
        source=source,
        note=note,
        parameters=count_parameters(folder),
    )
