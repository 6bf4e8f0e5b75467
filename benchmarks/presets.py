"""The settings of mistral-mlx-v1 against those of mistral-mlx-v2, on a model and data that every machine has.

    python benchmarks/presets.py [--backend mlx|cuda] [--seeds 0]

Runs both on SmolLM2-135M-Instruct (16-bit) and the shipped expert questions, the same rows, and prints the table of the
README; the numbers also go to benchmarks/results/presets.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# twice an epoch: v1 takes 11 steps for one, v2 takes 22
EVAL_EVERY = {"mistral-mlx-v1": 5, "mistral-mlx-v2": 11}


def run(preset: str, *, backend: str, seed: int, epochs: int | None, folder: Path) -> dict[str, Any]:
    """One run; a finished one is not repeated."""
    summary = folder / "training_summary.json"
    if not summary.exists():
        command = [
            *(sys.executable, "cli.py", "train", "--preset", preset, "--backend", backend, "--model", MODEL),
            *("--bits", "16", "--data", "data/samples/expert.jsonl", "--set", "data.validation=0.2"),
            *("--eval-every", str(EVAL_EVERY[preset]), "--seed", str(seed), "--output", str(folder)),
            *(("--epochs", str(epochs)) if epochs else ()),
        ]
        subprocess.run(command, cwd=ROOT, check=True)
    result: dict[str, Any] = json.loads(summary.read_text())
    return result


def row(preset: str, result: dict[str, Any]) -> str:
    gap = f"{result['gap']:.3f} [{result['gap_low']:.3f}, {result['gap_high']:.3f}]"
    end = (
        f"stopped early at {result['steps']}" if result["status"] == "early_stopped" else f"all {result['steps']} steps"
    )
    return (
        f"| `{preset}` | {result['base_val_loss']:.3f} | {result['best_val_loss']:.3f} | {result['probe_loss']:.3f} | "
        f"{gap} | {result['grade']} | {result['final_val_loss']:.3f} / {result['final_gap']:.3f} | "
        f"step {result['best_step']}; {end} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=None, help="default: the presets' own 3")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    args = parser.parse_args()
    suffix = f"-{args.epochs}epochs" if args.epochs else ""
    results = {
        preset: run(
            preset,
            backend=args.backend,
            seed=args.seed,
            epochs=args.epochs,
            folder=args.runs / f"bench-{preset}-{args.backend}-{args.seed}{suffix}",
        )
        for preset in EVAL_EVERY
    }
    print("| settings of | base | best val | probe | gap | grade | at the end: val / gap | best; end |")
    print("|---|---|---|---|---|---|---|---|")
    for preset, result in results.items():
        print(row(preset, result))
    record = {"date": str(date.today()), "machine": platform.machine(), "python": platform.python_version()}
    target = ROOT / "benchmarks" / "results" / f"presets{suffix}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
