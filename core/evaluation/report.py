"""An evaluation as a whole, and its files: report, summary, rows."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.adapter_files import PEFT_WEIGHTS
from core.evaluation.bootstrap import Verdict
from core.evaluation.classification import Classification
from core.evaluation.labels import Reading
from core.evaluation.losses import PairedLosses
from core.evaluation.text_scores import TextScores
from core.files import read_json, sha256_of, to_json, write_atomic
from core.protocols import FloatArray, IntArray
from core.run import ADAPTERS
from core.sides import SIDES

REPORT = "evaluation_report.json"
SUMMARY_CSV = "evaluation_summary.csv"
ROWS_CSV = "rows.csv"
PLOTS = "plots"
FOLDER = "evaluation"
"""In the run folder."""
EVALUATION = f"{FOLDER}/{REPORT}"
"""In the run folder."""
_ADAPTER = "adapter_sha256"

NUM_NAMED = 10
"""Rows that the report names at either end."""
_EXCERPT = 300


@dataclass(frozen=True, slots=True)
class Answers:
    """What one side wrote."""

    texts: Sequence[str]
    ended: Sequence[bool]
    """Whether the model ended the answer, and neither the limit of tokens nor its own length."""
    readings: Sequence[Reading] | None
    """Their labels; None for rows without labels."""

    @property
    def cut_off(self) -> float:
        """Share of the answers that were not ended."""
        return float(np.mean([not ended for ended in self.ended]))


@dataclass(frozen=True, slots=True)
class Row:
    """A row as a person knows it."""

    number: int
    """Index in its split."""
    origin: str
    question: str
    expected: str | None
    label: str | None
    """None where the rows have no labels."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found."""

    run: str
    adapter_sha256: str
    """Of the adapter that was evaluated, as `adapter_sha256` makes it."""
    model: str
    backend: str
    device: str
    precision: str
    data: str
    split: str
    notes: Sequence[str]
    """What a reader has to know of these rows."""
    rows: Sequence[Row]
    num_available: int
    """Rows of the split, of which `rows` may be a selection."""
    base_nll: FloatArray
    adapter_nll: FloatArray
    num_targets: IntArray
    losses: PairedLosses
    answers: Mapping[str, Answers] | None = None
    """By side; None where nothing was generated."""
    classification: Classification | None = None
    text: TextScores | None = None
    general: Mapping[str, Any] | None = None
    gate: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    losses_key: str = ""
    """Fingerprint of what decides the losses: adapter, base model, device, rows."""

    @property
    def verdict(self) -> Verdict:
        """By the answers where they have labels that could be read, else by the losses."""
        if self.classification is None or self.is_unreadable:
            return self.losses.verdict
        return self.classification.verdict

    @property
    def is_unreadable(self) -> bool:
        """Whether no answer of either side has a label that could be read, so that they show nothing."""
        scores = self.classification
        return scores is not None and scores.base.unreadable == scores.adapter.unreadable == 1.0

    @property
    def by_difference(self) -> list[int]:
        """Places of all rows, that which got worst first."""
        return [int(at) for at in np.argsort(-self.losses.row_differences, kind="stable")]

    def to_dict(self) -> dict[str, Any]:
        """The content of `evaluation_report.json`. Losses in nats per target token; `difference` is the adapter's loss
        of a row less the base model's, above 0 where the row got worse."""
        order = self.by_difference
        return {
            "format": 1,
            "run": self.run,
            _ADAPTER: self.adapter_sha256,
            "model": self.model,
            "backend": self.backend,
            "device": self.device,
            "precision": self.precision,
            "data": self.data,
            "split": self.split,
            "num_available_rows": self.num_available,
            "notes": list(self.notes),
            "verdict": self.verdict,
            "losses": self.losses.to_dict(),
            "classification": None if self.classification is None else self.classification.to_dict(),
            "text": None if self.text is None else self.text.to_dict(),
            "answers": self._answers(),
            "rows": {
                "worst": [self.named(at) for at in order[:NUM_NAMED]],
                "best": [self.named(at) for at in order[::-1][:NUM_NAMED]],
            },
            "general": self.general,
            "gate": self.gate,
            "settings": dict(self.settings),
            "losses_key": self.losses_key,
        }

    def _answers(self) -> dict[str, Any] | None:
        if self.answers is None:
            return None
        return {side: {"num_rows": len(some.texts), "cut_off": some.cut_off} for side, some in self.answers.items()}

    def named(self, at: int) -> dict[str, Any]:
        """A row for the report."""
        row = self.rows[at]
        targets = int(self.num_targets[at])
        found: dict[str, Any] = {
            "row": row.number,
            "origin": row.origin,
            "base_loss": float(self.base_nll[at]) / targets,
            "adapter_loss": float(self.adapter_nll[at]) / targets,
            "difference": float(self.losses.row_differences[at]),
            "num_targets": targets,
            "text": excerpt(row.question, _EXCERPT),
            "expected": None if row.expected is None else excerpt(row.expected, _EXCERPT),
        }
        if self.answers is not None:
            found |= {f"{side}_answer": excerpt(self.answers[side].texts[at], _EXCERPT) for side in SIDES}
        return found


def excerpt(text: str, length: int) -> str:
    """The text in one line, cut off at `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1].rstrip()}…"


def without_common(texts: Sequence[str]) -> list[str]:
    """Each text in one line without the words that all begin and end with: an instruction that every row repeats."""
    words = [text.split() for text in texts]
    shortest = min(map(len, words), default=0)
    if len(set(texts)) < 2 or not shortest:
        return [" ".join(some) for some in words]
    differs = [len({some[at] for some in words}) > 1 for at in range(shortest)]
    start = next((at for at, one in enumerate(differs) if one), 0)
    ends = [len({some[-at] for some in words}) > 1 for at in range(1, shortest - start)]
    end = next((at for at, one in enumerate(ends) if one), len(ends))
    before, after = "… " * bool(start), " …" * bool(end)
    return [before + " ".join(some[start : len(some) - end]) + after for some in words]


# --- files ------------------------------------------------------------------------------------------------------------


def adapter_sha256(run_folder: Path) -> str | None:
    """SHA-256 of the weights in `adapters/`, to tell an adapter from an earlier one; None where there are none.

    Of the file and not of the adapter's values, for those can't be read without the base model's architecture.
    """
    path = run_folder / ADAPTERS / PEFT_WEIGHTS
    return sha256_of(path) if path.is_file() else None


@dataclass(frozen=True, slots=True)
class FoundEvaluation:
    """What `evaluate` wrote of a run's adapter."""

    report: Mapping[str, Any] | None
    """None where there is nothing, or not of the adapter as it is now."""
    note: str | None = None
    """Why a report that is there is not used, and what to type."""


def read_evaluation_of(run_folder: Path) -> FoundEvaluation:
    """The evaluation of the adapter in `adapters/`.

    A run that went on after it was evaluated has another adapter than the one that was; where no adapter is left, there
    is none that the evaluation could be mistaken for.
    """
    report = read_json(run_folder / EVALUATION)
    if not isinstance(report, dict):
        return FoundEvaluation(None)
    now, then = adapter_sha256(run_folder), report.get(_ADAPTER)
    if now in (None, then):
        return FoundEvaluation(report)
    why = "does not say of which adapter it is" if then is None else "is of an earlier adapter"
    again = f"python cli.py evaluate {shlex.quote(str(run_folder))}"
    return FoundEvaluation(None, f"the evaluation {why} and is left out; again: {again}")


def earlier_findings(folder: Path, evaluation: Evaluation) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What an earlier evaluation in this folder found and a new one did not look at, as far as it still holds.

    Returns the general texts, which are of the adapter on its base model, and the gate's decision, which is of these
    very rows as well; None each where there is none.
    """
    report = read_json(folder / REPORT)
    if not isinstance(report, dict):
        return None, None
    now = evaluation.to_dict()
    if any(report.get(name) != now[name] for name in (_ADAPTER, "model", "precision", "backend", "device")):
        return None, None
    general, gate = report.get("general"), report.get("gate")
    has_same_rows = bool(evaluation.losses_key) and report.get("losses_key") == evaluation.losses_key
    return (
        general if isinstance(general, dict) else None,
        gate if has_same_rows and isinstance(gate, dict) else None,
    )


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Writes `evaluation_report.json`, `evaluation_summary.csv` and `rows.csv`, each whole; the report last."""
    write_atomic(folder / ROWS_CSV, rows_csv(evaluation))
    write_atomic(folder / SUMMARY_CSV, summary_csv(evaluation))
    write_atomic(folder / REPORT, to_json(evaluation.to_dict()))


def summary_csv(evaluation: Evaluation) -> str:
    """A line for each side with its key figures; empty where there is none."""
    report = evaluation.to_dict()
    scores, texts = report["classification"] or {}, report["text"] or {}
    columns = ("accuracy", "precision", "recall", "f1", "f1_low", "f1_high", "unreadable", "strict_json")
    text_columns = ("exact_match", "rouge_l")
    out = io.StringIO()
    writer = csv.writer(out)
    head = ("side", "run", "model", "backend", "data", "split", "num_rows", "num_targets", "loss", "perplexity")
    writer.writerow((*head, *columns, *text_columns, "verdict"))
    losses = report["losses"]
    for side in SIDES:
        writer.writerow(
            (
                side,
                *(report[name] for name in head[1:6]),
                losses["num_rows"],
                losses["num_targets"],
                losses[side]["loss"],
                losses[side]["perplexity"],
                *(scores.get(side, {}).get(name) for name in columns),
                *(texts.get(side, {}).get(name) for name in text_columns),
                report["verdict"] if side == "adapter" else None,
            )
        )
    return out.getvalue()


def rows_csv(evaluation: Evaluation) -> str:
    """A line for each row: both losses and, where there are answers, what was expected and answered."""
    answers, has_labels = evaluation.answers, evaluation.classification is not None
    rouge = evaluation.text.per_row if evaluation.text is not None else None
    columns = ["row", "origin", "num_targets", "base_loss", "adapter_loss", "difference"]
    columns += ["label", "base_label", "adapter_label"] if has_labels else []
    columns += ["base_rouge_l", "adapter_rouge_l"] if rouge is not None else []
    columns += ["expected", "base_answer", "adapter_answer"] if answers is not None else []
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    for at, row in enumerate(evaluation.rows):
        named = evaluation.named(at)
        line = [named[name] for name in ("row", "origin", "num_targets", "base_loss", "adapter_loss", "difference")]
        if has_labels and answers is not None:
            line += [row.label, *(_label(answers[side], at) for side in SIDES)]
        if rouge is not None:
            line += [float(side[at]) for side in rouge]
        if answers is not None:
            line += [row.expected, *(answers[side].texts[at] for side in SIDES)]
        writer.writerow(line)
    return out.getvalue()


def _label(answers: Answers, at: int) -> str | None:
    assert answers.readings is not None
    return answers.readings[at].label
