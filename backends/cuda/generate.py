"""Text from a learner's model, greedily or sampled, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from backends.cuda.memory import within_memory
from core.sampling import pick_token
from core.seeding import generator

if TYPE_CHECKING:
    from backends.cuda.learner import CudaLearner


def generate(
    learner: CudaLearner,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[int]:
    """Continues a prompt with the adapter at its present weights.

    Args:
        tokenizer: gives `eos_token_id`; the model's own generation settings may add more end tokens.
        prompt_ids: at least one token id.
        max_tokens: stop after so many new tokens.
        temperature: 0 takes the most likely token; else logits are divided by it and a token is drawn.
        top_p: draw from the fewest tokens that hold this probability (Holtzman et al., arXiv:1904.09751); 1: all.
        top_k: draw from the k most likely tokens; 0: all.
        seed: of the drawing, which both backends do alike: the same seed gives the same text.

    Returns:
        The new token ids, without the end token.

    Raises:
        OutOfMemoryError: prompt and cache did not fit.
    """
    assert prompt_ids, "an empty prompt"
    ends = end_tokens(learner, tokenizer)
    random = generator(seed, "generate")

    def run() -> list[int]:
        tokens: list[int] = []
        ids = torch.tensor([list(prompt_ids)], device=learner.device)
        cache = None
        while len(tokens) < max_tokens:
            output = learner.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            logits = output.logits[0, -1].float()
            if temperature == 0.0:
                token = int(logits.argmax())  # device-to-host synchronisation
            else:
                host = logits.double().cpu().numpy()  # device-to-host synchronisation
                token = pick_token(host, temperature, top_p=top_p, top_k=top_k, random=random)
            if token in ends:
                break
            tokens.append(token)
            ids = torch.tensor([[token]], device=learner.device)
        return tokens

    with learner.evaluating():
        return within_memory(run, device=learner.device, doing="while generating text")


def end_tokens(learner: CudaLearner, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's, and those of the model's generation settings."""
    settings = getattr(learner.model, "generation_config", None)
    more = getattr(settings, "eos_token_id", None)
    listed = more if isinstance(more, list) else [more]
    return frozenset(int(i) for i in (tokenizer.eos_token_id, *listed) if i is not None)
