"""A million rows: how long until they can be trained on, and how much memory that takes.

    python benchmarks/data_scale.py [--rows 1000000] [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Rows of generated words, about 100 tokens each in the model's chat template, are written as JSONL. Then they are loaded
and checked as `train` does it (`core.workflow.job.load_rows`), each time by a process of its own: cold, with an empty
cache; again; and again with another seed, which splits the same rows anew. Measured are the seconds until the rows are
there, the further seconds until the first batches of training and validation are, the processor seconds of all
processes together, and the peak of the memory of the process and its workers together, looked at twice a second:
resident, mapped files included (pages that two processes share count twice), and anonymous, what the programs need for
themselves (on Linux).
Leaves a table and benchmarks/results/data_scale.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, Result, facts, in_new_process, model_folder, save_part  # noqa: E402

RESULT = RESULTS / "data_scale.json"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WORDS = 5_000
PROMPT_WORDS, ANSWER_WORDS = 18, 14
SAMPLE_SECONDS = 0.5
TURNS: Mapping[str, int] = {"cold": 0, "cached": 0, "cached, another seed": 1}
"""Name -> seed."""
FIGURES = {
    "load_seconds": "rows there, s",
    "batch_seconds": "first batches, s",
    "processor_seconds": "processor, s",
    "resident_gb": "peak resident, GB",
    "anonymous_gb": "peak anonymous, GB",
}


def write_rows(path: Path, num_rows: int) -> None:
    """Pairs of a prompt and an answer, of words that sound alike and mean nothing."""
    random_ = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(random_.choices(syllables, k=random_.randint(1, 4))) for _ in range(WORDS)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(num_rows):
            prompt, answer = (" ".join(random_.choices(words, k=num)) for num in (PROMPT_WORDS, ANSWER_WORDS))
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


# --- a turn -----------------------------------------------------------------------------------------------------------


class MemoryWatch(threading.Thread):
    """The most that this process and its children have had at one time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.resident = self.anonymous = 0
        self._done = threading.Event()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._done.wait(SAMPLE_SECONDS):
            processes = [_memory(process.pid) for process in (me, *me.children(recursive=True))]
            self.resident = max(self.resident, sum(resident for resident, _ in processes))
            self.anonymous = max(self.anonymous, sum(anonymous for _, anonymous in processes))

    def stop(self) -> None:
        self._done.set()
        self.join()


def _memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process; nothing for one that has ended."""
    import psutil

    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        try:
            return psutil.Process(pid).memory_info().rss, 0
        except psutil.Error:
            return 0, 0
    kib = {
        line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.startswith(("VmRSS", "Rss"))
    }
    return kib.get("VmRSS", 0) * 1024, kib.get("RssAnon", 0) * 1024


def turn(rows: str, model: str, seed: int) -> Result:
    """Loads and checks the rows as `train` does."""
    watch = MemoryWatch()
    watch.start()
    began = time.perf_counter()
    from core.architecture import read_architecture
    from core.config import RunConfig
    from core.models import ResolvedModel
    from core.workflow import job

    folder = Path(model)
    resolved = ResolvedModel(path=folder, name="model", revision=None, source="folder", note="", parameters=0)
    config = RunConfig.model_validate({"data": {"path": rows}, "train": {"seed": seed}})
    data = job.load_rows(config, resolved, read_architecture(folder))
    loaded = time.perf_counter()
    first = data.epoch(0)[0], data.validation[0]
    batched = time.perf_counter()
    watch.stop()
    assert all(batch.num_targets for batch in first)
    return {
        "load_seconds": loaded - began,
        "batch_seconds": batched - loaded,
        "resident_gb": watch.resident / 1e9,
        "anonymous_gb": watch.anonymous / 1e9,
        "train_rows": data.num_train_rows,
        "validation_rows": data.num_val_rows,
        "targets": data.num_targets,
        "fingerprint": data.fingerprint,
    }


# --- all of them ------------------------------------------------------------------------------------------------------


def measure(num_rows: int, model: Path, folder: Path) -> Result:
    rows = folder / "rows.jsonl"
    began = time.perf_counter()
    write_rows(rows, num_rows)
    print(f"{num_rows:,} rows, {rows.stat().st_size / 1e6:,.0f} MB, written in {time.perf_counter() - began:.0f} s")
    environment = {"TWINKEEL_CACHE": str(folder / "cache")}
    turns: dict[str, Result] = {}
    for name, seed in TURNS.items():
        done = in_new_process(__file__, [str(rows), str(model), str(seed)], environment=environment)
        turns[name] = {**done, "processor_seconds": done["process"]["processor_seconds"]}
        print("  ".join([f"{name:22}", *(f"{title} {turns[name][key]:.2f}" for key, title in FIGURES.items())]))
    assert turns["cold"]["fingerprint"] == turns["cached"]["fingerprint"]
    assert turns["cold"]["fingerprint"] != turns["cached, another seed"]["fingerprint"]
    entries = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    sizes = {"rows": num_rows, "file_mb": rows.stat().st_size / 1e6}
    return {**sizes, "cache_mb": sum(path.stat().st_size for path in entries) / 1e6, "turns": turns}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default=MODEL, help="its tokenizer is what matters")
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    options: Any = parser.parse_args(arguments)
    if options.turn:
        rows, model, seed = options.turn
        print(json.dumps(turn(rows, model, int(seed))))
        return
    model = model_folder(options.model, "cuda", bits=16)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options.rows, model, Path(folder))
    report |= facts("cuda", "cpu", script=Path(__file__).name, arguments=arguments)
    save_part(RESULT, f"{options.rows} rows", report)


if __name__ == "__main__":
    main()
