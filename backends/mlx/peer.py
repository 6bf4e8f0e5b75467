"""An adapter folder in mlx-lm, as its users load it; the base model with the settings that mlx-lm would misread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.mlx.blas import needs_blas, preload_blas


def load(model: Path, adapter: str | None, *, dtype: str) -> Any:
    """The base model, with the adapter if there is one, on the GPU if there is one."""
    if needs_blas():
        preload_blas()
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    from backends.mlx.loading import mlx_settings

    if not mx.metal.is_available():
        mx.set_default_device(mx.cpu)
    module: Any = load_model(model, strict=True, model_config=mlx_settings(model))[0]
    module.set_dtype(getattr(mx, dtype))
    if adapter is not None:
        module = load_adapters(module, adapter)
    module.eval()
    return module


def logits(module: Any, inputs: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Those of every batch, float32 [B, T, V], for int32 `inputs` [B, T]."""
    import mlx.core as mx

    for ids in inputs:
        yield np.array(module(mx.array(ids)).astype(mx.float32))
