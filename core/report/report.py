"""What a report shows of a run, read from its folder: numbers as text, charts as SVG, in the order of the page.

`core.report.page` makes the page of it. Nothing here is about the data's texts: `core.workflow.report` adds what has to
be read from the data.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.comparison.compare import shown_setting
from core.config import BASE_MODEL, RunConfig
from core.errors import UserError
from core.evaluation.report import read_evaluation_of
from core.folds import fold_name, is_folds
from core.journal import ROUTING, read_records
from core.monitor import RunReader, Snapshot
from core.records import Record, gap_of, number, whole
from core.routing import shares_of
from core.run import ADAPTERS, COMPLETE, CONFIG
from core.run_summary import summary_of
from core.screen import count, duration
from core.settings import load_config
from core.settings import values as settings_of
from core.verdict import NOT_JUDGED, verdict_lines

_LABELLED = re.compile(r"  (?P<label>note|experts|validation loss|gap)  +(?P<text>.*)")
_SIZE = "trained on"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer."""

    headline: str
    tone: str
    """`good`, `doubtful`, `bad` or `open`: how it is coloured; the words say the same."""
    facts: tuple[tuple[str, str], ...]
    """Label and text."""


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    value: str
    default: str


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run as far as its folder shows it."""

    folder: Path
    name: str
    config: RunConfig
    snapshot: Snapshot
    summary: Mapping[str, Any]
    verdict: Verdict
    training: tuple[tuple[float, float], ...]
    """Step and training loss of each record that has one."""
    evaluations: tuple[Record, ...]
    """All of them, oldest first."""
    routing: tuple[Record, ...]
    """Before training and at the best step, of a mixture; each with `routing`."""
    evaluation: Mapping[str, Any]
    """What `evaluate` wrote of this adapter; empty where it was not called."""
    changed: tuple[Setting, ...]
    """Settings that are not the defaults."""
    defaults: tuple[Setting, ...]
    environment: tuple[tuple[str, str], ...]
    commands: tuple[tuple[str, str], ...]
    """What to do next, and what to type."""
    problems: tuple[str, ...] = field(default=())
    evaluation_note: str | None = None
    """Why an evaluation that is there is not shown."""

    @property
    def status(self) -> str:
        return self.snapshot.status.replace("_", " ")

    @property
    def is_judged(self) -> bool:
        """Whether rows are held out, so that there is a gap."""
        return not (self.summary.get(NOT_JUDGED) or self.snapshot.state.get(NOT_JUDGED))


def read_report(folder: Path) -> RunReport:
    """Reads a run, whatever state it is in.

    Raises:
        UserError: folds, each of which has a report of its own; or a `config.yaml` that can't be read.
    """
    if is_folds(folder):
        raise UserError(
            f"{folder}: these are folds, each a run of its own",
            hint=f"report one, such as: python cli.py report {shlex.quote(str(folder / fold_name(1)))}",
        )
    config = load_config(folder / CONFIG)
    snapshot = RunReader(folder).poll()
    summary = summary_of(snapshot)
    training, evaluations = _records(folder)
    changed, defaults = settings_tables(config)
    evaluation = read_evaluation_of(folder)
    return RunReport(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        snapshot=snapshot,
        summary=summary,
        verdict=make_verdict(folder, snapshot, summary),
        training=training,
        evaluations=evaluations,
        routing=tuple(_routing(evaluations, whole(snapshot.state.get("best_step")))),
        evaluation=evaluation.report or {},
        changed=changed,
        defaults=defaults,
        environment=tuple(environment(snapshot, summary)),
        commands=tuple(next_commands(folder, snapshot, has_evaluation=evaluation.report is not None)),
        problems=snapshot.problems,
        evaluation_note=evaluation.note,
    )


def _records(folder: Path) -> tuple[tuple[tuple[float, float], ...], tuple[Record, ...]]:
    training, evaluations = [], []
    for record, _ in read_records(folder):
        step = whole(record.get("step")) if isinstance(record, dict) else None
        if step is None:
            continue
        if (loss := number(record.get("loss"))) is not None:
            training.append((float(step), loss))
        if number(record.get("val_loss")) is not None or number(record.get("probe_loss")) is not None:
            evaluations.append(record)
    return tuple(training), tuple(evaluations)


def _routing(evaluations: Sequence[Record], best_step: int | None) -> Iterator[Record]:
    known = [record for record in evaluations if shares_of(record.get(ROUTING)) is not None]
    if known:
        yield known[0]
    best = next((record for record in known[1:] if record.get("step") == best_step), None)
    if best is not None or len(known) > 1:
        yield best or known[-1]


# --- verdict ----------------------------------------------------------------------------------------------------------


def make_verdict(folder: Path, snapshot: Snapshot, summary: Mapping[str, Any]) -> Verdict:
    """The verdict of `core.verdict`, or, of a run that has none, how it stands."""
    if snapshot.status == "failed":
        reason = snapshot.state.get("error") or summary.get("error") or "no reason was written down"
        return Verdict(f"Failed at step {snapshot.step}: {reason}", "bad", tuple(_so_far(snapshot)))
    if snapshot.status not in (*COMPLETE, "interrupted"):
        words = {"died": "Its process ended without a word", "silent": "No sign of life from its machine"}
        where = (
            f"step {snapshot.step:,} of {snapshot.total_steps:,}" if snapshot.total_steps else f"step {snapshot.step}"
        )
        headline = f"{words.get(snapshot.status, f'Not finished ({snapshot.status})')}: {where}."
        return Verdict(headline, "bad" if snapshot.status == "died" else "open", tuple(_so_far(snapshot)))
    gap = gap_of({**summary, "val_loss": summary.get("best_val_loss")})
    needed = ("base_val_loss", "num_target_tokens", "wall_seconds", "peak_memory_gb", "num_val_rows")
    if not summary or any(summary.get(name) is None for name in needed if gap is not None):
        headline = f"Interrupted at step {snapshot.step}." if snapshot.status == "interrupted" else "No summary."
        return Verdict(headline, "open", tuple(_so_far(snapshot)))
    whole_summary = {**summary, "tokens_per_second": summary.get("tokens_per_second") or 0.0}
    lines = verdict_lines(whole_summary, gap=gap, guard=snapshot.guard, folder=folder, next_command="")
    return Verdict(lines[0], _tone(summary, gap), tuple(_facts(lines[1:])))


def _facts(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The verdict's lines without where files are and what to type, which the page says elsewhere."""
    label, text = "", ""
    for line in [*lines, ""]:
        if label and line.startswith(" " * 20):
            text = f"{text}; {line.strip()}"
            continue
        if label:
            yield label, " ".join(text.split())
        label, text = "", ""
        if not line.strip() or line.startswith(("  adapter ", "  next ", "  continue ")):
            continue
        found = _LABELLED.fullmatch(line)
        label, text = (found["label"], found["text"]) if found else (_SIZE, line.strip())


def _tone(summary: Mapping[str, Any], gap: Any) -> str:
    if gap is None:
        return "open"
    base = number(summary.get("base_val_loss"))
    if base is not None and gap.val_loss >= base:
        return "bad"
    base_gap = number(summary.get("base_gap"))
    if gap.grade in ("EXCELLENT", "GOOD"):
        return "good"
    return "doubtful" if gap.grade == "MODERATE" or base_gap is not None else "bad"


def _so_far(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    state = snapshot.state
    base, best = number(state.get("base_val_loss")), number(state.get("best_val_loss"))
    if base is not None and best is not None:
        yield "validation loss", f"{base:.3f} → {best:.3f} (best so far, step {state.get('best_step')})"
    elif base is not None:
        yield "validation loss", f"{base:.3f} before training"
    if snapshot.step and (gap := gap_of(snapshot.evaluation)) is not None:
        yield "gap", f"{gap.value:z.3f} [{gap.low:z.3f}, {gap.high:z.3f}] {gap.grade}"
    if snapshot.elapsed_seconds:
        yield "time", duration(snapshot.elapsed_seconds)
    for warning in snapshot.warnings:
        yield "warning", warning


# --- settings, environment, commands ----------------------------------------------------------------------------------


def settings_tables(config: RunConfig) -> tuple[tuple[Setting, ...], tuple[Setting, ...]]:
    """All settings: those that are not the defaults, and the others."""
    defaults = dict(settings_of(RunConfig()))
    rows = [
        (value == defaults[name], Setting(name, shown_setting(value), shown_setting(defaults[name])))
        for name, value in settings_of(config)
    ]
    return (
        tuple(row for is_default, row in rows if not is_default),
        tuple(row for is_default, row in rows if is_default),
    )


def environment(snapshot: Snapshot, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the run's files say of where and how it was computed; what they don't say is not guessed."""
    state = snapshot.state
    for label, name in (("model", "model"), ("data", "data"), ("backend", "backend"), ("device", "device")):
        if state.get(name):
            yield label, str(state[name])
    if state.get("precision"):
        yield "precision", str(state["precision"])
    if (trained := whole(state.get("num_trainable"))) and (total := whole(state.get("num_parameters"))):
        yield "parameters", f"{count(trained)} trained of {count(total)}"
    rows = whole(state.get("num_train_rows")), whole(state.get("num_val_rows"))
    if None not in rows:
        yield "rows", f"{rows[0]:,} to train on, {rows[1]:,} to validate"
    if (started := number(state.get("started"))) is not None:
        yield "started", time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(started))
    if (seconds := number(summary.get("wall_seconds")) or snapshot.elapsed_seconds) is not None:
        yield "time", duration(seconds)
    if (speed := number(summary.get("tokens_per_second"))) is not None:
        yield "speed", f"{speed:,.0f} tokens a second"
    if (memory := number(summary.get("peak_memory_gb"))) is not None:
        of = number(state.get("memory_total_gb"))
        yield "memory", f"{memory:.1f} GB at most" + (f", of {of:.1f}" if of else "")
    yield from _moves(state.get("moves"))
    versions = state.get("versions")
    if isinstance(versions, dict):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    else:
        yield "versions", "not in the run's files"


def _moves(moves: object) -> Iterator[tuple[str, str]]:
    known = [move for move in moves if isinstance(move, dict)] if isinstance(moves, list) else []
    if len(known) > 1:
        yield (
            "moved",
            "; ".join(
                f"{move.get('backend')} on {move.get('device')} from step {move.get('from_step')}" for move in known
            ),
        )


def next_commands(folder: Path, snapshot: Snapshot, *, has_evaluation: bool) -> Iterator[tuple[str, str]]:
    """What makes sense now, the first thing first."""
    run = shlex.quote(str(folder))
    if snapshot.status in ("interrupted", "failed", "died"):
        yield "go on", f"python cli.py train --resume {run}"
    if snapshot.status in ("running", "starting", "silent"):
        yield "watch it", f"python cli.py monitor {run}"
    if not (folder / ADAPTERS).is_dir():
        return
    if not has_evaluation and snapshot.status in COMPLETE:
        yield "test it on rows it was not chosen by", f"python cli.py evaluate {run}"
    if snapshot.status in COMPLETE:
        yield "ask it", f'python cli.py generate {run} --prompt "…"'
        yield "put it into the base model", f"python cli.py merge {run}"
        yield "hold another run against it", f"python cli.py compare {run} RUN"
    yield "train again with these settings", f"python cli.py train --config {shlex.quote(str(folder / CONFIG))}"


def start_of(report: RunReport) -> str:
    """`base model` or `initial adapter`."""
    return str(report.snapshot.state.get("start") or report.summary.get("start") or BASE_MODEL)
