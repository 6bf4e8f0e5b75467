"""`data prepare nli`: tables of premises, hypotheses and labels -> prompts that ask for JSON.

Prompt and answer are those that training on the table itself gives (`data/formats.py`). Rows have the columns `prompt`,
`completion`, `label` in words, to stratify by, `premise`, by which they are to be grouped (data sets of this kind have
several hypotheses for one premise), and `source`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from core.errors import UserError
from data.formats import RowParser, lookup
from data.prepare.common import FoundFile, Record, Sample, Seen, walk_files
from data.sources import BadRows, FileRows, Row, open_source

_ABSENT = lookup({}, "label")
"""What `lookup` gives where there is no such column."""
_FORMAT = "premise, hypothesis and label"
_USUAL_NAMES = {
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "sentence2"),
    "label": ("gold_label", "label"),
    "explanation": ("explanation", "explanations", "Explanation_1", "explanation_1"),
}
"""Of columns, where `--fields` says nothing: ours, then those of SNLI and MultiNLI and of e-SNLI."""
_NO_GOLD = ("", "-", "-1", "none", "null")
"""What stands where annotators did not agree, or where the label is kept secret."""
_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Nli:
    """Questions with JSON answers; `fields` names columns by role."""

    fields: Mapping[str, str]
    name: Literal["nli"] = "nli"
    group: Literal["premise"] = "premise"

    def settings(self) -> Mapping[str, Any]:
        return {"fields": dict(self.fields)}

    def tools(self) -> Mapping[str, str]:
        return {}

    def samples(self, source: Path, record: Record) -> Iterator[Sample]:
        """Raises: UserError: no such file or folder, a table that can't be read, or one without the columns."""
        if source.is_file():
            open_source(str(source))  # says which kinds of files there are
        files = list(walk_files(source, record))
        record.expect(len(files))
        seen = Seen()
        for file in files:
            if file.name.lower().removesuffix(".gz").endswith(_ENDINGS):
                record.add_source(file.path, file.name)
                yield from self._of_file(file, record, seen)
            else:
                record.left_out.add("files that are no tables", file.name)
            record.advance()

    def _of_file(self, file: FoundFile, record: Record, seen: Seen) -> Iterator[Sample]:
        bad = BadRows(skip=True)
        rows = FileRows(file.path, file.name).read(bad)
        first = next(rows, None)
        if first is not None:
            fields = self._columns(first)
            parser = RowParser(_FORMAT, fields)
            for row in chain((first,), rows):
                yield from self._of_row(row, fields, parser, record, seen)
        for place in bad.named:
            record.left_out.add("rows that can't be read", place, 0)
        if bad.num_rows:
            record.left_out.add("rows that can't be read", file.name, bad.num_rows)

    def _columns(self, row: Row) -> dict[str, str]:
        """Role -> column, as the user says, or by the usual names. Raises `UserError` if one is missing."""
        fields = {}
        for role, names in _USUAL_NAMES.items():
            wanted = (self.fields[role],) if role in self.fields else names
            found = next((name for name in wanted if lookup(row.values, name) is not _ABSENT), None)
            if found is not None:
                fields[role] = found
            elif role != "explanation" or role in self.fields:
                what = f"{self.fields[role]!r} for the {role}" if role in self.fields else f"for the {role}"
                raise UserError(
                    f"{row.file}: no column {what} (its columns: {', '.join(map(str, row.values))})",
                    hint=f"say which it is: --fields {role}=NAME",
                )
        return fields

    def _of_row(
        self, row: Row, fields: Mapping[str, str], parser: RowParser, record: Record, seen: Seen
    ) -> Iterator[Sample]:
        if not _has_gold(lookup(row.values, fields["label"])):
            record.left_out.add("rows without a gold label", row.origin)
            return
        bad = BadRows(skip=True)
        examples, _ = parser.parse([row], bad)
        if not examples:
            record.left_out.add("rows that can't be read", bad.named[0])
            return
        example = examples[0]
        if not seen.is_new(example.content):
            record.left_out.add("rows that repeat another", row.origin)
            return
        prompt, completion = (turn.content for turn in example.messages)
        premise = lookup(row.values, fields["premise"])
        values = {"prompt": prompt, "completion": completion, "label": example.label, "premise": premise}
        yield Sample(values, source=row.file)


def _has_gold(label: object) -> bool:
    return label is not _ABSENT and label is not None and str(label).strip().lower() not in _NO_GOLD


def make_kind(options: Mapping[str, Any]) -> Nli:
    """From the argument `fields`: `role=column,…` or nothing. Raises `UserError` if it is not of this form."""
    return Nli(_parse_fields(options.get("fields") or ""))


def _parse_fields(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, sign, column = (piece.strip() for piece in part.partition("="))
        if not sign or not column:
            raise UserError(f"--fields: {part!r} is not ROLE=COLUMN", hint="for example premise=sentence1")
        if role not in _USUAL_NAMES:
            raise UserError(f"--fields: {role!r} is not a role", hint=f"roles: {', '.join(_USUAL_NAMES)}")
        fields[role] = column
    return fields
