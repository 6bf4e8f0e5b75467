"""Prefixes on disk: found again to the bit, bounded in size, shared by processes that fail and are killed."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from core import prefix_store
from core.prefix_store import KEY_FILE
from core.protocols import Prefix, TokenArray
from tests.core.stored_rows import (
    HIDDEN,
    KEY,
    ROWS,
    age,
    compute,
    files,
    fill,
    has,
    ignore,
    never,
    open_store,
    prefix_of,
    row_of,
    segment_of,
    segments,
)

# --- what is kept is what was computed ------------------------------------------------------------------------------


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16"])
def test_a_second_store_finds_every_bit(tmp_path: Path, dtype: str, routed: bool) -> None:
    def these(rows: Sequence[TokenArray]) -> Iterator[Prefix]:
        return (prefix_of(row, dtype, routed=routed) for row in rows)

    first = open_store(tmp_path / "root")
    assert first.find(ROWS) == [0, 1, 2, 3, 4]
    first.fill(ROWS, these, on_row=ignore)
    second = open_store(tmp_path / "root")
    assert second.find(ROWS) == []
    second.fill(ROWS, never, on_row=ignore)
    for store in (first, second):
        for row in ROWS:
            found, expected = store.get(row), prefix_of(row, dtype, routed=routed)
            assert found.states.dtype == dtype and found.states.shape == (len(row), HIDDEN)
            np.testing.assert_array_equal(found.states, expected.states)
            assert (found.routed is not None) == routed
            if found.routed is not None:
                assert found.routed.dtype == np.float32
                np.testing.assert_array_equal(found.routed, expected.routed)
        assert store.nbytes == 16 * HIDDEN * np.dtype(dtype).itemsize + routed * 5 * 24 * 4


def test_special_numbers_keep_their_bits(tmp_path: Path) -> None:
    states = np.array([[np.nan, -0.0, np.inf, 1e-45]], np.float32)
    states.view(np.uint32)[0, 0] |= 77
    open_store(tmp_path).fill([ROWS[1]], lambda rows: iter([Prefix(states)]), on_row=ignore)
    store = open_store(tmp_path)
    assert store.find([ROWS[1]]) == []
    assert store.get(ROWS[1]).states.tobytes() == states.tobytes()


def test_rows_are_views_of_the_map_and_not_to_be_written_to(tmp_path: Path) -> None:
    filled = fill(tmp_path)
    found = open_store(tmp_path)
    found.find(ROWS)
    for store in (filled, found):
        states = store.get(ROWS[0]).states
        base: Any = states
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
        with pytest.raises(ValueError, match="read-only"):
            states[0, 0] = 1


def test_a_learner_may_use_its_buffer_again(tmp_path: Path) -> None:
    buffer = np.empty((6, HIDDEN), np.float32)

    def reusing(rows: Sequence[TokenArray]) -> Iterator[Prefix]:
        for row in rows:
            buffer[: len(row)] = prefix_of(row).states
            yield Prefix(buffer[: len(row)])

    store = open_store(tmp_path)
    store.fill(ROWS, reusing, on_row=ignore)
    assert has(store)


def test_a_segment_is_a_safetensors_file_with_names_and_checksums_as_documented(tmp_path: Path) -> None:
    import xxhash

    fill(tmp_path)
    (path,) = segments(tmp_path)
    # the tokens 5 in 32 bits; 0, 1, 2
    one = hashlib.blake2b(b"\x05\0\0\0", digest_size=16).hexdigest()
    three = hashlib.blake2b(b"\0\0\0\0\1\0\0\0\2\0\0\0", digest_size=16).hexdigest()
    tensors = load_file(path)
    assert len(tensors) == len(ROWS)
    np.testing.assert_array_equal(tensors[one], prefix_of(row_of(5)).states)
    np.testing.assert_array_equal(tensors[three], prefix_of(row_of(0, 1, 2)).states)
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    bound = f"{path.parent.name} {one} float32 (1, 8) ".encode() + tensors[one].tobytes()
    assert metadata[one] == xxhash.xxh3_128(bound).hexdigest()
    assert json.loads((path.parent / KEY_FILE).read_text()) == KEY


def test_other_keys_and_other_rows_are_not_found(tmp_path: Path) -> None:
    fill(tmp_path)
    assert open_store(tmp_path, layers="3").find(ROWS) == [0, 1, 2, 3, 4]
    store = open_store(tmp_path)
    assert store.find([row_of(0, 1), ROWS[0], row_of(0, 1, 2, 3), row_of(2, 1, 0)]) == [0, 2, 3]
    with pytest.raises(KeyError):
        store.get(row_of(0, 1))
    with pytest.raises(KeyError):
        store.get(ROWS[1])  # kept, but not asked for
    assert store.nbytes == 3 * HIDDEN * 4
    assert store.find(ROWS) == [] and has(store)


def test_opening_writes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "root")
    assert store.find(ROWS) == [0, 1, 2, 3, 4] and store.nbytes == 0
    store.evict()
    store.fill([], never, on_row=ignore)
    assert not (tmp_path / "root").exists()


def test_a_row_that_comes_twice_is_computed_once(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1], ROWS[0].copy(), ROWS[2], ROWS[1]]
    asked: list[int] = []

    def counting(given: Sequence[TokenArray]) -> Iterator[Prefix]:
        asked.extend(map(len, given))
        return compute(given)

    done: list[int] = []
    store = open_store(tmp_path)
    assert store.find(rows) == [0, 1, 3]
    store.fill(rows, counting, on_row=done.append)
    assert asked == [3, 1, 6] and done == [3, 4, 5]
    assert has(store, rows)
    assert store.nbytes == 10 * HIDDEN * 4


def test_segments_end_when_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_store, "SEGMENT_BYTES", 2000)
    rows = [row_of(number, number + 1) for number in range(40)] + [row_of(*range(100))]  # the last one is larger
    fill(tmp_path, rows)
    sizes = sorted(path.stat().st_size for path in segments(tmp_path))
    assert len(sizes) == 40 // 5 + 1
    assert sizes[-2] <= 2000 < sizes[-1]
    store = open_store(tmp_path)
    assert store.find(rows) == [] and has(store, rows)


def test_the_number_of_rows_done_is_said(tmp_path: Path, one_row_each: None) -> None:
    done: list[tuple[int, int]] = []
    open_store(tmp_path).fill(ROWS, compute, on_row=lambda number: done.append((number, len(segments(tmp_path)))))
    assert done == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)], "a segment is written when the next row does not fit"


# --- size and age -----------------------------------------------------------------------------------------------------


def size_of(root: Path) -> int:
    return sum(path.stat().st_size for path in segments(root))


def test_what_is_found_counts_as_used(tmp_path: Path, one_row_each: None) -> None:
    fill(tmp_path)
    for path in segments(tmp_path):
        age(path, 1)
    open_store(tmp_path).find([ROWS[1], ROWS[3]])
    used = {path for path in segments(tmp_path) if path.stat().st_mtime > 1_700_000_000}
    assert used == {segment_of(tmp_path, ROWS[1]), segment_of(tmp_path, ROWS[3])}


def test_what_was_used_longest_ago_goes_first_in_every_store(tmp_path: Path, one_row_each: None) -> None:
    for layers in ("3", "4"):
        fill(tmp_path, ROWS[:3], layers=layers)
    for days, path in enumerate(segments(tmp_path)[::-1]):
        age(path, days)
    oldest_first = sorted(segments(tmp_path), key=lambda path: path.stat().st_mtime)
    kept = oldest_first[-2:]
    store = open_store(tmp_path, max_bytes=sum(path.stat().st_size for path in kept))
    store.evict()
    assert set(segments(tmp_path)) == set(kept)
    # the two newest were of one store: nothing is left of the other
    assert [path.name for path in tmp_path.iterdir()] == [kept[0].parent.name]
    store.evict()
    assert len(segments(tmp_path)) == 2


def test_a_segment_whose_rows_another_has_too_grows_old(tmp_path: Path) -> None:
    for rows in (ROWS[:2], ROWS[1:2]):
        open_store(tmp_path).fill(rows, compute, on_row=ignore)  # as two processes do that did not see each other
    for path in segments(tmp_path):
        age(path, 1)
    store = open_store(tmp_path, max_bytes=0)
    assert store.find(ROWS[1:2]) == [] and has(store, ROWS[1:2])
    (unused,) = (path for path in segments(tmp_path) if path.stat().st_mtime <= 1_700_000_000)
    store.evict()
    assert not unused.exists() and len(segments(tmp_path)) == 1


def test_filling_ends_with_an_eviction(tmp_path: Path) -> None:
    fill(tmp_path, layers="3")
    fill(tmp_path, [], max_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_what_this_store_has_mapped_stays(tmp_path: Path, one_row_each: None) -> None:
    fill(tmp_path)
    mine = {segment_of(tmp_path, row) for row in (ROWS[0], ROWS[4])}
    fill(tmp_path, ROWS[:2], layers="3")
    store = open_store(tmp_path, max_bytes=1)
    assert store.find([ROWS[0], ROWS[4]]) == []
    for path in mine:
        age(path, 365)
    store.evict()
    assert set(segments(tmp_path)) == mine


def test_rows_stay_readable_when_another_evicts_them(tmp_path: Path) -> None:
    store = fill(tmp_path)
    open_store(tmp_path, layers="3", max_bytes=0).evict()
    assert list(tmp_path.iterdir()) == []
    assert has(store)
    store.fill([row_of(77)], compute, on_row=ignore)  # and it goes on writing
    assert open_store(tmp_path).find([*ROWS, row_of(77)]) == [0, 1, 2, 3, 4]


def test_filling_makes_room_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_store, "SEGMENT_BYTES", 2000)
    rows = [row_of(number, number + 1) for number in range(40)]
    fill(tmp_path, rows, layers="3")
    full = size_of(tmp_path)
    sizes: list[int] = []
    real = os.replace

    def watched(source: Path, target: Path) -> None:
        real(source, target)
        sizes.append(size_of(tmp_path))

    monkeypatch.setattr(os, "replace", watched)
    # its own segments fit, and a few of the other's
    fill(tmp_path, rows, max_bytes=full + 4000)
    assert len(sizes) >= 8 and max(sizes) <= full + 4000
    assert size_of(tmp_path) > full and open_store(tmp_path).find(rows) == []
    assert open_store(tmp_path, layers="3").find(rows) != []


def test_rows_larger_than_the_limit_are_kept_all_the_same(tmp_path: Path, one_row_each: None) -> None:
    fill(tmp_path, layers="3")
    store = fill(tmp_path, max_bytes=100)
    assert has(store) and len(segments(tmp_path)) == 5
    assert open_store(tmp_path).find(ROWS) == []


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    model = tmp_path / "model" / "model.safetensors"
    model.parent.mkdir()
    save_file({"weight": np.zeros(1000, np.float32)}, model)
    save_file({"weight": np.zeros(1000, np.float32)}, tmp_path / "adapter.safetensors")
    fill(tmp_path, layers="3")
    open_store(tmp_path, max_bytes=0).evict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "model"]
    assert model.exists()


# --- disks that fail, runs that are interrupted -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (SafetensorError("I/O error: Quota exceeded (os error 122)"), "I/O error: Quota exceeded (os error 122)"),
    ],
)
def test_a_full_disk_costs_the_rest_of_the_store_not_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    one_row_each: None,
    error: Exception,
    words: str,
) -> None:
    def full(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
        if len(segments(tmp_path)) == 2:
            Path(path).write_bytes(b"half")
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    store = open_store(tmp_path)
    store.fill(ROWS, compute, on_row=ignore)
    folder = segments(tmp_path)[0].parent
    assert [(record.name, record.levelname) for record in caplog.records] == [("twinkeel", "WARNING")]
    assert caplog.messages == [f"{folder}: can't be written to ({words}); the frozen layers' states stay in memory"]
    assert has(store) and store.find(ROWS) == [] and store.nbytes == 16 * HIDDEN * 4
    with pytest.raises(ValueError, match="read-only"):
        store.get(ROWS[4]).states[0, 0] = 1
    store.fill([row_of(77)], compute, on_row=ignore)
    assert has(store, [row_of(77)]) and len(caplog.messages) == 1
    assert files(tmp_path) == {".safetensors", ".json"}, "no draft stays"
    assert open_store(tmp_path).find(ROWS) == [2, 3, 4]


def test_a_root_that_is_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "root"
    root.write_text("not a folder")
    store = fill(root)
    assert has(store) and store.find(ROWS) == []
    assert len(caplog.messages) == 1 and "can't be written to (Not a directory)" in caplog.messages[0]
    assert root.read_text() == "not a folder"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["compute", "on_row"])
def test_what_was_computed_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    monkeypatch.setattr(prefix_store, "SEGMENT_BYTES", 1000)  # two rows

    def interrupted(rows: Sequence[TokenArray]) -> Iterator[Prefix]:
        for number, row in enumerate(rows):
            if where == "compute" and number == 3:
                raise error
            yield prefix_of(row)

    def on_row(done: int) -> None:
        if where == "on_row" and done == 3:
            raise error

    store = open_store(tmp_path)
    with pytest.raises(error):
        store.fill(ROWS, interrupted, on_row=on_row)
    assert has(store, ROWS[:3]) and store.find(ROWS) == [3, 4]
    assert files(tmp_path) == {".safetensors", ".json"}
    assert open_store(tmp_path).find(ROWS) == [3, 4]
    assert has(fill(tmp_path))


def test_an_interruption_while_a_segment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def interrupted(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
        calls.append(path)
        save_file(tensors, path, metadata)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(prefix_store, "SEGMENT_BYTES", 1)
    monkeypatch.setattr("safetensors.numpy.save_file", interrupted)
    store = open_store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.fill(ROWS, compute, on_row=ignore)
    assert files(tmp_path) == {".safetensors", ".json"}
    again = open_store(tmp_path)
    assert again.find(ROWS) == [2, 3, 4] and has(again, ROWS[:2])


def test_a_learner_that_gives_too_little_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        open_store(tmp_path).fill(ROWS, lambda rows: compute(rows[:-1]), on_row=ignore)
    with pytest.raises(AssertionError):
        open_store(tmp_path).fill([row_of(9, 9, 9)], lambda rows: compute([row_of(1)]), on_row=ignore)


def test_drafts_of_dead_processes_are_removed(tmp_path: Path) -> None:
    fill(tmp_path)
    folder = segments(tmp_path)[0].parent
    dead, living, ancient = (folder / f".making-{tail}" for tail in ("4194999-a", f"{os.getpid()}-b", "1-c"))
    for draft in (dead, living, ancient):
        draft.mkdir()
        (draft / "half.safetensors").write_bytes(b"half")
    age(ancient, 1)
    store = open_store(tmp_path)
    assert store.find([*ROWS, row_of(77)]) == [5] and has(store)
    assert not dead.exists() and not ancient.exists() and living.exists()


# --- processes --------------------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path

from core import prefix_store
from safetensors.numpy import save_file
from tests.core.stored_rows import KEY, PLENTY, compute, has, row_of


def wait(word):
    print(word, flush=True)
    sys.stdin.readline()


def stuck(tensors, path, metadata):
    save_file(tensors, path, metadata)
    wait("writing")


first, last, block = map(int, sys.argv[2:])
rows = [row_of(number, number + 1) for number in range(first, last)]
prefix_store.SEGMENT_BYTES = 1000  # two rows
if block:
    import safetensors.numpy
    safetensors.numpy.save_file = stuck
store = prefix_store.PrefixStore(Path(sys.argv[1]), KEY, max_bytes=PLENTY)
missing = store.find(rows)
wait("found")
store.fill([rows[index] for index in missing], compute, on_row=lambda done: wait(f"row {done}"))
print("right" if has(store, rows) else "wrong", flush=True)
"""


def start(root: Path, first: int, last: int, *, block: bool = False) -> subprocess.Popen[str]:
    """A process that computes rows one by one, each step when it is told to."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), str(first), str(last), str(int(block))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def hear(process: subprocess.Popen[str]) -> str:
    """What it did; it waits now, unless it is at its end."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def step(process: subprocess.Popen[str]) -> str:
    """What it did; it goes on meanwhile."""
    word = hear(process)
    go_on(process)
    return word


def test_two_processes_fill_one_store_in_turns(tmp_path: Path) -> None:
    with start(tmp_path, 0, 8) as one, start(tmp_path, 3, 12) as other:
        said = [(step(one), step(other)) for _ in range(9)]
        assert said[:3] == [("found", "found"), ("row 1", "row 1"), ("row 2", "row 2")], "neither saw the other's"
        assert step(other) == "row 9"
        assert (hear(one), hear(other)) == ("right", "right")
    assert one.returncode == other.returncode == 0
    rows = [row_of(number, number + 1) for number in range(12)]
    third = open_store(tmp_path)
    assert third.find(rows) == [] and has(third, rows)
    assert files(tmp_path) == {".safetensors", ".json"}


def test_a_killed_process_loses_one_segment(tmp_path: Path) -> None:
    with start(tmp_path, 0, 8, block=True) as process:
        words = [hear(process)]
        while words.count("writing") < 3:
            go_on(process)
            words.append(hear(process))
        assert list(tmp_path.glob("*/.making-*/*.safetensors")), "the third segment is in its draft"
        process.kill()
    assert process.returncode == -9
    rows = [row_of(number, number + 1) for number in range(8)]
    store = open_store(tmp_path)
    assert store.find(rows) == [4, 5, 6, 7]
    assert files(tmp_path) == {".safetensors", ".json"}
    store.fill([rows[index] for index in (4, 5, 6, 7)], compute, on_row=ignore)
    assert has(store, rows)
    assert open_store(tmp_path).find(rows) == []
