"""`data prepare code`: a source repository -> completion, infilling or instruction rows."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from core.errors import UserError
from data.prepare import code_files
from data.prepare.code_forms import Form, UnfitError, file_parts, settings_of, whole
from data.prepare.code_items import Item, ItemReader
from data.prepare.code_languages import LANGUAGES, Language, grammar_versions, language_by_name, language_of
from data.prepare.common import FoundFile, Record, Sample, Seen, Source, walk_files
from data.workers import in_order

LEVELS = ("file", "item", "both")
_ALIASES = {
    "c++": "cpp",
    "cxx": "cpp",
    "golang": "go",
    "js": "javascript",
    "node": "javascript",
    "py": "python",
    "python3": "python",
    "rs": "rust",
    "ts": "typescript",
    "tsx": "typescript",
    "jsx": "javascript",
}
_BATCH = 16
"""Files for a worker process at a time."""
_WORTH = 8
"""Batches from which on workers are worth their start."""


@dataclass(frozen=True, slots=True)
class CodeSettings:
    """What decides the rows of a file."""

    form: Form
    level: str
    languages: tuple[str, ...]
    tests: bool
    max_chars: int
    min_chars: int


@dataclass(slots=True)
class _FileRows:
    """What became of one file; goes from a worker to the process that writes."""

    name: str
    source: Source | None = None
    """None if the file was left out."""
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Digest of the code, and the row."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Reason, and where."""
    noted: list[tuple[str, str]] = field(default_factory=list)


class CodeKind:
    """The kind `code`; see `data.prepare.common.Kind`."""

    name = "code"
    group = "source"

    def __init__(self, settings: CodeSettings) -> None:
        self._settings = settings

    def settings(self) -> dict[str, Any]:
        settings = self._settings
        return {
            **settings_of(settings.form),
            "level": settings.level,
            "languages": list(settings.languages),
            "tests": settings.tests,
            "max_chars": settings.max_chars,
            "min_chars": settings.min_chars,
        }

    def tools(self) -> dict[str, str]:
        return grammar_versions(self._settings.languages)

    def samples(self, source: Path, record: Record) -> Iterator[Sample]:
        """Rows in the order of the files; in a file, its parts first and then its items.

        Raises:
            UserError: there is no code in `source`, or a worker process ended.
        """
        seen = Seen()
        files = self._files(source, record)
        for result in _read_all(files, self._settings):
            record.advance()
            for reason, where in result.left_out:
                record.left_out.add(reason, where)
            for reason, where in result.noted:
                record.noted.add(reason, where)
            if result.source is not None:
                record.sources.append(result.source)
            for digest, values in result.rows:
                if seen.is_new(digest):
                    yield Sample(values, result.name)
                else:
                    record.left_out.add("exact duplicates", f"{result.name}:{values['line']}")
        if not record.sources:
            known = ", ".join(language.title for language in LANGUAGES.values())
            reasons = ", ".join(f"{reason} {entry['number']:,}" for reason, entry in record.left_out.to_json().items())
            raise UserError(
                f"{source}: no code found" + (f"; left out: {reasons}" if reasons else ""),
                hint=f"known languages: {known}; choose some with --languages",
            )

    def _files(self, source: Path, record: Record) -> Iterator[FoundFile]:
        for file in walk_files(source, record, skip_folder=code_files.skip_folder):
            language = language_by_name(file.name)
            reason = code_files.refused_name(file.name)
            if reason is None and language is not None and not self._wants(language, file.name):
                reason = "files in languages that were not asked for"
            if reason is None and not self._settings.tests and code_files.is_test(file.name):
                reason = "files of tests"
            if reason is None:
                yield file
            else:
                record.left_out.add(reason, file.name)

    def _wants(self, language: Language, name: str) -> bool:
        """A C header may be C++."""
        wanted = self._settings.languages
        return language.name in wanted or (name.endswith(".h") and "cpp" in wanted)


def make_kind(options: Mapping[str, Any]) -> CodeKind:
    """The kind with the values of its arguments (`core/prepare_arguments.py`).

    Raises:
        UserError: an unknown language, or options that exclude each other.
    """
    form, level = options["form"], options["level"]
    if form == "instruction" and level in ("file", "both"):
        raise UserError(
            f"--as instruction --level {level}: instructions are made of functions and types, not of files",
            hint="leave --level out, or choose another --as",
        )
    markers = tuple(options["infill_markers"])
    if len(set(markers)) < 3 or not all(markers):
        raise UserError("--infill-markers: three different markers are needed", hint=f"there are {' '.join(markers)}")
    if options["min_chars"] > options["max_chars"]:
        raise UserError(
            f"--min-chars {options['min_chars']}: more than --max-chars {options['max_chars']}", hint="lower it"
        )
    settings = CodeSettings(
        form=Form(form, (markers[0], markers[1], markers[2])),
        level=level or ("item" if form == "instruction" else "both"),
        languages=_languages(options["languages"]),
        tests=not options["no_tests"],
        max_chars=options["max_chars"],
        min_chars=options["min_chars"],
    )
    return CodeKind(settings)


def _languages(names: str | None) -> tuple[str, ...]:
    if names is None:
        return tuple(LANGUAGES)
    wanted = set()
    for name in (part.strip().lower() for part in names.split(",")):
        known = _ALIASES.get(name, name)
        if known not in LANGUAGES:
            near = difflib.get_close_matches(name, [*LANGUAGES, *_ALIASES], n=1)
            did_you = f"did you mean {_ALIASES.get(near[0], near[0])}? " if near else ""
            raise UserError(f"--languages: {name!r} is not a known language", hint=f"{did_you}{', '.join(LANGUAGES)}")
        wanted.add(known)
    return tuple(name for name in LANGUAGES if name in wanted)


# --- files, in worker processes where there are many ------------------------------------------------------------------


def _read_all(files: Iterator[FoundFile], settings: CodeSettings) -> Iterator[_FileRows]:
    """The rows of each file, in the order of the files; only a few batches wait at a time.

    Raises:
        UserError: a worker process ended.
    """
    batches = iter(lambda: list(islice(files, _BATCH)), [])
    first = list(islice(batches, _WORTH))
    read = partial(_read_batch, settings=settings)
    tagged = (("", batch) for batch in chain(first, batches))
    for _, results in in_order(read, tagged, parallel=len(first) == _WORTH):
        yield from results


def _read_batch(files: Sequence[FoundFile], settings: CodeSettings) -> list[_FileRows]:
    return [read_file(file, settings) for file in files]


def read_file(file: FoundFile, settings: CodeSettings) -> _FileRows:
    """The rows of a file, or why there are none. Depends on nothing but the file's name and content."""
    result = _FileRows(file.name)
    try:
        is_large = file.path.stat().st_size > code_files.MAX_BYTES
        content = b"" if is_large else file.path.read_bytes()
    except OSError:
        result.left_out.append(("files that can't be read", file.name))
        return result
    language = language_of(file.name, content)
    assert language is not None, "the walk passes code only"
    text = code_files.decoded(content)
    if is_large:
        reason: str | None = f"files larger than {code_files.MAX_BYTES // 1_000_000} MB"
    elif text is None:
        reason = "binary files, or not in UTF-8"
    elif language.name not in settings.languages:
        reason = "files in languages that were not asked for"
    else:
        reason = code_files.refused_text(text)
    if reason is not None or text is None:
        result.left_out.append((reason or "", file.name))
        return result
    result.source = Source(file.name, len(content), hashlib.sha256(content).hexdigest())
    _Reader(file.name, language, settings, result).read(text)
    return result


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes the rows of one file."""

    name: str
    language: Language
    settings: CodeSettings
    result: _FileRows

    def read(self, text: str) -> None:
        cleaned = code_files.clean(text, self.language, self.name, tests=self.settings.tests)
        root = cleaned.tree.root_node
        if root.has_error:
            self.result.noted.append(
                ("files with syntax errors, as the grammar sees it, of which the sound items were kept", self.name)
            )
        if cleaned.had_tests:
            self.result.left_out.append(("tests in files of other code", self.name))
        if self.settings.level != "item":
            for part in self._parts(cleaned):
                self._add(cleaned, part, "files")
        if self.settings.level != "file":
            for item in ItemReader(cleaned.source, self.language).items(root):
                self._add(cleaned, item, "items")

    def _parts(self, cleaned: code_files.Cleaned) -> Iterator[Item]:
        yield from file_parts(
            cleaned.source,
            cleaned.tree.root_node,
            self.language,
            name=self.name,
            max_size=self.settings.max_chars,
        )

    def _add(self, cleaned: code_files.Cleaned, item: Item, plural: str) -> None:
        line = cleaned.line(item.row)
        text = whole(cleaned.source, item)
        try:
            self._check(item, text, plural)
            values = self.settings.form.values(cleaned.source, item, self.language)
        except UnfitError as problem:
            where = self.name if item.kind == "file" else f"{self.name}:{line}"
            self.result.left_out.append((str(problem), where))
            return
        columns = {"language": self.language.name, "kind": item.kind, "name": item.name, "line": line}
        digest = hashlib.blake2b(text.strip().encode(), digest_size=16).hexdigest()
        self.result.rows.append((digest, {**values, **columns}))

    def _check(self, item: Item, text: str, plural: str) -> None:
        if item.has_error:
            raise UnfitError("items with syntax errors")
        if len(text) > self.settings.max_chars:
            what = "items" if plural == "items" else "parts of files"
            raise UnfitError(f"{what} longer than {self.settings.max_chars:,} characters")
        if len(text.strip()) < self.settings.min_chars:
            raise UnfitError(f"{plural} shorter than {self.settings.min_chars:,} characters")
