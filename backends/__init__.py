"""The backends by name. Importing this, or a backend's own module, imports no tensor library."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Sequence
from typing import Any, cast

from core.protocols import Backend, Learner

_CLASSES = {"mlx": "MlxBackend", "cuda": "CudaBackend"}


def names() -> tuple[str, ...]:
    """Every backend there is, whether it can run here or not."""
    return tuple(_CLASSES)


def default_name() -> str:
    """The backend of this machine: MLX on an Apple Silicon Mac, else PyTorch (CUDA if there is one, else the CPU)."""
    return "mlx" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cuda"


def get(name: str) -> Backend:
    """The backend of that name; `auto` is this machine's own."""
    name = default_name() if name == "auto" else name
    module = importlib.import_module(f"backends.{name}.backend")
    return cast(Backend, getattr(module, _CLASSES[name])())


def generate(name: str, learner: Learner, tokenizer: Any, prompt_ids: Sequence[int], *, max_tokens: int) -> list[int]:
    """Greedy continuation of a prompt by a learner of backend `name`, without the end token."""
    module = importlib.import_module(f"backends.{name}.generate")
    ids: list[int] = module.generate(learner, tokenizer, prompt_ids, max_tokens=max_tokens)
    return ids
