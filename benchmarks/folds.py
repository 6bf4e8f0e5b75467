"""How much of one split's gap is luck: five folds of the shipped expert questions.

    python benchmarks/folds.py [--model MODEL] [--backend mlx|cuda] [--folds 5] [--epochs 3]

Trains one run for each fold and prints each fold's gap with its own bootstrap interval, which is what a single split
would have said, beside the spread between the folds. The folds have the same settings, seed and first adapter: they
differ in the rows that are held out, and so in those that are trained on. Small enough for a CPU. A benchmark that was
stopped goes on where it was. The numbers go to benchmarks/results/folds.json, a part for each model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, Result, facts, save_part  # noqa: E402
from core.folds import FOLDS_SUMMARY, is_folds, read_plan  # noqa: E402
from core.models import QUICKSTART_MODEL  # noqa: E402

RESULT = RESULTS / "folds.json"
DATA = "data/samples/expert.jsonl"
EVALUATIONS_PER_EPOCH = 2


def run_folds(parent: Path, args: argparse.Namespace) -> Result:
    """Trains what is not trained yet; returns the content of `folds_summary.json`."""
    command = [sys.executable, "cli.py", "train"]
    if is_folds(parent):
        command += ["--resume", str(parent)]
    else:
        command += ["--model", args.model, "--backend", args.backend, "--device", args.device, "--data", DATA]
        command += ["--bits", "16", "--folds", str(args.folds), "--epochs", str(args.epochs), "--lr", str(args.lr)]
        command += ["--max-tokens", str(args.max_tokens), "--eval-every", str(_eval_every(args.folds))]
        command += ["--output", str(parent)]
    if read_plan(parent).get("status") != "finished":
        subprocess.run(command, cwd=ROOT, check=True)
    summary: Result = json.loads((parent / FOLDS_SUMMARY).read_text())
    return summary


def _eval_every(folds: int) -> int:
    """Steps: as often in an epoch however many the folds are; a step is of 8 rows, the settings' default."""
    num_rows = len((ROOT / DATA).read_text(encoding="utf-8").splitlines())
    return max(num_rows * (folds - 1) // folds // 8 // EVALUATIONS_PER_EPOCH, 1)


def show(found: Result) -> None:
    """The table of a result, in Markdown, and the sentence on luck. Pooled: each token counted once, not each fold."""
    print("| fold | rows | validation loss | gap | its own interval | grade |\n|---|---|---|---|---|---|")
    for one in found["results"]:
        loss = f"{one['base_val_loss']:.3f} → {one['best_val_loss']:.3f}"
        interval = f"[{one['gap_low']:z.3f}, {one['gap_high']:z.3f}]"
        rows = f"{one['num_train_rows']} + {one['num_val_rows']}"
        print(f"| {one['fold']} | {rows} | {loss} | {one['gap']:z.3f} | {interval} | {one['grade']} |")
    gap, loss = found["gap"], found["best_val_loss"]
    interval = f"[{gap['low']:z.3f}, {gap['high']:z.3f}]"
    print(f"| fold mean | | {loss['mean']:.3f} | {gap['mean']:z.3f} | {interval} | {found['grade']} |")
    print(f"| standard deviation | | {loss['sd']:.3f} | {gap['sd']:.3f} | {found['own_sd']:.3f} | |")
    if (pooled := found["pooled_val_loss"]) is not None:
        print(f"| pooled, {pooled['num_targets']:,} tokens | | {pooled['base']:.3f} → {pooled['best']:.3f} | | | |")
    print(f"\n{found['luck']}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=QUICKSTART_MODEL, help="default: %(default)s")
    parser.add_argument("--backend", choices=("mlx", "cuda"), default="cuda")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs stay")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: %(default)s")
    args = parser.parse_args(arguments)
    name = Path(args.model).name
    parent = args.runs.resolve() / f"bench-folds-{name}-{args.backend}-{args.folds}-{args.epochs:g}"
    found = run_folds(parent, args)
    show(found)
    names = ("model", "backend", "folds", "epochs", "lr", "max_tokens")
    settings: dict[str, Any] = {**{key: getattr(args, key) for key in names}, "model": name, "data": DATA}
    about = facts(args.backend, args.device, script="folds.py", arguments=arguments)
    save_part(args.output, f"{name}, {args.folds} folds", {**about, "settings": settings, **found})


if __name__ == "__main__":
    main()
