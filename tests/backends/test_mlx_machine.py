"""What the MLX backend needs of a machine: a BLAS to load before it, memory, and packages that work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import backends
from core.errors import OutOfMemoryError, UserError
from tests.backends.conftest import (
    LR,
    ROOT,
    assert_same_state,
    make_adapter,
    make_batch,
    make_config,
    microbatches,
    missing_package,
    open_learner,
    resolved,
)

if missing := missing_package("mlx"):
    pytest.skip(f"mlx: {missing} is not installed", allow_module_level=True)

from backends.mlx import memory as memory_module
from backends.mlx.learner import MlxLearner

import mlx.core as mx  # isort: skip

MLX = backends.get("mlx")
ON_LINUX = sys.platform.startswith("linux")


@pytest.fixture(scope="session")
def backend() -> str:
    return "mlx"


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


# --- imports, and the BLAS that must come first


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = """
import sys, backends
mlx = backends.get("mlx")
print([n for n in ("mlx.core", "mlx_lm", "transformers", "torch") if n in sys.modules])
mlx.probe()
print([n for n in ("mlx_lm", "transformers", "torch") if n in sys.modules])
"""
    assert run_python(code).split("\n") == ["[]", "[]"]


@pytest.mark.skipif(not ON_LINUX, reason="the Linux wheel's own trouble")
@pytest.mark.parametrize("module", ["backends.mlx.optim", "backends.mlx.model", "backends.mlx.loading"])
def test_the_fast_blas_comes_before_mlx(module: str) -> None:
    code = f"""
import ctypes, os, sys
seen = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx.core": seen.append("mlx")
sys.meta_path.insert(0, Finder())
load = ctypes.CDLL
def spy(name, *args, **kwargs):
    seen.append("blas" if kwargs.get("mode") == ctypes.RTLD_GLOBAL else "other")
    return load(name, *args, **kwargs)
ctypes.CDLL = spy
import {module}
from backends.mlx.blas import preload_blas
print([s for s in seen if s != "other"], preload_blas(), os.environ.get("MKL_CBWR"))
"""
    order, *rest = run_python(code).rsplit("] ", 1)
    library, mode = rest[0].split(" ")
    if library == "":
        pytest.skip("no fast BLAS on this machine")
    assert order == "['blas', 'mlx'"
    assert library.startswith(("libmkl_rt.so", "libopenblas.so"))
    assert mode == ("AUTO,STRICT" if "mkl" in library else "None")


@pytest.mark.skipif(importlib.util.find_spec("mkl") is None and not ON_LINUX, reason="needs PyPI's mkl")
def test_mlx_computes_with_it() -> None:
    """`libmkl_rt` loads MKL's core when the first function is called: by MLX's matrix product, or by nobody."""
    code = """
import backends.mlx, mlx.core as mx
from backends.mlx.blas import preload_blas
def mapped(): return "libmkl_core" in open("/proc/self/maps").read()
before = mapped()
a = mx.ones((64, 64)); mx.eval(a @ a)
print(preload_blas(), before, mapped())
"""
    library, before, after = run_python(code).rjust(3).split(" ")
    if "mkl" not in library:
        pytest.skip("MKL is not installed")
    assert (before, after) == ("False", "True")


@pytest.mark.skipif(not ON_LINUX, reason="the Linux wheel's own trouble")
def test_a_slow_blas_is_reported() -> None:
    """No library can be loaded; MLX was there first; a setting of the user's stays."""
    nothing = """
import ctypes
def refuse(*args, **kwargs): raise OSError("no")
ctypes.CDLL = refuse
import backends
from backends.mlx.blas import preload_blas
print(repr(preload_blas()), *backends.get("mlx").probe().notes)
"""
    found = run_python(nothing)
    assert found.startswith("''")
    assert "30 times slower" in found
    assert "libopenblas0-pthread" in found
    late = "import mlx.core\nfrom backends.mlx.blas import preload_blas\nprint(repr(preload_blas()))"
    assert run_python(late) == "''"
    chosen = "import os\nos.environ['MKL_CBWR'] = 'AVX2'\nimport backends.mlx\nprint(os.environ['MKL_CBWR'])"
    assert run_python(chosen) == "AVX2"


@pytest.mark.parametrize("order", [("backends.mlx.optim", "torch"), ("torch", "backends.mlx.optim")])
def test_torch_lives_in_the_same_process(order: tuple[str, str]) -> None:
    pytest.importorskip("torch")
    code = f"""
import {order[0]}, {order[1]}
import numpy as np, torch, mlx.core as mx
a = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
exact = a.astype(np.float64) @ a.T.astype(np.float64)
for product in (np.array(mx.array(a) @ mx.array(a).T), (torch.from_numpy(a) @ torch.from_numpy(a).T).numpy()):
    print(np.abs(product - exact).max() < 1e-3)
"""
    assert run_python(code).split() == ["True", "True"]


# --- memory


@pytest.mark.parametrize(
    "text",
    [
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of 8.",
        "[malloc_or_wait] Unable to allocate 9 bytes.",
        "[metal::malloc] Resource limit (499000) exceeded.",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackError)",
    ],
)
def test_running_out_of_memory(llama: Path, opened: Callable[..., MlxLearner], text: str) -> None:
    learner = opened(llama)
    state = learner.export_state()

    def fail(*_: Any) -> Any:
        raise RuntimeError(text)

    learner._gradients = learner._losses = fail
    with pytest.raises(OutOfMemoryError, match="2 x 2 x 16 tokens") as caught:
        learner.train_step([make_batch(width=16)] * 2, step=1, lr=LR)
    assert "\n" not in caught.value.what
    with pytest.raises(OutOfMemoryError, match="evaluation"):
        learner.evaluate(microbatches())
    assert_same_state(learner.export_state(), state)


def test_loading_can_run_out_of_memory_and_other_errors_stay(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_lm.utils

    config = make_config()

    def failing(text: str) -> Callable[..., Any]:
        def load_model(*_: Any, **__: Any) -> Any:
            raise RuntimeError(text)

        return load_model

    for text, kind in (
        ("[malloc] Unable to allocate 9 bytes.", OutOfMemoryError),
        ("[load_safetensors] bad", UserError),
    ):
        monkeypatch.setattr(mlx_lm.utils, "load_model", failing(text))
        with pytest.raises(UserError) as caught:
            MLX.open(config, resolved(llama), make_adapter(llama, config))
        assert type(caught.value) is kind
    with pytest.raises(RuntimeError, match="something else"), memory_module.translate_out_of_memory("a step"):
        raise RuntimeError("something else")


def test_the_buffer_cache_is_bounded_and_given_back(llama: Path) -> None:
    gib = 2**30
    assert [memory_module.cache_limit_bytes(n * gib) // gib for n in (8, 16, 64, 512)] == [1, 1, 4, 8]
    before = mx.set_cache_limit(123 * gib)
    mx.set_cache_limit(123 * gib)
    learner = open_learner("mlx", llama)
    limit = mx.set_cache_limit(7)
    mx.set_cache_limit(limit)
    on_gpu = mx.metal.is_available()
    expected = memory_module.cache_limit_bytes(memory_module.total_bytes()) if on_gpu else 64 * 2**20
    assert limit == expected
    learner.close()
    learner.close()
    assert mx.set_cache_limit(before) == 123 * gib


def test_the_cache_counts_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = memory_module.MemoryMeter(accelerator=True)
    figures = {"get_active_memory": 5, "get_cache_memory": 7, "get_peak_memory": 9}
    for name, value in figures.items():
        monkeypatch.setattr(mx, name, lambda value=value: value)
    assert (meter.read().current_bytes, meter.read().peak_bytes) == (12, 12)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 40)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    assert (meter.read().current_bytes, meter.read().peak_bytes) == (5, 40)


# --- devices and packages


def test_slow_choices_on_a_cpu_are_warned_of() -> None:
    if MLX.probe("auto").accelerator:
        pytest.skip("this machine has an accelerator")
    found = MLX.check(make_config(device="cpu", model={"bits": 4, "dtype": "bfloat16"}))
    assert [line.split(":")[0] for line in found] == ["model.dtype", "model.bits"]
    assert "bfloat16" in found[0]


def test_missing_packages_are_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "mlx-lm":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    report = MLX.probe()
    assert not report.available
    assert "mlx-lm not installed" in report.problem
    assert "pip install" in report.problem
    assert report.packages.keys() == {"mlx"}
    with pytest.raises(UserError, match="needs mlx-lm"):
        MLX.open(make_config(), resolved(llama), make_adapter(llama, make_config()))


def test_a_broken_installation_is_reported() -> None:
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx.core": raise ImportError("libmlx.so: cannot open shared object file")
sys.meta_path.insert(0, Broken())
import backends
report = backends.get("mlx").probe()
print(report.available, report.problem)
"""
    assert run_python(code) == "False mlx does not work here: ImportError: libmlx.so: cannot open shared object file"
