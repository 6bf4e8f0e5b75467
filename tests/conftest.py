"""Set before any numerical library is loaded: two test processes share two cores; waiting threads must not spin."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
# what tests pack or download is not the user's
_CACHE = tempfile.mkdtemp(prefix="twinkeel-tests-")
os.environ["TWINKEEL_CACHE"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

_MANY_MODULES = 200
_num_modules_frozen = 0
_LONGEST = (
    "tests/test_notebook.py",
    "tests/cli/test_every_setting.py",
    "tests/kill/",
    "tests/cli/test_train.py",
    "tests/cli/test_moves.py",
    "tests/cli/test_convert.py",
    "tests/parity/test_two_backends.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: two processes share the files, and neither should wait for the other at the end."""
    items.sort(
        key=lambda item: next((n for n, name in enumerate(_LONGEST) if item.nodeid.startswith(name)), len(_LONGEST))
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A learner collects garbage when it closes: through what a tiny run made, not through torch and transformers."""
    global _num_modules_frozen
    if len(sys.modules) >= _num_modules_frozen + _MANY_MODULES:
        gc.collect()
        gc.freeze()
        _num_modules_frozen = len(sys.modules)
