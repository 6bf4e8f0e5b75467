"""Text from a learner's model, for a batch of prompts, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from backends.cuda.kv_cache import ROOM, KeyValueCache
from backends.cuda.memory import within_memory
from core.generation import NO_TOKEN, OnToken, continue_prompts, end_tokens
from core.sampling import GREEDY, Continuation, Sampling

if TYPE_CHECKING:
    from backends.cuda.learner import CudaLearner

_PREFILL = 2048
"""Prompt tokens per forward pass, over all rows: bounds the memory of long prompts."""


def generate(
    learner: CudaLearner,
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
    settings = getattr(learner.model.generation_config, "eos_token_id", None)

    def run() -> list[Continuation]:
        return continue_prompts(
            _Decoder(learner),
            prompts,
            max_tokens=max_tokens,
            max_length=max_length,
            ends=end_tokens(tokenizer, settings),
            sampling=sampling,
            keys=keys,
            on_token=on_token,
        )

    longest = max(map(len, prompts), default=0)
    with learner.evaluating():
        doing = f"while generating text from {len(prompts)} prompts of up to {longest} tokens"
        return within_memory(run, device=learner.device, doing=doing)


class _Decoder:
    """`core.generation.Decoder`. Prompts are padded on the left, so that all rows' next tokens share a slot."""

    def __init__(self, learner: CudaLearner) -> None:
        config = learner.model.config
        self._model = learner.model
        self._device = learner.device
        self._cache = KeyValueCache(config.num_hidden_layers)
        self._window: int | None = getattr(config, "sliding_window", None)
        self._length = 0
        self._padding: list[int] = []
        self._first = torch.empty(0)
        self._next = torch.empty(0)

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        width = max(map(len, prompts))
        self._set_padding([width - len(prompt) for prompt in prompts])
        ids = self._send([[0] * padding + list(prompt) for padding, prompt in zip(self._padding, prompts, strict=True)])
        for part in ids.split(max(1, _PREFILL // len(prompts)), dim=1):
            self._read(part)

    def likeliest(self) -> list[int]:
        most, tokens = self._next.max(dim=-1)  # of a NaN anywhere the maximum is NaN
        found: list[int] = torch.where(most.isfinite(), tokens, NO_TOKEN).tolist()  # device-to-host synchronisation
        return found

    def logits(self) -> npt.NDArray[np.float32]:
        return self._next.cpu().numpy()  # device-to-host synchronisation

    def keep(self, places: Sequence[int]) -> None:
        self._cache.keep(self._send(places))
        self._set_padding([self._padding[place] for place in places])
        self._forget(min(self._padding))

    def step(self, tokens: Sequence[int]) -> None:
        self._read(self._send([[token] for token in tokens]))

    def _read(self, ids: torch.Tensor) -> None:
        """Appends token ids [rows, T] to the cache."""
        slots = torch.arange(self._length, self._length + ids.shape[1], device=self._device)
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask(slots),
            position_ids=(slots - self._first).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._next = output.logits[:, -1].float()
        self._length += len(slots)
        if self._window is not None and self._length >= self._window + ROOM:
            self._forget(self._length - self._window + 1)  # the next token looks at itself and window - 1 others

    def _mask(self, slots: torch.Tensor) -> torch.Tensor | None:
        """Boolean [rows, 1, T, keys]: what the new slots look at; None where `causal_attention` needs no telling."""
        end = self._length + len(slots)
        starts_or_is_one = self._length == 0 or (len(slots) == 1 and (self._window is None or end <= self._window))
        if starts_or_is_one and max(self._padding) <= 0:
            return None
        keys = torch.arange(end, device=self._device)
        distance = slots[:, None] - keys
        seen = distance >= 0
        if self._window is not None:
            seen &= distance < self._window
        # padding looks at itself: a softmax over nothing would be NaN, and of a NaN nothing is 0
        return ((seen & (keys >= self._first[:, :, None])) | (distance == 0))[:, None]

    def _forget(self, count: int) -> None:
        """Drops the first slots, which nothing looks at any more."""
        if count <= 0:
            return
        self._cache.forget(count)
        self._length -= count
        self._set_padding([padding - count for padding in self._padding])

    def _set_padding(self, padding: list[int]) -> None:
        """How many slots are before each row's first token; negative where the first tokens were forgotten."""
        self._padding = padding
        self._first = self._send(padding)[:, None]

    def _send(self, numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers, device=self._device)
