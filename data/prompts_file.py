"""Prompts from a file: one a line, or JSONL with `prompt` or `messages`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from core.errors import UserError
from data.formats import ROLES, Message
from data.sources import describe

STANDARD_INPUT = "-"
_JSONL = (".jsonl", ".ndjson")
_FORM = 'write a prompt a line, or JSONL with {"prompt": "…"} or {"messages": […]}'


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered."""

    place: str
    """For messages: `prompts.txt, line 3`."""
    messages: tuple[Message, ...]
    """The last is of the user, the first may be of the system."""
    is_pair: bool
    """A bare prompt, not a conversation: matters where there is no chat template."""
    given: Mapping[str, Any]
    """What a record of its answers begins with: `id` where there is one, `prompt` or `messages`."""
    lost_answer: bool = False
    """Whether the conversation came with an answer to its last question, which is left out."""

    @property
    def text(self) -> str:
        """The last question."""
        return self.messages[-1].content


def read_prompts(path: str, *, system: str | None = None) -> list[Prompt]:
    """The prompts of a file, in its order; `-` reads standard input.

    JSONL is what ends in .jsonl or .ndjson, and what begins with a JSON object unless it ends in .txt.

    Args:
        path: as the system knows it: `~` is a name.
        system: system message of prompts that bring none of their own.

    Raises:
        UserError: the file can't be read, or a line is no prompt; the file and line are named.
    """
    shown = "standard input" if path == STANDARD_INPUT else path
    lines = list(_lines(_content(path, shown), shown))
    if not lines:
        raise UserError(f"{shown}: no prompts", hint=_FORM)
    suffix = PurePath(path).suffix.lower()
    if suffix in _JSONL or (suffix != ".txt" and _is_object(lines[0][1])):
        return [_row(line, f"{shown}, line {number}", system) for number, line in lines]
    return [one_prompt(line, f"{shown}, line {number}", system) for number, line in lines]


def one_prompt(text: str, place: str, system: str | None = None) -> Prompt:
    """Raises: UserError: nothing in it, or half a character."""
    _check_text(text, place, "the prompt")
    return Prompt(place, _with_system([Message("user", text)], system), is_pair=True, given={"prompt": text})


def check_system(text: str | None) -> str | None:
    """A system message as it was typed; None where it is blank.

    Raises:
        UserError: it holds half a character.
    """
    if text is None or not text.strip():
        return None
    _check_text(text, "--system", "it")
    return text


def _content(path: str, shown: str) -> bytes:
    try:
        if path == STANDARD_INPUT:
            return sys.stdin.buffer.read()
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"--prompts: {shown} does not exist", hint=_FORM) from None
    except IsADirectoryError:
        raise UserError(f"--prompts: {shown} is a folder", hint="name a file in it") from None
    except OSError as error:
        raise UserError(f"--prompts: {shown} can't be read ({error.strerror})") from None


def _lines(content: bytes, shown: str) -> Iterator[tuple[int, str]]:
    """Number and text of the lines that are not blank."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{shown}: is UTF-16, not UTF-8", hint="save the file as UTF-8")
    if b"\x00" in content:
        raise UserError(f"{shown}: not a text file", hint=_FORM)
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
            raise UserError(f"{shown}, line {number}: not UTF-8 ({byte})", hint="save the file as UTF-8") from None
        if text.strip():
            yield number, text


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _row(line: str, place: str, system: str | None) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not JSON ({error.msg[0].lower()}{error.msg[1:].removesuffix(' at')} at column {error.colno})",
            hint="fix the line; a file with a prompt a line should end in .txt",
        ) from None
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        raise UserError(f"{place}: not JSON that can be read", hint="fix the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: {describe(row)}, not an object with fields", hint=_FORM)
    identity = {"id": row["id"]} if "id" in row else {}
    own = row.get("system")
    if own is not None:
        _check_text(own, place, "system", may_be_empty=True)
    match [name for name in ("prompt", "messages") if row.get(name) is not None]:
        case ["prompt"]:
            made = one_prompt(row["prompt"], place, system if own is None else own)
            return Prompt(place, made.messages, is_pair=True, given=identity | dict(made.given))
        case ["messages"]:
            return _conversation(row["messages"], place, own=own, system=system, identity=identity)
        case []:
            fields = ", ".join(map(str, row)) or "none"
            raise UserError(f"{place}: neither prompt nor messages (its fields: {fields[:80]})", hint=_FORM)
    raise UserError(f"{place}: prompt and messages at once", hint="leave one of them out")


def _conversation(
    items: object, place: str, *, own: str | None, system: str | None, identity: Mapping[str, Any]
) -> Prompt:
    if not isinstance(items, list) or not items:
        what = "empty" if items == [] else f"{describe(items)}, not a list of messages"
        raise UserError(f"{place}: messages is {what}", hint=_FORM)
    turns = [_message(item, f"{place}: messages[{index}]") for index, item in enumerate(items)]
    if turns[0].role == "system":
        if own is not None:
            raise UserError(f"{place}: a system message in messages and in system", hint="leave one of them out")
        own, turns = turns[0].content, turns[1:]
    lost = bool(turns) and turns[-1].role == "assistant"
    if lost:
        del turns[-1]
    for index, turn in enumerate(turns):
        due = ROLES[1 + index % 2]
        if turn.role != due:
            raise UserError(f"{place}: question {index // 2 + 1}: a message of {turn.role}, where {due} is due")
    if not turns:
        raise UserError(f"{place}: messages has no question (no message of user)")
    messages = _with_system(turns, system if own is None else own)
    listed = [{"role": turn.role, "content": turn.content} for turn in messages]
    return Prompt(place, messages, is_pair=False, given={**identity, "messages": listed}, lost_answer=lost)


def _message(item: object, name: str) -> Message:
    if not isinstance(item, dict) or "role" not in item or "content" not in item:
        raise UserError(f"{name} is not an object with role and content")
    if item["role"] not in ROLES:
        raise UserError(f"{name}: role {item['role']!r} is not supported (only {', '.join(ROLES)})")
    _check_text(item["content"], name, "content", may_be_empty=item["role"] == "system")
    return Message(item["role"], item["content"])


def _with_system(turns: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    return (*([Message("system", system)] if system and system.strip() else []), *turns)


def _check_text(value: object, place: str, name: str, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is {describe(value)}, not text", hint=_FORM)
    if not value.strip() and not may_be_empty:
        raise UserError(f"{place}: {name} is empty", hint="write what is to be answered")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise UserError(f"{place}: {name} is not whole UTF-8 (half a character, {half})") from None
