"""The backends by name. Importing this, or a backend's own module, imports no tensor library."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Sequence
from typing import Any, cast

from core.generation import OnToken
from core.protocols import Backend, Learner
from core.sampling import GREEDY, Continuation, Sampling

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


def generate(
    name: str,
    learner: Learner,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    max_length: int | None = None,
    sampling: Sampling = GREEDY,
    keys: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> list[Continuation]:
    """Continues prompts, all at once, with the adapter at its present weights and without dropout.

    A row's text is what it would be alone, up to float rounding. The more alike the prompts are in length, the less is
    spent on padding; a row that has ended costs nothing from then on.

    Args:
        name: the backend of `learner`.
        tokenizer: gives `eos_token_id`; the model's own generation settings may add more end tokens.
        prompts: token ids, at least one each, of any lengths.
        max_tokens: of each answer, without its end token.
        max_length: of prompt and answer together: the positions that the model was made for, which
            `Architecture.max_positions` knows. A prompt that fills them gets no answer. None: any number.
        sampling: how the next token is chosen.
        keys: one per prompt; with `sampling.seed` a key decides the row's draws, whatever batch it is in and on
            either backend. None: its place in the batch.
        on_token: called with a prompt's place and its next token as they come, step by step; where it returns True
            that was the row's last token. What it raises is passed on, and the learner stays usable.

    Raises:
        OutOfMemoryError: prompts and cache did not fit.
        UserError: the logits are no numbers any more.
    """
    module = importlib.import_module(f"backends.{name}.generate")
    found: list[Continuation] = module.generate(
        learner,
        tokenizer,
        prompts,
        max_tokens=max_tokens,
        max_length=max_length,
        sampling=sampling,
        keys=keys,
        on_token=on_token,
    )
    return found
