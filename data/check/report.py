"""The check of a data set: what would be trained on, what is wrong with it, and what to expect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.config import RunConfig
from data.check import findings
from data.check.duplicates import Comparison
from data.check.findings import LEVELS, Finding, Level
from data.check.inspection import OTHER_LABELS, Inspection, merged
from data.lines import Line


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """Of the rows that a split trains or is measured on."""

    rows: int
    tokens: int
    targets: int
    is_given: bool
    """Whether the data brought this split."""


@dataclass(frozen=True, slots=True)
class Facts:
    name: str
    format: str
    """`prompt and completion`, …; empty where it is not known."""
    splits: Mapping[str, SplitFacts]
    max_tokens: int
    quantiles: Mapping[str, int]
    """`shortest`, `median`, `p95`, `longest` of the rows' tokens, before the cut."""
    histogram: Sequence[tuple[int, int, int]]
    """(first length, last length, rows) of each bar."""
    share_cut: float
    """Share of the rows that are longer than `max_tokens`, from 0 to 1."""
    share_lost: float
    """Share of the target tokens that the cut takes away, from 0 to 1."""
    labels: Mapping[str, int]
    """Label -> rows, the most frequent first; empty where rows have no labels, or more than `MAX_LABELS`."""
    num_parameters: int | None
    """Of the adapter; None where it is not known."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `data check` says."""

    facts: Facts
    findings: tuple[Finding, ...]
    """The worst first."""
    expectations: tuple[str, ...]
    """What to expect of training on these rows, a sentence each."""

    def of_level(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    def to_json(self) -> dict[str, Any]:
        """For `--json`: `facts`, `findings` and `expectations`, as these classes have them."""
        return asdict(self)


def make_report(
    facts: Facts,
    config: RunConfig,
    inspections: Mapping[str, Inspection],
    comparison: Comparison,
    *,
    said: Sequence[Line] = (),
    bad_rows: tuple[int, Sequence[tuple[str, str]]] = (0, ()),
    others: Sequence[Finding] = (),
) -> Report:
    """Puts together what the parts of the check found.

    Args:
        inspections: by the split that the data brings.
        said: `Prepared.lines`.
        bad_rows: number of rows that could not be read, and some of them: place and reason.
        others: what was found elsewhere.
    """
    found = [
        *others,
        *findings.of_bad_rows(*bad_rows),
        *findings.of_rows(inspections, config.data.max_tokens),
        *findings.of_labels(inspections),
        *findings.of_copies(comparison, is_kept_together=config.data.near_duplicates is not None),
    ]
    found += findings.of_lines(said, {finding.kind for finding in found})
    order = sorted(found, key=lambda finding: LEVELS.index(finding.level))
    return Report(facts, tuple(order), tuple(expect(facts, config)))


def make_facts(
    name: str,
    format_name: str,
    splits: Mapping[str, SplitFacts],
    inspections: Mapping[str, Inspection],
    config: RunConfig,
    *,
    num_parameters: int | None,
) -> Facts:
    """The facts of a report."""
    whole = merged(inspections)
    num_cut = whole.of_kind("truncated").num_rows + whole.of_kind("answer-lost").num_rows
    num_targets = whole.num_targets + whole.num_lost_targets
    shares = {"shortest": 0.0, "median": 0.5, "p95": 0.95}
    return Facts(
        name=name,
        format=format_name,
        splits=splits,
        max_tokens=config.data.max_tokens,
        quantiles={key: whole.lengths.quantile(share) for key, share in shares.items()} | {"longest": whole.longest},
        histogram=list(whole.lengths.bars(10)),
        share_cut=num_cut / whole.num_rows if whole.num_rows else 0.0,
        share_lost=whole.num_lost_targets / num_targets if num_targets else 0.0,
        labels={} if OTHER_LABELS in whole.labels else dict(whole.labels.most_common()),
        num_parameters=num_parameters,
    )


_MANY_PER_TARGET = 1.0
"""Adapter parameters per target token from which memorising is to be expected."""
_FEW_STEPS = 30
_FEW_VALIDATION = 100


def expect(facts: Facts, config: RunConfig) -> Iterator[str]:
    """What to expect, in plain sentences: rows and passes against the adapter's size."""
    train, validation = facts.splits["train"], facts.splits["validation"]
    epochs = config.train.epochs
    passes = f"{epochs:g} time{'' if epochs == 1 else 's'}"
    seen = f"{train.rows:,} rows with {train.targets:,} target tokens, each seen {passes}"
    if facts.num_parameters is None or not train.targets:
        yield f"{seen}."
    else:
        ratio = facts.num_parameters / train.targets
        yield f"{seen}, against {facts.num_parameters:,} adapter parameters: {_amount(ratio)} a target token."
        yield _memory(ratio, facts.num_parameters, train.targets, config)
    if config.train.batch_tokens is None and config.train.max_steps is None:
        rows_a_step = config.train.batch_size * config.train.accumulation
        num_steps = int(-(-train.rows // rows_a_step) * epochs)
        if num_steps < _FEW_STEPS:
            yield (
                f"Only about {num_steps} optimiser steps ({rows_a_step} rows each): that is little to learn from. "
                "Lower train.accumulation or raise train.epochs."
            )
    if 0 < validation.rows < _FEW_VALIDATION:
        rows = f"{validation.rows} validation row{'' if validation.rows == 1 else 's'}"
        folds = "" if validation.is_given else " `train --folds 5` measures it on five."
        yield f"{rows}: much of one split's gap is luck.{folds}"


def _amount(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _memory(ratio: float, num_parameters: int, num_targets: int, config: RunConfig) -> str:
    if ratio < _MANY_PER_TARGET:
        return "Fewer parameters than target tokens: it has to generalise; more rank or more epochs may still help."
    rank = int(config.lora.rank * num_targets / num_parameters)
    start = "More parameters than target tokens: it can learn the rows by heart."
    patience = config.guard.patience
    guard = "turn early stopping on (guard.patience=3)"
    if patience is not None:
        guard = f"leave early stopping on (guard.patience {patience})"
    watch = f"Expect the best step early, and {guard}."
    if config.lora.init_adapter is not None:
        return f"{start} {watch}"
    if rank >= 2:
        return f"{start} {watch} lora.rank {rank} would have about one for each target token."
    frozen = "" if config.lora.frozen_fraction else " or lora.frozen_fraction 0.5"
    return f"{start} {watch} A smaller adapter (lora.rank {max(config.lora.rank // 4, 1)}{frozen}) slows it, no more."


# At the start of a run

_NUM_BRIEF = 4


def stops(report: Report) -> list[Finding]:
    """What a strict run does not start with: problems and warnings."""
    return [finding for finding in report.findings if finding.level != "note"]


def brief(report: Report, said: Sequence[Line] = ()) -> list[str]:
    """At most a handful of lines for the start of a run, the worst first: what is not `said` already."""
    told, texts = findings.told_by(said), {line.text for line in said}
    new = [finding for finding in stops(report) if finding.kind not in told and finding.text not in texts]
    lines = [_line(finding) for finding in new[:_NUM_BRIEF]]
    rest = len(new) - len(lines)
    if rest:
        lines.append(f"and {rest} more finding{'' if rest == 1 else 's'}: python cli.py data check")
    return lines


def _line(finding: Finding) -> str:
    named = [row.origin for row in finding.rows[:3]]
    more = ", …" if finding.num_rows > len(named) else ""
    return finding.text.rstrip(".") + (f" ({', '.join(named)}{more})" if named else "")
