"""A conversation with a run's base model, its adapter, or both."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.chat.commands import COMMANDS, Command, Settings, parse
from core.chat.conversation import Conversation, Said, SavedFiles, Turn, last_turn, to_rows
from core.chat.input import AnswerInterrupt, Lines, is_interactive, piped_lines, use_readline, whole_text
from core.chat.screen import Answer, Answers, answers_screen
from core.errors import UserError
from core.sampling import Sampling
from core.screen import logging_to
from core.workflow.after import SIDES, Flags, OpenedRun, Side, find_trained, opened_run
from core.workflow.talking import sides_of, stream_answer
from data.formats import Message
from data.prompt import PromptRenderer
from data.prompts_file import check_system

_log = logging.getLogger("twinkeel")
_WHO = {"base": "the base model", "adapter": "the adapter", "both": "base model and adapter"}


def chat(
    folder: Path,
    *,
    side: str,
    system: str | None,
    sampling: Sampling,
    max_tokens: int,
    flags: Flags,
    console: Console,
) -> int:
    """Talks until the input ends. Returns the exit code.

    On a terminal somebody types; else each line is a question, and only the answers are written.

    Args:
        side: `base`, `adapter` or `both`.

    Raises:
        UserError: no adapter yet, or the model can't be loaded; of an input that nobody types, any mistake in it.
    """
    system = check_system(system)
    notes = Console(stderr=True, width=console.width, highlight=False)
    with logging_to(notes):
        run = find_trained(folder, flags=flags)
        with opened_run(run) as opened:
            talk = _Chat(opened, side, system, Settings(sampling, max_tokens), console)
            if is_interactive():
                _converse(talk, console)
            else:
                _read(talk)
    return 0


def _read(talk: _Chat) -> None:
    """Every line a turn; the first mistake ends it."""
    lines = Lines()
    number = 0
    for number, line in piped_lines():
        if (text := lines.add(line)) is not None and not _take(talk, text, number):
            return
    if (text := lines.rest()) is not None:
        _take(talk, text, number)


def _take(talk: _Chat, text: str, number: int) -> bool:
    try:
        return talk.take(text)
    except UserError as error:
        raise UserError(f"standard input, line {number}: {error.what}", hint=error.hint) from None


def _converse(talk: _Chat, console: Console) -> None:
    """With somebody who sees what went wrong and goes on."""
    use_readline()
    talk.greet()
    for text in _typed(console):
        try:
            if not talk.take(text):
                return
        except UserError as error:
            console.print(Text(f"{error.what}{f': {error.hint}' if error.hint else ''}", "yellow"))
        except Exception:  # a bug of ours must not cost the conversation
            traceback.print_exc()
            console.print(Text("a mistake in the program; the conversation is still there: /save FILE.jsonl", "yellow"))
        except KeyboardInterrupt:  # the second during an answer
            console.print()
            return


def _typed(console: Console) -> Iterator[str]:
    """What is typed, until Ctrl-D or Ctrl-C twice."""
    lines = Lines()
    was_interrupted = False
    while True:
        try:
            line = whole_text(input("… " if lines.is_open else "> "))
        except EOFError:
            console.print()
            return
        except UnicodeDecodeError:
            line = None
        except KeyboardInterrupt:
            console.print()
            if was_interrupted:
                return
            was_interrupted = True
            lines.clear()
            console.print(Text("Ctrl-C once more ends the chat; during an answer it ends the answer", "dim"))
            continue
        was_interrupted = False
        if line is None:
            console.print(Text("that was not UTF-8: see the terminal's encoding", "yellow"))
        elif (text := lines.add(line)) is not None:
            yield text


class _Chat:
    """What was said, to whom, and how answers are made."""

    def __init__(self, opened: OpenedRun, side: str, system: str | None, settings: Settings, console: Console) -> None:
        self._opened = opened
        self._choice = side
        self._system = system
        self._settings = settings
        self._console = console
        self._renderer = PromptRenderer(opened.tokenizer)
        self._max_length = opened.run.architecture.max_positions or None
        self._conversations: dict[Side, Conversation] = {side: Conversation() for side in SIDES}
        self._num_asked = 0
        self._told: set[str] = set()
        self._saved = SavedFiles()

    def greet(self) -> None:
        run = self._opened.run
        self._console.print(
            Text.assemble((run.folder.name, "bold"), f" · {Path(run.model.name).name} · {_WHO[self._choice]}"),
            Text("/help lists the commands, Ctrl-C ends an answer, Ctrl-D the chat\n", "dim"),
            sep="\n",
        )

    def take(self, text: str) -> bool:
        """Answers, or does what a command says. Returns whether the chat goes on.

        Raises:
            UserError: a mistake in a command, or a question that can't be answered.
        """
        command = parse(text)
        if command is not None:
            return self._obey(command)
        if question := text.strip():
            self._ask(question, self._sides)
        return True

    @property
    def _sides(self) -> tuple[Side, ...]:
        return sides_of(self._choice)

    def _ask(self, question: str, sides: Iterable[Side]) -> None:
        self._num_asked += 1
        prompts = {side: self._prompt(side, question) for side in sides}  # all, before one of them answers
        self._tell(self._renderer.notes())
        screen = answers_screen(self._console, list(prompts))
        try:
            for side, ids in prompts.items():
                answer = self._answer(side, ids, screen)
                if answer.text:  # a template takes no empty answer
                    self._conversations[side].add(Turn(self._num_asked, question, answer.text))
        finally:
            screen.close()

    def _prompt(self, side: Side, question: str) -> list[int]:
        conversation = self._conversations[side]

        def ids(skip: int) -> list[int]:
            return self._renderer.ids(_messages(conversation.messages(self._system, question, skip=skip)))

        num_left_out = conversation.fit(
            lambda skip: len(ids(skip)), max_length=self._max_length, max_tokens=self._settings.max_tokens
        )
        if num_left_out:
            _log.info(
                "%s: longer than the model's %s tokens: from here without the oldest %s",
                side,
                f"{self._max_length:,}",
                "turn" if conversation.num_left_out == 1 else f"{conversation.num_left_out} turns",
            )
        return ids(conversation.num_left_out)

    def _answer(self, side: Side, ids: list[int], screen: Answers) -> Answer:
        show = screen.begin(side)
        # somebody who types ends an answer with Ctrl-C; a program that is told to stop stops
        with AnswerInterrupt() if self._console.is_terminal else nullcontext(_never) as interrupted:
            answer = stream_answer(
                self._opened,
                side,
                ids,
                stops=self._renderer.stops(),
                max_tokens=self._settings.max_tokens,
                sampling=self._settings.sampling,
                key=self._num_asked,
                show=show,
                is_interrupted=interrupted,
            )
        screen.end(answer)
        return answer

    def _tell(self, notes: Iterable[str]) -> None:
        """Says what was not said before."""
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                _log.info(note)

    # --- commands -----------------------------------------------------------------------------------------------------

    def _obey(self, command: Command) -> bool:
        argument = command.argument
        match command.name:
            case "/quit":
                return False
            case "/help":
                self._console.print(_help(), "")
            case "/side":
                self._choice = argument
                self._say(f"{_WHO[argument]}: each side knows its own answers only")
            case "/system":
                self._system = check_system(argument)
                self._say("system message set" if self._system else "no system message")
            case "/set":
                self._settings, changed = self._settings.changed(argument) if argument else (self._settings, None)
                self._say("\n".join(self._settings.lines(changed)))
            case "/clear":
                self._conversations = {side: Conversation() for side in SIDES}
                self._say("forgotten")
            case "/undo":
                self._say(f"taken back: {_short(self._undo().question)}")
            case "/retry":
                self._retry()
            case "/save":
                sides = [(side, self._conversations[side]) for side in self._sides]
                path = self._saved.save(argument, list(to_rows(sides, system=self._system)))
                self._say(f"saved: {path}")
        return True

    def _undo(self) -> Turn:
        conversations = list(self._conversations.values())
        turn = last_turn(conversations)
        if turn is None:
            raise UserError("nothing was asked yet")
        for conversation in conversations:
            conversation.drop(turn.number)
        return turn

    def _retry(self) -> None:
        """The new answer takes the place of the last; where there is none, all stays as it was."""
        if self._settings.sampling.temperature == 0.0:
            self._tell(["the temperature is 0: the same question has the same answer; /set temperature 0.7"])
        before = {side: conversation.copy() for side, conversation in self._conversations.items()}
        number = self._num_asked
        is_answered = False
        try:
            self._ask(self._undo().question, self._sides)
            last = last_turn(list(self._conversations.values()))
            is_answered = last is not None and last.number > number
        finally:
            if not is_answered:
                self._conversations = before

    def _say(self, text: str) -> None:
        """For somebody who types; a program reads answers only."""
        if self._console.is_terminal:
            self._console.print(Text(text, "dim"))


def _never() -> bool:
    return False


def _messages(said: Iterable[Said]) -> list[Message]:
    return [Message(role, content) for role, content in said]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


def _help() -> Table:
    table = Table.grid(padding=(0, 2))
    for usage, text in COMMANDS.items():
        table.add_row(Text(usage), Text(text, "dim"))
    table.add_row(Text('\\ at a line\'s end, or """'), Text("more lines; three quotes end them again", "dim"))
    return table
