"""What is worth saying of rows, labels and copies: the rules, and the sentences."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

from data.check.duplicates import Alike, Comparison, Leak
from data.check.inspection import MAX_LABELS, OTHER_LABELS, Inspection, NamedRow, merged
from data.check.texts import GARBLED
from data.lines import Line
from data.sources import count

Level = Literal["problem", "warning", "note"]
LEVELS: tuple[Level, ...] = ("problem", "warning", "note")
"""From the worst."""


@dataclass(frozen=True, slots=True)
class FoundRow:
    """A row that a finding names."""

    origin: str
    """`train.jsonl:17`, or `train.jsonl:17 and train.jsonl:40` for rows that are alike."""
    detail: str = ""
    names: tuple[str, ...] = ()
    """Each of the rows; none for one that can't be read."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found."""

    kind: str
    """Stays the same from version to version: `answer-lost`."""
    level: Level
    text: str
    """A sentence, with its numbers."""
    hint: str = ""
    """What to do: a setting or a command."""
    num_rows: int = 0
    """Rows it is about; 0 for what is about the whole."""
    rows: tuple[FoundRow, ...] = ()
    """The first or the worst of them."""


def found_rows(rows: Iterable[NamedRow]) -> tuple[FoundRow, ...]:
    """Single rows."""
    return tuple(FoundRow(row.origin, row.detail, (row.origin,)) for row in rows)


def alike_rows(found: Alike) -> tuple[FoundRow, ...]:
    """Rows that are alike, by two or more."""
    return tuple(FoundRow(" and ".join(names), names=names) for names in found.named)


_LONG_TOKENS, _LONG_TIMES = 512, 8
"""A row is very long with more tokens than the one, and more than so many times the median."""
_SHORT_TOKENS, _SHORT_TIMES = 16, 8
_FEW_TARGETS = 3
_RARE = 0.25
"""A label is rare below this share of what an even spread would give it."""
_MANY_COPIES = 0.05
"""Share of held-out rows from which near copies in training are worth a warning: below, they hardly move the gap."""


class _Kind(NamedTuple):
    level: Level
    text: str
    """`{rows}` is the number of rows; `{s}` an s for one row's verb."""
    hint: str


_ROW_KINDS: Mapping[str, _Kind] = {
    "no-targets": _Kind(
        "problem",
        "{rows} without a single target token, left out.",
        "give them an answer, or take them out of the file",
    ),
    "no-end": _Kind(
        "problem",
        "{rows} without the end token behind the answer: the model would not learn to stop.",
        "use the tokenizer and the chat template that belong to the model",
    ),
    "empty-answer": _Kind("warning", "{rows} with an answer that says nothing.", "write the answer, or take them out"),
    **{
        kind: _Kind("warning", f"{{rows}} with {what}.", "read the original file again, as UTF-8, and write it anew")
        for kind, what in GARBLED.items()
    },
    "secret": _Kind(
        "problem",
        "{rows} with what looks like a password or key, which a trained model can repeat.",
        "take it out of the rows, and revoke it if it is real",
    ),
    "email": _Kind("note", "{rows} with an e-mail address.", "replace addresses if they belong to people"),
}


def of_bad_rows(num_rows: int, named: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """Args: named: place and reason of some of them: `train.jsonl, line 3` and `not JSON`."""
    if num_rows:
        rows = tuple(FoundRow(place, why) for place, why in named)
        text = f"{count(num_rows, 'row')} can't be read."
        yield Finding("bad-rows", "problem", text, _BAD_ROWS_HINT, num_rows, rows)


def of_rows(inspections: Mapping[str, Inspection], max_tokens: int) -> Iterator[Finding]:
    """What is found in single rows."""
    whole = merged(inspections)
    yield from _cut_rows(whole, max_tokens)
    for kind, (level, text, hint) in _ROW_KINDS.items():
        noted = whole.of_kind(kind)
        if noted.num_rows:
            rows = count(noted.num_rows, "row")
            yield Finding(kind, level, text.format(rows=rows), hint, noted.num_rows, found_rows(noted.rows))
    yield from _outliers(whole)


def _cut_rows(whole: Inspection, max_tokens: int) -> Iterator[Finding]:
    hint = f"set data.max_tokens={whole.longest} to keep them whole, or shorten the rows"
    lost = whole.of_kind("answer-lost")
    if lost.num_rows:
        rows = count(lost.num_rows, "row")
        text = f"{rows} lost their whole answer to data.max_tokens {max_tokens}, and are left out."
        yield Finding("answer-lost", "problem", text, hint, lost.num_rows, found_rows(lost.rows))
    cut = whole.of_kind("truncated")
    if cut.num_rows:
        share = whole.num_lost_targets / (whole.num_targets + whole.num_lost_targets)
        text = (
            f"{count(cut.num_rows, 'answer')} of {whole.num_rows:,} cut off at data.max_tokens {max_tokens}, without "
            f"an end; {share:.1%} of all target tokens are lost."
        )
        yield Finding("truncated", "warning", text, hint, cut.num_rows, found_rows(cut.rows))


def _outliers(whole: Inspection) -> Iterator[Finding]:
    """Rows that are not like the others: each against an absolute and a relative measure."""
    median, typical = whole.lengths.quantile(0.5), whole.targets.quantile(0.5)
    limit = max(_LONG_TOKENS, _LONG_TIMES * median)
    floor = min(_SHORT_TOKENS, median / _SHORT_TIMES)
    bound = min(_FEW_TARGETS + 1, typical / 8)
    if num_rows := whole.lengths.num_above(limit):
        text = f"very long: over {limit:,} tokens, where half of the rows have {median:,} at most."
        named = _beyond(whole.of_kind("longest").rows, limit)
        yield _of_outliers("very-long", text, "split them, or leave them out", num_rows, named)
    if num_rows := whole.lengths.num_below(floor):
        text = f"very short: {ceil(floor) - 1} tokens at most, where half of the rows have {median:,} or more."
        named = _beyond(whole.of_kind("shortest").rows, -floor)
        yield _of_outliers("very-short", text, "look whether they say anything", num_rows, named)
    is_all_targets = whole.num_targets + whole.num_lost_targets > 0.9 * whole.num_tokens  # few are few tokens, then
    if not is_all_targets and (num_rows := whole.targets.num_below(bound)):
        text = f"with hardly a target: {ceil(bound) - 1} at most, where half of the rows have {typical:,} or more."
        named = _beyond(whole.of_kind("fewest-targets").rows, -bound)
        yield _of_outliers("few-targets", text, "look whether their answers are whole", num_rows, named)


def _of_outliers(kind: str, text: str, hint: str, num_rows: int, named: tuple[FoundRow, ...]) -> Finding:
    return Finding(kind, "note", f"{count(num_rows, 'row')} {text}", hint, num_rows, named)


def _beyond(rows: Sequence[NamedRow], limit: float) -> tuple[FoundRow, ...]:
    beyond = (row._replace(detail=count(abs(row.weight), "token")) for row in rows if row.weight > limit)
    return found_rows(beyond)


def of_labels(inspections: Mapping[str, Inspection]) -> Iterator[Finding]:
    """Labels that are rare, and those that only rows outside of training have."""
    if OTHER_LABELS in merged(inspections).labels:
        text = f"The column of data.stratify has more than {MAX_LABELS:,} different values: it is no label."
        yield Finding("no-label", "note", text, "name a column with few values, or leave data.stratify out")
        return
    train = inspections["train"].labels
    if not train:
        return
    num_rows, (most, num_most) = train.total(), train.most_common(1)[0]
    if len(train) == 1:
        text = f"All {num_rows:,} training rows have the label {most!r}: there is nothing to tell apart."
        yield Finding("one-label", "warning", text, "add rows with the other labels")
    rare = {label: num for label, num in train.items() if num < _RARE * num_rows / len(train)}
    if rare:
        listed = ", ".join(
            f"{label} {num / num_rows:.1%}" for label, num in sorted(rare.items(), key=lambda it: it[1])[:5]
        )
        text = f"Labels are uneven: {listed}, against {most} {num_most / num_rows:.1%}."
        yield Finding("uneven-labels", "warning", text, "add rows with the rare labels; judge each label by itself")
    for split, inspection in inspections.items():
        unseen = [label for label in inspection.labels if label not in train]
        if unseen:
            text = f"Labels of {split} rows that no training row has: {', '.join(unseen[:5])}."
            yield Finding("unseen-labels", "warning", text, "add training rows with them")


def of_copies(found: Comparison, *, is_kept_together: bool) -> Iterator[Finding]:
    """Rows that say the same, within and across the splits.

    Args:
        is_kept_together: whether the split keeps near copies on one side.
    """
    yield from _copies_within(found, is_kept_together)
    for split, leak in found.given.items():
        yield from _leaking(split, leak, is_kept_together)
    if found.disagreeing.num_rows:
        num, rows = found.disagreeing.num_rows, alike_rows(found.disagreeing)
        if found.answers_are_labels:
            text = f"{count(num, 'input')} with more than one label: they contradict each other."
            yield Finding("contradictory-labels", "warning", text, "keep the right one of each", num, rows)
        else:
            text = f"{count(num, 'question')} with several answers."
            yield Finding("several-answers", "note", text, "fine if they are meant as alternatives", num, rows)


def _copies_within(found: Comparison, is_kept_together: bool) -> Iterator[Finding]:
    exact, near = found.exact, found.near
    if exact.num_rows:
        text = f"{count(exact.num_rows, 'row')} the same as an earlier one{_naively(found, 'exact')}."
        hint = "copies stay on one side of the split; take them out unless they are meant to weigh more"
        yield Finding("exact-copies", "note", text, hint, exact.num_rows, alike_rows(exact))
    if near.num_rows:
        text = (
            f"{count(near.num_rows, 'row')} nearly the same as an earlier one ({count(found.num_clusters, 'set')}, the "
            f"largest of {found.largest_cluster}){_naively(found, 'near')}."
        )
        hint = "near copies stay on one side of the split (data.near_duplicates)"
        level: Level = "note"
        if not is_kept_together and found.naive is not None and found.naive.share >= _MANY_COPIES:
            level, hint = "warning", "keep them on one side of the split with data.near_duplicates=0.7"
        yield Finding("near-copies", level, text, hint, near.num_rows, alike_rows(near))


def _naively(found: Comparison, which: str) -> str:
    """What they would do to the gap if rows were held out one by one."""
    if found.naive is None or not (num := getattr(found.naive, which).num_rows):
        return ""
    share = num / found.naive.num_rows
    effect = ", and the gap would look too good" if share >= _MANY_COPIES else ""
    return (
        f"; cut off row by row, {num:,} of {found.naive.num_rows:,} validation rows ({share:.0%}) would have one in "
        f"training{effect}"
    )


def _leaking(split: str, leak: Leak, is_kept_together: bool) -> Iterator[Finding]:
    hint = _OVERLAP_HINT
    whole = f"of {count(leak.num_rows, f'{split} row')}"
    if num := leak.exact.num_rows:
        is_in = "is" if num == 1 else "are"
        text = f"{num:,} {whole} {is_in} in the training file as well; training leaves such rows out."
        yield Finding("copies-across", "warning", text, hint, num, alike_rows(leak.exact))
    if num := leak.near.num_rows:
        have = "has" if num == 1 else "have"
        level: Level = "warning" if leak.share >= _MANY_COPIES else "note"
        effect = ": the gap will look too good" if level == "warning" else ": too few to move the gap much"
        if is_kept_together:
            effect = "; training leaves such rows out"
        text = f"{num:,} {whole} ({leak.share:.0%}) {have} a near copy in the training file{effect}."
        yield Finding("near-copies-across", level, text, hint, num, alike_rows(leak.near))


class _LineKind(NamedTuple):
    level: Level
    hint: str


_BAD_ROWS_HINT = "fix the lines; --set data.skip_bad=true leaves such rows out"
_OVERLAP_HINT = "give the files different rows, or one file and data.validation"
_LINE_KINDS: Mapping[str, _LineKind] = {
    "bad-rows": _LineKind("problem", _BAD_ROWS_HINT),
    "answer-not-found": _LineKind("problem", "see these rows' answers for what the template strips or rewrites"),
    "template-prompt": _LineKind(
        "warning", "look at a row with `python cli.py data show` that its targets are the answer"
    ),
    "copies-across": _LineKind("warning", _OVERLAP_HINT),
    "near-copies-across": _LineKind("warning", _OVERLAP_HINT),
    "held-out-twice": _LineKind("warning", "give the validation and the test file different rows"),
    "groups-across": _LineKind("warning", "give the files different groups, or one file and data.validation"),
    "stratify-unused": _LineKind("note", ""),
    "uneven-split": _LineKind(
        "note", "try another train.seed, or --folds 5; data.stratify evens out a column's values"
    ),
    "no-template": _LineKind("note", "use an instruct model if the rows are conversations"),
    "last-question": _LineKind("note", "add the answers"),
}
_TELLS: Mapping[str, frozenset[str]] = {
    "bad-rows": frozenset({"bad-rows"}),
    "truncated": frozenset({"truncated", "answer-lost"}),
    "no-targets": frozenset({"no-targets", "answer-lost"}),
    "no-end": frozenset({"no-end"}),
    "exact-copies": frozenset({"exact-copies"}),
    "copies-across": frozenset({"copies-across"}),
    "near-copies-across": frozenset({"near-copies-across", "copies-across"}),
}
"""Kind of a line -> kinds of findings that say the same, with more in them."""


def told_by(lines: Sequence[Line]) -> frozenset[str]:
    """Kinds of findings of which lines have told already."""
    return frozenset().union(*(_TELLS.get(line.kind, frozenset()) for line in lines))


def of_lines(lines: Sequence[Line], found: Collection[str]) -> Iterator[Finding]:
    """What reading, tokenising and splitting said, where no finding says it. `found`: the kinds that there are."""
    for line in lines:
        if _TELLS.get(line.kind, frozenset()).isdisjoint(found):
            level, hint = _LINE_KINDS.get(line.kind, _LineKind("note", ""))
            yield Finding(line.kind, level, line.text, hint, line.num_rows)
