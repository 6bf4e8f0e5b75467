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
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

LABEL_KEYS = ("predicted_label", "label")
"""Keys of a JSON answer that are a label, whatever else there is."""
NLI = ("entailment", "neutral", "contradiction")
_INFERENCE = re.compile(r"\bpremise\b.*\bhypothesis\b", re.IGNORECASE | re.DOTALL)
MAX_LABELS = 20
MAX_LABEL_CHARACTERS = 40
_SHORT_ANSWER = 60
"""Characters of an answer that may be a number in a few words."""
_SAID = r"(?:label|answer|class|category|prediction|output|result)"
_NAMED = r"(?:(?:option|choice)\s+)?(?<!-)"
"""What may stand before a name; a minus there would belong to a number."""
_MINUS = "\N{MINUS SIGN}"
_THOUGHT = re.compile(r"^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
"""Also of an answer whose prompt has opened it."""
_EDGE = " \t\r\n\"'`*_.,:;!?()[]{}<>"
_STOP = re.compile(r"\s*(?:$|[.,;:()\n\"'}\]*-]|(?:because|since|as)\b)", re.IGNORECASE)
"""What may stand behind a label of one character in a sentence."""
_NO_ANSWER = re.compile(r"\s+(?:doubt|idea|matter|one|problem|wonder)\b", re.IGNORECASE)
"""Behind a "no" that begins a sentence and answers nothing."""
_SENTENCE_END = re.compile(r"(?:^|[.!?:;\n\"(*])\s*$")
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
    spellings: frozenset[str] = frozenset()
    """Other spellings of the labels that the rows have: `Yes` beside `yes`."""
    is_nli: bool = False
    """Whether the labels are those of inference, so that 0 is entailment."""

    @property
    def is_json(self) -> bool:
        return self.key is not None

    def read(self, answer: str) -> Reading:
        """What `answer` says: strictly, else tolerantly."""
        text = _THOUGHT.sub("", answer).strip()
        strict = self._read_strictly(text)
        return Reading(strict or self._read_tolerantly(text.replace(_MINUS, "-")), strict is not None)

    def _read_strictly(self, text: str) -> str | None:
        if self.key is None:
            return self._label_of(text) if text in self.labels or text in self.spellings else None
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
        """`Answer: 2`, `the label is neutral`; a bare number at the end of a short answer; `Option B`."""
        names = self._names_pattern
        begins = rf"^\W*(?<!-)({names})[*'\"]*\s*(?:[-–—:(\n]|$)"  # not `1.` nor `1)`, which begin lists
        if self._has_letters:  # `B) Paris`; no list of them all
            listed = rf"[^\n]*\n\W*(?:option\s+)?(?:{names})\s*[).:]"
            begins = rf"^\W*(?<!-)({names})[*'\"]*\s*(?:[-–—:(\n).,]|$)(?!{listed})"
        for pattern in (
            begins,
            rf"\b{_SAID}\b\W{{0,4}}(?:is|=|:)?\W{{0,4}}{_NAMED}({names})(?!\w)",
            rf"^.{{0,{_SHORT_ANSWER}}}\b(?:is|:|=)\W{{0,3}}{_NAMED}({names})\W*$",
        ):
            for match in re.finditer(pattern, text, re.IGNORECASE):
                if self._is_meant(match) and not self._goes_on(match):
                    return self._label_of(match[1])
        return self._only_one(re.finditer(rf"\b(?:option|choice)\W{{1,4}}(?<!-)({names})(?!\w)", text, re.IGNORECASE))

    def _only_one(self, matches: Iterable[re.Match[str]]) -> str | None:
        """The label that all of them name."""
        found = {self._label_of(match[1]) for match in matches if self._is_meant(match)}
        return found.pop() if len(found) == 1 else None

    def _is_meant(self, match: re.Match[str]) -> bool:
        """Whether the name stands for a label: "the answer is a man", "2 men" and "no doubt" name no A, 2 or no."""
        if len(match[1]) > 1 and match[1].lower() != "no":
            return True
        return _STOP.match(match.string, match.end(1)) is not None

    def _goes_on(self, match: re.Match[str]) -> bool:
        """Whether another label follows: `positive or negative` is no answer."""
        others = re.compile(
            rf"\s*(?:[,/(]\s*(?:or\b|and\b)?|or\b|and\b)\s*(?:an?\s+|the\s+|option\s+)?(?<!-)({self._names_pattern})(?!\w)",
            re.IGNORECASE,
        )
        other = others.match(match.string, match.end(1))
        return other is not None and self._is_meant(other) and self._label_of(other[1]) != self._label_of(match[1])

    def _only_word(self, text: str) -> str | None:
        """The label that the text names, if it names one alone; no number or letter, which may mean something else."""
        found = set()
        for match in re.finditer(rf"(?<![\w-])({self._names_pattern})(?!\w)", text, re.IGNORECASE):
            name, before = match[1], text[: match.start()]
            if name.lstrip("-").isdigit() or len(name) == 1 or _NEGATION.search(before):
                continue
            # "no" is a word of prose as well, unless it begins a sentence
            begins = _SENTENCE_END.search(before) and not _NO_ANSWER.match(text, match.end())
            if not begins and not self._is_meant(match):
                continue
            found.add(self._label_of(name))
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
            if self.is_nli and set(names) <= set(own):
                names |= {word: names[mine] for word, mine in zip(other, own, strict=True) if mine in names}
        return names

    @cached_property
    def _has_letters(self) -> bool:
        return all(len(label) == 1 and label.isalpha() for label in self.labels)

    @cached_property
    def _names_pattern(self) -> str:
        """Longest first: `very good` before `good`."""
        return "|".join(re.escape(name) for name in sorted(self._by_name, key=len, reverse=True))


def _name(label: str) -> str:
    """What labels are told apart by: without case, quotes and punctuation around it."""
    return label.replace(_MINUS, "-").strip(_EDGE).casefold()


def canonical(value: object) -> str | None:
    """A label as text: 1, "1" and 1.0 are one; None for what can be no label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        return value.strip() or None
    return str(value) if isinstance(value, int | float) else None


def find_scheme(
    answers: Sequence[str], labels: Sequence[str | None], questions: Sequence[str] = ()
) -> LabelScheme | None:
    """The labels of a data set, from its expected answers; None where the answers have none.

    Args:
        answers: the expected answer of each row.
        labels: what is known of each row's label; a key of JSON answers that says the same is the label's.
        questions: of each row; premises and hypotheses show that the labels 0, 1 and 2 are those of inference.
    """
    if not answers:
        return None
    objects = [_whole_object(answer) for answer in answers]
    if all(value is not None for value in objects):
        scheme = _json_scheme([value for value in objects if value is not None], labels)
    else:
        scheme = _short_scheme(answers)
    return scheme if scheme is None else replace(scheme, is_nli=_is_nli(scheme, labels, questions))


def _is_nli(scheme: LabelScheme, labels: Sequence[str | None], questions: Sequence[str]) -> bool:
    """Whether the rows are of inference: by the names of their labels, or by what they ask."""
    if any({_name(name) for name in names if name} <= set(NLI) for names in (scheme.labels, labels) if any(names)):
        return True
    return bool(questions) and all(_INFERENCE.search(question) is not None for question in questions)


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
    if "" in spellings or len(labels) > MAX_LABELS:
        return None
    return LabelScheme(labels, key, frozenset(found) - set(labels))


def _order(label: str) -> tuple[int, int, str]:
    """Numbers by value, the names of inference in their order, other names by the alphabet."""
    if re.fullmatch(r"-?[0-9]+", label) and len(label) < MAX_LABEL_CHARACTERS:
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
