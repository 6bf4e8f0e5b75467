"""The MLX backend's threads and exponentials."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.backends.conftest import missing_package

if missing := missing_package("mlx"):
    pytest.skip(f"mlx: {missing} is not installed", allow_module_level=True)

from backends.mlx import cores, fastmath
from backends.mlx.blas import _thread_setting, blas_threads

import mlx.core as mx  # isort: skip


def test_results_keep_their_order_and_errors_come_through() -> None:
    def tripled(value: int) -> int:
        if value == 5:
            raise ValueError("five")
        array = mx.arange(1000 * (7 - value)).sum() * 0 + value
        return int(np.array(array * 3))

    assert list(cores.map_on_cores(tripled, range(5), count=3)) == [0, 3, 6, 9, 12]
    with pytest.raises(ValueError, match="five"):
        list(cores.map_on_cores(tripled, range(9), count=3))


def test_no_more_at_once_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, both, running, most = threading.Lock(), threading.Barrier(2, timeout=30), 0, 0
    pool = ThreadPoolExecutor(4, initializer=cores._start)
    monkeypatch.setattr(cores, "_pool", lambda: pool)

    def work(value: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait()
        with lock:
            running -= 1
        return value

    assert list(cores.map_on_cores(work, range(10), count=2)) == list(range(10))
    assert most == 2
    pool.shutdown()


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
    assert list(cores.map_on_cores(abs, range(number), count=8, blas=blas)) == list(range(number))
    assert told == [threads]


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
