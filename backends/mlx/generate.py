"""Text from a learner's model, greedily or sampled, with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from backends.mlx.memory import translate_out_of_memory
from core.sampling import pick_token
from core.seeding import generator

if TYPE_CHECKING:
    from backends.mlx.learner import MlxLearner

_PREFILL = 512
"""Prompt tokens per forward pass: bounds the memory of a long prompt."""


def generate(
    learner: MlxLearner,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[int]:
    """Continues a prompt with the adapter at its present weights, without dropout.

    Args:
        tokenizer: gives `eos_token_id`; the model's own generation settings may add more end tokens.
        prompt_ids: at least one token id.
        max_tokens: stop after so many new tokens.
        temperature: 0 takes the most likely token; else logits are divided by it and a token is drawn.
        top_p: draw from the fewest tokens that hold this probability (arXiv:1904.09751); 1: all.
        top_k: draw from the k most likely tokens; 0: all.
        seed: of the drawing; the same seed gives the same text.

    Returns:
        The new token ids, without the end token.

    Raises:
        OutOfMemoryError: prompt and cache did not fit.
    """
    assert prompt_ids, "an empty prompt"
    ends = {*learner.network.end_tokens}
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    random = generator(seed, "generate")
    tokens: list[int] = []
    with translate_out_of_memory(f"generating from a prompt of {len(prompt_ids)} tokens"):
        logits = _prefill(learner, prompt_ids, cache := learner.network.make_cache())
        while len(tokens) < max_tokens:
            if temperature == 0.0:
                token = int(mx.argmax(logits))  # waits for the device
            else:
                host = np.array(logits, np.float64)  # waits for the device
                token = pick_token(host, temperature, top_p=top_p, top_k=top_k, random=random)
            if token in ends:
                break
            tokens.append(token)
            logits = _next_logits(learner, [token], cache)
    return tokens


def _prefill(learner: MlxLearner, prompt_ids: Sequence[int], cache: list[Any]) -> mx.array:
    *earlier, last = _parts(prompt_ids)
    for part in earlier:
        mx.eval(_hidden(learner, part, cache))
    return _next_logits(learner, last, cache)


def _parts(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), _PREFILL):
        yield ids[start : start + _PREFILL]


def _hidden(learner: MlxLearner, ids: Sequence[int], cache: list[Any]) -> mx.array:
    tokens = mx.array([list(ids)], mx.int32)
    return learner.network.hidden_states(learner.parameters, tokens, cache=cache)


def _next_logits(learner: MlxLearner, ids: Sequence[int], cache: list[Any]) -> mx.array:
    """Float32 logits [V] of the token after `ids`."""
    return learner.network.project(_hidden(learner, ids, cache)[0, -1]).astype(mx.float32)
