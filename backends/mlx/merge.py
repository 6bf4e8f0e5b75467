"""A merged model as an MLX folder in 4 bits, by mlx-lm's own quantisation."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from backends.mlx.backend import choose_device, prepare_device, quiet_libraries
from backends.mlx.loading import GROUP_SIZE
from backends.mlx.memory import translate_out_of_memory

DESCRIPTION = f"MLX, 4-bit, groups of {GROUP_SIZE}"


def refuse_4bit(num_experts: int) -> None:
    """Every model that this backend trains can be written in 4 bits."""


def write_4bit(source: Path, folder: Path, *, device: str) -> None:
    """Reads the 16-bit folder `source` and writes weights and `config.json` into `folder`, as `mlx_lm.convert -q` does.

    Raises:
        UserError: MLX is not here.
        OutOfMemoryError: it does not fit.
    """
    restore = prepare_device(choose_device(device))
    try:
        with quiet_libraries(), translate_out_of_memory("quantising the merged model"):
            _write(source, folder)
    finally:
        restore()


def _write(source: Path, folder: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    module: Any
    # lazy: a weight is read, quantised and written when its file is
    module, config = load_model(source, lazy=True, strict=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how many bits a weight has
        module, config = quantize_model(module, config, GROUP_SIZE, 4)
    save_model(folder, module, donate_model=True)
    save_config(config, folder / "config.json")
    del module
    mx.clear_cache()
