"""Rows in chunks: the same whether one process makes them or several, and never all in memory."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from core.config import DataConfig
from core.errors import UserError
from data import array_store, pipeline, workers
from data.array_store import ArrayStore
from data.dataset import TokenizedData, tokenize_data
from data.formats import Example, Message
from data.keys import RowKeys, positions, prompt_and_answer
from data.sources import BadRows, FileRows, Row
from data.tokenize import Tokenizer
from data.workers import in_order
from tests.data.conftest import MakeTokenizer

Write = Callable[..., str]


def rows(num: int) -> list[dict[str, Any]]:
    """Some with secrets, copies, no target within 60 tokens, or a question too many."""
    made: list[dict[str, Any]] = []
    for number in range(num):
        question, answer = f"How much is {number % 90} + 1?", "y" * (number % 40) + str(number % 90 + 1)
        turns = [{"role": "user", "content": question * (3 if number % 17 == 0 else 1)}]
        turns += [{"role": "assistant", "content": answer}]
        turns += [{"role": "user", "content": "And?"}] if number % 13 == 0 else []
        made.append({"messages": turns, "topic": f"t{number % 7}", "kind": number % 3})
    return made


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_ROWS", 16)


def settings(path: str, **changes: Any) -> DataConfig:
    return DataConfig(path=path, max_tokens=60, group="topic", stratify="kind", **changes)


def assert_same(one: TokenizedData, other: TokenizedData) -> None:
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype
        assert np.array_equal(array, other.arrays[name]), name
    assert one.findings == other.findings
    assert {split: made.to_json() for split, made in one.inspections.items()} == {
        split: made.to_json() for split, made in other.inspections.items()
    }


def test_worker_processes_and_small_chunks_change_nothing(
    write: Write, tmp_path: Path, make: MakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make()
    write(rows(200), "set/train.jsonl")
    write([*rows(220)[200:], {"messages": "none"}], "set/valid.jsonl")
    config = settings(str(tmp_path / "set"), skip_bad=True)
    whole = tokenize_data(config, tokenizer)
    assert len(whole.findings) == 4  # a bad row, questions left out, rows cut off, rows without a target
    assert whole.arrays["train-signature"].shape == (len(whole.arrays["train-lengths"]), 128)
    monkeypatch.setattr(pipeline, "CHUNK_ROWS", 16)
    assert_same(tokenize_data(config, tokenizer), whole)
    monkeypatch.setattr(pipeline, "LARGE_ROWS", 1)
    monkeypatch.setattr(workers, "num_cores", lambda: 2)
    assert_same(tokenize_data(config, tokenizer), whole)


def test_the_first_bad_row_is_named_whoever_finds_it(
    write: Write, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    some = rows(100)
    for number in (60, 90):
        some[number] = {"messages": [], "topic": "t", "kind": 1}
    path = write(some)
    monkeypatch.setattr(workers, "num_cores", lambda: 2)
    for large in (10**6, 1):
        monkeypatch.setattr(pipeline, "LARGE_ROWS", large)
        with pytest.raises(UserError) as caught:
            tokenize_data(settings(path), chatml)
        assert caught.value.what == f"{path}, line 61: messages is empty"
        assert "skip_bad" in str(caught.value.hint)


def test_a_line_that_is_no_json_is_found_before_anything_is_tokenised(write: Write, chatml: Tokenizer) -> None:
    path = Path(write(rows(30)))
    path.write_text(path.read_text() + "{\n")

    class Untouched:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    with pytest.raises(UserError, match="line 31: not JSON"):
        tokenize_data(settings(str(path)), Untouched())  # type: ignore[arg-type]


def test_rows_are_not_kept(
    write: Write, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    """Of 400 rows in chunks of 16, no more than two chunks live at any time."""

    class Tracked(dict[str, Any]):
        pass

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    read = FileRows.read

    class Counted:
        """Stands for a row's values, and knows when they are gone."""

    def tracked(self: FileRows, bad: BadRows) -> Iterator[Row]:
        nonlocal most
        for row in read(self, bad):
            values, mark = Tracked(row.values), Counted()
            values[""] = mark
            alive.add(mark)
            most = max(most, len(alive))
            yield Row(values, row.file, row.number, row.unit)

    monkeypatch.setattr(FileRows, "read", tracked)
    gc.disable()  # nothing must hang on a cycle either
    try:
        data = tokenize_data(settings(write(rows(400))), chatml)
    finally:
        gc.enable()
    assert len(data.arrays["train-lengths"]) > 300
    assert 1 <= most <= 2 * 16 + 2


def test_what_waits_for_workers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def items() -> Iterator[tuple[str, int]]:
        for number in range(40):
            taken.append(number)
            yield "a", number

    monkeypatch.setattr(workers, "num_cores", lambda: 2)
    results = in_order(abs, items(), parallel=True)
    assert next(results) == ("a", 0)
    assert len(taken) <= 4
    assert [result for _, result in results] == list(range(1, 40))
    results.close()  # type: ignore[attr-defined]


def test_a_worker_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "num_cores", lambda: 2)
    with pytest.raises(UserError, match="worker process that prepares the data ended unexpectedly") as caught:
        list(in_order(os._exit, [("a", 1)], parallel=True))
    assert "memory" in str(caught.value.hint)


def test_an_interrupt_ends_the_workers_without_a_word(tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the terminal's group; only the one in front says something."""
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, time\n"
        "from data import workers\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        "    workers.num_cores = lambda: 2\n"
        "    results = workers.in_order(time.sleep, (('a', 0.01) for _ in iter(int, 1)), parallel=True)\n"
        "    try:\n"
        "        for number, _ in enumerate(results):\n"
        "            if number == 3:\n"
        "                print('started', flush=True)\n"
        "    except KeyboardInterrupt:\n"
        "        results.close()\n"
        "        print('interrupted', flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "interrupted\n", "")


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from data import workers\n"
        "if __name__ == '__main__':\n"
        "    workers.num_cores = lambda: 2\n"
        "    results = workers.in_order(time.sleep, (('a', 0.01) for _ in iter(int, 1)), parallel=True)\n"
        "    next(results)\n"
        "    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)\n"
        "    list(results)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    with process.stdout:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert pids
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_large_arrays_go_to_files_and_small_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [{"ids": np.arange(n, dtype=np.int32), "signature": np.full((n, 3), n, np.uint32)} for n in (4, 0, 3, 5)]
    whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def stored(folder: Path | None, limit: int) -> dict[str, Any]:
        monkeypatch.setattr(array_store, "SPILL_BYTES", limit)
        store = ArrayStore(folder)
        for piece in pieces:
            store.append(piece)
        done = store.finish()
        for name, array in whole.items():
            assert done[name].dtype == array.dtype
            assert np.array_equal(done[name], array)
        return done

    stored(tmp_path / "small", 10**6)
    assert not (tmp_path / "small").exists()
    large = stored(tmp_path / "large", 50)
    assert (tmp_path / "large" / "ids.bin").stat().st_size == 12 * 4
    assert not large["ids"].flags.writeable
    (tmp_path / "file").touch()
    stored(tmp_path / "file" / "none", 50)  # can't be written to: in memory after all
    stored(None, 50)


def test_a_disk_that_fills_up_keeps_the_rows_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_store, "SPILL_BYTES", 1)
    store = ArrayStore(tmp_path)
    for number in range(3):
        store.append({"a": np.full(5, number), "b": np.full((2, 2), number)})
    real_open = open

    def full(path: Any, mode: str = "r", *args: Any) -> Any:
        if mode == "ab" and Path(path).name == "b.bin":
            raise OSError(28, "No space left on device")
        return real_open(path, mode, *args)

    monkeypatch.setattr("builtins.open", full)
    for number in (3, 4):
        store.append({"a": np.full(5, number), "b": np.full((2, 2), number)})
    done = store.finish()
    assert done["a"].tolist() == [number for number in range(5) for _ in range(5)]
    assert done["b"].tolist() == [[number] * 2 for number in range(5) for _ in range(2)]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_removed_on_the_way_loses_no_rows_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_store, "SPILL_BYTES", 1)
    store = ArrayStore(tmp_path / "scratch")
    store.append({"a": np.arange(3)})
    shutil.rmtree(tmp_path / "scratch")
    with pytest.raises(UserError, match="can't be read again"):
        store.append({"a": np.arange(3)})


# --- keys -------------------------------------------------------------------------------------------------------------


def keys_of(write: Write, tokenizer: Tokenizer, some: list[dict[str, Any]], **changes: Any) -> RowKeys:
    """Of the rows as they were read: those that validate come from a file of their own."""
    folder = Path(write(some, "set/train.jsonl")).parent
    write([{**some[0], "prompt": "held out"}], "set/valid.jsonl")
    return tokenize_data(DataConfig(path=str(folder), **changes), tokenizer).split("train").keys(seed=0)


def test_keys_tell_rows_apart_by_what_they_are_for(write: Write, chatml: Tokenizer) -> None:
    some = [
        {"prompt": "one", "completion": "a", "who": "x", "kind": 1},
        {"prompt": "one", "completion": "b", "who": None, "kind": 1},
        {"prompt": "two", "completion": "a", "who": "x"},
        {"prompt": "two", "completion": "a", "who": "y", "kind": "1"},
        {"prompt": "six", "completion": "a", "who": None},
    ]
    keys = keys_of(write, chatml, some, group="who", stratify="kind")
    assert keys.group is not None
    assert keys.stratum is not None

    def alike(values: Any) -> list[int]:
        return [values.tolist().index(value) for value in values.tolist()]

    assert alike(keys.equal) == [0, 1, 2, 2, 4]
    assert alike(keys.position) == [0, 1, 2, 2, 4]
    assert alike(keys.prompt) == [0, 0, 2, 2, 4]
    assert alike(keys.answer) == [0, 1, 0, 0, 0]
    assert alike(keys.group) == [0, 1, 0, 3, 4]  # rows without a value are groups of their own
    assert alike(keys.stratum) == [0, 0, 2, 0, 2]
    assert keys.signature is not None
    assert keys.signature.shape == (5, 128)
    bare = keys_of(write, chatml, some)
    assert (bare.group, bare.stratum) == (None, None)
    chosen = keys.select([3, 0])
    assert chosen.equal.tolist() == [keys.equal[3], keys.equal[0]]
    assert chosen.signature is not None
    assert chosen.group is not None


def test_positions_spread_evenly_and_follow_the_seed() -> None:
    content = np.arange(10_000, dtype=np.uint64)  # the worst of hashes
    places = positions(content, seed=0) / 2**64
    # the largest distance from even spacing, whose 99.9 % point is 1.95 / sqrt(n) (Kolmogorov)
    assert np.abs(np.sort(places) - (np.arange(10_000) + 0.5) / 10_000).max() < 0.0195
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    other = positions(content, seed=1) / 2**64
    assert abs(np.corrcoef(places, other)[0, 1]) < 0.05
    assert len(np.unique(positions(content, seed=0))) == len(content)


def test_position_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """SplitMix64's first output for state 0 is its function of 0x9e3779b97f4a7c15 (Vigna's splitmix64.c)."""
    monkeypatch.setattr("data.keys.stable_hash", lambda *parts: 0)
    gamma = np.array([0x9E3779B97F4A7C15], np.uint64)
    assert positions(gamma, seed=0).tolist() == [0xE220A8397B1DCDAF]


def test_prompt_and_answer_of_texts_and_chats() -> None:
    def chat(*contents: str) -> Example:
        roles = ("user", "assistant")
        turns = tuple(Message(roles[index % 2], content) for index, content in enumerate(contents))
        return Example("", "", messages=turns)

    assert prompt_and_answer(Example("", "", text="a"))[0] == 0
    assert prompt_and_answer(chat("q", "a", "q", "b"))[0] == prompt_and_answer(chat("q", "a", "q", "c"))[0]
    assert prompt_and_answer(chat("q", "a", "q", "b"))[0] != prompt_and_answer(chat("q", "z", "q", "b"))[0]
    assert prompt_and_answer(chat("q", "b"))[1] == prompt_and_answer(chat("p", "b"))[1]


def test_parquet_and_json_lines_become_the_same_rows(tmp_path: Path, write: Write, chatml: Tokenizer) -> None:
    import pandas as pd

    some = rows(300)
    pd.DataFrame(some).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(some))
    first, *others = (
        tokenize_data(settings(path), chatml)
        for path in (write(some), str(tmp_path / "rows.parquet"), str(tmp_path / "rows.json"))
    )
    for other in others:
        assert np.array_equal(first.arrays["train-ids"], other.arrays["train-ids"])
        assert np.array_equal(first.arrays["train-group"], other.arrays["train-group"])
        assert np.array_equal(first.arrays["train-numbers"], other.arrays["train-numbers"])
