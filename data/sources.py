"""Files, folders and hub data sets -> rows that know where they came from."""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Source:
    """The rows of a data set by split: `train`, and `validation` and `test` where the source brings them."""

    name: str
    splits: Mapping[str, list[Row]]


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
        self.num_rows += 1
        if len(self.named) < _NUM_NAMED:
            self.named.append(f"{place}: {what}")

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


def read_source(path: str, bad: BadRows) -> Source:
    """Reads a file, a folder with train/valid/test files, or a hub data set (`owner/name`, `owner/name:config`).

    Raises:
        UserError: not found, not readable, no rows, or (unless `bad.skip`) a row that is not a JSON object.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        source = _read_folder(local, path, bad)
    elif local.exists():
        source = Source(local.name, {"train": _read_file(local, path, bad)})
    elif _looks_like_path(path):
        raise _not_found(local, path)
    else:
        source = _read_hub(path)
    for split, rows in source.splits.items():
        if not rows:
            where = path if len(source.splits) == 1 else f"{path} ({split})"
            left_out = f" ({and_more(bad.named, bad.num_rows)})" if bad.num_rows else ""
            raise UserError(f"{where}: no rows{left_out}", hint="give a file with one row a line")
    return source


def source_fingerprint(path: str) -> str | None:
    """SHA-256, in hex, of the content and name of what `read_source` would read; None where that is not to be had.

    Raises:
        UserError: as `read_source`, for a folder or a hub data set.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        found = {split: _split_file(local, split) for split in SPLIT_NAMES}
        files = [file for file in found.values() if file is not None] if found["train"] else []
    elif local.exists():
        files = [local]
    elif _looks_like_path(path):
        return None
    else:
        return _hub_fingerprint(path)
    try:
        parts = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    except OSError:
        return None
    return hashlib.sha256(json.dumps([local.resolve().name, parts]).encode()).hexdigest() if parts else None


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


def _read_folder(folder: Path, shown: str, bad: BadRows) -> Source:
    found = {split: _split_file(folder, split) for split in SPLIT_NAMES}
    if found["train"] is None:
        names = sorted(entry.name for entry in folder.iterdir())
        listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise UserError(
            f"{shown}: no train file in this folder (it holds {listed or 'nothing'})",
            hint="name one train.jsonl (or .json, .csv, .tsv, .parquet), or give data.path a file",
        )
    splits = {
        split: _read_file(file, str(PurePath(shown) / file.name), bad)
        for split, file in found.items()
        if file is not None
    }
    return Source(folder.resolve().name, splits)


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


def _kind(path: PurePath) -> str:
    """The suffix that decides the format: `.jsonl` for `rows.jsonl.gz` as well."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_file(file: Path, shown: str, bad: BadRows) -> list[Row]:
    reader = _READERS.get(_kind(file))
    if reader is None:
        raise UserError(
            f"{shown}: {file.suffix or 'no file extension'} is not a format that can be read",
            hint=f'convert it to one of {KINDS}; plain text as JSONL lines of the form {{"text": "…"}}',
        )
    return reader(_read_bytes(file, shown), shown, bad)


def _read_bytes(file: Path, shown: str) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{shown}: can't be read ({error.strerror})", hint="check the file's permissions") from None
    if file.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            raise UserError(f"{shown}: not a whole gzip file", hint="download or compress it again") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in content[:2]:
        raise UserError(
            f"{shown}: is UTF-16, not UTF-8",
            hint=f"convert it: iconv -f UTF-16 -t UTF-8 {shown} > utf8-{file.name}",
        )
    return content.removeprefix(b"\xef\xbb\xbf")


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x} at byte {error.start + 1} of the line)"


def _decode(content: bytes, shown: str) -> str:
    """Raises `UserError` with the line that is not UTF-8."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{shown}, line {number}: {_not_utf8(error)}", hint="save the file as UTF-8") from None
    return content.decode()


def _read_jsonl(content: bytes, shown: str, bad: BadRows) -> list[Row]:
    rows: list[Row] = []
    # Only \n ends a line: JSON strings may hold U+2028, at which str.splitlines would cut.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{shown}, line {number}"
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            bad.add(place, _not_utf8(error))
        except json.JSONDecodeError as error:
            bad.add(place, f"not JSON ({_json_problem(error)})")
        except RecursionError:
            bad.add(place, "not JSON that can be read (nested too deeply)")
        except ValueError:
            bad.add(place, "not JSON that can be read (a number of thousands of digits)")
        else:
            _append(rows, value, Row({}, shown, number), bad)
    return rows


def _json_problem(error: json.JSONDecodeError) -> str:
    message = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
    return f"{message} at column {error.colno}"


def _append(rows: list[Row], value: object, at: Row, bad: BadRows) -> None:
    if isinstance(value, dict):
        rows.append(Row(value, at.file, at.number, at.unit))
    else:
        bad.add(at.place, f"{describe(value)}, not an object with fields")


def _read_json(content: bytes, shown: str, bad: BadRows) -> list[Row]:
    text = _decode(content, shown)
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # many a .json file is JSONL
            return _read_jsonl(content, shown, bad)
        raise UserError(
            f"{shown}, line {error.lineno}: not JSON ({_json_problem(error)})",
            hint="fix the file, or name it .jsonl if it has one object a line",
        ) from None
    except RecursionError:
        raise UserError(f"{shown}: nested too deeply", hint="give a list of objects with text fields") from None
    rows: list[Row] = []
    for number, item in enumerate(_only_list(value, shown), start=1):
        _append(rows, item, Row({}, shown, number, "row"), bad)
    return rows


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


def _read_table(delimiter: str) -> Callable[[bytes, str, BadRows], list[Row]]:
    def read(content: bytes, shown: str, bad: BadRows) -> list[Row]:
        header: list[str] | None = None
        rows: list[Row] = []
        for number, cells in _records(_decode(content, shown), delimiter, shown):
            if header is None:
                header = [name.strip() for name in cells]
            elif len(cells) != len(header):
                place = f"{shown}, line {number}"
                bad.add(place, f"{count(len(cells), 'cell')} for {count(len(header), 'column')}")
            else:
                rows.append(Row(dict(zip(header, cells, strict=True)), shown, number))
        return rows

    return read


def _records(text: str, delimiter: str, shown: str) -> Iterator[tuple[int, list[str]]]:
    """Line number of each record's first line, and its cells; blank lines left out."""
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is a long document
    # strict: an unclosed quotation mark is an error, not a cell with the rest of the file in it
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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


def _read_parquet(content: bytes, shown: str, bad: BadRows) -> list[Row]:
    try:
        import pandas as pd

        frame = pd.read_parquet(io.BytesIO(content), dtype_backend="pyarrow")
    except ImportError:
        raise UserError(f"{shown}: Parquet needs pandas and pyarrow", hint="pip install pandas pyarrow") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: not Parquet ({error})", hint="download it again") from None
    names = [str(name) for name in frame.columns]
    columns = [[None if cell is pd.NA else cell for cell in frame[name]] for name in frame.columns]
    return [
        Row(dict(zip(names, cells, strict=True)), shown, number, "row")
        for number, cells in enumerate(zip(*columns, strict=True), start=1)
    ]


_READERS: Mapping[str, Callable[[bytes, str, BadRows], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".parquet": _read_parquet,
}


# The hub


def _hub_fingerprint(path: str) -> str | None:
    """Of what `datasets` has in its own cache, which tells its versions apart."""
    loaded = _load_hub(path)
    prints = {split: getattr(loaded[split], "_fingerprint", None) for split in loaded}
    if None in prints.values():
        return None
    return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()


def _load_hub(path: str) -> Any:
    """A mapping of splits to rows. Raises `UserError` if there is no such data set."""
    name, _, config = path.partition(":")
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data.path: {path} is no file or folder here, and hub data sets need `datasets`",
            hint="give a file that exists, or pip install datasets",
        ) from None
    try:
        # Data files only: `datasets` runs no code from the hub since version 4.
        return datasets.load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.path: {path} is no file or folder here, and the hub gave no data set ({reason})",
            hint="check the spelling and the network; choose a configuration as owner/name:config",
        ) from None


def _read_hub(path: str) -> Source:
    name, loaded = path.partition(":")[0], _load_hub(path)
    splits: dict[str, list[Row]] = {}
    for split, aliases in SPLIT_NAMES.items():
        for alias in aliases:
            if alias in loaded and split not in splits:
                splits[split] = [
                    Row(values, f"{name}/{alias}", number, "row")
                    for number, values in enumerate(loaded[alias], start=1)
                ]
    if "train" not in splits:
        raise UserError(
            f"data.path: {path} has no train split (it has {', '.join(loaded)})",
            hint="download the split you want and give data.path the file",
        )
    return Source(path, splits)
