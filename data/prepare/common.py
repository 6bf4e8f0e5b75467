"""What the kinds of `data prepare` share: a walk over files, what is told on the way, and how rows are written.

A kind yields `Sample`s and tells its `Record` what it read and what it left out. `write_prepared` streams the samples
into a new folder with two files: `rows.jsonl`, and `manifest.json`, which says what the rows were made of and how. Both
are the same bytes for the same input and settings, wherever that lies: no times, no absolute paths.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

FORMAT = "twinkeel prepared rows"
VERSION = 1
ROWS = "rows.jsonl"
MANIFEST = "manifest.json"
_NUM_NAMED = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """A row to be."""

    values: Mapping[str, Any]
    """The columns; `write_prepared` adds the column `source` at the end."""
    source: str
    """Path of the file that it was made of, relative to the prepared folder, with forward slashes."""


class Kind(Protocol):
    """A way to make rows, with its settings. `data/prepare/<name>.py` has `make_kind(options) -> Kind`.

    `options` are the values of the kind's arguments by name, as in `core/prepare_arguments.py`. For a mistake in them
    or in the source, `make_kind` and `samples` raise `UserError`.
    """

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str | None:
        """The column whose equal values belong on one side of the split; None where there is none."""

    def settings(self) -> Mapping[str, Any]:
        """All that decides the rows, for the manifest: JSON, no paths of this machine."""

    def tools(self) -> Mapping[str, str]:
        """Libraries whose version may change the rows -> version."""

    def samples(self, source: Path, record: Record) -> Iterator[Sample]:
        """The rows of a file or folder, in an order that depends on its content only, a few in memory at a time."""


class Counter:
    """Things of one sort, such as left-out files: how many for each reason, and the first three by name."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._named: dict[str, list[str]] = {}

    def add(self, reason: str, where: str, number: int = 1) -> None:
        """Counts `number` more.

        Args:
            reason: a plural that reads well after a number: `generated files`.
            where: a file, or a file and a line: `src/a.rs:12`.
        """
        self._numbers[reason] = self._numbers.get(reason, 0) + number
        named = self._named.setdefault(reason, [])
        if len(named) < _NUM_NAMED:
            named.append(where)

    def __getitem__(self, reason: str) -> int:
        return self._numbers.get(reason, 0)

    def __len__(self) -> int:
        return len(self._numbers)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """By reason, sorted: the number and the first three."""
        return {
            reason: {"number": self._numbers[reason], "named": list(self._named[reason])}
            for reason in sorted(self._numbers)
        }


class LeftOut(Counter):
    """What gave no row, and why."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was read."""

    path: str
    size: int
    sha256: str


@dataclass(slots=True)
class Record:
    """What a kind tells while it makes its samples."""

    console: Console | None = None
    """Where to show progress; nowhere if it is no terminal."""
    left_out: LeftOut = field(default_factory=LeftOut)
    noted: Counter = field(default_factory=Counter)
    """What was kept, but should be known."""
    sources: list[Source] = field(default_factory=list)
    passed_over: frozenset[Path] = frozenset()
    """Folders that `walk_files` does not see: where the rows are being written, which may lie in the source."""
    _bar: Progress | None = None
    _task: TaskID | None = None

    def read(self, path: Path, name: str) -> bytes:
        """The content of a source file, which the manifest will list under `name`.

        Raises:
            UserError: it can't be read.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from None
        self.sources.append(Source(name, len(content), hashlib.sha256(content).hexdigest()))
        return content

    def add_source(self, path: Path, name: str) -> None:
        """Lists a file that is too large to be read at once. Raises `UserError` like `read`."""
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.sources.append(Source(name, path.stat().st_size, digest))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from None

    def expect(self, total: int | None) -> None:
        """How many steps there will be, files as a rule, if it is known."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def advance(self, number: int = 1) -> None:
        """Moves the progress bar."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, number)

    @contextmanager
    def progress(self, what: str) -> Iterator[None]:
        """Shows a bar on a terminal while it is open."""
        if self.console is None or not self.console.is_terminal:
            yield
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=4) as bar:
            self._bar, self._task = bar, bar.add_task(what, total=None)
            try:
                yield
            finally:
                self._bar = self._task = None


class Seen:
    """Tells repeats; 16 bytes of hash are kept of each text."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """True the first time."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._digests:
            return False
        self._digests.add(digest)
        return True


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file under the prepared folder."""

    path: Path
    name: str
    """Relative to that folder, with forward slashes."""


SkipFolder = Callable[[Path], str | None]
"""Why a folder is left out, such as `folders of dependencies`; None to look into it."""


def walk_files(
    source: Path,
    record: Record,
    *,
    skipped_folders: Mapping[str, str] | None = None,
    skip_folder: SkipFolder | None = None,
) -> Iterator[FoundFile]:
    """The files under a folder in the order of their names, folder by folder; a file is its own only one.

    Symbolic links are not followed, and folders that `data prepare` wrote are passed over.

    Args:
        skipped_folders: name of a folder -> why it is left out.
        skip_folder: the same for rules that need more than the name.

    Raises:
        UserError: no such file or folder, or a folder that can't be read.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder", hint="give a folder, or a file in it")
    if not source.is_dir():
        yield FoundFile(source, source.name)
        return

    def reason(folder: Path) -> str | None:
        found = (skipped_folders or {}).get(folder.name)
        if found is None and skip_folder is not None:
            found = skip_folder(folder)
        if found is None and is_prepared(folder):
            found = "folders that data prepare wrote"
        return found

    yield from _walk(source, "", record, reason)


def _walk(folder: Path, prefix: str, record: Record, why_skip: SkipFolder) -> Iterator[FoundFile]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})", hint="check its permissions") from None
    for entry in entries:
        name = prefix + os.fsencode(entry.name).decode("utf-8", "replace")
        if entry.is_symlink():
            record.left_out.add("symbolic links", name)
        elif entry.is_file(follow_symlinks=False):
            yield FoundFile(Path(entry.path), name)
        elif not entry.is_dir(follow_symlinks=False):
            record.left_out.add("devices, pipes and sockets", name)
        elif record.passed_over and Path(entry.path).resolve() in record.passed_over:
            continue
        elif (reason := why_skip(Path(entry.path))) is not None:
            record.left_out.add(reason, f"{name}/")
        else:
            yield from _walk(Path(entry.path), f"{name}/", record, why_skip)


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was written, and of what."""

    kind: str
    settings: Mapping[str, Any]
    tools: Mapping[str, str]
    group: str | None
    num_rows: int
    size: int
    """Of `rows.jsonl`, in bytes."""
    sha256: str
    """Of `rows.jsonl`."""
    left_out: Mapping[str, Mapping[str, Any]]
    noted: Mapping[str, Mapping[str, Any]]
    sources: tuple[Source, ...]
    rows_by_source: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "settings": dict(self.settings),
            "tools": dict(self.tools),
            "group": self.group,
            "rows": {"file": ROWS, "number": self.num_rows, "size": self.size, "sha256": self.sha256},
            "left_out": dict(self.left_out),
            "noted": dict(self.noted),
            "sources": [asdict(source) | {"rows": self.rows_by_source.get(source.path, 0)} for source in self.sources],
        }


def is_prepared(folder: Path) -> bool:
    """Whether `write_prepared` wrote this folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def check_output(output: Path, *, force: bool) -> None:
    """Raises `UserError` unless this folder is new, empty or, by `force`, an earlier preparation."""
    if not output.exists() and not output.is_symlink():
        return
    if output.is_dir() and not output.is_symlink():
        names = {path.name for path in output.iterdir()}
        if not names:
            return
        if is_prepared(output) and names <= {ROWS, MANIFEST}:
            if force:
                return
            raise UserError(
                f"{output}: holds prepared rows already", hint="replace them with --force, or choose another --output"
            )
    raise UserError(
        f"{output}: exists already and is not a folder that data prepare wrote",
        hint="give another folder with --output",
    )


def write_prepared(
    samples: Iterable[Sample], output: Path, *, kind: Kind, record: Record, force: bool = False
) -> Manifest:
    """Streams samples into the folder `output`, which appears whole or not at all.

    Args:
        kind: for the manifest.
        record: the one that `samples` tells.
        force: replace an earlier preparation.

    Raises:
        UserError: `output` may not be written to, the disk is full, or there are no samples.
    """
    check_output(output, force=force)
    missing = [parent for parent in output.parents if not parent.exists()]
    with _disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    record.passed_over = frozenset({folder.resolve(), output.resolve()})
    try:
        manifest = _write(samples, folder, kind=kind, record=record, output=output)
        with _disk_errors(output):
            folder.chmod(0o777 & ~_umask())  # mkdtemp's is for the owner alone
            _put(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not output.exists():
            with suppress(OSError):  # of no use any more, unless something else is in it
                for parent in missing:
                    parent.rmdir()
    return manifest


def _write(samples: Iterable[Sample], folder: Path, *, kind: Kind, record: Record, output: Path) -> Manifest:
    digest = hashlib.sha256()
    num_rows = size = 0
    by_source: dict[str, int] = {}
    with _opened(folder / ROWS, output) as write:
        for sample in samples:
            assert "source" not in sample.values, "write_prepared adds the source itself"
            try:
                line = (json.dumps({**sample.values, "source": sample.source}, ensure_ascii=False) + "\n").encode()
            except UnicodeEncodeError:
                record.left_out.add("rows with half a character", sample.source)
                continue
            write(line)
            digest.update(line)
            size += len(line)
            num_rows += 1
            by_source[sample.source] = by_source.get(sample.source, 0) + 1
    if not num_rows:
        left_out = record.left_out.to_json().items()
        reasons = ", ".join(f"{reason} {entry['number']:,} ({entry['named'][0]})" for reason, entry in left_out)
        raise UserError(
            "no row came out of it" + (f"; left out: {reasons}" if reasons else f": no {kind.name} found there"),
            hint=f"what it reads: python cli.py data prepare {kind.name} --help, and docs/prepare.md",
        )
    manifest = Manifest(
        kind=kind.name,
        settings=kind.settings(),
        tools=kind.tools(),
        group=kind.group,
        num_rows=num_rows,
        size=size,
        sha256=digest.hexdigest(),
        left_out=record.left_out.to_json(),
        noted=record.noted.to_json(),
        sources=tuple(sorted(record.sources, key=lambda source: source.path)),
        rows_by_source=by_source,
    )
    with _disk_errors(output):
        text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


@contextmanager
def _opened(path: Path, output: Path) -> Iterator[Callable[[bytes], None]]:
    """Gives what appends to a new file; what goes wrong in reading a source is not blamed on `output`."""
    with _disk_errors(output):
        file = open(path, "wb")  # noqa: SIM115

    def write(line: bytes) -> None:
        with _disk_errors(output):
            file.write(line)

    try:
        yield write
    finally:
        with _disk_errors(output):
            file.close()


def _put(folder: Path, output: Path) -> None:
    """Renames `folder` to `output`; an earlier preparation there goes only when the new one stands."""
    if not output.exists() or not any(output.iterdir()):
        os.replace(folder, output)  # an empty folder is replaced as well
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        os.replace(output, old)
        try:
            os.replace(folder, output)
        except BaseException:
            os.replace(old, output)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, or a place that can't be written to, into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: the disk is full", hint="free some space, or choose another --output") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            raise UserError(
                f"{path}: cannot write here ({error.strerror})", hint="choose another folder with --output"
            ) from error
        raise
