"""What has to be in memory when layers are left out: `model.low_memory` and `model.stream_layers`.

    python benchmarks/residence.py --census                          # counted from shapes alone; needs no GPU
    python benchmarks/residence.py [--backend mlx|cuda] [--bits 16] [--device cpu|gpu]

Counted: of Mixtral-8x7B and Mistral-7B in NF4 with the first half of the layers frozen, the bytes of the weights on the
device. Measured: a Llama of 0.4 billion random weights, 4 steps, each setting in a process of its own that starts with
an empty prefix store: the peak of the memory (on a CPU of the anonymous kind: what the process holds, without mapped
files, which the system can take back at any time; on a GPU what tensors held), seconds a step, and the losses, which
must be the same. Leaves benchmarks/results/residence.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, Result, facts, in_new_process, save_part  # noqa: E402
from core.protocols import Weight  # noqa: E402

RESULT = RESULTS / "residence.json"
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 320,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
SETTINGS = {"all layers": (), "low_memory": ("model.low_memory=true",), "stream_layers": ("model.stream_layers=true",)}


# --- counted ----------------------------------------------------------------------------------------------------------


def resident(weights: Sequence[Weight], num_layers: int) -> dict[str, int]:
    """Bytes on the device for each setting, adapters and activations apart, with the first half frozen.

    While the store is filled a frozen layer comes on top; `stream_layers` holds one layer at a time in any case.
    """
    layers = [_of_layer(weights, number) for number in range(num_layers)]
    outside = sum(weight.bytes for weight in weights) - sum(layers)
    half = num_layers // 2
    return {
        "all layers": outside + sum(layers),
        "low_memory": outside + sum(layers[half:]) + max(layers[:half]),
        "stream_layers": outside + max(layers),
    }


def _of_layer(weights: Sequence[Weight], number: int) -> int:
    return sum(weight.bytes for weight in weights if weight.name.startswith(f"model.layers.{number}."))


def show_census() -> None:
    from backends.cuda.streaming import planned_weights
    from benchmarks.gpu_step import SHAPES as DENSE
    from benchmarks.mixtral import SHAPES as MIXTURES
    from benchmarks.mixtral_census import shape_without_weights

    print(f"{'NF4, first half frozen':<24}" + "".join(f"{name:>15}" for name in SETTINGS))
    for name, shape in (("Mixtral-8x7B", MIXTURES["mixtral-8x7b"]), ("Mistral-7B", DENSE["mistral-7b"])):
        found = resident(planned_weights(shape_without_weights(shape)), shape["num_hidden_layers"])
        print(f"{name:<24}" + "".join(f"{found[setting] / 1e9:>12.2f} GB" for setting in SETTINGS))


# --- measured ---------------------------------------------------------------------------------------------------------


@contextmanager
def watching_memory(found: dict[str, float]) -> Iterator[None]:
    """Leaves the peak of the process's anonymous memory in `found["anonymous_gb"]`, looked at every 5 ms."""
    over = threading.Event()
    found["anonymous_gb"] = 0.0

    def watch() -> None:
        while not over.is_set():
            lines = Path("/proc/self/status").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            found["anonymous_gb"] = max(found["anonymous_gb"], kilobytes * 1024 / 1e9)
            time.sleep(0.005)

    if not Path("/proc/self/status").exists():
        yield
        return
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def take_turn(turn: Result) -> Result:
    from benchmarks.growth import BATCH_SIZE
    from benchmarks.watched import GUARD_OFF, watched_train

    folder = Path(turn["folder"])
    settings = [
        f"device={turn['device']}",
        f"model.path={folder / 'model'}",
        f"model.bits={turn['bits']}",
        f"data.path={folder}",
        "lora.dropout=0",
        "lora.frozen_fraction=0.5",
        f"train.batch_size={BATCH_SIZE}",
        "train.accumulation=1",
        "train.epochs=2",
        "eval.every=2",
        "eval.probe_rows=4",
        "log.every=1",
        "train.prefix_store=true",
        *GUARD_OFF,
        *SETTINGS[turn["setting"]],
    ]
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=folder) as name, watching_memory(memory):
        found = watched_train(settings, backend=turn["backend"], run=Path(name) / "run")
    peak = found["device_gb"] if "device_gb" in found else memory["anonymous_gb"]
    return {
        "peak_gb": peak,
        "seconds_per_step": found["steps_seconds"] / found["steps"],
        "losses": [found["base_loss"], found["own_loss"]],
    }


def measure(backend: str, device: str, *, bits: int, layers: int | None) -> Result:
    from benchmarks.growth import Point, write_point

    point = Point(rows=8, tokens=64, layers=layers or SHAPE["num_hidden_layers"])
    with tempfile.TemporaryDirectory() as name:
        num_bytes = write_point(Path(name), point, device=device, shape=SHAPE)
        found: Result = {}
        for setting in SETTINGS:
            turn = {"folder": name, "backend": backend, "device": device, "bits": bits, "setting": setting}
            environment = {"TWINKEEL_CACHE": str(Path(name) / f"cache-{setting}")}
            found[setting] = in_new_process(__file__, ["run", json.dumps(turn)], environment=environment)
            one = found[setting]
            print(f"{setting:<16}{one['peak_gb']:>8.2f} GB{one['seconds_per_step']:>8.2f} s a step"
                  f"   losses {' '.join(f'{loss:.6f}' for loss in one['losses'])}", flush=True)  # fmt: skip
    return {"bits": bits, "parameters": num_bytes // 2, "settings": found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--census", action="store_true", help="count, and measure nothing")
    parser.add_argument("--backend", choices=("mlx", "cuda"), default="cuda")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=16)
    parser.add_argument("--layers", type=int, help="so many layers instead of 24")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: %(default)s")
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.turn:
        print(json.dumps(take_turn(json.loads(args.turn[1]))))
        return
    if args.census:
        show_census()
        return
    about = facts(args.backend, args.device, script="residence.py", arguments=arguments)
    print(f"{args.backend}, {args.bits} bits, {about['device']}")
    found = measure(args.backend, args.device, bits=args.bits, layers=args.layers)
    save_part(args.output, f"{args.backend} {args.bits} bits", {**about, **found})


if __name__ == "__main__":
    main()
