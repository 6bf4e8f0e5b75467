"""Files, folders and hub data sets -> rows that know where they came from.

Rows are read one by one, as often as somebody goes over them; only a `.json` file, and a compressed Parquet file, is in
memory as a whole.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any, Protocol, cast

from core.errors import UserError

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
"""Split -> the names that a file in a folder, or a split on the hub, may have for it."""

SKIP_HINT = "fix the line, or leave such rows out with --set data.skip_bad=true"
KINDS = "JSONL (.jsonl, .ndjson), JSON, CSV, TSV and Parquet"
_NUM_NAMED = 3
_BATCH = 256
"""Rows of a Parquet file that are made Python objects at a time."""
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, as it was read."""

    values: Mapping[str, Any]
    file: str
    """The file as the user named it; `owner/name/train` for a hub data set."""
    number: int
    """Counted from 1."""
    unit: str = "line"
    """`line` where a row starts at a line of its own, else `row`."""

    @property
    def place(self) -> str:
        """For messages: `data/train.jsonl, line 17`."""
        return f"{self.file}, {self.unit} {self.number}"

    @property
    def origin(self) -> str:
        """For records: `train.jsonl:17`."""
        return f"{PurePath(self.file).name}:{self.number}"


class Rows(Protocol):
    """The rows of a split, read as they are asked for."""

    def read(self, bad: BadRows) -> Iterator[Row]:
        """Goes over the rows once. Raises `UserError`: not readable, or (unless `bad.skip`) a row that is no object."""
        ...

    @property
    def num_bytes(self) -> int:
        """On the disk; 0 where that is not known."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """The rows of a data set by split: `train`, and `validation` and `test` where the source brings them."""

    name: str
    splits: Mapping[str, Rows]
    path: str
    """As the user named it."""

    def read(self, bad: BadRows) -> Iterator[Row]:
        """All rows of all splits.

        Raises:
            UserError: as `Rows.read`, or at the end, a split without rows.
        """
        empty = []
        for split, rows in self.splits.items():
            row = None
            for row in rows.read(bad):
                yield row
            if row is None:
                empty.append(split)
        if empty:
            where = self.path if len(self.splits) == 1 else f"{self.path} ({empty[0]})"
            left_out = f" ({and_more(bad.named, bad.num_rows)})" if bad.num_rows else ""
            raise UserError(f"{where}: no rows{left_out}", hint="give a file with one row a line")

    @property
    def num_bytes(self) -> int:
        return sum(rows.num_bytes for rows in self.splits.values())


class BadRows:
    """Rows that can't be read: raises at the first, or counts them and names the first three."""

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.num_rows = 0
        self.named: list[str] = []

    def add(self, place: str, what: str) -> None:
        """Raises `UserError` unless bad rows are to be left out."""
        if not self.skip:
            raise UserError(f"{place}: {what}", hint=SKIP_HINT)
        self.merge(1, [f"{place}: {what}"])

    def merge(self, num_rows: int, named: Iterable[str]) -> None:
        """Adds what was found in later rows."""
        self.num_rows += num_rows
        self.named = [*self.named, *named][:_NUM_NAMED]

    def findings(self) -> list[str]:
        if not self.num_rows:
            return []
        return [f"{count(self.num_rows, 'bad row')} left out: {and_more(self.named, self.num_rows)}"]


def count(number: int, noun: str) -> str:
    """`1 row`, `1,250 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def and_more(named: list[str], total: int) -> str:
    """The first few of `total`, and how many more there are."""
    shown = named[:_NUM_NAMED]
    rest = total - len(shown)
    return "; ".join(shown) + (f"; and {rest:,} more" if rest else "")


def describe(value: object) -> str:
    """What a JSON value is, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"a number ({value:g})"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list | tuple) else "an object"


def open_source(path: str) -> Source:
    """A file, a folder with train/valid/test files, or a hub data set (`owner/name`, `owner/name:config`).

    Raises:
        UserError: not found, or not of a kind that can be read.
    """
    local = _local(path)
    if local.is_dir():
        return _open_folder(local, path)
    if local.exists():
        return Source(local.name, {"train": _open_file(local, path)}, path)
    if _looks_like_path(path):
        raise _not_found(local, path)
    from data.hub import open_hub

    return open_hub(path)


def _local(path: str) -> Path:
    """The path that a person typed; `~name` of an unknown user is a name, as in a shell."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def source_fingerprint(path: str) -> str | None:
    """SHA-256, in hex, of the content and name of what `open_source` would read; None where that is not to be had.

    Raises:
        UserError: as `open_source`, for a folder or a hub data set.
    """
    local = _local(path)
    if local.is_dir():
        found = {split: _split_file(local, split) for split in SPLIT_NAMES}
        files = [file for file in found.values() if file is not None] if found["train"] else []
    elif local.exists():
        files = [local]
    elif _looks_like_path(path):
        return None
    else:
        from data.hub import hub_fingerprint

        return hub_fingerprint(path)
    try:
        parts = [[file.name, _sha256(file)] for file in files]
    except OSError:
        return None
    return hashlib.sha256(json.dumps([local.resolve().name, parts]).encode()).hexdigest() if parts else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _looks_like_path(path: str) -> bool:
    return (
        not _HUB_ID.fullmatch(path)
        or bool(re.match(r"[A-Za-z]:[\\/]", path))
        or _kind(PurePath(path)) in _READERS
        or ("/" in path and Path(path.split("/")[0]).is_dir())
    )


def _not_found(local: Path, path: str) -> UserError:
    siblings = [entry.name for entry in local.parent.iterdir()] if local.parent.is_dir() else []
    near = difflib.get_close_matches(local.name, siblings, n=1)
    hint = f"did you mean {local.parent / near[0]}?" if near else "check data.path"
    return UserError(f"data.path: {path} does not exist", hint=hint)


# Folders


def _open_folder(folder: Path, shown: str) -> Source:
    found = {split: _split_file(folder, split) for split in SPLIT_NAMES}
    if found["train"] is None:
        names = sorted(entry.name for entry in folder.iterdir())
        listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise UserError(
            f"{shown}: no train file in this folder (it holds {listed or 'nothing'})",
            hint="name one train.jsonl (or .json, .csv, .tsv, .parquet), or give data.path a file",
        )
    splits = {
        split: _open_file(file, str(PurePath(shown) / file.name)) for split, file in found.items() if file is not None
    }
    return Source(folder.resolve().name, splits, shown)


def _split_file(folder: Path, split: str) -> Path | None:
    names = SPLIT_NAMES[split]
    files = sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_file() and _kind(entry) in _READERS and PurePath(entry.name.removesuffix(".gz")).stem in names
    )
    if len(files) > 1:
        raise UserError(
            f"{folder}: {' and '.join(file.name for file in files)} are both {split} files",
            hint="leave one of them in the folder",
        )
    return files[0] if files else None


# Files


Reader = Callable[[IO[bytes], str, BadRows], Iterator[Row]]
"""From content, the file's name for messages, and what becomes of bad rows."""


def _kind(path: PurePath) -> str:
    """The suffix that decides the format: `.jsonl` for `rows.jsonl.gz` as well."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@dataclass(frozen=True, slots=True)
class FileRows:
    """The rows of a file."""

    file: Path
    shown: str

    def read(self, bad: BadRows) -> Iterator[Row]:
        """As `Rows.read`."""
        with _opened(self.file, self.shown) as content:
            yield from _READERS[_kind(self.file)](content, self.shown, bad)

    @property
    def num_bytes(self) -> int:
        return self.file.stat().st_size


def _open_file(file: Path, shown: str) -> FileRows:
    if _kind(file) not in _READERS:
        raise UserError(
            f"{shown}: {file.suffix or 'no file extension'} is not a format that can be read",
            hint=f'convert it to one of {KINDS}; plain text as JSONL lines of the form {{"text": "…"}}',
        )
    return FileRows(file, shown)


@contextmanager
def _opened(file: Path, shown: str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed, behind a byte order mark. Raises `UserError`: not readable, or UTF-16."""
    try:
        with open(file, "rb") as raw:
            is_packed = file.suffix.lower() == ".gz"
            content = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw))) if is_packed else raw
            start = content.peek(3)[:3]
            if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in start[:2]:
                raise UserError(
                    f"{shown}: is UTF-16, not UTF-8",
                    hint=f"convert it: iconv -f UTF-16 -t UTF-8 {shown} > utf8-{file.name}",
                )
            if start == b"\xef\xbb\xbf":
                content.read(3)
            yield content
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{shown}: not a whole gzip file", hint="download or compress it again") from None
    except OSError as error:
        raise UserError(f"{shown}: can't be read ({error.strerror})", hint="check the file's permissions") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x} at byte {error.start + 1} of the line)"


def _refuse_other_encodings(lines: Iterable[bytes], shown: str) -> None:
    """Raises `UserError` with the line that is not UTF-8."""
    for number, line in enumerate(lines, start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{shown}, line {number}: {_not_utf8(error)}", hint="save the file as UTF-8") from None


def _read_jsonl(content: IO[bytes], shown: str, bad: BadRows) -> Iterator[Row]:
    # Only \n ends a line of bytes: JSON strings may hold U+2028, at which str.splitlines would cut.
    for number, line in enumerate(content, start=1):
        if not line.strip():
            continue
        place = f"{shown}, line {number}"
        try:
            value = json.loads(line.removesuffix(b"\n").decode())
        except UnicodeDecodeError as error:
            bad.add(place, _not_utf8(error))
        except json.JSONDecodeError as error:
            bad.add(place, f"not JSON ({_json_problem(error)})")
        except RecursionError:
            bad.add(place, "not JSON that can be read (nested too deeply)")
        except ValueError:
            bad.add(place, "not JSON that can be read (a number of thousands of digits)")
        else:
            yield from _objects(value, shown, number, "line", bad)


def _objects(value: object, shown: str, number: int, unit: str, bad: BadRows) -> Iterator[Row]:
    """The row that a value is, or none."""
    row = Row(value if isinstance(value, dict) else {}, shown, number, unit)
    if isinstance(value, dict):
        yield row
    else:
        bad.add(row.place, f"{describe(value)}, not an object with fields")


def _json_problem(error: json.JSONDecodeError) -> str:
    message = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
    return f"{message} at column {error.colno}"


def _read_json(content: IO[bytes], shown: str, bad: BadRows) -> Iterator[Row]:
    whole = content.read()
    _refuse_other_encodings(whole.split(b"\n"), shown)
    text = whole.decode()
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # many a .json file is JSONL
            yield from _read_jsonl(io.BytesIO(whole), shown, bad)
            return
        raise UserError(
            f"{shown}, line {error.lineno}: not JSON ({_json_problem(error)})",
            hint="fix the file, or name it .jsonl if it has one object a line",
        ) from None
    except RecursionError:
        raise UserError(f"{shown}: nested too deeply", hint="give a list of objects with text fields") from None
    for number, item in enumerate(_only_list(value, shown), start=1):
        yield from _objects(item, shown, number, "row", bad)


def _only_list(value: object, shown: str) -> list[object]:
    if isinstance(value, list):
        return value
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else []
    if len(lists) == 1:
        return lists[0]
    raise UserError(
        f"{shown}: neither a list of objects nor an object that holds exactly one list",
        hint='write [{"prompt": "…", "completion": "…"}, …], or one object a line as .jsonl',
    )


def _read_table(delimiter: str) -> Reader:
    def read(content: IO[bytes], shown: str, bad: BadRows) -> Iterator[Row]:
        header: list[str] | None = None
        try:
            for number, cells in _records(io.TextIOWrapper(content, "utf-8", newline=""), delimiter, shown):
                if header is None:
                    header = [name.strip() for name in cells]
                elif len(cells) != len(header):
                    place = f"{shown}, line {number}"
                    bad.add(place, f"{count(len(cells), 'cell')} for {count(len(header), 'column')}")
                else:
                    yield Row(dict(zip(header, cells, strict=True)), shown, number)
        except UnicodeDecodeError:
            content.seek(0)
            _refuse_other_encodings(content, shown)
            raise

    return read


def _records(lines: Iterable[str], delimiter: str, shown: str) -> Iterator[tuple[int, list[str]]]:
    """Line number of each record's first line, and its cells; blank lines left out."""
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is a long document
    lines = iter(lines)
    head = next(lines, "")
    if delimiter == "," and "," not in head and ";" in head:
        delimiter = ";"  # as Excel writes CSV where the comma is for decimals
    # strict: an unclosed quotation mark is an error, not a cell with the rest of the file in it
    reader = csv.reader(itertools.chain([head], lines), delimiter=delimiter, strict=True)
    first_line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield first_line, cells
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{shown}, line {first_line}: not CSV ({error})",
            hint='close the quotation mark, and write one inside a cell as ""',
        ) from None


def _read_parquet(content: IO[bytes], shown: str, bad: BadRows) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{shown}: Parquet needs pyarrow", hint="pip install pyarrow") from None
    if not isinstance(content, io.BufferedReader) or not isinstance(content.raw, io.FileIO):
        content = io.BytesIO(content.read())  # a compressed file is slow to jump about in
    try:
        batches = parquet.ParquetFile(content).iter_batches(_BATCH)
        rows = (values for batch in batches for values in batch.to_pylist())
        for number, values in enumerate(rows, start=1):
            yield Row(values, shown, number, "row")
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: not Parquet ({error})", hint="download it again") from None


_READERS: Mapping[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".parquet": _read_parquet,
}
