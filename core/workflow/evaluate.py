"""`evaluate`: base model and adapter on the same held-out rows."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from core.config import DataConfig, RunConfig
from core.errors import UserError
from core.evaluation.bootstrap import BETTER
from core.evaluation.classification import Classification, classify
from core.evaluation.journal import RowJournal, fingerprint, forget_others, is_journal, journal_name
from core.evaluation.labels import LabelScheme, find_scheme
from core.evaluation.losses import PairedLosses, pair_losses
from core.evaluation.plots import write_plots
from core.evaluation.report import (
    FOLDER,
    PLOTS,
    REPORT,
    ROWS_CSV,
    SUMMARY_CSV,
    Answers,
    Evaluation,
    Row,
    adapter_sha256,
    earlier_findings,
    write_report,
)
from core.evaluation.screen import print_evaluation
from core.evaluation.text_scores import TextScores, score_texts
from core.files import read_json
from core.gate import Decision, Gate, decide
from core.general import GeneralReport
from core.models.fingerprint import model_fingerprint
from core.protocols import Batch
from core.run import CONFIG, SUMMARY, NewFolder
from core.screen import logging_to
from core.seeding import generator
from core.settings import resolve
from core.signals import termination_as_interrupt
from core.workflow.after import SIDES, Flags, OpenedRun, Side, TrainedRun, find_trained, opened_run
from core.workflow.answering import answer_rows, answers_there, losses_there, measure_losses
from core.workflow.general import measure_general
from core.workflow.held_out import HeldOut, find_rows
from data.answers import AskedRow, read_asked
from data.batches import eval_batches
from data.keys import hash_tokens
from data.shapes import Limit, eval_shapes
from data.tokenize import Tokenizer, load_tokenizer

_log = logging.getLogger("twinkeel")
INTERRUPTED = 130
_OURS = {REPORT, SUMMARY_CSV, ROWS_CSV, PLOTS}
_SCHEME_ROWS = 2_000
"""Rows whose answers show, beside those of the rows that are evaluated, which labels there are."""


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What was asked for, as typed."""

    data: str | None = None
    settings: tuple[str, ...] = ()
    """`data.FIELD=VALUE`: how the rows of `data` are read."""
    split: str | None = None
    max_samples: int | None = None
    generate: bool | None = None
    """None: rows with labels are answered."""
    text_scores: bool = False
    max_tokens: int = 256
    batch_size: int | None = None
    general: bool = False
    gate: bool = False
    max_gap: float | None = None
    """None: the bound of GOOD."""
    min_gain: float = 0.0
    max_forgotten: float = 0.1
    output: str | None = None
    anew: bool = False


def evaluate(folder: Path, options: EvaluateOptions, *, flags: Flags, console: Console) -> int:
    """Evaluates and writes the report. Returns the exit code: 3 when the gate says no, 130 when it was stopped.

    Raises:
        UserError: no adapter, no such rows, rows that can't be answered, or nowhere to write to.
    """
    with logging_to(console), termination_as_interrupt():
        try:
            return _evaluate(folder, options, flags, console)
        except KeyboardInterrupt:
            command = command_of(folder, options, flags)
            console.print(f"stopped; go on where it was: {command}", markup=False, soft_wrap=True)
            return INTERRUPTED


def command_of(folder: Path, options: EvaluateOptions, flags: Flags) -> str:
    """What to type to go on."""
    default = EvaluateOptions()
    words = ["python", "cli.py", "evaluate", str(folder)]
    for name in EvaluateOptions.__dataclass_fields__:
        value = getattr(options, name)
        if name == "settings":
            words += [word for text in options.settings for word in ("--set", text)]
            continue
        if name == "anew" or value == getattr(default, name) or (name == "general" and options.gate):
            continue
        flag = "--" + name.replace("_", "-")
        if value is False:
            words.append("--no-generate")
        else:
            words += [flag] if value is True else [flag, str(value)]
    for flag, value in flags.values():
        words += [flag, str(value)]
    return shlex.join(words)


# --- what there is to do ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Everything that was found before anything is written."""

    run: TrainedRun
    adapter_sha256: str
    options: EvaluateOptions
    held_out: HeldOut
    asked: Sequence[AskedRow]
    """By row."""
    batches: Sequence[Batch]
    scheme: LabelScheme | None
    labels: Sequence[str | None]
    """Expected label of each row."""
    generates: bool
    limit: Limit

    @property
    def num_rows(self) -> int:
        return len(self.asked)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "max_samples": self.options.max_samples,
            "generate": self.generates,
            "text_scores": self.options.text_scores,
            "max_tokens": self.options.max_tokens if self.generates else None,
            "batch_size": self.options.batch_size,
            "seed": self.run.config.train.seed,
        }

    @property
    def losses_key(self) -> str:
        """What decides the losses."""
        run, rows = self.run, self.held_out.rows
        tokens = list(map(hash_tokens, rows.ids, rows.is_target))
        device = (run.backend.name, run.device.device)
        model = (model_fingerprint(run.model.path), run.config.model.bits, run.config.model.dtype)
        return fingerprint(run.adapter.fingerprint, model, device, tokens, (self.limit.rows, self.limit.positions))

    @property
    def answers_key(self) -> str:
        """What decides the answers."""
        prompts = [None if row.prompt_ids is None else row.prompt_ids.tolist() for row in self.asked]
        return fingerprint(self.losses_key, prompts, self.options.max_tokens, self.options.batch_size)


def _plan(folder: Path, options: EvaluateOptions, flags: Flags) -> _Plan:
    if options.text_scores and options.generate is False:
        raise UserError("--text-scores needs answers, and --no-generate forbids them", hint="leave one of them out")
    run = find_trained(folder, flags=flags)
    weights = adapter_sha256(run.folder)
    assert weights is not None  # they were just read
    config = run.config
    seed = config.train.seed
    held_out = find_rows(run, data=options.data, split=options.split, reading=_reading(run, options))
    held_out = held_out.at_most(options.max_samples, seed=seed)
    if options.gate and held_out.split == "train" and held_out.trained_on.all():
        raise UserError("--gate needs rows that were not trained on", hint="leave out --split train")
    tokenizer = load_tokenizer(run.model.path, trust_remote_code=config.model.trust_remote_code)
    asked = read_asked(held_out.config, held_out.rows, tokenizer)
    can_answer = all(row.expected is not None for row in asked)
    if not can_answer and (options.generate or options.text_scores):
        raise UserError(
            f"{held_out.name}: no row can be answered: they are plain text",
            hint="leave out --generate and --text-scores: the losses need no answers",
        )
    scheme = None
    if can_answer and options.generate is not False:
        others = _read_some(held_out, tokenizer, seed=seed)
        scheme = _find_scheme([*asked, *others]) or _find_scheme(asked)
    limit = _limit(config, options)
    return _Plan(
        run=run,
        adapter_sha256=weights,
        options=options,
        held_out=held_out,
        asked=asked,
        batches=eval_batches(held_out.rows, eval_shapes([held_out.rows.lengths], limit)[0]),
        scheme=scheme,
        labels=[None if scheme is None else scheme.read(row.expected or "").label for row in asked],
        generates=bool(options.generate or options.text_scores or scheme is not None),
        limit=limit,
    )


def _reading(run: TrainedRun, options: EvaluateOptions) -> DataConfig | None:
    """The settings of `--set`, on the run's. Raises: UserError: they are not of the data, or there is no `--data`."""
    if not options.settings:
        return None
    others = [text for text in options.settings if not text.strip().startswith("data.")]
    if others:
        raise UserError(
            f"--set {others[0]}: only data.… can be set here", hint="it says how the rows of --data are read"
        )
    if options.data is None:
        raise UserError("--set says how the rows of --data are read, and there is no --data", hint="give both")
    return resolve(files=[run.folder / CONFIG], assignments=options.settings).config.data


def _read_some(held_out: HeldOut, tokenizer: Tokenizer, *, seed: int) -> list[AskedRow]:
    """Rows of the data that are not evaluated: a few rows need not have all labels. At most `_SCHEME_ROWS`."""
    evaluated = set(held_out.rows.origin)
    others = [at for at, origin in enumerate(held_out.known.origin) if origin not in evaluated]
    if len(others) > _SCHEME_ROWS:
        chosen = generator(seed, "evaluation-labels").choice(len(others), _SCHEME_ROWS, replace=False)
        others = [others[at] for at in sorted(chosen)]
    if not others:
        return []
    rows = read_asked(held_out.config, held_out.known.select(others), tokenizer)
    return [row for row in rows if row.expected is not None]


def _find_scheme(asked: Sequence[AskedRow]) -> LabelScheme | None:
    """The labels of the rows, where every row has one."""
    expected = [row.expected or "" for row in asked]
    scheme = find_scheme(expected, [row.label for row in asked], [row.question for row in asked])
    if scheme is None or any(scheme.read(text).label is None for text in expected):
        return None
    return scheme


def _limit(config: RunConfig, options: EvaluateOptions) -> Limit:
    """As in training's evaluations, unless it is told."""
    rows = options.batch_size or config.eval.batch_size
    if rows is None and config.train.batch_tokens is not None:
        return Limit(positions=config.train.batch_tokens)
    return Limit(rows=rows or config.train.batch_size)


# --- doing it ---------------------------------------------------------------------------------------------------------


def _evaluate(folder: Path, options: EvaluateOptions, flags: Flags, console: Console) -> int:
    plan = _plan(folder, options, flags)
    output = Path(options.output) if options.output else _default_output(plan)
    _refuse_other(output)
    _say_plan(plan)
    names = [journal_name("losses", plan.losses_key), journal_name("answers", plan.answers_key)]
    with (
        NewFolder(output) as new,
        RowJournal(output / names[0], plan.losses_key, anew=options.anew) as losses,
        RowJournal(output / names[1], plan.answers_key, anew=options.anew) as answers,
    ):
        if options.anew:
            forget_others(output, names)
        general = None
        with nullcontext() if _is_done(plan, losses, answers) else opened_run(plan.run) as opened:
            new.keep()
            if opened is not None:
                _measure(plan, opened, losses, answers, console)
                general = _general(opened) if options.general else None
        evaluation = _score(plan, losses, answers)
    decision = _decide(plan, evaluation.losses, general) if options.gate else None
    earlier = (None, None) if options.anew else earlier_findings(output, evaluation)
    evaluation = replace(
        evaluation,
        general=earlier[0] if general is None else general.to_dict(),
        gate=earlier[1] if decision is None else decision.to_dict(),
    )
    write_report(output, evaluation)
    write_plots(output, evaluation)
    print_evaluation(
        evaluation,
        console=console,
        folder=str(output),
        general=[] if general is None else list(general.lines),
        gate=None if decision is None else decision.line,
        next_command=_next(plan.run.folder, evaluation, decision),
    )
    return 0 if decision is None else decision.exit_code


def _default_output(plan: _Plan) -> Path:
    """`compare`, `report` and `push` read the evaluation of all rows that were held out; others lie beside it."""
    label = plan.held_out.label
    return plan.run.folder / (f"{FOLDER}-{label}" if label else FOLDER)


def _refuse_other(output: Path) -> None:
    """Raises: UserError: there is something that is no evaluation of ours."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file", hint="give a folder, or a name that is free")
    if output.is_dir():
        if not os.access(output, os.W_OK):
            raise UserError(f"{output}: cannot write here", hint="choose another folder with --output")
        there = {item.name for item in output.iterdir() if not item.name.startswith(".")}
        others = sorted(name for name in there - _OURS if not is_journal(name))
        if others:
            raise UserError(f"--output: {output} holds other things ({others[0]})", hint="give a folder of its own")


def _say_plan(plan: _Plan) -> None:
    held_out = plan.held_out
    of = f" of {held_out.num_available:,}" if plan.num_rows < held_out.num_available else ""
    answers = "losses and answers" if plan.generates else "losses"
    _log.info("%s: %s of %d%s %s rows", held_out.name, answers, plan.num_rows, of, held_out.split)
    for note in held_out.notes:
        _log.warning(note)


def _is_done(plan: _Plan, losses: RowJournal, answers: RowJournal) -> bool:
    """Whether no model is needed any more."""
    if plan.options.general or any(losses_there(losses, side, plan.num_rows) is None for side in SIDES):
        return False
    return not plan.generates or all(answers_there(answers, side, plan.num_rows) is not None for side in SIDES)


def _measure(plan: _Plan, opened: OpenedRun, losses: RowJournal, answers: RowJournal, console: Console) -> None:
    if losses.records or answers.records:
        _log.info("going on: %d losses and %d answers are there", len(losses.records), len(answers.records))
    for side in SIDES:
        measure_losses(opened, side, plan.batches, losses, console=console)
    if not plan.generates:
        return
    options = plan.options
    for side in SIDES:
        answer_rows(
            opened,
            side,
            plan.asked,
            answers,
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            console=console,
        )


def _general(opened: OpenedRun) -> GeneralReport:
    _log.info("general texts: what the adapter did to everything else")
    return measure_general(opened)


# --- scores -----------------------------------------------------------------------------------------------------------


def _score(plan: _Plan, losses: RowJournal, answers: RowJournal) -> Evaluation:
    run, held_out = plan.run, plan.held_out
    seed, confidence = run.config.train.seed, run.config.guard.confidence
    base, adapter = (losses_there(losses, side, plan.num_rows) for side in SIDES)
    assert base is not None and adapter is not None
    written: dict[str, Answers] | None = None
    if plan.generates:
        written = {side: _answers(plan, answers, side) for side in SIDES}
    return Evaluation(
        run=str(run.folder),
        adapter_sha256=plan.adapter_sha256,
        model=run.model.name,
        backend=run.backend.name,
        device=run.device.device,
        precision=f"{run.config.model.bits}-bit",
        data=held_out.name,
        split=held_out.split,
        notes=held_out.notes,
        rows=[
            Row(int(number), row.origin, row.question, row.expected, label)
            for number, row, label in zip(held_out.numbers, plan.asked, plan.labels, strict=True)
        ],
        num_available=held_out.num_available,
        base_nll=base[0],
        adapter_nll=adapter[0],
        num_targets=base[1],
        losses=pair_losses(base[0], adapter[0], base[1], seed=seed, confidence=confidence),
        answers=written,
        classification=_classify(plan, written, seed=seed, confidence=confidence),
        text=_score_texts(plan, written, seed=seed, confidence=confidence),
        settings=plan.settings,
        losses_key=plan.losses_key,
    )


def _answers(plan: _Plan, journal: RowJournal, side: Side) -> Answers:
    found = answers_there(journal, side, plan.num_rows)
    assert found is not None
    texts = [answer.text for answer in found]
    readings = None if plan.scheme is None else [plan.scheme.read(text) for text in texts]
    return Answers(texts, [answer.ended for answer in found], readings)


def _classify(
    plan: _Plan, answers: Mapping[str, Answers] | None, *, seed: int, confidence: float
) -> Classification | None:
    if plan.scheme is None or answers is None:
        return None
    base, adapter = (answers[side].readings for side in SIDES)
    assert base is not None and adapter is not None
    labels = [label for label in plan.labels if label is not None]
    return classify(plan.scheme, labels, base, adapter, seed=seed, confidence=confidence)


def _score_texts(
    plan: _Plan, answers: Mapping[str, Answers] | None, *, seed: int, confidence: float
) -> TextScores | None:
    if not plan.options.text_scores or answers is None:
        return None
    expected = [row.expected for row in plan.asked if row.expected is not None]
    return score_texts(expected, answers["base"].texts, answers["adapter"].texts, seed=seed, confidence=confidence)


def _decide(plan: _Plan, losses: PairedLosses, general: GeneralReport | None) -> Decision:
    options = plan.options
    gate = Gate.of(
        plan.run.config.guard,
        max_gap=options.max_gap,
        min_gain=options.min_gain,
        max_forgotten=options.max_forgotten,
    )
    summary = read_json(plan.run.folder / SUMMARY)
    return decide(
        gate,
        summary=summary if isinstance(summary, dict) else {},
        losses=losses,
        general=general,
        num_trained_on=plan.held_out.num_trained_on,
    )


def _next(folder: Path, evaluation: Evaluation, decision: Decision | None) -> str:
    """What to type now: merge what the gate keeps; is it worth keeping; else a look at the run."""
    if decision is not None:
        words = ["merge" if decision.keep else "report", str(folder)]
    elif evaluation.verdict == BETTER:
        words = ["evaluate", str(folder), "--gate"]
    else:
        words = ["report", str(folder)]
    return shlex.join(["python", "cli.py", *words])
