"""Answers on the screen as they come: one below the other, or two columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

TWO_COLUMNS = 100
"""Width from which two answers stand side by side."""
UNBROKEN = 1 << 30
"""Width of lines that a file, or a program, gets: whole."""
LABEL = 9
"""Width of `base` or `adapter` before an answer."""
_JOINER = "\N{ZERO WIDTH JOINER}"
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Without control characters: a model may write what a terminal would obey."""
    return text.translate(_CONTROLS).expandtabs(4)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a side said."""

    text: str
    num_tokens: int
    ended: bool
    """Whether the model ended it."""
    seconds: float
    """Prompt included."""
    interrupted: bool = False
    is_full: bool = False
    """Whether question and answer fill the length that the model was made for."""

    def facts(self) -> str:
        """`38 tokens · 21.3 tok/s · stopped`."""
        parts = [f"{self.num_tokens:,} token{'' if self.num_tokens == 1 else 's'}"]
        if self.num_tokens and self.seconds > 0:
            parts.append(f"{self.num_tokens / self.seconds:.1f} tok/s")
        if self.interrupted:
            parts.append("stopped")
        elif not self.ended:
            parts.append("the model is full" if self.is_full else "cut off: max_tokens")
        elif not self.text:
            parts.append("the model ended at once")
        return " · ".join(parts)


class Wrapper:
    """Breaks text that comes in pieces into lines of a width, between words."""

    def __init__(self, width: int) -> None:
        self._width = max(width, 1)
        self._column = 0
        self._gap = ""
        self._word = ""

    def feed(self, piece: str) -> str:
        """What can be shown now: words that are whole, with line breaks among them."""
        return "".join(map(self._character, piece))

    def end(self) -> str:
        """The last word."""
        return self._end_word()

    def _character(self, character: str) -> str:
        if character == "\n":
            shown = self._end_word() + "\n"
            self._column, self._gap = 0, ""
            return shown
        if character.isspace():
            shown = self._end_word()
            self._gap += " "
            return shown
        # scripts of wide characters have no spaces: a line may end before any of them
        starts = cell_len(character) > 1 and not self._word.endswith(_JOINER)
        shown = self._end_word() if starts or cell_len(self._word + character) > self._width else ""
        self._word += character
        return shown

    def _end_word(self) -> str:
        if not self._word:
            return ""
        word, gap, size = self._word, self._gap, cell_len(self._word)
        self._word = self._gap = ""
        if self._column + len(gap) + size > self._width:
            broken = "\n" if self._column else ""
            self._column = size
            return broken + word
        self._column += len(gap) + size
        return gap + word


def wrapped_lines(text: str, width: int) -> list[str]:
    """The lines of a whole text."""
    wrapper = Wrapper(width)
    return (wrapper.feed(printable(text)) + wrapper.end()).split("\n")


class Answers(Protocol):
    """Shows what the sides answer to one question."""

    def begin(self, side: str) -> Callable[[str], None]:
        """What shows the pieces of this side's answer."""
        ...

    def end(self, answer: Answer) -> None:
        """The side that was begun has answered."""
        ...

    def close(self) -> None:
        """No more answers."""
        ...


def answers_screen(console: Console, sides: Sequence[str]) -> Answers:
    """Two columns on a wide terminal, else one below the other; without a terminal the text alone."""
    if len(sides) > 1 and console.is_terminal and console.width >= TWO_COLUMNS:
        return SideBySide(console, sides)
    return Below(console, is_labelled=len(sides) > 1)


class Below:
    """Answers one below the other: on a terminal word by word, elsewhere to the letter."""

    def __init__(self, console: Console, *, is_labelled: bool) -> None:
        self._console = console
        self._is_labelled = is_labelled
        self._indent = " " * LABEL if is_labelled else ""
        self._wrapper = Wrapper(1)
        self._num_answers = 0

    def begin(self, side: str) -> Callable[[str], None]:
        if self._is_labelled:
            if self._num_answers and self._console.is_terminal:
                self._console.print()
            self._write(f"{side:<{LABEL}}", "dim")
        self._num_answers += 1
        self._wrapper = Wrapper(self._console.width - len(self._indent))
        return self._show

    def end(self, answer: Answer) -> None:
        if self._console.is_terminal:
            self._write(self._wrapper.end() + "\n" * bool(answer.text))
            self._write(answer.facts(), "dim")
        self._console.file.write("\n")
        self._console.file.flush()

    def close(self) -> None:
        if self._console.is_terminal:
            self._console.print()

    def _show(self, piece: str) -> None:
        self._write(self._wrapper.feed(printable(piece)) if self._console.is_terminal else piece)

    def _write(self, text: str, style: str = "") -> None:
        text = text.replace("\n", f"\n{self._indent}")
        if self._console.is_terminal:
            self._console.print(Text(text, style), end="", soft_wrap=True)
        else:  # a console would expand tabs
            self._console.file.write(text)
        self._console.file.flush()


class SideBySide:
    """Answers in columns, the second beginning when the first has ended."""

    def __init__(self, console: Console, sides: Sequence[str]) -> None:
        self._console = console
        self._texts = dict.fromkeys(sides, "")
        self._facts = dict.fromkeys(sides, "")
        self._side = sides[0]
        self._live = Live(
            self, console=console, transient=True, refresh_per_second=10, vertical_overflow="crop", auto_refresh=True
        )
        self._live.start()

    def begin(self, side: str) -> Callable[[str], None]:
        self._side = side
        return self._add

    def _add(self, piece: str) -> None:
        self._texts[self._side] += piece

    def end(self, answer: Answer) -> None:
        self._facts[self._side] = answer.facts()

    def close(self) -> None:
        self._live.stop()
        self._console.print(columns(self._texts, self._facts, width=self._console.width))
        self._console.print()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What fits on the screen; the whole is printed at the end."""
        yield columns(self._texts, self._facts, width=options.max_width, height=max(console.height - 3, 1))


def columns(texts: Mapping[str, str], facts: Mapping[str, str], *, width: int, height: int | None = None) -> Table:
    """Sides beside each other: name, text, facts. `height`: lines of text, the last ones."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    table = Table.grid(padding=0)
    lines = {side: wrapped_lines(text, each) for side, text in texts.items()}
    num_lines = max(map(len, lines.values()))
    shown = range(max(num_lines - height, 0) if height else 0, num_lines)
    for index in range(len(texts)):
        if index:
            table.add_column(width=3)
        table.add_column(width=each, no_wrap=True)
    bar = Text(" │ ", "dim")
    _add_row(table, [Text(side, "dim") for side in texts], bar)
    for number in shown:
        _add_row(table, [Text(rows[number] if number < len(rows) else "") for rows in lines.values()], bar)
    _add_row(table, [Text(facts[side], "dim") for side in texts], bar)
    return table


def _add_row(table: Table, cells: Sequence[Text], bar: Text) -> None:
    table.add_row(*[part for cell in cells for part in (bar, cell)][1:])
