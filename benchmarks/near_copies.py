"""What near copies across a split do to the verdict, and what keeping them on one side does about it.

    python benchmarks/near_copies.py [--model PATH] [--shares 0.1 0.5] [--seeds 5] [--backend cuda] [--device cpu]

A third of the shipped expert questions is set aside, never trained on and never validated with: the clean rows. Of the
others, so many are written once more, with one word in twenty exchanged, that copies are the given share of the rows.
Each data set is split twice with the same seed, `data.near_duplicates=null` (naive) and as it is by default (ours), and
trained with the same settings. Printed are, as means over the seeds: the loss of the validation rows and of the clean
rows after the last step, by how much each fell in training, the gap and the grades. Where validation is honest, both
losses fall alike. Leaves benchmarks/results/near_copies.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, Result, facts, in_new_process  # noqa: E402
from benchmarks.watched import GUARD_OFF  # noqa: E402

RESULT = RESULTS / "near_copies.json"
SAMPLE = ROOT / "data/samples/expert.jsonl"
SPLITS = {"naive": "data.near_duplicates=null", "ours": "data.near_duplicates=0.7"}
CHANGED_WORDS = 0.05
"""Share of a copy's words that are others than its original's."""
SETTINGS = (
    "model.bits=16",
    "data.validation=0.2",
    "data.max_tokens=192",
    "lora.rank=32",
    "lora.alpha=64",
    "lora.targets=all-linear",
    "lora.dropout=0",
    "optim.lr=3e-3",
    "train.batch_size=8",
    "train.accumulation=1",
    "train.epochs=4",
    "eval.every=1000000",
    "log.every=20",
    *GUARD_OFF,
)
"""To the last step, and only then evaluated: so both splits are judged after the same number of epochs."""

Rows = list[dict[str, str]]


# --- the data ---------------------------------------------------------------------------------------------------------


def with_words_changed(text: str, words: Sequence[str], draw: random.Random) -> str:
    """The text with one word in twenty exchanged, one at least."""
    own = text.split(" ")
    for place in draw.sample(range(len(own)), max(round(CHANGED_WORDS * len(own)), 1)):
        own[place] = draw.choice(words)
    return " ".join(own)


def make_rows(rows: Rows, *, share: float, seed: int) -> tuple[Rows, Rows]:
    """Rows of which `share` are near copies of others, and clean rows, which are neither these nor copies of them."""
    draw = random.Random(seed)
    rows = draw.sample(rows, len(rows))
    clean, originals = rows[: len(rows) // 3], rows[len(rows) // 3 :]
    words = [word for row in originals for text in row.values() for word in text.split()]
    copied = draw.sample(originals, round(len(originals) * share / (1 - share)))
    copies = [{key: with_words_changed(text, words, draw) for key, text in row.items()} for row in copied]
    return draw.sample(originals + copies, len(originals + copies)), clean


def write_rows(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- a turn -----------------------------------------------------------------------------------------------------------


def take_turn(settings: Sequence[str], folder: Path) -> Result:
    """Trains on `data.jsonl` in the folder; the clean rows are evaluated with the base model and with the adapter."""
    from rich.console import Console

    from core.settings import resolve
    from core.workflow.train import train

    run = folder / "run"
    asked = [*settings, f"data.path={folder / 'data.jsonl'}", f"output={run}"]
    code = train(resolve(assignments=asked), console=Console(file=sys.stderr))
    assert code == 0, f"the run ended with {code}"
    summary = json.loads((run / "training_summary.json").read_text())
    own = [*settings, f"data.path={folder / 'clean'}", "data.near_duplicates=null"]
    return {
        **{
            key: summary[key] for key in ("gap", "gap_low", "gap_high", "grade", "steps", "best_step", "num_train_rows")
        },
        "validation_rows": summary["num_val_rows"],
        "base_loss": summary["base_val_loss"],
        "loss": summary["best_val_loss"],
        "clean_base_loss": validation_loss(own),
        "clean_loss": validation_loss([*own, f"lora.init_adapter={run}"]),
    }


def validation_loss(assignments: Sequence[str]) -> float:
    """Loss of the data's validation rows before a step is taken."""
    import numpy as np

    from core.settings import resolve
    from core.workflow.job import opened, prepare

    settings = resolve(assignments=assignments)
    job = prepare(settings.config, choose_bits=False, sources=settings.sources)
    with opened(job) as learner:
        found = learner.evaluate(job.data.validation)
    return float(np.sum(found.nll) / np.sum(found.num_targets))


def measure(model: str, backend: str, device: str, *, share: float, seed: int) -> dict[str, Result]:
    rows, clean = make_rows([json.loads(line) for line in SAMPLE.read_text().splitlines()], share=share, seed=seed)
    found = {}
    for split, setting in SPLITS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "data.jsonl", rows)
            write_rows(folder / "clean/train.jsonl", rows)
            write_rows(folder / "clean/valid.jsonl", clean)
            place = (f"model.path={model}", f"backend={backend}", f"device={device}", f"train.seed={seed}")
            found[split] = in_new_process(__file__, [json.dumps([*SETTINGS, *place, setting]), name])
        print(f"{share:.0%} copies, seed {seed}, {row_of(split, [found[split]])}", flush=True)
    return found


# --- what is shown ----------------------------------------------------------------------------------------------------

HEAD = (
    "| split | validation loss | clean rows | validation fell by | clean rows fell by | gap | grades |\n"
    "|---|---|---|---|---|---|---|"
)


def means(turns: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the seeds. `flattered` is by how much more the validation loss fell than that of the clean rows."""
    fell = [turn["base_loss"] - turn["loss"] for turn in turns]
    clean_fell = [turn["clean_base_loss"] - turn["clean_loss"] for turn in turns]
    flattered = [one - other for one, other in zip(fell, clean_fell, strict=True)]
    spread = statistics.stdev(flattered) / len(flattered) ** 0.5 if len(flattered) > 1 else float("nan")
    return {
        **{key: statistics.fmean(turn[key] for turn in turns) for key in ("loss", "clean_loss", "gap")},
        "fell": statistics.fmean(fell),
        "clean_fell": statistics.fmean(clean_fell),
        "flattered": statistics.fmean(flattered),
        "flattered_standard_error": spread,
    }


def row_of(split: str, turns: Sequence[Mapping[str, Any]]) -> str:
    mean = means(turns)
    grades = Counter(str(turn["grade"]) for turn in turns)
    return (
        f"| {split} | {mean['loss']:.3f} | {mean['clean_loss']:.3f} | {mean['fell']:.3f} | {mean['clean_fell']:.3f} | "
        f"{mean['gap']:.3f} | {', '.join(f'{number} {grade}' for grade, number in grades.most_common())} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="auto", help="default: the tool's quickstart model")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.5], help="of copies among the rows")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.turn:
        print(json.dumps(take_turn(json.loads(args.turn[0]), Path(args.turn[1]))))
        return
    results: dict[str, Any] = {}
    for share in args.shares:
        seeds = [measure(args.model, args.backend, args.device, share=share, seed=seed) for seed in range(args.seeds)]
        turns = {split: [one[split] for one in seeds] for split in SPLITS}
        results[f"{share:g}"] = {split: {"means": means(some), "turns": some} for split, some in turns.items()}
        print(f"\n{share:.0%} of the rows are near copies\n{HEAD}")
        print("\n".join(row_of(split, some) for split, some in turns.items()), flush=True)
    about = facts(args.backend, args.device, script="near_copies.py", arguments=arguments)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({**about, "settings": SETTINGS, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
