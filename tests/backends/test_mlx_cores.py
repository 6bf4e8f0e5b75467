"""The MLX backend's streams and exponentials."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.backends.conftest import missing_package

if missing := missing_package("mlx"):
    pytest.skip(f"mlx: {missing} is not installed", allow_module_level=True)

from backends.mlx import cores, fastmath
from backends.mlx.backend import prepare_device
from backends.mlx.blas import _thread_setting, blas_threads

import mlx.core as mx  # isort: skip


def test_results_keep_their_order_and_errors_come_through() -> None:
    def tripled(value: int) -> tuple[int, dict[str, mx.array]]:
        if value == 5:
            raise ValueError("five")
        return value, {"tripled": mx.arange(1000 * (7 - value)).sum() * 0 + 3 * value}

    found = [(value, int(made["tripled"])) for value, made in cores.on_streams(tripled, range(5), count=3)]
    assert found == [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]
    with pytest.raises(ValueError, match="five"):
        list(cores.on_streams(tripled, range(9), count=3))


def test_each_has_a_stream_of_its_own_and_the_streams_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX is given at once decides which stream it feeds first."""
    given: list[list[int]] = []
    async_eval = mx.async_eval

    def noting(arrays: list[mx.array]) -> None:
        given.append([int(array.size) for array in arrays])
        async_eval(arrays)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(mx, "async_eval", noting)
    streams: list[mx.Stream] = []

    def built(value: int) -> list[mx.array]:
        streams.append(mx.default_stream(mx.cpu))
        return [mx.zeros(10 * value + number) for number in range(value)]

    default = mx.default_stream(mx.cpu)
    found = list(cores.on_streams(built, [2, 3, 2, 1, 2], count=2))
    # first a number on a stream of its own, which then waits for the others
    assert given == [[1, 20, 30, 21, 31, 32], [1, 20, 10, 21], [1, 20, 21]]
    assert [len(arrays) for arrays in found] == [2, 3, 2, 1, 2]
    one, two = streams[:2]
    assert streams == [one, two, one, two, default]
    assert len({str(stream) for stream in (one, two, default)}) == 3


def test_the_next_group_is_handed_out_before_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    handed_out: list[int] = []
    async_eval = mx.async_eval

    def noting(arrays: list[mx.array]) -> None:
        handed_out.append(len(arrays) - 1)
        async_eval(arrays)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(mx, "async_eval", noting)

    def build(value: int) -> mx.array:
        built.append(value)
        return mx.array(value) + 1

    found = cores.on_streams(build, range(9), count=2)
    assert int(next(found)) == 1
    assert built == [0, 1, 2, 3]
    assert handed_out == [2, 2]
    found.close()
    assert built == [0, 1, 2, 3]


@pytest.mark.parametrize("how", ["closed", "failed"])
def test_what_is_under_way_is_waited_for_before_blas_has_its_cores_back(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    events: list[str] = []
    synchronize = mx.synchronize

    @contextlib.contextmanager
    def noting(_: int) -> Iterator[None]:
        try:
            yield
        finally:
            events.append("given back")

    def waiting(stream: mx.Stream) -> None:
        synchronize(stream)
        events.append("waited")

    def build(value: int) -> mx.array:
        if how == "failed" and value == 4:
            raise ZeroDivisionError
        return mx.ones((300, 300)) @ mx.ones((300, 300))

    monkeypatch.setattr(cores, "blas_threads", noting)
    monkeypatch.setattr(mx, "synchronize", waiting)
    found = cores.on_streams(build, range(6), count=2)
    next(found)
    if how == "closed":
        found.close()
    else:
        with pytest.raises(ZeroDivisionError):
            list(found)
    assert events == [*["waited"] * (len(events) - 1), "given back"]
    assert len(events) > 3


def test_another_thread_has_streams_of_its_own() -> None:
    def totals() -> list[int]:
        return [int(total) for total in cores.on_streams(lambda n: mx.arange(n).sum(), range(1, 7), count=2)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(totals), pool.submit(totals)
    assert first.result() == second.result() == totals() == [0, 1, 3, 6, 10, 15]


def test_on_a_cpu_graphs_are_gone_through_in_breadth(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX reads it once for a process, at its first evaluation."""
    for given, expected in ((None, "4096"), ("7", "7")):
        monkeypatch.delenv("MLX_BFS_MAX_WIDTH", raising=False)
        if given:
            monkeypatch.setenv("MLX_BFS_MAX_WIDTH", given)
        restore = prepare_device("cpu")
        assert os.environ["MLX_BFS_MAX_WIDTH"] == expected
        restore()


@pytest.mark.parametrize(("number", "blas", "threads"), [(1, None, 8), (3, None, 2), (20, None, 1), (1, 1, 1)])
def test_few_parts_leave_blas_the_other_cores(
    monkeypatch: pytest.MonkeyPatch, number: int, blas: int | None, threads: int
) -> None:
    told: list[int] = []

    def noting(count: int) -> contextlib.AbstractContextManager[None]:
        told.append(count)
        return contextlib.nullcontext()

    monkeypatch.setattr(cores, "num_cores", lambda: 8)
    monkeypatch.setattr(cores, "blas_threads", noting)
    assert [int(n) for n in cores.on_streams(mx.array, range(number), count=8, blas=blas)] == list(range(number))
    assert told == [threads]


def test_no_more_streams_than_can_be_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 6: 3, 7: 3, 8: 4, 9: 3, 10: 3, 16: 4}
    for count, streams in expected.items():
        monkeypatch.setattr(cores, "num_cores", lambda count=count: count)
        assert cores.num_streams() == streams


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 8), ("150000 100000", 2), ("20000 100000", 1), ("1600000 100000", 8), ("", 8), (None, 8)],
)
def test_a_containers_quota_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, expected: int
) -> None:
    monkeypatch.setattr(cores, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    if text is not None:
        (tmp_path / "cpu.max").write_text(text + "\n")
    assert cores.num_cores.__wrapped__() == expected


def test_blas_uses_its_cores_again_afterwards() -> None:
    setting = _thread_setting()
    if setting is None:
        pytest.skip("no BLAS that can be told")
    get, set_ = setting
    before = get()
    set_(2)
    try:
        with blas_threads(1):
            assert get() == 1
        assert get() == 2
    finally:
        set_(before)


# --- exponentials


@pytest.fixture
def values() -> Iterator[np.ndarray]:
    with mx.stream(mx.cpu):
        yield np.random.default_rng(0).normal(0, 6, (5, 333)).astype(np.float32)


def test_exponentials(values: np.ndarray) -> None:
    wide = np.append(values.ravel(), [0, -86.5, 87, 1e-6]).astype(np.float64)
    found = np.array(fastmath.exp(mx.array(wide.astype(np.float32)))).astype(np.float64)
    exact = np.exp(wide.astype(np.float32).astype(np.float64))
    assert np.abs(found / exact - 1).max() < 6e-6
    small = np.abs(wide) < 2
    assert np.abs(found / exact - 1)[small].max() < 3e-7
    special = np.array(fastmath.exp(mx.array([-np.inf, -500.0, np.nan, 0.0])))
    np.testing.assert_array_equal(special, [0, 0, np.nan, 1])
    for scale in (1.0, -1.0):  # any NaN, whatever its bits
        nans = mx.array(np.array([0x7FC00001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32))
        assert np.isnan(np.array(fastmath.exp(nans, scale=scale))).all()


@pytest.mark.parametrize("size", [3, 256, 49_152])
def test_log_sum_exp_and_its_gradient(size: int) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (5, size)).astype(np.float32)
    slope = np.random.default_rng(1).normal(size=5).astype(np.float32)
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide).sum(axis=1))
    with mx.stream(mx.cpu):
        given, slopes = [mx.array(logits)], [mx.array(slope)]
        (found,), (gradient,) = mx.vjp(fastmath.log_sum_exp, given, slopes)
        (theirs,), _ = mx.vjp(lambda x: mx.logsumexp(x, axis=-1), given, slopes)
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-6)
        np.testing.assert_allclose(np.array(theirs), np.array(found), rtol=1e-4)
        shares = np.exp(wide - expected[:, None]) * slope[:, None]
        np.testing.assert_allclose(np.array(gradient), shares, rtol=5e-6, atol=1e-12)


def test_swiglu_and_softmax_with_their_gradients(values: np.ndarray) -> None:
    gate, up = mx.array(values), mx.array(values[::-1] * 0.1)
    slope = mx.array(np.random.default_rng(1).normal(size=values.shape).astype(np.float32))
    pairs = (
        (fastmath.swiglu, lambda g, u: g * mx.sigmoid(g) * u, [gate, up]),
        (fastmath.softmax, lambda x: mx.softmax(x, axis=-1), [gate]),
    )
    for ours, theirs, given in pairs:
        for one, other in zip(mx.vjp(ours, given, [slope]), mx.vjp(theirs, given, [slope]), strict=True):
            for found, expected in zip(one, other, strict=True):
                np.testing.assert_allclose(np.array(found), np.array(expected), rtol=5e-6, atol=1e-6)
    assert np.isfinite(np.array(fastmath.swiglu(mx.array([-200.0, 200.0]), mx.array([1.0, 1.0])))).all()
