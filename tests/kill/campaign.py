"""Kills runs with SIGKILL at many moments, resumes them, and compares with a run that was never killed.

    python -m tests.kill.campaign BACKEND MODEL DATA FOLDER NUM_POINTS

prints a JSON list, one object a kill point: `point`, `event` (what the process was doing), `differences` (empty when
the resumed run left the same bits). Every run is a forked child that dies by a real SIGKILL; forking saves importing
torch or MLX dozens of times.

A moment is an event that leaves a trace outside the process: a file opened, renamed or removed in the run folder, an
fsync, a write to the journal (half of it is written, then the process dies), a training step, an evaluation. The run
is first counted, then killed at points spread over its whole length, and at one of each kind.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MACHINE_FIELDS = {"tokens_per_second", "memory_gb", "time", "peak_memory_gb", "wall_seconds"}
SETTINGS = (
    *("--bits", "16", "--device", "cpu", "--batch-size", "2", "--accumulation", "2", "--epochs", "2"),
    *("--eval-every", "3", "--max-tokens", "64", "--dropout", "0.1", "--lr", "3e-3", "--rank", "4"),
    *("--set", "checkpoint.every=2", "--set", "checkpoint.keep=2", "--set", "log.every=2"),
    *("--set", "eval.probe_rows=6", "--set", "schedule.name=constant"),
)


class Killer:
    """Counts events of this process in `folder` and dies at number `fatal`."""

    def __init__(self, folder: Path, *, fatal: int | None, log: Path) -> None:
        self._folder, self._fatal, self._count = str(folder), fatal, 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._armed = False

    def install(self) -> None:
        """Watches file events by an audit hook, and wraps what the hook does not see."""
        from core.trainer import Trainer

        sys.addaudithook(self._audit)
        self._wrap(os, "fsync")
        self._wrap(Trainer, "_train_step")
        self._wrap(Trainer, "_evaluate")
        real = os.pwrite

        def pwrite(descriptor: int, content: bytes, offset: int) -> int:
            self._event("half a write to the journal", lambda: real(descriptor, content[: len(content) // 2], offset))
            return real(descriptor, content, offset)

        os.pwrite = pwrite

    def _wrap(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._event(name)
            return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        path = str(args[0])
        if path.startswith(self._folder):
            name = path.removeprefix(self._folder)
            # before config.yaml is there, there is no run to resume
            self._armed = self._armed or name.startswith("/checkpoints")
            self._event(f"{event} {name}")

    def _event(self, name: str, last_words: Callable[[], object] = lambda: None) -> None:
        if not self._armed:
            return
        self._count += 1
        os.write(self._log, (name + "\n").encode())
        if self._count == self._fatal:
            last_words()
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(action: Callable[[], int]) -> int:
    """Runs `action` in a forked process; its exit code, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(arguments: list[str], folder: Path, *, fatal: int | None) -> tuple[int, list[str]]:
    """One command in a child; returns its exit code and the events it saw."""
    log = folder.with_suffix(".events")

    def action() -> int:
        import cli

        Killer(folder, fatal=fatal, log=log).install()
        return cli.main(arguments)

    code = in_child(action)
    return code, log.read_text().splitlines()


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, without what measures the machine."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("**/*.safetensors")):
        found[str(path.relative_to(folder))] = path.read_bytes()
    found["adapter_config"] = (folder / "adapters" / "adapter_config.json").read_text()
    found["metrics"] = [_plain(record) for record in json.loads((folder / "training_metrics.json").read_text())]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found["journal"] = [_plain(json.loads(line)) for line in lines]
    found["csv rows"] = len((folder / "training_metrics.csv").read_text().splitlines())
    found["summary"] = _plain(json.loads((folder / "training_summary.json").read_text()))
    found["plot"] = (folder / "training_curves.png").is_file()
    found["files"] = sorted(str(path.relative_to(folder)) for path in folder.glob("**/*"))
    return found


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in MACHINE_FIELDS}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if expected.get(name) != found.get(name)]


def campaign(backend: str, model: str, data: str, root: Path, num_points: int) -> list[dict[str, Any]]:
    preload(backend)
    start = ["train", "--backend", backend, "--model", model, "--data", data, *SETTINGS]
    whole = root / "whole"
    code, events = run([*start, "--output", str(whole)], whole, fatal=None)
    assert code == 0, code
    expected = outcome(whole)
    points = choose_points(events, num_points)
    results = []
    for point in points:
        killed = root / f"killed{point}"
        code, seen = run([*start, "--output", str(killed)], killed, fatal=point)
        problems = [] if code == -signal.SIGKILL else [f"exit code {code} instead of a kill"]
        code, _ = run(["train", "--resume", str(killed)], killed, fatal=None)
        problems += [] if code == 0 else [f"exit code {code} of the resumed run"]
        problems += differences(expected, outcome(killed)) if code == 0 else []
        results.append({"point": point, "of": len(events), "event": seen[-1], "differences": problems})
        if not problems:
            shutil.rmtree(killed)
    return results


KINDS = ("_train_step", "_evaluate", "half a write", "optimizer.safetensors", "adapters/", "summary", "curves")
"""Events that a campaign must not miss."""


def choose_points(events: list[str], num_points: int) -> list[int]:
    """Numbers of events, from 1: evenly spread over the run, and one of each kind, from the middle of its kind."""
    spread = {1 + round(i * (len(events) - 1) / (num_points - 1)) for i in range(num_points)}
    for kind in KINDS:
        found = [number for number, event in enumerate(events, start=1) if kind in event]
        assert found, f"no event of kind {kind}"
        spread.add(found[len(found) // 2])
    return sorted(spread)


def preload(backend: str) -> None:
    """Imports what every child needs, before any of it starts a thread."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import pytest

    import core.workflow.train  # noqa: F401

    if backend == "cuda":
        import peft  # noqa: F401
        import torch
        import transformers.models.llama.modeling_llama  # noqa: F401

        import backends.cuda.learner

        torch.set_num_threads(1)
    else:
        from backends.mlx.blas import preload_blas

        preload_blas()
        import mlx_lm.models.llama
        import mlx_lm.utils  # noqa: F401

        import backends.mlx.learner
        import backends.mlx.model  # noqa: F401
    from tests.pictures import draw_blank

    draw_blank(pytest.MonkeyPatch())
    gc.collect()
    gc.freeze()  # a child collects what it made itself


if __name__ == "__main__":
    name, model, data, root, count = sys.argv[1:]
    print(json.dumps(campaign(name, model, data, Path(root), int(count)), indent=1))
