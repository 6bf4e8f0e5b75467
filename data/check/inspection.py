"""What the rows of one split are like: counted row by row, in a bounded space, in any number of processes."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.check.secrets import find_emails, find_secrets
from data.check.texts import find_garbled, says_nothing
from data.formats import Example

MAX_NAMED = 20
"""Rows that are named of each kind; all are counted."""
MAX_LABELS = 1000
"""Different labels that are counted one by one; a column with more is no label."""
_EXACT_BITS = 11
OTHER_LABELS = "\0other"
"""Where rows are counted whose label came after `MAX_LABELS` others."""


class NamedRow(NamedTuple):
    """A row, as a person finds it again."""

    weight: int
    """How bad it is, within its kind; the largest are kept."""
    origin: str
    """`train.jsonl:17`"""
    detail: str
    """What is the matter, in a few words, or empty. Never a secret."""


@dataclass(slots=True)
class Noted:
    """The rows of one kind: how many, and the first or the worst of them by name."""

    num_rows: int = 0
    rows: list[NamedRow] = field(default_factory=list)
    """At most `MAX_NAMED`, the largest weight first; among equals, the first that came."""

    def add(self, weight: int, origin: str, detail: str = "") -> None:
        self.num_rows += 1
        if len(self.rows) < MAX_NAMED or weight > self.rows[-1].weight:
            self._keep(NamedRow(weight, origin, detail))

    def merge(self, later: Noted) -> None:
        self.num_rows += later.num_rows
        for row in later.rows:
            self._keep(row)

    def _keep(self, row: NamedRow) -> None:
        insort(self.rows, row, key=lambda one: -one.weight)  # behind its equals
        del self.rows[MAX_NAMED:]


class Lengths:
    """A histogram of lengths that merges: exact below 2,048, and to a thousandth above."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: Counter[int] = Counter(counts or {})
        """Lower end of a bin -> rows in it."""

    def add(self, length: int) -> None:
        shift = max(length.bit_length() - _EXACT_BITS, 0)
        self.counts[length >> shift << shift] += 1

    def merge(self, later: Lengths) -> None:
        self.counts.update(later.counts)

    @property
    def num_rows(self) -> int:
        return self.counts.total()

    def quantile(self, share: float) -> int:
        """The smallest length that at least `share` of the rows do not exceed; 0 without rows."""
        due, seen = share * self.num_rows, 0
        for length in sorted(self.counts):
            seen += self.counts[length]
            if seen >= due:
                return length
        return 0

    def num_above(self, length: float) -> int:
        return sum(rows for low, rows in self.counts.items() if low > length)

    def num_below(self, length: float) -> int:
        return sum(rows for low, rows in self.counts.items() if low < length)

    def bars(self, num_bars: int) -> Iterator[tuple[int, int, int]]:
        """Bins of equal width in round numbers, from the shortest: (first length, last length, rows in it)."""
        if not self.counts:
            return
        low, high = min(self.counts), max(self.counts)
        width = _round_up((high - low) // num_bars + 1)
        start = low // width * width
        while start <= high:
            stop = start + width
            yield start, stop - 1, sum(rows for length, rows in self.counts.items() if start <= length < stop)
            start = stop


def _round_up(width: int) -> int:
    """To 1, 2 or 5 times a power of ten."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= width:
                return digit * power
        power *= 10


class Inspection:
    """What was seen of the rows of one split. Small, picklable, and the same however the rows were divided.

    `noted` has, by kind: `truncated` (the answer is cut off), `answer-lost` (all of it), `no-targets`, `no-end`,
    `empty-answer`, `secret`, `email`, the kinds of `data.check.texts`; and, of all rows, the `longest`, `shortest` and
    `fewest-targets`.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.num_tokens = 0
        """Before the cut at `max_tokens`."""
        self.num_targets = 0
        """Kept."""
        self.num_lost_targets = 0
        self.lengths = Lengths()
        """Tokens of each row, before the cut."""
        self.targets = Lengths()
        """Targets of each row that keeps any, before the cut."""
        self.labels: Counter[str] = Counter()
        self.noted: dict[str, Noted] = {}

    def add(self, example: Example, *, num_tokens: int, num_targets: int, lost_targets: int, has_end: bool) -> None:
        """Counts a row.

        Args:
            num_tokens: before the cut at `max_tokens`.
            num_targets: that are left.
            lost_targets: that were cut away.
            has_end: whether the row ends with the end token.
        """
        origin = example.origin
        self.num_rows += 1
        self.num_tokens += num_tokens
        self.num_targets += num_targets
        self.num_lost_targets += lost_targets
        self.lengths.add(num_tokens)
        self._note("longest", origin, num_tokens)
        self._note("shortest", origin, -num_tokens)
        if num_targets:
            self.targets.add(num_targets + lost_targets)
            self._note("fewest-targets", origin, -num_targets - lost_targets)
        self._add_answer(origin, num_targets, lost_targets, has_end)
        self._add_label(example.label)
        self._add_text(example)

    def _add_answer(self, origin: str, num_targets: int, lost_targets: int, has_end: bool) -> None:
        if lost_targets and num_targets:
            detail = f"{lost_targets:,} of {lost_targets + num_targets:,} target tokens cut off"
            self._note("truncated", origin, lost_targets, detail)
        elif lost_targets:
            self._note("answer-lost", origin, lost_targets, f"all {lost_targets:,} target tokens cut off")
        elif not num_targets:
            self._note("no-targets", origin)
        elif not has_end:
            self._note("no-end", origin)

    def _add_label(self, label: str | None) -> None:
        if label is None:
            return
        is_known = label in self.labels or len(self.labels) < MAX_LABELS
        self.labels[label if is_known else OTHER_LABELS] += 1

    def _add_text(self, example: Example) -> None:
        answers = [turn.content for turn in example.messages if turn.role == "assistant"]
        for answer in answers if example.text is None else [example.text]:
            if len(answer) < 40 and (nothing := says_nothing(answer)):
                self._note("empty-answer", example.origin, 0, nothing)
                break
        parts = [turn.content for turn in example.messages] if example.text is None else [example.text]
        text = "\n".join(parts)
        if not (text.isascii() and text.isprintable()):
            for kind, detail in find_garbled(text):
                self._note(kind, example.origin, 0, detail)
        if secrets := find_secrets(text):
            self._note("secret", example.origin, 0, ", ".join(dict.fromkeys(found.name for found in secrets)))
        if emails := find_emails(text):
            self._note("email", example.origin, 0, f"{len(emails)} address{'' if len(emails) == 1 else 'es'}")

    def _note(self, kind: str, origin: str, weight: int = 0, detail: str = "") -> None:
        if (noted := self.noted.get(kind)) is None:
            noted = self.noted[kind] = Noted()
        noted.add(weight, origin, detail)

    def of_kind(self, kind: str) -> Noted:
        return self.noted.get(kind) or Noted()

    @property
    def longest(self) -> int:
        """Tokens of the longest row, before the cut; 0 without rows. Exact, where `lengths` is not."""
        return max((row.weight for row in self.of_kind("longest").rows), default=0)

    def merge(self, later: Inspection) -> None:
        """Adds what was seen of the rows that come after these."""
        self.num_rows += later.num_rows
        self.num_tokens += later.num_tokens
        self.num_targets += later.num_targets
        self.num_lost_targets += later.num_lost_targets
        self.lengths.merge(later.lengths)
        self.targets.merge(later.targets)
        for label, rows in later.labels.items():
            is_known = label in self.labels or len(self.labels) < MAX_LABELS
            self.labels[label if is_known else OTHER_LABELS] += rows
        for kind, noted in later.noted.items():
            self.noted.setdefault(kind, Noted()).merge(noted)

    def to_json(self) -> dict[str, Any]:
        """Everything, in what JSON can hold."""
        return {
            "num_rows": self.num_rows,
            "num_tokens": self.num_tokens,
            "num_targets": self.num_targets,
            "num_lost_targets": self.num_lost_targets,
            "lengths": sorted(self.lengths.counts.items()),
            "targets": sorted(self.targets.counts.items()),
            "labels": dict(self.labels),
            "noted": {kind: [noted.num_rows, noted.rows] for kind, noted in self.noted.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Inspection:
        """What `to_json` wrote."""
        made = cls()
        made.num_rows = content["num_rows"]
        made.num_tokens = content["num_tokens"]
        made.num_targets = content["num_targets"]
        made.num_lost_targets = content["num_lost_targets"]
        made.lengths = Lengths(dict(content["lengths"]))
        made.targets = Lengths(dict(content["targets"]))
        made.labels = Counter(content["labels"])
        for kind, (num_rows, rows) in content["noted"].items():
            made.noted[kind] = Noted(num_rows, [NamedRow(*row) for row in rows])
        return made


def merged(inspections: Mapping[str, Inspection]) -> Inspection:
    """What was seen of the rows of all splits."""
    whole = Inspection()
    for inspection in inspections.values():
        whole.merge(inspection)
    return whole
