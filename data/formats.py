"""Rows -> conversations or plain text, whatever the columns are called."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from core.errors import UserError
from data.sources import BadRows, Row, count, describe

ROLES = ("system", "user", "assistant")
LABELS = ("entailment", "neutral", "contradiction")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
_MISSING: Final = object()
_NUM_COLUMNS = 20
"""Columns that a message names."""
_NUM_SHAPES = 1000
"""Different sets of columns that are remembered; rows of more are looked at one by one."""


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
    group: str | None = None
    """Value of `data.group`'s column, as text: rows that share it stay on one side of the split."""
    stratum: str | None = None
    """Value of `data.stratify`'s column, as text."""
    label: str | None = None
    """Of a premise and a hypothesis, `entailment`, …; in other formats what `data.stratify` gives."""
    own_text: str | None = None
    """What the row itself says, where we put it into a template of ours; `data.near` judges copies by it."""

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
    example = _pair(reader, prompt, json.dumps(answer, ensure_ascii=False))
    own_text = "\n".join((premise, hypothesis, explanation))
    return replace(example, label=LABELS[_label(reader)], own_text=own_text)


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


@dataclass(frozen=True)
class RowParser:
    """Makes examples of a data set's rows, one by one; `survey` finds which way. It can be sent to another process."""

    format_name: str
    fields: Mapping[str, str]
    group: str | None = None
    stratify: str | None = None

    def parse(self, rows: Iterable[Row], bad: BadRows) -> tuple[list[Example], int]:
        """Examples of the rows, and how many of them ended with a question, which was left out.

        Raises:
            UserError: (unless `bad.skip`) a row with a field that is missing, empty or not text, or with messages out
                of order.
        """
        convert = next(format_.convert for format_ in FORMATS if format_.name == self.format_name)
        examples: list[Example] = []
        num_trimmed = 0
        for row in rows:
            try:
                whole = convert(_Reader(row, self.fields))
            except _BadRowError as problem:
                bad.add(row.place, str(problem))
                continue
            example = _without_last_question(whole)
            num_trimmed += example is not whole
            examples.append(self._labelled(example, row))
        return examples, num_trimmed

    def _labelled(self, example: Example, row: Row) -> Example:
        if self.group is None and self.stratify is None:
            return example
        group, stratum = (column and _as_text(lookup(row.values, column)) for column in (self.group, self.stratify))
        return replace(example, group=group, stratum=stratum, label=example.label or stratum)


def trimmed_findings(num_trimmed: int) -> list[str]:
    """What is said of conversations that ended with a question."""
    return [f"{count(num_trimmed, 'conversation')} ended with a question, which was left out"] if num_trimmed else []


def survey(
    rows: Iterable[Row], *, name: str, fields: Mapping[str, str], group: str | None = None, stratify: str | None = None
) -> RowParser:
    """Finds the format that the rows are of; goes over them once and keeps none.

    Args:
        name: of the data set, for messages.
        fields: role -> column.
        group: column of `Example.group`.
        stratify: column of `Example.stratum`.

    Raises:
        UserError: an unknown role or column in `fields`, no known format, mixed formats, or a column `group` or
            `stratify` that no row has.
    """
    seen = _Survey(fields, group, stratify)
    for row in rows:
        seen.add(row)
    seen.check_fields(name)
    format_ = seen.detect(name)
    seen.refuse_mixed(format_)
    seen.check_columns(name)
    return RowParser(format_.name, dict(fields), group, stratify)


def _without_last_question(example: Example) -> Example:
    if not example.messages or example.messages[-1].role == "assistant":
        return example
    return replace(example, messages=example.messages[:-1])


def _as_text(value: object) -> str | None:
    if value is _MISSING or value is None:
        return None
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What matters of the columns that a row has."""

    fits: tuple[bool, ...]
    """By format."""
    instead: tuple[str | None, ...]
    """By format: the other format that a row fits which has nothing of this one."""
    wanted: frozenset[str]
    """Those of the columns that the settings name."""


class _Survey:
    """What the rows of a data set look like, counted one by one."""

    def __init__(self, fields: Mapping[str, str], group: str | None, stratify: str | None) -> None:
        self.fields = fields
        self._named = {f"data.{name}": column for name, column in (("group", group), ("stratify", stratify)) if column}
        self._wanted = {*fields.values(), *self._named.values()}
        self._by_columns = not any("." in column for column in self._wanted)
        self._shapes: dict[tuple[str, ...], _Shape] = {}
        self.candidates = tuple(format_ for format_ in FORMATS if fields.keys() <= set(format_.roles))
        self.num_fitting = [0] * len(self.candidates)
        self.num_readable = 0
        self.columns: dict[str, None] = {}
        """The first few, in the order in which they come."""
        self.found: set[str] = set()
        """Columns of the settings that a row has."""
        self.first_mixed: dict[str, tuple[str, str]] = {}
        """Format -> place of the first row that has nothing of it and all of another, and which."""

    def add(self, row: Row) -> None:
        shape = self._shape(row)
        self.num_readable += any(shape.fits)
        self.found |= shape.wanted
        for index, format_ in enumerate(self.candidates):
            self.num_fitting[index] += shape.fits[index]
            instead = shape.instead[index]
            if instead is not None and format_.name not in self.first_mixed:
                self.first_mixed[format_.name] = row.place, instead

    def _shape(self, row: Row) -> _Shape:
        """Rows with the same columns share it, unless a path reaches into the row."""
        columns = tuple(row.values)
        shape = self._shapes.get(columns) if self._by_columns else None
        if shape is None:
            if len(self.columns) <= _NUM_COLUMNS:
                self.columns |= dict.fromkeys(columns)
            shape = self._look(_Reader(row, self.fields))
            if len(self._shapes) < _NUM_SHAPES:
                self._shapes[columns] = shape
        return shape

    def _look(self, reader: _Reader) -> _Shape:
        fitting = [format_ for format_ in self.candidates if format_.fits(reader)]
        return _Shape(
            tuple(format_ in fitting for format_ in self.candidates),
            tuple(
                fitting[0].name if fitting and not any(map(reader.has, format_.required)) else None
                for format_ in self.candidates
            ),
            frozenset(column for column in self._wanted if lookup(reader.row.values, column) is not _MISSING),
        )

    def check_fields(self, name: str) -> None:
        known = list(dict.fromkeys(role for format_ in FORMATS for role in format_.roles))
        for role in self.fields:
            if role not in known:
                near = difflib.get_close_matches(role, known, n=1)
                did_you = f"did you mean {near[0]}? " if near else ""
                raise UserError(f"data.fields: {role!r} is not a role", hint=f"{did_you}roles: {', '.join(known)}")
        for role, column in self.fields.items():
            if column not in self.found:
                raise UserError(
                    f"data.fields: {role} is said to be in column {column!r}, which no row of {name} has",
                    hint=f"columns: {self._listed()}",
                )
        if not self.candidates:
            ways = "; ".join(", ".join(format_.roles) for format_ in FORMATS)
            raise UserError(f"data.fields: no format has all of {', '.join(self.fields)}", hint=f"choose from: {ways}")

    def check_columns(self, name: str) -> None:
        for setting, column in self._named.items():
            if column not in self.found:
                raise UserError(
                    f"{setting}: no row of {name} has a column {column!r}", hint=f"columns: {self._listed()}"
                )

    def detect(self, name: str) -> Format:
        """The first format that half of the readable rows fit, else the one that most fit."""
        if not self.num_readable:
            raise UserError(
                f"{name}: its columns ({self._listed()}) are of no known format",
                hint="say which is which: --set 'data.fields={prompt: question, completion: answer}'",
            )
        for format_, num in zip(self.candidates, self.num_fitting, strict=True):
            if 2 * num >= self.num_readable:
                return format_
        return self.candidates[self.num_fitting.index(max(self.num_fitting))]

    def refuse_mixed(self, format_: Format) -> None:
        """A row that has nothing of the format and all of another is no slip of the pen."""
        if format_.name in self.first_mixed:
            place, other = self.first_mixed[format_.name]
            raise UserError(
                f"{place}: has {other}, where the other rows have {format_.name}",
                hint="put rows of one format in a file",
            )

    def _listed(self) -> str:
        names = list(self.columns)
        return ", ".join(names[:_NUM_COLUMNS]) + (", …" if len(names) > _NUM_COLUMNS else "")
