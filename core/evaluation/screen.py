"""An evaluation on a terminal: the verdict first, then the numbers, the rows at either end, and what to type next."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.evaluation.bootstrap import BETTER, WORSE, Interval, Verdict
from core.evaluation.classification import Classification, SideScores
from core.evaluation.losses import PairedLosses, perplexity
from core.evaluation.report import Evaluation, excerpt, without_common
from core.evaluation.text_scores import TextScores
from core.screen import wrapped

_NUM_NAMED = 3
_STYLES: dict[Verdict, str] = {BETTER: "green", WORSE: "red"}
_NAME_WIDTH = 11
Line = tuple[str, str, str, str]
"""Name, base model, adapter, difference."""


def print_evaluation(
    evaluation: Evaluation, *, console: Console, folder: str, general: list[str], gate: str | None, next_command: str
) -> None:
    """
    Args:
        folder: where the files are.
        general: what the adapter did to general texts, a line each.
        gate: keep it or not, in a line.
    """
    about = (evaluation.run, evaluation.backend, evaluation.model.rstrip("/").rsplit("/", 1)[-1], evaluation.precision)
    _print(f"twinkeel evaluate · {' · '.join(about)}", console, style="dim")
    console.print()
    if evaluation.is_unreadable:
        _print(_unreadable(evaluation), console, style="yellow")
    _print(headline(evaluation), console, style=_STYLES.get(evaluation.verdict, ""))
    if evaluation.losses.verdict != evaluation.verdict:
        _print(f"  by loss    {evaluation.losses.verdict}", console)
    for note in (*evaluation.notes, *_guessing(evaluation)):
        _print(f"  note       {note}", console)
    console.print()
    console.print(_table(list(_lines(evaluation))))
    console.print()
    for line in _about_rows(evaluation, console.width):
        _print(line, console)
    for line in general:
        _print(line, console)
    if general:
        console.print()
    if gate is not None:
        _print(f"  gate       {gate}", console)
    _print(f"  report     {folder}   (report, rows, plots)", console)
    _print(f"  next       {next_command}", console)


def _guessing(evaluation: Evaluation) -> Iterator[str]:
    """That a gain in F1 may come from answering at all."""
    scores = evaluation.classification
    if scores is not None and not evaluation.is_unreadable and scores.is_guessing:
        label, share = scores.most_frequent
        yield f"accuracy {scores.adapter.accuracy:.3f} is no better than always answering {label} ({share:.3f})"


def headline(evaluation: Evaluation) -> str:
    """The verdict, and on what it stands."""
    verdict = evaluation.verdict[0].upper() + evaluation.verdict[1:]
    rows = f"{len(evaluation.rows)} {evaluation.split} rows"
    if (scores := evaluation.classification) is not None and not evaluation.is_unreadable:
        return f"{verdict}: F1 {scores.base.f1.value:.3f} → {scores.adapter.f1.value:.3f} on {rows}"
    losses = evaluation.losses
    return f"{verdict}: loss {losses.base_loss:.3f} → {losses.adapter_loss:.3f} on {rows}"


def _unreadable(evaluation: Evaluation) -> str:
    """That the answers show nothing, and what may help."""
    line = "No answer could be read"
    cut_off = [side.cut_off for side in (evaluation.answers or {}).values()]
    if cut_off and sum(cut_off) / len(cut_off) >= 0.5:
        return f"{line}: most were cut off at --max-tokens {evaluation.settings['max_tokens']}; raise it"
    return f"{line}: none names a label; rows.csv has them"


def _table(lines: list[Line]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(" " * 2 + " " * _NAME_WIDTH, no_wrap=True)
    table.add_column("base model", justify="right")
    table.add_column("adapter", justify="right")
    table.add_column("difference")
    for name, base, adapter, difference in lines:
        table.add_row(Text(f"  {name}"), base, adapter, Text(difference))
    return table


def _lines(evaluation: Evaluation) -> Iterator[Line]:
    yield from _loss_lines(evaluation.losses)
    if evaluation.classification is not None:
        yield from _class_lines(evaluation.classification)
    if evaluation.text is not None:
        yield from _text_lines(evaluation.text)
    if evaluation.answers is not None and any(side.cut_off for side in evaluation.answers.values()):
        base, adapter = (evaluation.answers[side].cut_off for side in ("base", "adapter"))
        limit = f"--max-tokens {evaluation.settings['max_tokens']} or model's length"
        yield "not ended", f"{base:.0%}", f"{adapter:.0%}", limit


def _loss_lines(losses: PairedLosses) -> Iterator[Line]:
    base, adapter, found = losses.base_loss, losses.adapter_loss, losses.difference
    change = f"{-found.value:+.3f} [{-found.high:+.3f}, {-found.low:+.3f}]  {_p(found.p_value)}"
    yield "loss", f"{base:.3f}", f"{adapter:.3f}", change
    yield "perplexity", _large(perplexity(base)), _large(perplexity(adapter)), ""


def _class_lines(scores: Classification) -> Iterator[Line]:
    found = scores.difference
    change = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]  {_p(found.p_value)}"
    base, adapter = scores.base, scores.adapter
    yield "F1 (macro)", f"{base.f1.value:.3f}", f"{adapter.f1.value:.3f}", change
    yield "", _range(base.f1), _range(adapter.f1), ""
    for name in ("accuracy", "precision", "recall"):
        yield name, f"{getattr(base, name):.3f}", f"{getattr(adapter, name):.3f}", ""
    strict = "whole answer is JSON with a label" if scores.scheme.is_json else "whole answer is a label"
    yield "strict", f"{base.strict:.0%}", f"{adapter.strict:.0%}", strict
    yield "unreadable", f"{base.unreadable:.0%}", f"{adapter.unreadable:.0%}", _said_of_unreadable(base, adapter)


def _said_of_unreadable(base: SideScores, adapter: SideScores) -> str:
    return "no label found; counted as wrong" if base.unreadable or adapter.unreadable else ""


def _text_lines(scores: TextScores) -> Iterator[Line]:
    found = scores.rouge_difference
    change = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]  {_p(found.p_value)}"
    rouge, exact = scores.rouge_l, scores.exact_match
    yield "ROUGE-L", f"{rouge[0].value:.3f}", f"{rouge[1].value:.3f}", change
    yield "exact match", f"{exact[0].value:.0%}", f"{exact[1].value:.0%}", ""


def _about_rows(evaluation: Evaluation, width: int) -> Iterator[str]:
    losses = evaluation.losses
    same = int((losses.row_differences == 0).sum())
    better = losses.num_rows - losses.num_worse - same
    counts = [f"{better} better", f"{losses.num_worse} worse", *([f"{same} the same"] if same else [])]
    of = f" of {evaluation.num_available:,}" if losses.num_rows < evaluation.num_available else ""
    yield f"  rows       {', '.join(counts)}, by their loss ({losses.num_rows:,}{of})"
    order = evaluation.by_difference
    questions = without_common([row.question for row in evaluation.rows])
    worst = [at for at in order[:_NUM_NAMED] if losses.row_differences[at] > 0]
    best = [at for at in order[::-1][:_NUM_NAMED] if losses.row_differences[at] < 0]
    for name, places in (("got worst", worst), ("got best", best)):
        origins = [evaluation.rows[at].origin for at in places]
        room = max((len(origin) for origin in origins), default=0)
        for number, at in enumerate(places):
            head = f"  {'' if number else name:<9}  {origins[number]:<{room}}  {losses.row_differences[at]:+.3f}  "
            yield head + excerpt(questions[at], max(min(width, 120) - len(head), 20))
    yield ""


def _range(interval: Interval) -> str:
    return f"[{interval.low:.2f}, {interval.high:.2f}]"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p {value:.3f}"


def _large(value: float | None) -> str:
    """A perplexity: with decimals where they matter."""
    if value is None or value >= 1e6:
        return "over 1 M"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def _print(line: str, console: Console, *, style: str = "") -> None:
    printable = "".join(character if character.isprintable() else "·" for character in line)
    text = wrapped(printable, console.width) if console.is_terminal else printable
    console.print(Text(text, style), soft_wrap=True)
