"""Write the small natural-language-inference sample set, ``nli.jsonl``.

The set exists so that a classification run can be tried without downloading anything, and so
that its labels can be trusted: every row comes from a small grammar in which the label is worked
out from the facts (sets of numbers, orders, rules), never guessed from the wording. Each family
of scenes supplies all three labels in equal number, and negated hypotheses occur under every
label, so that no single surface word gives the answer away.

Run it without arguments to rewrite the file, or with ``--check`` to compare only. The same bytes
come out at every run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.samples.nli_facts import (  # noqa: E402
    CONTRADICTION,
    ENTAILMENT,
    NEUTRAL,
    Family,
    conditional,
    counts,
    either,
    implied,
    indoors,
    member,
    quantified,
    scene,
    take_and_add,
)
from data.samples.nli_orders import arrival, compared, inside, last_day, opening, order_of_deeds, shared_out  # noqa: E402

ROWS = 400
SEED = 20240229
TARGET = Path(__file__).resolve().parent / "nli.jsonl"

INSTRUCTION = (
    "Label: 0 = entailment, 1 = neutral, 2 = contradiction. Answer only with JSON that has the"
    ' keys "thought_process" and "predicted_label".'
)

VERDICTS: dict[int, tuple[str, ...]] = {
    ENTAILMENT: (
        "So the hypothesis follows.",
        "The hypothesis must be true.",
        "The hypothesis is therefore true.",
    ),
    NEUTRAL: (
        "The hypothesis may be true or false.",
        "So the hypothesis stays open.",
        "The premise does not settle the hypothesis.",
    ),
    CONTRADICTION: (
        "The hypothesis cannot be true.",
        "So the hypothesis is ruled out.",
        "The hypothesis says otherwise.",
    ),
}

FAMILIES: tuple[Family, ...] = (
    scene,
    counts,
    compared,
    conditional,
    inside,
    quantified,
    arrival,
    implied,
    shared_out,
    member,
    take_and_add,
    order_of_deeds,
    indoors,
    either,
    opening,
    last_day,
)


def build_rows() -> list[dict[str, str | int]]:
    """Return all rows, with labels as even as the count allows and no pair used twice."""
    rng = random.Random(SEED)
    rows: list[dict[str, str | int]] = []
    seen: set[tuple[str, str]] = set()
    while len(rows) < ROWS:
        label = len(rows) % 3
        family = FAMILIES[len(rows) // 3 % len(FAMILIES)]
        premise, hypothesis, reason = family(rng, label)
        if (premise, hypothesis) in seen:
            continue
        seen.add((premise, hypothesis))
        answer = {
            "thought_process": f"{reason} {rng.choice(VERDICTS[label])}",
            "predicted_label": label,
        }
        rows.append(
            {
                "prompt": f"Premise: {premise}\nHypothesis: {hypothesis}\n{INSTRUCTION}",
                "completion": json.dumps(answer, ensure_ascii=False),
                "label": label,
            }
        )
    rng.shuffle(rows)
    return rows


def render(rows: list[dict[str, str | int]]) -> bytes:
    """Return the file's bytes, with plain line feeds on every system."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def main(argv: list[str] | None = None) -> int:
    """Write the file, or with ``--check`` say by exit status whether it is up to date."""
    parser = argparse.ArgumentParser(description="Write nli.jsonl beside this script.")
    parser.add_argument("--check", action="store_true", help="compare only; exit with 1 when the file differs")
    arguments = parser.parse_args(argv)
    data = render(build_rows())
    if arguments.check:
        same = TARGET.is_file() and TARGET.read_bytes() == data
        print(f"{TARGET.name}: {'up to date' if same else 'differs, run make_nli.py'}")
        return 0 if same else 1
    TARGET.write_bytes(data)
    print(f"{TARGET.name}: {ROWS} rows written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
