"""The adapter folder that loads unchanged in PEFT, in mlx-lm, or in both.

`adapter_model.safetensors` holds PEFT's names and orientation (`core.adapter_peft`), `adapters.safetensors` mlx-lm's
(`core.adapter_mlx`), and one `adapter_config.json` carries the keys of both.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core import adapter_mlx, adapter_peft
from core.adapter import Adapter
from core.architecture import Architecture
from core.errors import UserError
from core.files import disk_errors, to_json, write_atomic
from core.folds import run_with_adapter
from core.tensor_files import read_float32

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = adapter_peft.WEIGHTS
MLX_WEIGHTS = adapter_mlx.WEIGHTS

Form = Literal["peft", "mlx"]
BOTH: tuple[Form, ...] = ("peft", "mlx")
_WEIGHTS: Mapping[Form, str] = {"peft": PEFT_WEIGHTS, "mlx": MLX_WEIGHTS}


def write_adapter(folder: Path, adapter: Adapter, *, base_model: str, forms: Collection[Form] = BOTH) -> None:
    """Writes the folder, each file in one step; `base_model` is a hub id or a path, for PEFT's AutoPeftModel.

    Files of a form that is not asked for are removed: they would hold another adapter.
    """
    from safetensors.numpy import save

    contents = {"peft": adapter_peft.weights, "mlx": adapter_mlx.weights}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for form, name in _WEIGHTS.items():
            if form not in forms:
                (folder / name).unlink(missing_ok=True)
    for form in forms:
        write_atomic(folder / _WEIGHTS[form], save(contents[form](adapter), {"format": "pt"}), durable=True)
    write_atomic(folder / CONFIG, to_json(adapter_config(adapter, base_model=base_model, forms=forms)))


def adapter_config(adapter: Adapter, *, base_model: str, forms: Collection[Form] = BOTH) -> dict[str, Any]:
    """The keys of PEFT's LoraConfig and of mlx-lm's adapter configuration, side by side."""
    plain: dict[str, Any] = {"base_model_name_or_path": base_model}
    if "peft" in forms:
        plain |= adapter_peft.config(adapter)
    if "mlx" in forms:
        plain |= adapter_mlx.config(adapter)
    return plain


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter folder that was found, by us or by a peer; nothing but its configuration is read yet."""

    path: Path
    form: Form
    """PEFT's where it has both."""
    config: Mapping[str, Any]

    @property
    def base_model(self) -> str | None:
        """Hub id or path of the model that it was made for, as its configuration says."""
        name = self.config.get("base_model_name_or_path") or self.config.get("model")
        return name if isinstance(name, str) else None

    def read(self, architecture: Architecture) -> Adapter:
        """The adapter for a model of this shape.

        Raises:
            UserError: a kind that can't be carried (DoRA and others, by name), or tensors that fit neither the
                configuration nor the model, or that do nothing.
        """
        reader = adapter_peft.read if self.form == "peft" else adapter_mlx.read
        return reader(self.config, read_float32(self.path / _WEIGHTS[self.form]), architecture, where=str(self.path))


def find_adapter(path: Path, *, form: Form | None = None) -> AdapterFolder:
    """Looks at an adapter folder, or at the `adapters` folder of a run; of folds, at that of the run on all rows.

    Args:
        form: the form that is wanted, of a folder that may have both.

    Raises:
        UserError: there is no adapter of a known form, or folds without a run on all rows.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder", hint=f"an adapter folder holds {CONFIG} and its weights")
    path = run_with_adapter(path)
    folder = path if (path / CONFIG).is_file() else path / "adapters"
    if not (folder / CONFIG).is_file():
        raise UserError(f"{path}: no adapter here (no {CONFIG})", hint=_WHAT_IT_HOLDS)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / CONFIG}: not JSON ({error})", hint="copy the adapter again, whole") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: not a JSON object", hint="copy the adapter again, whole")
    for one in BOTH if form is None else (form,):
        if (folder / _WEIGHTS[one]).is_file():
            return AdapterFolder(folder, one, config)
    if (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder}: adapter_model.bin is a pickle, which can run code and is not read",
            hint="load it in PEFT and save it again: save_pretrained writes safetensors",
        )
    raise UserError(f"{folder}: {CONFIG}, but no weights beside it", hint=_WHAT_IT_HOLDS)


_WHAT_IT_HOLDS = f"an adapter folder holds {CONFIG} and {PEFT_WEIGHTS} (PEFT) or {MLX_WEIGHTS} (mlx-lm)"


def read_saved(folder: Path, adapter: Adapter) -> Adapter:
    """An adapter of our own as its files hold it, in the form of `adapter`, which has its modules and ranks.

    Raises:
        AssertionError: a tensor is missing, or the two files disagree: a bug of ours.
    """
    from safetensors.numpy import load_file

    peft = load_file(folder / PEFT_WEIGHTS)
    assert adapter_peft.weights(adapter).keys() == peft.keys(), "the saved adapter has other tensors"
    saved = adapter.with_tensors(adapter_peft.tensors_like(adapter, peft))
    for written, found in (
        (adapter_peft.weights(saved), peft),
        (adapter_mlx.weights(saved), load_file(folder / MLX_WEIGHTS)),
    ):
        assert written.keys() == found.keys()
        assert all(np.allclose(found[name], written[name], rtol=1e-6, atol=0.0) for name in written)
    return saved
