"""Data sets of the Hugging Face hub, through `datasets`, which keeps them on the disk and reads them row by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import UserError
from data.sources import SPLIT_NAMES, BadRows, Row, Rows, Source


def hub_fingerprint(path: str) -> str | None:
    """Of what `datasets` has in its own cache, which tells its versions apart."""
    loaded = _load_hub(path)
    prints = {split: getattr(loaded[split], "_fingerprint", None) for split in loaded}
    if None in prints.values():
        return None
    return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()


def _load_hub(path: str) -> Any:
    """A mapping of splits to rows. Raises `UserError` if there is no such data set."""
    name, _, config = path.partition(":")
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data.path: {path} is no file or folder here, and hub data sets need `datasets`",
            hint="give a file that exists, or pip install datasets",
        ) from None
    try:
        # Data files only: `datasets` runs no code from the hub since version 4.
        return datasets.load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.path: {path} is no file or folder here, and the hub gave no data set ({reason})",
            hint="check the spelling and the network; choose a configuration as owner/name:config",
        ) from None


@dataclass(frozen=True, slots=True)
class HubRows:
    """The rows of a split on the hub."""

    loaded: Iterable[Mapping[str, Any]]
    shown: str

    def read(self, bad: BadRows) -> Iterator[Row]:
        """As `Rows.read`."""
        for number, values in enumerate(self.loaded, start=1):
            yield Row(values, self.shown, number, "row")

    @property
    def num_bytes(self) -> int:
        return getattr(self.loaded, "size_in_bytes", None) or 0


def open_hub(path: str) -> Source:
    name, loaded = path.partition(":")[0], _load_hub(path)
    splits: dict[str, Rows] = {}
    for split, aliases in SPLIT_NAMES.items():
        found = next((alias for alias in aliases if alias in loaded), None)
        if found is not None:
            splits[split] = HubRows(loaded[found], f"{name}/{found}")
    if "train" not in splits:
        raise UserError(
            f"data.path: {path} has no train split (it has {', '.join(loaded)})",
            hint="download the split you want and give data.path the file",
        )
    return Source(path, splits, path)
