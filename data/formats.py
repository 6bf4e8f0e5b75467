"""Rows -> conversations or plain text, whatever the columns are called."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from core.errors import UserError
from data.sources import BadRows, Row, count, describe

ROLES = ("system", "user", "assistant")
LABELS = ("entailment", "neutral", "contradiction")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
_MISSING: Final = object()


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """What one row says: messages that end with an answer, or plain text."""

    place: str
    origin: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    is_pair: bool = False
    """Made of a prompt and a completion, not of a chat: matters where there is no chat template."""

    @property
    def content(self) -> str:
        """The same for two rows exactly when they say the same: what the split goes by."""
        return json.dumps([self.text, *([turn.role, turn.content] for turn in self.messages)])


class _BadRowError(Exception):
    """Why one row can't be used."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """One row, read by role instead of by column."""

    row: Row
    fields: Mapping[str, str]

    def raw(self, role: str) -> object:
        return lookup(self.row.values, self.fields.get(role, role))

    def has(self, role: str) -> bool:
        return self.raw(role) is not _MISSING

    def name(self, role: str) -> str:
        column = self.fields.get(role, role)
        return role if column == role else f"{role} (column {column})"

    def text(self, role: str) -> str:
        value = self.raw(role)
        if value is _MISSING:
            raise _BadRowError(f"{self.name(role)} is missing")
        return _filled(value, self.name(role))

    def optional_text(self, role: str) -> str:
        """Empty where the column is missing, null or blank."""
        value = self.raw(role)
        if value is _MISSING or value is None:
            return ""
        return _text(value, self.name(role))


def lookup(values: Mapping[str, Any], column: str) -> object:
    """A row's value under a column name, or along a dotted path: `answers.0.text`."""
    if column in values:
        return values[column]
    found: object = values
    for part in column.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return _MISSING
    return found


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _BadRowError(f"{name} is {describe(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRowError(f"{name} holds half a character (\\u{ord(value[error.start]):04x})") from None
    return value


def _filled(value: object, name: str) -> str:
    text = _text(value, name)
    if not text.strip():
        raise _BadRowError(f"{name} is empty")
    return text


# Conversations


def _from_messages(reader: _Reader, role: str) -> tuple[Message, ...]:
    items = reader.raw(role)
    name = reader.name(role)
    if not isinstance(items, list | tuple):
        what = "missing" if items is _MISSING else f"{describe(items)}, not a list of messages"
        raise _BadRowError(f"{name} is {what}")
    if not items:
        raise _BadRowError(f"{name} is empty")
    turns = [_message(item, f"{name}[{index}]") for index, item in enumerate(items)]
    turns = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
    _check_order(turns, name)
    return tuple(turns)


def _message(item: object, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise _BadRowError(f"{name} is {describe(item)}, not an object with role and content")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    for key in (role_key, content_key):
        if key not in item:
            raise _BadRowError(f"{name} has no {key}")
    role = _SHAREGPT_ROLES.get(str(item[role_key]))
    if role is None:
        raise _BadRowError(f"{name}: {role_key} {item[role_key]!r} is not supported (only {', '.join(ROLES)})")
    for key in ("tool_calls", "function_call"):
        if item.get(key):
            raise _BadRowError(f"{name}: {key} is not supported (only text)")
    check = _text if role == "system" else _filled
    return Message(role, check(item[content_key], f"{name}.{content_key}"))


def _check_order(turns: Sequence[Message], name: str) -> None:
    """A system message or none, then user and assistant in turn."""
    start = 1 if turns and turns[0].role == "system" else 0
    for index, turn in enumerate(turns[start:]):
        due = "assistant" if index % 2 else "user"
        if turn.role != due:
            raise _BadRowError(f"{name}: message {start + index + 1} is of {turn.role}, where {due} is due")
    if len(turns) - start < 2:
        raise _BadRowError(f"{name}: no answer (no message of assistant)")


def _chat(role: str) -> Callable[[_Reader], Example]:
    def convert(reader: _Reader) -> Example:
        row = reader.row
        return Example(row.place, row.origin, messages=_from_messages(reader, role))

    return convert


def _pair(reader: _Reader, prompt: str, completion: str) -> Example:
    messages = (Message("user", prompt), Message("assistant", completion))
    return Example(reader.row.place, reader.row.origin, messages=messages, is_pair=True)


def _prompt_completion(reader: _Reader) -> Example:
    return _pair(reader, reader.text("prompt"), reader.text("completion"))


def _instruction(reader: _Reader) -> Example:
    instruction, given = reader.text("instruction"), reader.optional_text("input")
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    return _pair(reader, prompt, reader.text("output"))


def _plain(reader: _Reader) -> Example:
    return Example(reader.row.place, reader.row.origin, text=reader.text("text"))


def _nli(reader: _Reader) -> Example:
    """A prompt that asks for JSON; with an explanation (of several, the first) as its `thought_process`."""
    premise, hypothesis = reader.text("premise"), reader.text("hypothesis")
    explanation = _explanation(reader)
    keys = '"predicted_label" (0 for entailment, 1 for neutral, 2 for contradiction)'
    answer: dict[str, object] = {"predicted_label": _label(reader)}
    if explanation:
        keys = f'"thought_process" (the reason, in a sentence) and {keys}'
        answer = {"thought_process": explanation} | answer
    prompt = (
        "Does the premise entail the hypothesis, contradict it, or neither?\n\n"
        f"Premise: {premise}\nHypothesis: {hypothesis}\n\n"
        f"Answer with a JSON object that has {keys}."
    )
    return _pair(reader, prompt, json.dumps(answer, ensure_ascii=False))


def _explanation(reader: _Reader) -> str:
    value = reader.raw("explanation")
    if isinstance(value, list):
        name = reader.name("explanation")
        texts = [_text(item, f"{name}[{index}]") for index, item in enumerate(value)]
        return next((text for text in texts if text.strip()), "")
    return reader.optional_text("explanation")


def _label(reader: _Reader) -> int:
    value = reader.raw("label")
    if isinstance(value, str):
        name = value.strip().lower()
        value = LABELS.index(name) if name in LABELS else name
    if not isinstance(value, bool) and value in (0, 1, 2, "0", "1", "2"):
        return int(value)  # type: ignore[call-overload, no-any-return]
    raise _BadRowError(f"{reader.name('label')} is {value!r}, not 0, 1, 2 or {', '.join(LABELS)}")


# Detection


@dataclass(frozen=True, slots=True)
class Format:
    """A way to write a row: the roles that it needs, those it may have, and how it becomes an example."""

    name: str
    required: tuple[str, ...]
    convert: Callable[[_Reader], Example]
    optional: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        return self.required + self.optional

    def fits(self, reader: _Reader) -> bool:
        return all(reader.has(role) for role in self.required)


FORMATS = (
    Format("messages", ("messages",), _chat("messages")),
    Format("conversations", ("conversations",), _chat("conversations")),
    Format("prompt and completion", ("prompt", "completion"), _prompt_completion),
    Format("instruction and output", ("instruction", "output"), _instruction, ("input",)),
    Format(
        "premise, hypothesis and label",
        ("premise", "hypothesis", "label"),
        _nli,
        ("explanation",),
    ),
    Format("text", ("text",), _plain),
)
"""In the order of preference for rows that fit several."""


def parse_rows(
    splits: Mapping[str, Sequence[Row]], *, name: str, fields: Mapping[str, str], bad: BadRows
) -> tuple[dict[str, list[Example]], list[str]]:
    """Examples by split, and findings. All rows must be of one format, which is detected over all of them.

    Raises:
        UserError: an unknown role or column in `fields`, no known format, mixed formats, or (unless `bad.skip`) a row
            with a field that is missing, empty or not text, or with messages out of order.
    """
    readers = {split: [_Reader(row, fields) for row in rows] for split, rows in splits.items()}
    everything = [reader for some in readers.values() for reader in some]
    candidates = _candidates(fields, everything, name)
    format_ = _detect(candidates, everything, name)
    for reader in everything:
        _refuse_mixed(format_, reader, candidates)
    examples = {split: _convert(format_, some, bad) for split, some in readers.items()}
    findings = []
    num_trimmed = 0
    for split, some in examples.items():
        examples[split] = [_without_last_question(example) for example in some]
        num_trimmed += sum(a is not b for a, b in zip(some, examples[split], strict=True))
    if num_trimmed:
        whose = count(num_trimmed, "conversation")
        findings.append(f"{whose} ended with a question, which was left out")
    return examples, findings


def _convert(format_: Format, readers: Iterable[_Reader], bad: BadRows) -> list[Example]:
    examples = []
    for reader in readers:
        try:
            examples.append(format_.convert(reader))
        except _BadRowError as problem:
            bad.add(reader.row.place, str(problem))
    return examples


def _without_last_question(example: Example) -> Example:
    if not example.messages or example.messages[-1].role == "assistant":
        return example
    return Example(example.place, example.origin, messages=example.messages[:-1])


def _candidates(fields: Mapping[str, str], readers: Sequence[_Reader], name: str) -> tuple[Format, ...]:
    """The formats that have all the roles of `fields`."""
    known = list(dict.fromkeys(role for format_ in FORMATS for role in format_.roles))
    for role in fields:
        if role not in known:
            near = difflib.get_close_matches(role, known, n=1)
            did_you = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"data.fields: {role!r} is not a role", hint=f"{did_you}roles: {', '.join(known)}")
    for role, column in fields.items():
        if not any(reader.has(role) for reader in readers):
            raise UserError(
                f"data.fields: {role} is said to be in column {column!r}, which no row of {name} has",
                hint=f"columns: {_columns(readers)}",
            )
    candidates = tuple(format_ for format_ in FORMATS if fields.keys() <= set(format_.roles))
    if not candidates:
        ways = "; ".join(", ".join(format_.roles) for format_ in FORMATS)
        raise UserError(f"data.fields: no format has all of {', '.join(fields)}", hint=f"choose from: {ways}")
    return candidates


def _columns(readers: Iterable[_Reader]) -> str:
    names = list(dict.fromkeys(column for reader in readers for column in reader.row.values))
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")


def _detect(candidates: Sequence[Format], readers: Sequence[_Reader], name: str) -> Format:
    """The first format that half of the readable rows fit, else the one that most fit."""
    fitting = {format_.name: sum(format_.fits(reader) for reader in readers) for format_ in candidates}
    num_readable = sum(any(format_.fits(reader) for format_ in candidates) for reader in readers)
    if not num_readable:
        raise UserError(
            f"{name}: its columns ({_columns(readers)}) are of no known format",
            hint="say which is which: --set 'data.fields={prompt: question, completion: answer}'",
        )
    for format_ in candidates:
        if 2 * fitting[format_.name] >= num_readable:
            return format_
    return max(candidates, key=lambda format_: fitting[format_.name])


def _refuse_mixed(format_: Format, reader: _Reader, candidates: Sequence[Format]) -> None:
    """A row that has nothing of the format and all of another is no slip of the pen."""
    if any(reader.has(role) for role in format_.required):
        return
    for other in candidates:
        if other.fits(reader):
            raise UserError(
                f"{reader.row.place}: has {other.name}, where the other rows have {format_.name}",
                hint="put rows of one format in a file",
            )
