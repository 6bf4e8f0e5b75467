"""What near copies across a split do to the verdict, and what keeping them on one side does about it.

    python benchmarks/near_copies.py [--model PATH] [--shares 0.1] [--seeds 8] [--backend cuda] [--device cpu]

A third of the shipped expert questions is set aside, never trained on and never validated with: the clean rows. Of the
others, so many are written once more, with one word in twenty exchanged, that copies are the given share of the rows.
Each data set is split twice with the same seed, `data.near_duplicates=null` (naive) and as it is by default (ours), and
trained with the same settings. Rate and epochs are chosen so that the gap lies near a bound of the grades, 0.30: far
from the bounds, copies change the gap but no grade.

Printed for each split are the gap and its grade, as the run says them, and the gap as it is with its grade: what the
gap would be if the validation rows' loss had fallen in training by as much as that of the clean rows, at the same
weights. Which rows are hard by chance is so in both. How much the first lies below the second is how much the run is
flattered: nothing, within its standard error, where the split is honest. Gaps are means over the seeds, and grades are
counted. Leaves benchmarks/results/near_copies.json.
"""

from __future__ import annotations

import argparse
import io
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

from benchmarks.common import RESULTS, Result, facts  # noqa: E402
from benchmarks.watched import GUARD_OFF  # noqa: E402
from core.config import GuardConfig  # noqa: E402
from core.overfitting import GRADES, grade_of  # noqa: E402

RESULT = RESULTS / "near_copies.json"
SAMPLE = ROOT / "data/samples/expert.jsonl"
SPLITS = {"naive": "data.near_duplicates=null", "ours": "data.near_duplicates=0.7"}
CHANGED_WORDS = 0.05
"""Share of a copy's words that are others than its original's."""
SETTINGS = (
    "model.bits=16",
    "data.validation=0.3",
    "data.max_tokens=96",
    "lora.rank=16",
    "lora.alpha=32",
    "lora.dropout=0",
    "optim.lr=2.5e-3",
    "train.batch_size=8",
    "train.accumulation=1",
    "train.epochs=2",
    "eval.every=1000000",
    "eval.batch_size=32",
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


# --- a run ------------------------------------------------------------------------------------------------------------


def train_on(settings: Sequence[str], folder: Path, *, clean_base_loss: float) -> Result:
    """Trains on `data.jsonl` in the folder, then evaluates the clean rows with the adapter."""
    from rich.console import Console

    from core.settings import resolve
    from core.workflow.train import train

    with tempfile.TemporaryDirectory() as run:
        asked = [*settings, f"data.path={folder / 'data.jsonl'}", f"output={run}/run"]
        code = train(resolve(assignments=asked), console=Console(file=io.StringIO()))
        assert code == 0, f"the run ended with {code}"
        summary = json.loads(Path(run, "run/training_summary.json").read_text())
        clean_loss = validation_loss([*clean_data(settings, folder), f"lora.init_adapter={run}/run"])
    fell, clean_fell = summary["base_val_loss"] - summary["best_val_loss"], clean_base_loss - clean_loss
    honest_gap = summary["gap"] + fell - clean_fell
    return {
        **{
            key: summary[key] for key in ("gap", "gap_low", "gap_high", "grade", "steps", "best_step", "num_train_rows")
        },
        "validation_rows": summary["num_val_rows"],
        "base_loss": summary["base_val_loss"],
        "loss": summary["best_val_loss"],
        "clean_base_loss": clean_base_loss,
        "clean_loss": clean_loss,
        "honest_gap": honest_gap,
        "honest_grade": grade_of(honest_gap, GuardConfig().grades),
    }


def clean_data(settings: Sequence[str], folder: Path) -> list[str]:
    """The settings, with the clean rows as validation rows."""
    return [*settings, f"data.path={folder / 'clean'}", "data.near_duplicates=null"]


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
    settings = (*SETTINGS, f"model.path={model}", f"backend={backend}", f"device={device}", f"train.seed={seed}")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "data.jsonl", rows)
        write_rows(folder / "clean/train.jsonl", rows)
        write_rows(folder / "clean/valid.jsonl", clean)
        base_loss = validation_loss(clean_data(settings, folder))
        for split, setting in SPLITS.items():
            found[split] = train_on([*settings, setting], folder, clean_base_loss=base_loss)
            print(f"{share:.0%} copies, seed {seed}: {row_of(split, [found[split]])}", file=sys.stderr, flush=True)
    return found


# --- what is shown ----------------------------------------------------------------------------------------------------

HEAD = (
    "| split | gap | grade | runs' grades | gap as it is | grade | runs' grades | flattered by |\n|---"
    + "|---" * 7
    + "|"
)


def means(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, their grades, and how many runs got which grade."""
    flattered = [turn["honest_gap"] - turn["gap"] for turn in turns]
    spread = statistics.stdev(flattered) / len(flattered) ** 0.5 if len(flattered) > 1 else float("nan")
    found: dict[str, Any] = {"flattered": statistics.fmean(flattered), "flattered_standard_error": spread}
    for gap, grade in (("gap", "grade"), ("honest_gap", "honest_grade")):
        found[gap] = statistics.fmean(turn[gap] for turn in turns)
        found[grade] = grade_of(found[gap], GuardConfig().grades)
        found[f"{grade}s"] = dict(Counter(str(turn[grade]) for turn in turns))
    return found


def row_of(split: str, turns: Sequence[Mapping[str, Any]]) -> str:
    mean = means(turns)
    cells = [
        split,
        *(f"{mean['gap']:.3f}", mean["grade"], _counts(mean["grades"])),
        *(f"{mean['honest_gap']:.3f}", mean["honest_grade"], _counts(mean["honest_grades"])),
        f"{mean['flattered']:z.3f} ± {mean['flattered_standard_error']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def _counts(grades: Mapping[str, int]) -> str:
    return ", ".join(f"{grades[grade]} {grade}" for grade in GRADES if grade in grades)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="auto", help="default: the tool's quickstart model")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1], help="of copies among the rows")
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    about = facts(args.backend, args.device, script="near_copies.py", arguments=arguments)
    for share in args.shares:
        seeds = [measure(args.model, args.backend, args.device, share=share, seed=seed) for seed in range(args.seeds)]
        turns = {split: [one[split] for one in seeds] for split in SPLITS}
        results[f"{share:g}"] = {split: {"means": means(some), "turns": some} for split, some in turns.items()}
        print(f"\n{share:.0%} of the rows are near copies\n{HEAD}")
        print("\n".join(row_of(split, some) for split, some in turns.items()), flush=True)
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps({**about, "settings": SETTINGS, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
