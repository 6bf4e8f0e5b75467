"""How the cost of a run grows: ten times the rows, four times the tokens of a row, twice the layers.

    python benchmarks/growth.py [--backend mlx|cuda|both] [--device cpu|gpu]

From a small base point (24 training rows of 64 tokens, 8 layers) one thing at a time is made larger. Every point is a
run of the tool in a process of its own, with the first half of the layers frozen, once with the prefix store, which
starts empty, and once without. Measured are seconds of an optimiser step (the median one) and of an evaluation of the
validation split, of filling the store, of the run after loading (filling, steps, evaluations and the probe's), the peak
of the memory and how far it is above what was there after loading, and what the store takes on the disk. A slope is the
exponent of the growth between the smallest and the largest point: 1 is in proportion, 0 is none.

The model has random weights (a Llama of hidden size 256, every byte a token), so losses mean nothing here; all rows
have one length. A step is always of 4 rows. The validation split has a quarter as many rows as training has, and so has
the probe. Memory is the process's, mapped files included; on a GPU it is what tensors held. Leaves a table,
benchmarks/results/growth.json and growth.png.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import (  # noqa: E402
    RESULTS,
    Result,
    facts,
    in_new_process,
    save_part,
    write_model,
)
from benchmarks.watched import GUARD_OFF, watched_train  # noqa: E402

RESULT = RESULTS / "growth.json"
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
BATCH_SIZE = 4
ROWS_PER_VALIDATION_ROW = 4
EPOCHS = 2
PROMPT = 8
"""Characters of a row's question; each is a token."""
FIGURES = {
    "seconds_per_step": "s / step",
    "seconds_per_evaluation": "s / evaluation",
    "fill_seconds": "filling, s",
    "run_seconds": "run, s",
    "peak_gb": "peak, GB",
    "working_mb": "peak above load, MB",
    "store_mb": "store, MB",
}


@dataclass(frozen=True)
class Point:
    """The size of a run."""

    rows: int
    tokens: int
    layers: int

    @property
    def name(self) -> str:
        return f"{self.rows} rows x {self.tokens} tokens, {self.layers} layers"


@dataclass(frozen=True)
class Turn:
    """What a process is told."""

    folder: str
    """With `model` and the rows; the run goes there, too."""
    backend: str
    device: str
    store: bool
    rows: int
    tokens: int


BASE = Point(rows=24, tokens=64, layers=SHAPE["num_hidden_layers"])
AXES: Mapping[str, Sequence[int]] = {"rows": (1, 3, 10), "tokens": (1, 2, 4), "layers": (1, 2)}
"""By how much each is multiplied."""


def points_of(base: Point, axis: str) -> list[Point]:
    return [replace(base, **{axis: getattr(base, axis) * factor}) for factor in AXES[axis]]


# --- a point's model and rows -----------------------------------------------------------------------------------------


def write_point(folder: Path, point: Point, *, device: str, shape: Mapping[str, Any] = SHAPE) -> int:
    """A model and its rows; returns the bytes of its weights."""
    from tests.tiny import make_tokenizer

    model = folder / "model"
    model.mkdir(parents=True)
    num_bytes = write_model(model, shape, layers=point.layers, device=device)
    make_tokenizer(model)
    rows = random_rows(point.rows + num_validation_rows(point.rows), tokens=point.tokens)
    for name, some in (("train", rows[: point.rows]), ("valid", rows[point.rows :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return num_bytes


def num_validation_rows(rows: int) -> int:
    return max(rows // ROWS_PER_VALIDATION_ROW, BATCH_SIZE)


def random_rows(count: int, *, tokens: int) -> list[dict[str, str]]:
    """Questions and answers of random letters; with the chat template around them, `tokens` inputs each."""
    around = sum(len(["<|im_start|>", *role, "\n", "<|im_end|>", "\n"]) for role in ("user", "assistant"))
    around -= 2  # the last target is the end of the answer: it is no input, nor is the line break after it
    letters = random.Random(0)

    def word(length: int) -> str:
        return "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=length))

    return [{"prompt": word(PROMPT), "completion": word(tokens - around - PROMPT)} for _ in range(count)]


# --- a turn -----------------------------------------------------------------------------------------------------------


def settings_of(turn: Turn) -> list[str]:
    steps = EPOCHS * turn.rows // BATCH_SIZE
    return [
        f"device={turn.device}",
        f"model.path={Path(turn.folder) / 'model'}",
        "model.bits=16",
        f"data.path={turn.folder}",
        "lora.dropout=0",
        "lora.frozen_fraction=0.5",
        f"train.batch_size={BATCH_SIZE}",
        "train.accumulation=1",
        f"train.epochs={EPOCHS}",
        f"train.prefix_store={str(turn.store).lower()}",
        "log.every=1",
        f"eval.every={max(steps // 3, 1)}",
        f"eval.probe_rows={num_validation_rows(turn.rows)}",
        *GUARD_OFF,
    ]


def take_turn(turn: Turn) -> Result:
    with tempfile.TemporaryDirectory(dir=turn.folder) as name:
        run = Path(name) / "run"
        found = watched_train(settings_of(turn), backend=turn.backend, run=run)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [record["tokens_per_second"] for record in records if record["step"] > 0]
    evaluations = found["evaluation_seconds"] + found["probe_seconds"]
    return {
        "seconds_per_step": BATCH_SIZE * turn.tokens / statistics.median(speeds),
        # the first one warms caches up
        "seconds_per_evaluation": statistics.median(found["evaluation_seconds"]),
        "fill_seconds": found["fill_seconds"],
        "run_seconds": found["fill_seconds"] + found["steps_seconds"] + sum(evaluations),
        "filled_rows": found["filled_rows"],
        "peak_gb": found["peak_gb"],
        "working_mb": 1e3 * max(found["peak_gb"] - found["loaded_gb"], 0.0),
        "store_mb": found["store_bytes"] / 1e6,
        "steps": found["steps"],
        "losses": [found["base_loss"], found["own_loss"]],
    }


def measure(backend: str, device: str, *, base: Point) -> list[Result]:
    """Every point with and without the store."""
    wanted = list(dict.fromkeys(point for axis in AXES for point in points_of(base, axis)))
    found = []
    for point in wanted:
        with tempfile.TemporaryDirectory() as name:
            write_point(Path(name), point, device=device)
            for store in (True, False):
                turn = Turn(name, backend, device, store, point.rows, point.tokens)
                environment = {"TWINKEEL_CACHE": str(Path(name) / f"cache-{store}")}
                figures = in_new_process(__file__, ["point", json.dumps(asdict(turn))], environment=environment)
                found.append({**asdict(point), "store": store, **figures})
                print(row_of(point.name, found[-1]), flush=True)
    return found


# --- what is shown ----------------------------------------------------------------------------------------------------


def curve(results: Sequence[Result], base: Point, axis: str, *, store: bool) -> list[Result]:
    """The results along an axis, rising."""
    return [
        next(one for one in results if one["store"] == store and one.items() >= asdict(point).items())
        for point in points_of(base, axis)
    ]


def slope(line: Sequence[Result], axis: str, figure: str) -> float | None:
    """d log(figure) / d log(axis) from the first to the last point; None where the figure is 0."""
    first, last = line[0], line[-1]
    if min(first[figure], last[figure]) <= 0.0:
        return None
    return math.log(last[figure] / first[figure]) / math.log(last[axis] / first[axis])


def slopes(results: Sequence[Result], base: Point) -> list[Result]:
    return [
        {"axis": axis, "store": store}
        | {figure: slope(curve(results, base, axis, store=store), axis, figure) for figure in FIGURES}
        for axis in AXES
        for store in (True, False)
    ]


HEAD = f"| {'':<40} | store | {' | '.join(FIGURES.values())} |\n|---|---|{'---|' * len(FIGURES)}"


def row_of(name: str, result: Mapping[str, Any]) -> str:
    numbers = ["–" if result[figure] in (None, 0) else f"{result[figure]:.3g}" for figure in FIGURES]
    return f"| {name:<40} | {'yes' if result['store'] else 'no':<5} | {' | '.join(numbers)} |"


def plot(reports: Mapping[str, Result], base: Point, path: Path) -> None:
    """A column for each axis, a row for each figure; every line's slope stands in its legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(
        len(FIGURES),
        len(AXES),
        figsize=(4.2 * len(AXES), 2.7 * len(FIGURES)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, (name, label) in zip(places, FIGURES.items(), strict=True):
        for place, axis in zip(row, AXES, strict=True):
            for color, (backend, report) in enumerate(reports.items()):
                for store in (True, False):
                    line = curve(report["points"], base, axis, store=store)
                    _draw(place, line, axis, name, f"{backend}, {'with store' if store else 'without'}", color, store)
            place.set(xscale="log", yscale="log", xlabel=axis)
            place.set_xticks([getattr(point, axis) for point in points_of(base, axis)])
            place.get_xaxis().set_major_formatter("{x:.0f}")
            place.get_xaxis().minorticks_off()
            place.grid(alpha=0.3)
            if place.lines:
                place.legend(fontsize=7)
        row[0].set_ylabel(label)
        _widen(row[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(place: Any, line: Sequence[Result], axis: str, figure: str, name: str, color: int, store: bool) -> None:
    found = slope(line, axis, figure)
    if found is None:
        return
    place.plot(
        [one[axis] for one in line],
        [one[figure] for one in line],
        "o-" if store else "s--",
        color=f"C{color}",
        label=f"{name}: slope {found:.2f}",
        markersize=4,
    )


def _widen(place: Any) -> None:
    """At least a factor of ten from bottom to top, so that what hardly grows looks as if it hardly grew."""
    low, high = place.get_ylim()
    if high < 10 * low:
        middle = math.sqrt(low * high)
        place.set_ylim(middle / math.sqrt(10), middle * math.sqrt(10))


# --- the command ------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("mlx", "cuda", "both"), default="both")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rows", type=int, default=BASE.rows, help="training rows of the base point")
    parser.add_argument("--tokens", type=int, default=BASE.tokens, help="tokens of a row at the base point")
    parser.add_argument("--layers", type=int, default=BASE.layers, help="layers at the base point")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: %(default)s")
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.rows % BATCH_SIZE:
        parser.error(f"--rows must be a multiple of {BATCH_SIZE}")
    if args.tokens < 4 * PROMPT:
        parser.error(f"--tokens must be {4 * PROMPT} or more: the chat template takes some")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.turn:
        print(json.dumps(take_turn(Turn(**json.loads(args.turn[1])))))
        return
    base = Point(args.rows, args.tokens, args.layers)
    reports: dict[str, Result] = {}
    for backend in ("mlx", "cuda") if args.backend == "both" else (args.backend,):
        about = facts(backend, args.device, script="growth.py", arguments=arguments)
        print(f"{backend}, {about['device']}\n{HEAD}", flush=True)
        found = measure(backend, args.device, base=base)
        reports[backend] = about | {"points": found, "slopes": slopes(found, base)}
        for one in reports[backend]["slopes"]:
            factor = AXES[one["axis"]][-1]
            print(row_of(f"slope: {one['axis']} x{factor}", one))
        save_part(args.output, f"{backend}, {args.device}", reports[backend])
    plot(reports, base, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
