"""The prefix store of a run: found, judged, filled before the first step."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import backends
from core.config import RunConfig
from core.errors import UserError
from core.models.fingerprint import model_fingerprint
from core.models.wheel import cache_folder
from core.prefix import PAYS_FROM, PrefixedLearner, PrefixPlan, PrefixReport, plan_prefixes
from core.prefix_store import PrefixStore
from core.protocols import Learner, TokenArray
from core.workflow.job import Job

_log = logging.getLogger("twinkeel")
_AIR = 1.1
"""The disk must have more room than the new rows need by this factor."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Prepared:
    """The learner that trains, and what the store does for it; None when nothing is stored."""

    learner: Learner
    report: PrefixReport | None


def with_prefixes(job: Job, learner: Learner, *, console: Console) -> Prepared:
    """Fills the store and puts it before the learner, if the settings want it and it pays.

    Raises:
        UserError: there is no room for what has to be stored.
    """
    config, num_layers = job.config, learner.num_prefix_layers
    if not _wanted(config, num_layers):
        return Prepared(learner, None)
    began = time.perf_counter()
    plan = plan_prefixes(config, job.data)
    if not _fits_and_pays(job, plan, num_layers):
        return Prepared(learner, None)
    store = PrefixStore(
        cache_folder() / "prefix", _key(job, num_layers), max_bytes=int(config.train.prefix_store_gb * 1e9)
    )
    missing = [plan.rows[index] for index in store.find(plan.rows)]
    if not _disk_has_room(job, missing):
        return Prepared(learner, None)
    if missing:
        _log.info("prefix store: %d of %d rows through the frozen layers, once", len(missing), len(plan.rows))
    with _progress(console) as progress:
        task = progress.add_task("frozen layers", total=len(missing), visible=bool(missing))
        # of nothing it only makes room, in case `train.prefix_store_gb` was lowered
        store.fill(missing, learner.prefixes, on_row=lambda done: progress.update(task, completed=done))
    num_computed = sum(len(row) for row in missing)
    report = PrefixReport(
        layers=num_layers,
        rows=len(plan.rows),
        computed_rows=len(missing),
        bytes=store.nbytes,
        spared=max(1.0 - num_computed / plan.num_uses, 0.0),
        seconds=time.perf_counter() - began,
    )
    return Prepared(PrefixedLearner(learner, store), report)


def _wanted(config: RunConfig, num_layers: int) -> bool:
    # code from the model folder may change without a trace in the key
    return num_layers > 0 and config.train.prefix_store is not False and not config.model.trust_remote_code


def _fits_and_pays(job: Job, plan: PrefixPlan, num_layers: int) -> bool:
    config = job.config
    must = _must(config)
    if not must and plan.spared < PAYS_FROM:
        return False
    num_bytes = _num_bytes(job, plan.rows)
    if num_bytes <= config.train.prefix_store_gb * 1e9:
        return True
    problem = (
        f"the prefix store would take {num_bytes / 1e9:.1f} GB, and train.prefix_store_gb is "
        f"{config.train.prefix_store_gb:g}"
    )
    if must:
        raise UserError(problem, hint=f"--set train.prefix_store_gb={num_bytes / 1e9 + 1:.0f}")
    _log.info("%s: the frozen layers are computed every time", problem)
    return False


def _must(config: RunConfig) -> bool:
    return config.train.prefix_store is True or config.model.low_memory or config.model.stream_layers


def _num_bytes(job: Job, rows: Sequence[TokenArray]) -> int:
    return sum(map(len, rows)) * job.architecture.hidden_size * _BYTES[_dtype(job)]


def _disk_has_room(job: Job, rows: Sequence[TokenArray]) -> bool:
    """Whether the rows fit; a disk that nobody can ask is left to the store, which then keeps rows in memory."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError:
        return True
    needed = _AIR * _num_bytes(job, rows)
    if needed <= free or not rows:
        return True
    problem = f"the prefix store needs {needed / 1e9:.1f} GB in {folder}, and the disk has {free / 1e9:.1f}"
    if _must(job.config):
        raise UserError(problem, hint="make room, or set TWINKEEL_CACHE to a folder on a larger disk")
    _log.info("%s: the frozen layers are computed every time", problem)
    return False


def _key(job: Job, num_layers: int) -> dict[str, str]:
    """What a row's states depend on, apart from its tokens."""
    files = sorted(job.model.path.glob("*.safetensors"))
    packages = job.device.packages
    return {
        "code": code_fingerprint(job.config.backend),
        "model": model_fingerprint(job.model.path),
        # the fingerprint does not see a change within a file
        "changed": " ".join(str(path.stat().st_mtime_ns) for path in files),
        "backend": job.config.backend,
        "versions": " ".join(f"{name} {packages[name]}" for name in sorted(packages)),
        "device": job.device.device if job.device.accelerator else "CPU",
        "bits": str(job.config.model.bits),
        "dtype": _dtype(job),
        "layers": str(num_layers),
    }


def code_fingerprint(backend: str) -> str:
    """SHA-256 of the backend's own source: what another version makes of a row may be another thing."""
    folder = Path(backends.__file__).parent / backend
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _dtype(job: Job) -> str:
    if job.config.model.dtype != "auto":
        return job.config.model.dtype
    return "bfloat16" if job.device.accelerator else "float32"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
