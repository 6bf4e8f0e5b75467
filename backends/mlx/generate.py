"""Text from a learner's model, for a batch of prompts, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from backends.mlx.memory import translate_out_of_memory
from backends.mlx.model import keep_rows
from core.generation import NO_TOKEN, OnToken, continue_prompts, end_tokens
from core.sampling import GREEDY, Continuation, Sampling

if TYPE_CHECKING:
    from backends.mlx.learner import MlxLearner

_PREFILL = 2048
"""Prompt tokens per forward pass, over all rows: bounds the memory of long prompts."""


def generate(
    learner: MlxLearner,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    max_length: int | None = None,
    sampling: Sampling = GREEDY,
    keys: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> list[Continuation]:
    """See `backends.generate`."""
    longest = max(map(len, prompts), default=0)
    with translate_out_of_memory(f"generating text from {len(prompts)} prompts of up to {longest} tokens"):
        return continue_prompts(
            _Decoder(learner),
            prompts,
            max_tokens=max_tokens,
            max_length=max_length,
            ends=end_tokens(tokenizer, learner.network.end_tokens),
            sampling=sampling,
            keys=keys,
            on_token=on_token,
        )


class _Decoder:
    """`core.generation.Decoder`. Prompts are padded on the left, so that all rows' next tokens share a slot."""

    def __init__(self, learner: MlxLearner) -> None:
        self._learner = learner
        self._cache: list[Any] = []
        self._next = mx.zeros(0)
        self._ahead: mx.array | None = None
        """The logits after the next `step`, where it is known already."""

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        self._cache = self._learner.network.make_cache(padding)
        ids = mx.array([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], mx.int32)
        size = max(1, _PREFILL // len(prompts))
        for start in range(0, width, size):
            hidden = self._read(ids[:, start : start + size])
            mx.eval(hidden)
        self._next = self._logits(hidden)

    def likeliest(self) -> list[int]:
        tokens = mx.argmax(self._next, axis=-1)
        is_number = mx.isfinite(mx.max(self._next, axis=-1))  # of a NaN anywhere the maximum is NaN
        found = mx.where(is_number, tokens.astype(mx.int32), NO_TOKEN)
        # the next step is on its way before these tokens are looked at: the device needs not wait for Python
        self._ahead = self._logits(self._read(tokens[:, None]))
        mx.async_eval(found, self._ahead)
        return [int(token) for token in np.array(found)]  # waits for the device

    def logits(self) -> npt.NDArray[np.float32]:
        return np.array(self._next)  # waits for the device

    def keep(self, places: Sequence[int]) -> None:
        kept = mx.array(list(places), mx.int32)
        if self._ahead is not None:
            self._ahead = self._ahead[kept]
        for cache in self._cache:
            keep_rows(cache, kept)

    def step(self, tokens: Sequence[int]) -> None:
        if self._ahead is None:
            self._ahead = self._logits(self._read(mx.array(list(tokens), mx.int32)[:, None]))
        self._next, self._ahead = self._ahead, None

    def _read(self, ids: mx.array) -> mx.array:
        """Appends token ids [rows, T] to the cache; returns hidden states [rows, T, D]."""
        return self._learner.network.hidden_states(self._learner.parameters, ids, cache=self._cache)

    def _logits(self, hidden: mx.array) -> mx.array:
        """Float32 [rows, V] of the token after the last."""
        return self._learner.network.project(hidden[:, -1]).astype(mx.float32)
