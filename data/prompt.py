"""A question as the model's own template puts it, ready to be answered, and the answer as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.formats import Message
from data.tokenize import Renderer, Tokenizer

PLAIN_STOPS = ("\n\nUser:\n",)
"""Where an answer ends whose conversation is written without a chat template: the model goes on with the next turn."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""


class PromptRenderer:
    """Questions -> token ids, written as training writes the rows that they would be the beginning of."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._renderer = Renderer(tokenizer)
        self._tokenizer = tokenizer
        self.has_template = self._renderer.has_template
        self._notes: dict[str, None] = {}

    def ids(self, messages: Sequence[Message], *, is_pair: bool = False) -> list[int]:
        """Token ids of a conversation, with the assistant's turn begun.

        Args:
            messages: the last is of the user, the first may be of the system.
            is_pair: without a chat template, as rows of prompt and completion are written, not as chats are.

        Raises:
            UserError: the chat template refuses the conversation.
        """
        text = self._renderer.prompt(messages, is_pair=is_pair)
        self._note(has_system=messages[0].role == "system", is_pair=is_pair)
        # a template writes its own <s>, and plain text gets the tokenizer's, as in training
        ids: list[int] = list(self._tokenizer(text, add_special_tokens=not self.has_template)["input_ids"])  # type: ignore[arg-type]
        if len(ids) > 1 and ids[0] == ids[1] == self._tokenizer.bos_token_id:  # in the text, and added again
            del ids[0]
        if not self.has_template and len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id:
            del ids[-1]  # some tokenizers end a text, which goes on here
        return ids

    def stops(self, *, is_pair: bool = False) -> tuple[str, ...]:
        """Texts that end an answer, beside the end token."""
        return () if self.has_template or is_pair else PLAIN_STOPS

    def notes(self) -> list[str]:
        """What was done to the messages that a person should know of, a line each."""
        return list(self._notes)

    def _note(self, *, has_system: bool, is_pair: bool) -> None:
        if self.has_template:
            if has_system and not self._renderer.takes_system:
                self._notes["the chat template takes no system message: it goes before the first question"] = None
        elif not is_pair:
            note = "the tokenizer has no chat template: messages are written under `User:` and `Assistant:` lines"
            self._notes[note] = None
        elif has_system:
            self._notes["the tokenizer has no chat template: the system message goes before the prompt"] = None


def render_prompt(tokenizer: Tokenizer, prompt: str, *, system: str | None = None) -> list[int]:
    """Token ids of `prompt` as training rows put it: a user's turn with the assistant's to come.

    Without a chat template it is the bare text and, as between a row's prompt and completion, a line break.
    """
    return PromptRenderer(tokenizer).ids(question(prompt, system=system), is_pair=True)


def question(prompt: str, *, system: str | None = None) -> list[Message]:
    """The conversation that a prompt begins."""
    return [*([Message("system", system)] if system else []), Message("user", prompt)]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated tokens, without special tokens."""
    return _decoded(tokenizer, ids).strip()


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text


class TextStream:
    """Text as its tokens come: the pieces together are `decode` of all tokens.

    A character of several tokens comes with its last one, white space with what follows it. Decodes a few tokens at a
    time with those before them, as vLLM and TGI do: a tokenizer writes the first token of a text in its own way.
    """

    def __init__(self, tokenizer: Any, *, stops: Sequence[str] = ()) -> None:
        """`stops`: the text ends before the first of them."""
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        self._context = 0
        """The first token that is decoded again."""
        self._seen = 0
        """The first token whose text has not come yet."""
        self._held = ""
        """White space, or what may become a stop."""
        self.text = ""
        """What has come so far."""
        self.stopped = False
        """Whether one of the stops came."""

    def push(self, token: int) -> str:
        """What one more token adds."""
        self._ids.append(token)
        known = _decoded(self._tokenizer, self._ids[self._context : self._seen])
        now = _decoded(self._tokenizer, self._ids[self._context :])
        if len(now) <= len(known) or now.endswith(_UNFINISHED):
            return ""
        self._context, self._seen = self._seen, len(self._ids)
        return self._release(now[len(known) :], is_last=False)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        known = _decoded(self._tokenizer, self._ids[self._context : self._seen])
        now = _decoded(self._tokenizer, self._ids[self._context :])
        self._seen = len(self._ids)
        # half a character can spoil the whole one before it, which has been shown
        return self._release(now[len(known) :] if now.startswith(known) else "", is_last=True)

    def _release(self, text: str, *, is_last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        for stop in self._stops:
            before, found, _ = text.partition(stop)
            if found:
                text, self.stopped, is_last = before, True, True
        begun = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        whole = text[: len(text) - begun].rstrip()
        self._held = text[len(whole) :]
        piece = whole if self.text else whole.lstrip()
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """How many of the first characters of `stop` the text ends with."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)
