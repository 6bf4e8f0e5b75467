"""What the loop itself costs, with a learner that costs next to nothing.

    python benchmarks/loop_overhead.py [--steps 100000]

Prints microseconds a step early and late in one run of many steps, each step logged, and the time to resume from and
to export such a journal. The figures are of the machine it runs on; the ratio of late to early is what matters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.checkpoint import Checkpointer  # noqa: E402
from core.config import RunConfig  # noqa: E402
from core.journal import Journal  # noqa: E402
from core.run import RunState  # noqa: E402
from core.trainer import Trainer  # noqa: E402
from tests.fakes import FakeData, FakeLearner, SilentScreen  # noqa: E402


class TimedScreen(SilentScreen):
    """Notes when each step ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[float] = []

    def show_step(self, *, step: int, epoch: float) -> None:
        self.ended.append(time.perf_counter())


def run(folder: Path, *, num_steps: int, log_every: int) -> list[float]:
    """End times of the steps of one run, which evaluates and checkpoints only at its ends."""
    config = RunConfig.model_validate(
        {
            "train": {"epochs": 10**6, "max_steps": num_steps, "accumulation": 2},
            "eval": {"every": num_steps},
            "checkpoint": {"every": num_steps},
            "log": {"every": log_every},
        }
    )
    state = RunState(folder, {})
    screen = TimedScreen()

    def heartbeat(values: Mapping[str, Any]) -> None:
        state.update(status="running", **values)

    trainer = Trainer(
        config=config,
        learner=FakeLearner(),
        data=FakeData(),
        folder=folder,
        journal=Journal(folder),
        checkpointer=Checkpointer(folder, keep=1),
        screen=screen,
        save_best=lambda tensors: None,
        heartbeat=heartbeat,
    )
    trainer.run()
    return screen.ended


def fake_step_seconds() -> float:
    """The fake learner's own cost, to be taken off."""
    learner, batches = FakeLearner(), FakeData().epoch(0)[:2]
    began = time.perf_counter()
    for step in range(1, 2001):
        learner.train_step(list(batches), step=step, lr=1e-3)
    return (time.perf_counter() - began) / 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    args = parser.parse_args()
    own = fake_step_seconds()
    print(f"the fake learner's own step: {1e6 * own:.0f} us")
    for log_every in (10, 1):
        with tempfile.TemporaryDirectory() as name:
            ended = run(Path(name), num_steps=args.steps, log_every=log_every)
            tenth = len(ended) // 10
            early = (ended[tenth] - ended[1]) / (tenth - 1) - own
            late = (ended[-2] - ended[-tenth]) / (tenth - 2) - own
            print(
                f"loop, a record every {log_every} steps: {1e6 * early:.0f} us a step in the first tenth, "
                f"{1e6 * late:.0f} us in the last ({late / early:.2f}x)"
            )
            began = time.perf_counter()
            Journal(Path(name), keep_bytes=(Path(name) / "metrics.jsonl").stat().st_size).close()
            print(f"  opening its journal again, exports rebuilt: {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()
