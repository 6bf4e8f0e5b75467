"""Labels in expected answers, and in what a model wrote.

Which labels there are is read from the expected answers: JSON with a label under a key, or short answers of which there
are few. A model's answer is read tolerantly (JSON in prose or code fences, single quotes, JSON that was cut off, a bare
label, a number for a name) and judged strictly beside that: is the whole answer what was asked for?
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

LABEL_KEYS = ("predicted_label", "label")
"""Keys of a JSON answer that are a label, whatever else there is."""
NLI = ("entailment", "neutral", "contradiction")
MAX_LABELS = 20
MAX_LABEL_CHARACTERS = 40
_SHORT_ANSWER = 60
"""Characters of an answer that may be a number in a few words."""
_SAID = r"(?:label|answer|class|category|prediction|output|result)"
_THOUGHT = re.compile(r"^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
"""Also of an answer whose prompt has opened it."""
_EDGE = " \t\r\n\"'`*_.,:;!?()[]{}<>"
_STOP = re.compile(r"\s*(?:$|[.,;:()\n\"'}\]*-]|(?:because|since|as)\b)", re.IGNORECASE)
"""What may stand behind a label of one character in a sentence."""
_NEGATION = re.compile(r"(?:\b(?:not|no|isn't|is not|cannot be|neither)\s+(?:a |an |the )?)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model's answer says."""

    label: str | None
    """One of the scheme's labels; None where none could be read."""
    is_strict: bool
    """Whether the whole answer has the form that was asked for, with one of the labels."""


@dataclass(frozen=True)
class LabelScheme:
    """Which labels the answers of a data set have, and in which form."""

    labels: tuple[str, ...]
    """In the order in which they are shown."""
    key: str | None
    """The key of JSON answers; None for bare labels."""

    @property
    def is_json(self) -> bool:
        return self.key is not None

    def read(self, answer: str) -> Reading:
        """What `answer` says: strictly, else tolerantly."""
        text = _THOUGHT.sub("", answer).strip()
        strict = self._read_strictly(text)
        return Reading(strict or self._read_tolerantly(text), strict is not None)

    def _read_strictly(self, text: str) -> str | None:
        if self.key is None:
            return text if text in self.labels else None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return self._label_of(value[self.key]) if isinstance(value, dict) and self.key in value else None

    def _read_tolerantly(self, text: str) -> str | None:
        if self.key is not None and (found := self._in_json(text)) is not None:
            return found
        lines = [line for line in text.splitlines() if line.strip()]
        if lines and (found := self._label_of(lines[0])) is not None:
            return found
        return self._said(text) or self._only_word(text)

    def _in_json(self, text: str) -> str | None:
        """The label of the first object with the key; of one that is no JSON, what stands behind the key."""
        assert self.key is not None
        for value in _objects(text):
            if self.key in value and (label := self._label_of(value[self.key])) is not None:
                return label
        behind = rf"""["']?\b{re.escape(self.key)}\b["']?\s*[:=]\s*(?:"([^"\n]*)"|'([^'\n]*)'|([^\s,}}\]]+))"""
        for match in re.finditer(behind, text, re.IGNORECASE):
            if (label := self._label_of(next(part for part in match.groups() if part is not None))) is not None:
                return label
        return None

    def _said(self, text: str) -> str | None:
        """`Answer: 2`, `the label is neutral`; a bare number at the end of a short answer."""
        names = self._names_pattern
        for pattern in (
            rf"^\W*({names})\s*(?:[-–—:(\n]|$)",  # not `1.` nor `1)`, which begin lists
            rf"\b{_SAID}\b\W{{0,4}}(?:is|=|:)?\W{{0,4}}({names})(?!\w)",
            rf"^.{{0,{_SHORT_ANSWER}}}\b(?:is|:|=)\W{{0,3}}({names})\W*$",
        ):
            for match in re.finditer(pattern, text, re.IGNORECASE):
                # "the answer is a man" and "the answer is 2 men" name no label A or 2
                if len(match[1]) > 1 or _STOP.match(text, match.end(1)):
                    return self._label_of(match[1])
        return None

    def _only_word(self, text: str) -> str | None:
        """The label that the text names, if it names one alone; no number or letter, which may mean something else."""
        found = set()
        for match in re.finditer(rf"(?<!\w)({self._names_pattern})(?!\w)", text, re.IGNORECASE):
            if match[1].isdigit() or len(match[1]) == 1 or _NEGATION.search(text[: match.start()]):
                continue
            found.add(self._label_of(match[1]))
        return found.pop() if len(found) == 1 else None

    def _label_of(self, value: object) -> str | None:
        name = canonical(value)
        return None if name is None else self._by_name.get(_name(name))

    @cached_property
    def _by_name(self) -> dict[str, str]:
        """Every way to write a label, in small letters, to the label."""
        names = {_name(label): label for label in self.labels}
        numbers = tuple(str(number) for number in range(len(NLI)))
        for other, own in ((NLI, numbers), (numbers, NLI)):
            if set(names) <= set(own):
                names |= {word: names[mine] for word, mine in zip(other, own, strict=True) if mine in names}
        return names

    @cached_property
    def _names_pattern(self) -> str:
        """Longest first: `very good` before `good`."""
        return "|".join(re.escape(name) for name in sorted(self._by_name, key=len, reverse=True))


def _name(label: str) -> str:
    """What labels are told apart by: without case, quotes and punctuation around it."""
    return label.strip(_EDGE).casefold()


def canonical(value: object) -> str | None:
    """A label as text: 1, "1" and 1.0 are one; None for what can be no label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        return value.strip() or None
    return str(value) if isinstance(value, int | float) else None


def find_scheme(answers: Sequence[str], labels: Sequence[str | None]) -> LabelScheme | None:
    """The labels of a data set, from its expected answers; None where the answers have none.

    Args:
        answers: the expected answer of each row.
        labels: what is known of each row's label; a key of JSON answers that says the same is the label's.
    """
    if not answers:
        return None
    objects = [_whole_object(answer) for answer in answers]
    if all(value is not None for value in objects):
        return _json_scheme([value for value in objects if value is not None], labels)
    return _short_scheme(answers)


def _json_scheme(objects: Sequence[Mapping[str, Any]], labels: Sequence[str | None]) -> LabelScheme | None:
    for key in LABEL_KEYS:
        values = [canonical(value.get(key)) for value in objects]
        if all(value is not None for value in values):
            return _scheme((value for value in values if value is not None), key)
    for key in objects[0]:
        values = [canonical(value.get(key)) for value in objects]
        if all(value is not None and value == label for value, label in zip(values, labels, strict=True)):
            return _scheme((value for value in values if value is not None), key)
    return None


def _short_scheme(answers: Sequence[str]) -> LabelScheme | None:
    """Bare labels: short, few, and each there several times, about."""
    texts = [answer.strip() for answer in answers]
    num = len(set(map(_name, texts)))
    is_closed = 2 <= num <= min(MAX_LABELS, len(texts) // 2)
    is_short = all(0 < len(text) <= MAX_LABEL_CHARACTERS and "\n" not in text for text in texts)
    return _scheme(texts, None) if is_closed and is_short else None


def _scheme(values: Iterable[str], key: str | None) -> LabelScheme | None:
    """Of labels that are there; None where there are too many to be labels."""
    found = Counter(values)
    spellings: dict[str, str] = {}
    for label, _ in found.most_common():  # `Yes` and `yes` are one label, in the spelling that is more frequent
        spellings.setdefault(_name(label), label)
    labels = tuple(sorted(spellings.values(), key=_order))
    return LabelScheme(labels, key) if "" not in spellings and len(labels) <= MAX_LABELS else None


def _order(label: str) -> tuple[int, int, str]:
    """Numbers by value, the names of inference in their order, other names by the alphabet."""
    if label.isdigit() and len(label) < MAX_LABEL_CHARACTERS:
        return 0, int(label), label
    return (0, NLI.index(label.lower()), label) if label.lower() in NLI else (1, 0, label)


def _whole_object(text: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    """JSON objects in a text, in prose or code fences, in order; those inside others are not looked for."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(value, dict):
                yield value
        start = text.find("{", end)
