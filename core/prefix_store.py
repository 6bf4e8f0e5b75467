"""What frozen layers make of rows, kept on disk: computed once, read by every run with the same base.

One folder for each base (model files, quantisation, compute type, number of layers, libraries: the caller's key). In it
lie segments: safetensors files of up to 256 MB, each written to a draft and renamed when whole, so a process that is
killed loses one segment at most, and two processes that fill the same store only double some rows. Each row is found by
the BLAKE2 hash of its tokens and stands with an xxh3 checksum of its values, types and shapes and of the place they
belong to; a row that is wanted is checked before it is used. What is damaged, or of another shape, is computed again,
never used.

Reading is by memory map: what fits in memory stays there, and a segment that another process evicts stays readable to
those who hold it. The time of a segment's last change is the time of its last use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import xxhash

from core.errors import UserError
from core.files import read_json, to_json
from core.models.folder import read_header
from core.protocols import Prefix, TokenArray

_log = logging.getLogger("twinkeel")

Compute = Callable[[Sequence[TokenArray]], Iterator[Prefix]]
"""`Learner.prefixes`."""

FORMAT = "twinkeel prefixes 1"
"""In each segment's metadata and in the name of each store: another format is another store."""
KEY_FILE = "key.json"
SEGMENT_BYTES = 256 * 2**20
"""Size from which a segment is full; a larger row has one for itself."""

_HEADER_BYTES = 320
"""Of a row with its name, checksum, types, shapes and offsets, about, so that many tiny rows make no vast header."""
_ROUTED = ".routed"
"""Ends the name of the tensor that stands beside a row's states."""
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "U16": np.dtype("<u2")}
_STORE_NAME = re.compile("[0-9a-f]{32}")
_DRAFT = ".making-"
"""Start of a draft's folder name; the number of its process follows."""
_DRAFT_SECONDS = 3600
"""A draft so old is dead, even if a process of its number lives: numbers come again, in containers at every start."""


class PrefixStore:
    """The rows of one base. Not for more than one thread."""

    def __init__(self, root: Path, key: Mapping[str, str], *, max_bytes: int) -> None:
        """Opens `root`/<hash of `key`>, reading and writing nothing yet.

        Args:
            root: folder of all stores, which together may hold `max_bytes`.
            key: what the values depend on, apart from the tokens; written beside them, in `key.json`, for people.
        """
        self._root = root
        self._key = dict(key)
        self._folder = root / _store_name(key)
        self._max_bytes = max_bytes
        self._rows: dict[str, Prefix] = {}
        self._pending: dict[str, Prefix] = {}
        """Those of the rows that are waiting for their segment to be full."""
        self._pending_bytes = 0
        """Of a segment of these, at most."""
        self._mapped: set[Path] = set()
        self._keeps = True
        """Until the disk refuses."""

    def find(self, rows: Sequence[TokenArray]) -> list[int]:
        """Maps the rows that are kept, checking each, and returns the indices of the others (a row that comes twice
        counts once). Damaged files are said in a log line and removed, with all their rows."""
        names = [_row_name(row) for row in rows]
        lengths = {name: len(row) for name, row in zip(names, rows, strict=True) if name not in self._rows}
        if lengths:
            _remove_dead_drafts(self._root)
            self._remove_foreign()
            self._map(lengths)
        missing: dict[str, int] = {}
        for index, name in enumerate(names):
            if name not in self._rows:
                missing.setdefault(name, index)
        return list(missing.values())

    def fill(self, rows: Sequence[TokenArray], compute: Compute, *, on_row: Callable[[int], object]) -> None:
        """Computes `rows`, except those that were found, and keeps them. On a disk that is full or can't be written to,
        what is new is held in memory instead, which a log line says once.

        Whatever ends it early (Ctrl-C, an error of `compute` or `on_row`), the rows computed before are kept.

        Args:
            on_row: called after each row with the number of rows done.
        """
        missing: dict[str, TokenArray] = {}
        for row in rows:
            if (name := _row_name(row)) not in self._rows:
                missing.setdefault(name, row)
        computed = compute(list(missing.values())) if missing else iter(())
        done = len(rows) - len(missing)
        try:
            for (name, row), prefix in zip(missing.items(), computed, strict=True):
                self._add(name, row, prefix)
                done += 1
                on_row(done)
        finally:
            self._write()
        self.evict()

    def get(self, row: TokenArray) -> Prefix:
        """A row that was found or filled: views of the map, not copies, and not to be written to.

        Raises:
            KeyError: it was neither.
        """
        return self._rows[_row_name(row)]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that were found or filled."""
        return sum(prefix.nbytes for prefix in self._rows.values())

    def evict(self) -> None:
        """Removes what was used longest ago, in any store under the root, until all fit in `max_bytes`; never a segment
        that this store has mapped, so these may be more than `max_bytes` by themselves."""
        self._make_room(0)

    # --- reading

    def _map(self, lengths: Mapping[str, int]) -> None:
        found: dict[Path, dict[str, Prefix]] = {}
        wanted = dict(lengths)
        for path in _segments(self._folder):
            rows = self._read(path, wanted)
            if rows:
                found[path] = rows
                wanted = {name: length for name, length in wanted.items() if name not in rows}
        kinds = {_kind(prefix) for rows in found.values() for prefix in rows.values()}
        # where segments contradict each other, none of them can be trusted
        right = self._kind or (kinds.pop() if len(kinds) == 1 else None)
        for path, rows in found.items():
            if all(_kind(prefix) == right for prefix in rows.values()):
                self._use(path, rows)
            else:
                _remove_damaged(path)

    def _read(self, path: Path, lengths: Mapping[str, int]) -> dict[str, Prefix]:
        try:
            return _read_segment(path, self._folder.name, lengths)
        except FileNotFoundError:  # another process evicted it
            pass
        except OSError as error:
            _log.warning("%s: can't be read (%s); its rows are computed again", path, error.strerror or error)
        except _DamageError:
            _remove_damaged(path)
        return {}

    def _use(self, path: Path, rows: Mapping[str, Prefix]) -> None:
        self._rows.update(rows)
        self._mapped.add(path)
        with suppress(OSError):  # evicted meanwhile, or on a disk that is read only
            os.utime(path)

    @property
    def _kind(self) -> tuple[object, ...] | None:
        first = next(iter(self._rows.values()), None)
        return None if first is None else _kind(first)

    # --- writing

    def _add(self, name: str, row: TokenArray, prefix: Prefix) -> None:
        assert _is_prefix_of(len(row), prefix), (prefix.states.shape, prefix.states.dtype, len(row))
        assert self._kind in (None, _kind(prefix)), "the key does not determine what is kept under it"
        own = Prefix(_own(prefix.states), None if prefix.routed is None else _own(prefix.routed))
        num_bytes = own.nbytes + _HEADER_BYTES
        if self._pending_bytes + num_bytes > SEGMENT_BYTES:
            self._write()
        self._rows[name] = own
        if self._keeps:
            self._pending[name] = own
            self._pending_bytes += num_bytes

    def _write(self) -> None:
        """Makes a segment of what is pending, and puts views of its map in the place of the rows in memory."""
        if not self._pending:
            return
        from safetensors import SafetensorError

        # processes that compute the same rows side by side choose the same name
        joined = hashlib.blake2b("".join(self._pending).encode(), digest_size=16).hexdigest()
        path = self._folder / f"{joined}.safetensors"
        try:
            self._make_room(self._pending_bytes)
            self._remove_foreign()
            rows = self._write_segment(path)
        except (OSError, SafetensorError, _DamageError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            _log.warning("%s: can't be written to (%s); the frozen layers' states stay in memory", self._folder, reason)
            self._keeps = False
        else:
            self._use(path, rows)
        self._pending, self._pending_bytes = {}, 0

    def _write_segment(self, path: Path) -> dict[str, Prefix]:
        from safetensors.numpy import save_file

        tensors: dict[str, npt.NDArray[Any]] = {}
        metadata = {"format": FORMAT, "store": self._folder.name}
        for name, prefix in self._pending.items():
            tensors[name] = prefix.states
            if prefix.routed is not None:
                tensors[name + _ROUTED] = prefix.routed
            metadata[name] = _checksum(self._folder.name, name, prefix)
        with _draft(self._folder) as draft:
            if not (self._folder / KEY_FILE).exists():
                key = draft / KEY_FILE
                key.write_text(to_json(self._key), encoding="utf-8")
                os.replace(key, self._folder / KEY_FILE)
            segment = draft / path.name
            save_file(tensors, segment, metadata=metadata)
            # mapped before others see it and may evict it
            rows = _read_segment(
                segment, self._folder.name, {name: len(prefix.states) for name, prefix in self._pending.items()}
            )
            os.replace(segment, path)
        return rows

    # --- removing

    def _make_room(self, needed: int) -> None:
        folders = _stores(self._root)
        kept: list[tuple[int, Path, int]] = []
        for path in (path for folder in folders for path in _segments(folder)):
            with suppress(OSError):  # another process evicted it
                stat = path.stat()
                kept.append((stat.st_mtime_ns, path, stat.st_size))
        excess = sum(size for _, _, size in kept) + needed - self._max_bytes
        for _, path, size in sorted(kept):
            if excess > 0 and path not in self._mapped:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                    excess -= size
        for folder in folders:
            _remove_if_empty(folder)

    def _remove_foreign(self) -> None:
        """A key file that names another base: whoever put it there may have brought the segments with it."""
        path = self._folder / KEY_FILE
        found = read_json(path)
        if found is None or found == self._key:
            return
        for segment in _segments(self._folder):
            if segment not in self._mapped:
                _remove_damaged(segment)
        with suppress(OSError):
            path.unlink()


class _DamageError(Exception):
    """A segment is not what was written, or was written for another store."""

    def __str__(self) -> str:
        return "what was written does not read back"


def _store_name(key: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([FORMAT, sorted(key.items())]).encode()).hexdigest()[:32]


def _row_name(row: TokenArray) -> str:
    return hashlib.blake2b(np.asarray(row, "<i4").tobytes(), digest_size=16).hexdigest()


def _read_segment(path: Path, store: str, lengths: Mapping[str, int]) -> dict[str, Prefix]:
    """The wanted rows that a segment has, each of them checked; views of its map.

    Args:
        store: name of the store that it must belong to.
        lengths: number of tokens of each wanted row, by name.

    Raises:
        _DamageError: the file or a wanted row is not as it was written.
        OSError: the file is gone or can't be opened.
    """
    try:
        header = read_header(path)
        metadata = header["__metadata__"]
        if (metadata["format"], metadata["store"]) != (FORMAT, store):
            raise _DamageError
        names = [name for name in lengths if name in header]
        data = _mapped_data(path) if names else None
        rows = {name: Prefix(_view(data, header[name]), _view(data, header.get(name + _ROUTED))) for name in names}
        for name, prefix in rows.items():
            if not _is_prefix_of(lengths[name], prefix) or metadata[name] != _checksum(store, name, prefix):
                raise _DamageError
    # whatever a header may say that is JSON but no header
    except (UserError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _DamageError from error
    return rows


def _mapped_data(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 [bytes behind the header], which can't be written to."""
    with path.open("rb") as file:
        whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return whole[8 + int.from_bytes(whole[:8].tobytes(), "little") :]


def _view(data: Any, entry: Any) -> Any:
    """An array of the type and shape in a header's entry; None without one."""
    if entry is None:
        return None
    begin, end = entry["data_offsets"]
    return data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _is_prefix_of(length: int, prefix: Prefix) -> bool:
    states, routed = prefix.states, prefix.routed
    if states.ndim != 2 or len(states) != length or states.dtype not in _DTYPES.values():
        return False
    return routed is None or (routed.dtype == np.float32 and routed.ndim == 3 and len(routed) == 2)


def _kind(prefix: Prefix) -> tuple[object, ...]:
    """What all rows of a store have in common."""
    return prefix.states.dtype, prefix.states.shape[1], None if prefix.routed is None else prefix.routed.shape


def _checksum(store: str, name: str, prefix: Prefix) -> str:
    digest = xxhash.xxh3_128(f"{store} {name}".encode())
    for array in (prefix.states, prefix.routed):
        if array is not None:
            digest.update(f" {array.dtype.name} {array.shape} ".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _own(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy: the learner may use its buffer again, and a view would hold all of it."""
    copy = np.array(array, order="C")
    copy.flags.writeable = False
    return copy


@contextmanager
def _draft(store: Path) -> Iterator[Path]:
    """A folder to write in, inside `store`, which is made; both on one disk, so that a rename is one step."""
    draft = store / f"{_DRAFT}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True)
    except FileNotFoundError:  # another process removed the store, being empty, between the two steps of this one
        draft.mkdir(parents=True)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _remove_dead_drafts(root: Path) -> None:
    """What processes that were killed left, in any store: up to a segment each."""
    for store in _stores(root):
        for draft in _listed(store, f"{_DRAFT}*"):
            number = draft.name.removeprefix(_DRAFT).partition("-")[0]
            alive = number.isdecimal() and psutil.pid_exists(int(number))
            with suppress(OSError):
                if not alive or time.time() - draft.stat().st_mtime > _DRAFT_SECONDS:
                    shutil.rmtree(draft, ignore_errors=True)


def _remove_damaged(path: Path) -> None:
    _log.warning("%s: damaged; its rows are computed again", path)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _remove_if_empty(store: Path) -> None:
    """Removes a store without segments or drafts. A process that is about to write there makes it again."""
    with suppress(OSError):
        if {path.name for path in store.iterdir()} <= {KEY_FILE}:
            (store / KEY_FILE).unlink(missing_ok=True)
            store.rmdir()


def _stores(root: Path) -> list[Path]:
    # by name, lest eviction touch a stranger's files in a root that is not ours alone
    return [path for path in _listed(root, "*") if _STORE_NAME.fullmatch(path.name)]


def _segments(store: Path) -> list[Path]:
    return _listed(store, "*.safetensors")


def _listed(folder: Path, pattern: str) -> list[Path]:
    """Sorted; empty where there is no folder, or none that can be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []
