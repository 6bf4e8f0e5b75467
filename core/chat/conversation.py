"""A conversation with one side: what was said, what of it still fits, and its form as a training row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import UserError
from core.files import user_path, write_atomic

Said = tuple[str, str]
"""Role and content of a message."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer."""

    number: int
    """Of the question, from 1; two sides that were asked the same have the same."""
    question: str
    answer: str


@dataclass(slots=True)
class Conversation:
    """What one side was asked and answered. It never holds another side's answers."""

    turns: list[Turn] = field(default_factory=list)
    num_left_out: int = 0
    """Turns from the beginning that the model does not read any more."""

    def messages(self, system: str | None, question: str | None = None, *, skip: int = 0) -> list[Said]:
        """System message, turns but the first `skip`, and what is asked now."""
        said: list[Said] = [("system", system)] if system else []
        for turn in self.turns[skip:]:
            said += [("user", turn.question), ("assistant", turn.answer)]
        return said if question is None else [*said, ("user", question)]

    def fit(self, num_tokens: Callable[[int], int], *, max_length: int | None, max_tokens: int) -> int:
        """Leaves out the oldest turns until there is room for an answer.

        Args:
            num_tokens: of the prompt when so many of the first turns are left out.
            max_length: tokens of prompt and answer together that the model was made for; None: any number.
            max_tokens: of an answer. A quarter of the model's length is room enough for any.

        Returns:
            How many turns were left out that were read before.

        Raises:
            UserError: the question alone fills the model.
        """
        if max_length is None:
            return 0
        before = self.num_left_out
        skip = before
        bound = max_length - min(max_tokens, max_length // 4)
        while (length := num_tokens(skip)) > bound and skip < len(self.turns):
            skip += 1
        if length >= max_length:
            raise too_long(length, max_length)
        self.num_left_out = skip
        return skip - before

    def copy(self) -> Conversation:
        """One that goes its own way from here."""
        return Conversation([*self.turns], self.num_left_out)

    def add(self, turn: Turn) -> None:
        self.turns.append(turn)

    def drop(self, number: int) -> None:
        """Takes back the turn of that number, if it is the last."""
        if self.turns and self.turns[-1].number == number:
            self.turns.pop()
            self.num_left_out = min(self.num_left_out, len(self.turns))


def too_long(length: int, max_length: int, place: str = "") -> UserError:
    """`place`: `prompts.txt, line 3`."""
    before = f"{place}: " if place else ""
    return UserError(
        f"{before}{length:,} tokens with system message and template; the model was made for {max_length:,}",
        hint="shorten it, and leave room for the answer",
    )


def last_turn(conversations: Sequence[Conversation]) -> Turn | None:
    """What was asked last, on whichever side."""
    last = [conversation.turns[-1] for conversation in conversations if conversation.turns]
    return max(last, key=lambda turn: turn.number, default=None)


def to_rows(conversations: Sequence[tuple[str, Conversation]], *, system: str | None) -> Iterator[str]:
    """A JSONL line that `train` reads for each side that has answered: `messages`, and whose answers they are."""
    for side, conversation in conversations:
        if conversation.turns:
            said = conversation.messages(system)
            messages = [{"role": role, "content": content} for role, content in said]
            yield json.dumps({"messages": messages, "side": side}, ensure_ascii=False)


class SavedFiles:
    """Where this chat was saved: those files may be replaced, no others."""

    def __init__(self) -> None:
        self._mine: set[Path] = set()

    def save(self, name: str, rows: Sequence[str]) -> Path:
        """Writes the rows.

        Raises:
            UserError: no rows yet, a file of somebody else, or a place that can't be written to.
        """
        if not rows:
            raise UserError("nothing to save yet", hint="ask something first")
        path = user_path(name)
        if path.suffix not in (".jsonl", ".ndjson"):
            raise UserError(f"{name}: `train` reads rows from .jsonl", hint=f"/save {name}.jsonl")
        if os.path.exists(path) and path.resolve() not in self._mine:
            raise UserError(f"{name}: is there already", hint="save it under another name")
        try:
            write_atomic(path, "".join(f"{row}\n" for row in rows))
        except UserError as error:
            raise UserError(error.what, hint="save it elsewhere") from None
        except OSError as error:  # such as a name that is too long
            raise UserError(f"{name}: {error.strerror}", hint="save it elsewhere") from None
        self._mine.add(path.resolve())
        return path
