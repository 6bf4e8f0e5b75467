"""Lines from a keyboard or a pipe -> what is to be answered."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType

from core.chat.commands import CHOICES, NAMES, SETTINGS
from core.errors import UserError

_BLOCK = '"""'


class Lines:
    """Puts lines together: one that ends with a backslash goes on, and three quotes begin and end a block."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._in_block = False

    @property
    def is_open(self) -> bool:
        """Whether more lines belong to what was begun."""
        return self._in_block or bool(self._lines)

    def add(self, line: str) -> str | None:
        """The whole, when it is. What was written in a block never begins with a slash, so is no command."""
        if self._in_block:
            before, closes, behind = line.partition(_BLOCK)
            self._lines.append(before + behind if closes else line)
            if not closes:
                return None
            return " " + self._take()
        if not self._lines and line.lstrip().startswith(_BLOCK):
            rest = line.lstrip().removeprefix(_BLOCK)
            self._in_block = True
            return self.add(rest) if rest else None
        goes_on = line.endswith("\\")
        self._lines.append(line.removesuffix("\\"))
        return None if goes_on else self._take()

    def rest(self) -> str | None:
        """What was begun and not ended when there are no more lines."""
        if not self.is_open:
            return None
        return (" " if self._in_block else "") + self._take()

    def clear(self) -> None:
        self._take()

    def _take(self) -> str:
        whole = "\n".join(self._lines)
        self._lines, self._in_block = [], False
        return whole


def piped_lines() -> Iterator[tuple[int, str]]:
    """Number and text of each line of standard input.

    Raises:
        UserError: a line that is not UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"standard input, line {number}: not UTF-8 (byte 0x{line[error.start]:02x})", hint="give UTF-8 text"
            ) from None


def whole_text(line: str) -> str | None:
    """The line, or None where it holds bytes of another encoding, as a terminal may send them."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return None
    return line


def use_readline() -> None:
    """Lines may be edited, earlier ones come back, and commands complete, where there is a readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        words = completions(readline.get_line_buffer()[: readline.get_begidx()], text)
        return words[state] if state < len(words) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def completions(before: str, word: str) -> list[str]:
    """What a word may become, after what was typed before it: commands, sides, settings."""
    words: dict[str, Sequence[str]] = {"": NAMES if word else (), "/side ": CHOICES, "/set ": SETTINGS}
    return [f"{found} " for found in words.get(before, ()) if found.startswith(word)]


class AnswerInterrupt:
    """While entered, the first Ctrl-C asks for the answer to end and the second raises `KeyboardInterrupt`.

    What is typed meanwhile is not shown: it would stand in the middle of the answer. The next prompt has it.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: object = None
        self._exits = ExitStack()

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> AnswerInterrupt:
        self._exits.enter_context(_silent_keyboard())
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]
        self._exits.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


@contextmanager
def _silent_keyboard() -> Iterator[None]:
    """Turns the terminal's echo off, where there is one."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (OSError, ValueError, termios.error):  # a pipe, or a test's
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(keyboard, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def is_interactive() -> bool:
    """Whether somebody types, and sees what is written."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
