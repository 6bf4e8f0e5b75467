"""A question as the model's own template puts it, ready to be answered, and the answer as text."""

from __future__ import annotations

from typing import Any


def render_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of `prompt` as training rows put it: a user's turn with the assistant's to come.

    Without a chat template it is the bare text and, as between a row's prompt and completion, a line break.
    """
    if tokenizer.chat_template is None:
        seam = "" if prompt[-1:].isspace() else "\n"
        plain: list[int] = tokenizer(prompt + seam)["input_ids"]
        return plain
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return ids


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of generated tokens, without special tokens."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()
