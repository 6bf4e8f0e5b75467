"""What dropout of the adapter adds to an optimiser step.

    python benchmarks/dropout_cost.py [--backend mlx|cuda|both] [--device cpu|gpu]

SmolLM2-135M-Instruct in 16 bits (float32 compute on a CPU), rank 8 on q k v o above the first half of the layers, whose
output is in the prefix store, and batches of 4 rows of the shipped expert questions, as a run of the tool gives them to
its learner. That learner goes through them with dropout switched off and on, in turns. What is printed: medians over
--repeats of a step's seconds without and with it, and of their ratio.

The GPU part has not been measured yet. Leaves benchmarks/results/dropout.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, Result, facts, model_folder, save_part  # noqa: E402
from benchmarks.profile_step import LR, SETUPS, Turn, in_turn, on_batches, parse_with, parser_of, write_rows  # noqa: E402

RESULT = RESULTS / "dropout.json"


def cost(turn: Turn, learner: Any, batches: Sequence[Any], *, rate: float) -> Result:
    def seconds(of_turn: float) -> float:
        switch(learner, turn.backend, of_turn)
        began = time.perf_counter()
        for number, batch in enumerate(batches, start=1):
            float(learner.train_step([batch], step=number, lr=LR).loss)
        return (time.perf_counter() - began) / len(batches)

    for warm_up in (0.0, rate):
        seconds(warm_up)
    turns = [(seconds(0.0), seconds(rate)) for _ in range(turn.repeats)]
    return {
        "rate": rate,
        "seconds_without": statistics.median(without for without, _ in turns),
        "seconds_with": statistics.median(dropping for _, dropping in turns),
        "ratio": statistics.median(dropping / without for without, dropping in turns),
    }


def switch(learner: Any, backend: str, rate: float) -> None:
    """To this rate, which is 0 or the one that the learner was opened with."""
    if backend == "mlx":
        learner.network.has_dropout = rate > 0
        return
    from backends.cuda.lora import LoraLinear

    for module in learner.model.modules():
        if isinstance(module, LoraLinear):
            module.dropout = rate


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, RESULT)
    parser.add_argument("--rate", type=float, default=0.05, help="default: %(default)s")
    parser.set_defaults(rows=219, batches=6, repeats=10)
    args = parse_with(parser, arguments)
    if not 0 < args.rate < 1:
        parser.error("--rate must be above 0 and below 1")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.turn:
        turn = Turn(**json.loads(args.turn[1]))
        print(json.dumps(on_batches(turn, partial(cost, rate=args.rate), dropout=args.rate)))
        return
    for backend in ("mlx", "cuda") if args.backend == "both" else (args.backend,):
        about = facts(backend, args.device, script="dropout_cost.py", arguments=arguments)
        model = str(model_folder(args.model, backend, bits=16))
        with tempfile.TemporaryDirectory() as name:
            data = Path(name) / "rows.jsonl"
            write_rows(args, data)
            turn = Turn(
                model,
                str(data),
                backend,
                args.device,
                num_batches=args.batches,
                repeats=args.repeats,
                **SETUPS["half frozen, stored"],
            )
            found = in_turn(__file__, turn, Path(name) / "cache", "--rate", str(args.rate))
        print(
            f"{Path(args.model).name}, {backend}, {about['device']}: a step takes {found['seconds_without']:.3f} s, "
            f"with dropout {args.rate} {found['seconds_with']:.3f} s, {found['ratio']:.3f} times as long",
            flush=True,
        )
        save_part(args.output, f"{Path(args.model).name}, {backend}, {args.device}", about | found)


if __name__ == "__main__":
    main()
