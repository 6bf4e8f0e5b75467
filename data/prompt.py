"""A question as the model's own template puts it, ready to be answered."""

from __future__ import annotations

from typing import Any


def render_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of `prompt` as a user's turn with the assistant's to come; without a chat template, of the bare text."""
    if tokenizer.chat_template is None:
        plain: list[int] = tokenizer(prompt)["input_ids"]
        return plain
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return ids
