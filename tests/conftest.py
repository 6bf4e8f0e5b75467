"""Set before any numerical library is loaded: two test processes share two cores; waiting threads must not spin."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
# what tests pack or download is not the user's
_CACHE = tempfile.mkdtemp(prefix="twinkeel-tests-")
os.environ["TWINKEEL_CACHE"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
