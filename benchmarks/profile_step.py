"""Where the time of an optimiser step goes, and how far it is from the machine's limit.

    python benchmarks/profile_step.py [--backend mlx|cuda|both] [--device cpu|gpu]

SmolLM2-135M-Instruct in 16 bits (float32 compute on a CPU), rank 8 on q k v o, batches of 4 rows of the shipped expert
questions, in three set-ups: nothing frozen; the first half of the layers frozen; the same with the frozen half's output
in the prefix store. The batches are those that a run of the tool gives its learner: the run is started as ever, and the
clock is held to the learner's calls.

Against the limit: the multiply-adds that the step needs (`dense_work.py`: real tokens, logits at targets only), over
the time of a step, as a share of the rate of one large float32 product (bfloat16 on a GPU) of the same library in the
same process. The rate of a product of this model's typical shape, all tokens of a batch through one MLP matrix, stands
beside it: what is lost there is lost to the library.

Where the time goes, by leaving parts out (both backends): the layers forward (an evaluation with one target), the head
and the loss forward (what all targets add to it), the update and what every step costs (a step of one row of 8 tokens,
less its evaluation), and the backward pass, which is the rest. For PyTorch there is also the profiler's own time of
each kind of operation, with batches trained on whole, and how often the host waits for the device in steps between two
logs. Medians of --repeats.

The GPU part has not been measured yet. Leaves benchmarks/results/profile.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import (  # noqa: E402
    RESULTS,
    Result,
    facts,
    in_new_process,
    model_folder,
    save_part,
)
from benchmarks.dense_work import PARTS, work_of_a_step  # noqa: E402
from benchmarks.profile_torch import by_kind, host_waits  # noqa: E402
from benchmarks.watched import GUARD_OFF, watched_train  # noqa: E402

RESULT = RESULTS / "profile.json"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANK, BATCH_SIZE, LR = 8, 4, 1e-4
SETUPS: dict[str, dict[str, Any]] = {
    "nothing frozen": {"frozen": 0.0, "stored": False},
    "half frozen": {"frozen": 0.5, "stored": False},
    "half frozen, stored": {"frozen": 0.5, "stored": True},
}
SPLIT = ("layers forward", "head and loss forward", "backward", "update and per-step costs")


@dataclass(frozen=True)
class Turn:
    """What a process is told."""

    model: str
    data: str
    backend: str
    device: str
    frozen: float
    stored: bool
    num_batches: int
    repeats: int


class EnoughSeen(Exception):
    """Ends the run that the batches came from."""


# --- one turn, in a process of its own --------------------------------------------------------------------------------


def on_batches(turn: Turn, measure: Callable[[Turn, Any, Sequence[Any]], Result], *, dropout: float = 0.0) -> Result:
    """What `measure` makes of a run's learner and its first batches; the run ends there."""
    found: Result = {}
    batches: list[Any] = []

    def on_learner(learner: Any) -> None:
        train_step = learner.train_step

        def watch(microbatches: Sequence[Any], *, step: int, lr: float) -> Any:
            batches.extend(microbatches)
            if len(batches) < turn.num_batches:
                return train_step(microbatches, step=step, lr=lr)
            learner.train_step = train_step
            found.update(measure(turn, learner, batches))
            raise EnoughSeen

        learner.train_step = watch

    with tempfile.TemporaryDirectory() as name:
        try:
            settings = [*settings_of(turn), f"lora.dropout={dropout}"]
            watched_train(settings, backend=turn.backend, run=Path(name) / "run", on_learner=on_learner)
        except EnoughSeen:
            return found
    raise AssertionError(f"the run ended before {turn.num_batches} steps")


def settings_of(turn: Turn) -> list[str]:
    return [
        f"device={turn.device}",
        f"model.path={turn.model}",
        "model.bits=16",
        f"data.path={turn.data}",
        f"lora.rank={RANK}",
        f"lora.frozen_fraction={turn.frozen}",
        f"train.batch_size={BATCH_SIZE}",
        "train.accumulation=1",
        f"train.prefix_store={str(turn.stored).lower()}",
        "eval.probe_rows=1",
        f"eval.every={10**6}",
        *GUARD_OFF,
    ]


def profile(turn: Turn, learner: Any, batches: Sequence[Any]) -> Result:
    """The figures of the batches' steps; per step, in seconds."""
    assert (batches[0].prefix is not None) == turn.stored
    config = json.loads((Path(turn.model) / "config.json").read_text())
    rates = matmul_rates(turn, config, rows=round(statistics.fmean(batch.inputs.size for batch in batches)))
    splits = [split_of(learner, batch, wait_for(turn.backend), turn.repeats) for batch in batches]
    seconds = statistics.fmean(one["step"] for one in splits)
    work = mean_work(turn, config, batches)
    needed = sum(sum(part.values()) for part in work.values())
    found: Result = {
        "tokens": sum(batch.num_real_tokens for batch in batches) / len(batches),
        "positions": sum(batch.inputs.size for batch in batches) / len(batches),
        "targets": sum(batch.num_targets for batch in batches) / len(batches),
        "multiply_adds": work,
        "rates_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "seconds_per_step": seconds,
        "share_of_limit": 2 * needed / seconds / rates["large"],
        "share_of_typical": 2 * needed / seconds / rates["typical"],
        "split": {part: statistics.fmean(one[part] for one in splits) for part in SPLIT},
    }
    if turn.backend == "cuda":
        steps = _steps(learner, batches)
        learner._most_parts = 1  # the profiler sees this thread only
        found["by_kind"] = by_kind(steps, vocab_size=config["vocab_size"])
        found["host_waits_per_step"], found["scalar_reads_per_step"] = host_waits(steps, len(batches))
    return found


def _steps(learner: Any, batches: Sequence[Any]) -> Callable[[], None]:
    """Steps without a log between them: no loss is read."""

    def run() -> None:
        for number, batch in enumerate(batches, start=1):
            learner.train_step([batch], step=number, lr=LR)

    return run


def mean_work(turn: Turn, config: Mapping[str, Any], batches: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Multiply-adds of a step by direction and part of the model, over the batches."""
    found: dict[str, dict[str, float]] = {}
    for batch in batches:
        work = work_of_a_step(
            config,
            lengths=batch.is_token.sum(axis=1).tolist(),
            num_targets=batch.num_targets,
            first_layer=int(turn.frozen * config["num_hidden_layers"] + 1e-9),
            rank=RANK,
            stored=turn.stored,
        )
        for direction, parts in asdict(work).items():
            sums = found.setdefault(direction, {})
            for part, count in parts.items():
                sums[part] = sums.get(part, 0.0) + count / len(batches)
    return found


# --- time by leaving parts out ----------------------------------------------------------------------------------------


def split_of(learner: Any, batch: Any, wait: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of a step on a batch and of its parts."""
    from core.protocols import IGNORE

    one_target = np.full_like(batch.targets, IGNORE)
    row, column = np.argwhere(batch.targets != IGNORE)[-1]
    one_target[row, column] = batch.targets[row, column]
    small = smallest(batch)

    def step(one: Any) -> Callable[[], object]:
        return lambda: float(learner.train_step([one], step=1, lr=0.0).grad_norm)

    def evaluation(one: Any) -> Callable[[], object]:
        return lambda: learner.evaluate([one])

    seconds = {
        name: median_seconds(action, wait, repeats)
        for name, action in {
            "step": step(batch),
            "forward": evaluation(batch),
            "one target": evaluation(replace(batch, targets=one_target)),
            "small step": step(small),
            "small forward": evaluation(small),
        }.items()
    }
    update = max(seconds["small step"] - seconds["small forward"], 0.0)
    forward = min(seconds["one target"], seconds["forward"])
    parts = (forward, seconds["forward"] - forward, seconds["step"] - seconds["forward"] - update, update)
    return {"step": seconds["step"], **dict(zip(SPLIT, parts, strict=True))}


def smallest(batch: Any, width: int = 8) -> Any:
    """Its first row's first tokens, with a target at each."""
    inputs = batch.inputs[:1, :width]
    known = batch.prefix and replace(batch.prefix, states=batch.prefix.states[:1, :width])
    return replace(batch, row_ids=batch.row_ids[:1], inputs=inputs, targets=inputs.copy(), prefix=known)


def median_seconds(action: Callable[[], object], wait: Callable[[], object], repeats: int) -> float:
    """Of one call, the device's work included; the first call is not counted."""
    action()
    wait()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def wait_for(backend: str) -> Callable[[], object]:
    """Returns what waits until the device has done what it was given."""
    if backend == "mlx":
        import mlx.core as mx

        return mx.synchronize
    import torch

    return torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


# --- the limit --------------------------------------------------------------------------------------------------------


def matmul_rates(turn: Turn, config: Mapping[str, Any], *, rows: int) -> dict[str, float]:
    """Operations a second, two for a multiply-add: of a large square product, and of `rows` positions through a matrix
    of the MLP. The best of several: what the machine can do."""
    size = 8192 if turn.device == "gpu" else 2048
    shapes = {"large": (size, size, size), "typical": (rows, config["hidden_size"], config["intermediate_size"])}
    return {name: _rate(turn, *shape) for name, shape in shapes.items()}


def _rate(turn: Turn, rows: int, size_in: int, size_out: int) -> float:
    multiply, wait = _product(turn, rows, size_in, size_out), wait_for(turn.backend)
    work = 2.0 * rows * size_in * size_out
    count = max(int(2e9 / work), 1)

    def several() -> None:
        for _ in range(count):
            multiply()

    several()
    wait()
    times = []
    for _ in range(max(turn.repeats, 3)):
        began = time.perf_counter()
        several()
        wait()
        times.append(time.perf_counter() - began)
    return count * work / min(times)


def _product(turn: Turn, rows: int, size_in: int, size_out: int) -> Callable[[], object]:
    if turn.backend == "mlx":
        import mlx.core as mx

        kind = mx.bfloat16 if turn.device == "gpu" else mx.float32
        left, right = (mx.random.normal(shape).astype(kind) for shape in ((rows, size_in), (size_out, size_in)))
        mx.eval(left, right)
        return lambda: mx.eval(left @ right.T)
    import torch

    place = torch.device("cuda" if turn.device == "gpu" else "cpu")
    dtype = torch.bfloat16 if turn.device == "gpu" else torch.float32
    one, other = (torch.randn(shape, device=place).to(dtype) for shape in ((rows, size_in), (size_out, size_in)))
    return lambda: torch.mm(one, other.T)


# --- what is printed --------------------------------------------------------------------------------------------------


def table(reports: Mapping[str, Result]) -> str:
    """A column for each set-up."""
    lines = [f"| | {' | '.join(reports)} |", f"|---|{'---|' * len(reports)}"]

    def line(name: str, value: Callable[[Result], str]) -> None:
        lines.append(f"| {name} | {' | '.join(value(report) for report in reports.values())} |")

    line("tokens / targets of a step", lambda one: f"{one['tokens']:.0f} / {one['targets']:.0f}")
    line("padding", lambda one: f"{1 - one['tokens'] / one['positions']:.1%}")
    for part in PARTS:
        line(f"{part}, multiply-adds in 10^9", lambda one, part=part: f"{_sum_of(one, part) / 1e9:.2f}")  # type: ignore[misc]
    line("multiply-adds in 10^9", lambda one: f"{sum(_sum_of(one, part) for part in PARTS) / 1e9:.1f}")
    line("limit: large product, GFLOP/s", lambda one: f"{one['rates_gflops']['large']:.1f}")
    line("typical product, GFLOP/s", lambda one: f"{one['rates_gflops']['typical']:.1f}")
    line("a step, s", lambda one: f"{one['seconds_per_step']:.3f}")
    line("share of the limit", lambda one: f"{one['share_of_limit']:.0%}")
    line("share of the typical product's rate", lambda one: f"{one['share_of_typical']:.0%}")
    for part in SPLIT:
        line(f"{part}, s", lambda one, part=part: _with_share(one["split"][part], one["seconds_per_step"]))  # type: ignore[misc]
    for kind in next(iter(reports.values())).get("by_kind", ()):
        line(f"profiler: {kind}", lambda one, kind=kind: f"{one['by_kind'][kind]:.1%}")  # type: ignore[misc]
    if "host_waits_per_step" in next(iter(reports.values())):
        line("waits for the device a step", lambda one: f"{sum(one['host_waits_per_step'].values()):.1f}")
        line("scalars read a step", lambda one: f"{one['scalar_reads_per_step']['aten::item']:.1f}")
    return "\n".join(lines)


def _sum_of(report: Result, part: str) -> float:
    return float(sum(parts.get(part, 0.0) for parts in report["multiply_adds"].values()))


def _with_share(seconds: float, whole: float) -> str:
    return f"{seconds:.3f} ({seconds / whole:.0%})"


# --- the command ------------------------------------------------------------------------------------------------------


def parser_of(description: str | None, output: Path) -> argparse.ArgumentParser:
    """What a script takes that measures steps on the batches of a run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("mlx", "cuda", "both"), default="both")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--model", default=MODEL, help="hub id or folder of a dense model")
    parser.add_argument("--data", type=Path, default=ROOT / "data/samples/expert.jsonl")
    parser.add_argument("--rows", type=int, default=32, help="rows of the data")
    parser.add_argument("--batches", type=int, default=4, help="batches whose steps are measured")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is measured")
    parser.add_argument("--output", type=Path, default=output, help="default: %(default)s")
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)
    return parser


def parse_with(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(arguments)
    if args.rows < 2 * BATCH_SIZE * args.batches:  # a fifth of them is for validation
        parser.error(f"--rows must be {2 * BATCH_SIZE * args.batches} or more for --batches {args.batches}")
    if not args.data.is_file():
        parser.error(f"--data {args.data}: no such file")
    return args


def write_rows(args: argparse.Namespace, path: Path) -> None:
    lines = args.data.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: args.rows]), encoding="utf-8")


def in_turn(script: str, turn: Turn, cache: Path, *options: str) -> Result:
    """What a process of its own measures."""
    environment = {"TWINKEEL_CACHE": str(cache), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
    return in_new_process(script, [turn.backend, json.dumps(asdict(turn)), *options], environment=environment)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_with(parser_of(__doc__, RESULT), arguments)
    if args.turn:
        print(json.dumps(on_batches(Turn(**json.loads(args.turn[1])), profile)))
        return
    for backend in ("mlx", "cuda") if args.backend == "both" else (args.backend,):
        about = facts(backend, args.device, script="profile_step.py", arguments=arguments)
        with tempfile.TemporaryDirectory() as name:
            data = Path(name) / "rows.jsonl"
            write_rows(args, data)
            model = str(model_folder(args.model, backend, bits=16))
            reports = {}
            for title, setup in SETUPS.items():
                turn = Turn(
                    model, str(data), backend, args.device, num_batches=args.batches, repeats=args.repeats, **setup
                )
                reports[title] = in_turn(__file__, turn, Path(name) / "cache")
        print(f"{Path(args.model).name}, {backend}, {about['device']}\n\n{table(reports)}\n", flush=True)
        save_part(args.output, f"{Path(args.model).name}, {backend}, {args.device}", about | {"setups": reports})


if __name__ == "__main__":
    main()
