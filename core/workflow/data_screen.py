"""The check of a data set, and its rows, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.screen import count, wrapped
from data.check.findings import LEVELS, Finding, Level
from data.check.page import ShownRow
from data.check.pieces import Piece
from data.check.report import Facts, Report

_STYLES: dict[Level, str] = {"problem": "red", "warning": "yellow", "note": "cyan"}
_NUM_NAMED = 3
_NUM_LABELS = 8
_BAR_WIDTH = 30
_TARGET = "green underline"
START, END, BORDER = "⟦", "⟧", "│"
"""Around targets, so that they show without colours too, and between tokens."""


def print_report(report: Report, *, console: Console, next_command: str) -> None:
    """Facts, lengths, findings from the worst, what to expect, and what to type next."""
    facts = report.facts
    console.print(Text(f"twinkeel data check · {facts.name}"), Text(facts.format, "dim"), sep="   ", soft_wrap=True)
    console.print()
    console.print(_splits(facts))
    console.print()
    for line in _lengths(facts):
        console.print(Text(f"  {line}"), soft_wrap=True)
    for bar in _histogram(facts):
        console.print(bar, soft_wrap=True)
    if facts.labels:
        console.print(Text(f"  labels  {_labels(facts)}"), soft_wrap=True)
    console.print()
    console.print(Text(_summary(report)), soft_wrap=True)
    for level in LEVELS:
        for finding in report.of_level(level):
            _print_finding(finding, console)
    console.print()
    _print_block("expect", "", report.expectations, console)
    console.print()
    console.print(Text.assemble(("next     ", "dim"), next_command), soft_wrap=True)


def _splits(facts: Facts) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    table.add_column("  split")
    for name in ("rows", "tokens", "targets"):
        table.add_column(name, justify="right")
    table.add_column("")
    for split, some in facts.splits.items():
        if some.rows:
            mark = "given" if some.is_given else ""
            table.add_row(f"  {split}", f"{some.rows:,}", count(some.tokens), count(some.targets), Text(mark, "dim"))
    return table


def _lengths(facts: Facts) -> Iterator[str]:
    yield "tokens a row  " + " · ".join(f"{value:,} {name}" for name, value in facts.quantiles.items())
    cut = f"{facts.share_cut:.1%} of the rows" if facts.share_cut else "no row"
    yield f"cut off       {cut}, at data.max_tokens {facts.max_tokens:,}"


def _histogram(facts: Facts) -> Iterator[Text]:
    most = max((rows for _, _, rows in facts.histogram), default=0)
    width = len(f"{max((high for _, high, _ in facts.histogram), default=0):,}")
    for low, high, rows in facts.histogram:
        bar = "█" * round(_BAR_WIDTH * rows / most) or ("▏" if rows else "")
        line = Text(f"  {low:>{width},}–{high:<{width},} ")
        line.append(f"{bar:<{_BAR_WIDTH}} ", "red" if low > facts.max_tokens else "blue").append(f"{rows:,}")
        yield line.append("  over data.max_tokens", "dim") if low > facts.max_tokens and rows else line


def _labels(facts: Facts) -> str:
    shown = list(facts.labels.items())[:_NUM_LABELS]
    more = len(facts.labels) - len(shown)
    listed = " · ".join(f"{_printable(label)} {rows:,}" for label, rows in shown)
    return listed + (f" · and {more} more" if more else "")


def _summary(report: Report) -> str:
    counts = [(len(report.of_level(level)), level) for level in LEVELS]
    return ", ".join(f"{num} {level}{'' if num == 1 else 's'}" for num, level in counts if num) or "nothing found"


def _print_finding(finding: Finding, console: Console) -> None:
    lines = [finding.text]
    lines += [f"  {row.origin}" + (f": {row.detail}" if row.detail else "") for row in finding.rows[:_NUM_NAMED]]
    if finding.rows and (more := finding.num_rows - _NUM_NAMED) > 0:
        lines.append(f"  and {more:,} more")
    if finding.hint:
        lines.append(f"→ {finding.hint}")
    _print_block(finding.level, _STYLES[finding.level], lines, console)


def _print_block(name: str, style: str, lines: Sequence[str], console: Console) -> None:
    for index, line in enumerate(lines):
        whole = f"{name if index == 0 else '':<9}{_printable(line)}"
        if console.is_terminal:  # a file, or a program, gets whole lines
            whole = wrapped(whole, console.width)
        text = Text(whole)
        text.stylize(style, 0, len(name) if index == 0 else 0)
        console.print(text, soft_wrap=True)


# Rows


def print_row(row: ShownRow, *, console: Console) -> None:
    """A row as the model sees it: prompt dim, targets underlined and in brackets, a line between tokens."""
    head = f"{row.split} {row.number} · {row.origin} · {row.num_tokens:,} tokens, {row.num_targets:,} of them targets"
    console.print(Text(head, "bold"), soft_wrap=True)
    console.print(row_text(row.pieces))
    if row.cut:
        console.print(Text(f"✂ {row.cut}", "red"), soft_wrap=True)


def print_legend(console: Console) -> None:
    """What the marks of `print_row` mean."""
    target, special = Text(f"{START}target{END}", _TARGET), Text("<special>", "magenta")
    parts = (
        Text("prompt", "dim"),
        target,
        special,
        Text(f"{BORDER} between tokens", "dim"),
        Text("⏎ line break", "dim"),
    )
    console.print(Text("  ").join(parts))


def row_text(pieces: Sequence[Piece]) -> Text:
    """Tokens with the marks of `print_legend`."""
    text = Text()
    for index, piece in enumerate(pieces):
        before = pieces[index - 1].is_target if index else False
        if before and not piece.is_target:
            text.append(END, "bold green")
        if piece.is_target and not before:
            text.append(START, "bold green")
        elif index:
            text.append(BORDER, "dim")
        text.append(visible(piece.text), _style(piece))
    if pieces and pieces[-1].is_target:
        text.append(END, "bold green")
    return text


def _style(piece: Piece) -> str:
    style = _TARGET if piece.is_target else "dim"
    return f"{style} magenta" if piece.is_special else style


def visible(text: str) -> str:
    """Line breaks and tabs marked, and what a terminal would take for commands in its picture form."""
    marked = text.replace("\n", "⏎\n").replace("\t", "⇥")
    return "".join(_picture(character) for character in marked) or "∅"


def _printable(line: str) -> str:
    return "".join(_picture(character) for character in line.replace("\n", "⏎"))


def _picture(character: str) -> str:
    code = ord(character)
    if character == "\n" or 0x20 <= code < 0x7F or code >= 0xA0:
        return character
    return chr(0x2400 + code) if code < 0x20 else "\N{SYMBOL FOR DELETE}" if code == 0x7F else f"<U+{code:04X}>"
