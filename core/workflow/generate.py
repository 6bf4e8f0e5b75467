"""Prompts answered by a run's base model and adapter: one as the text comes, or many in batches."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from core.chat.conversation import too_long
from core.chat.screen import UNBROKEN, Answer, Below, wrapped_lines
from core.errors import UserError
from core.files import disk_errors, user_path, write_atomic
from core.sampling import Sampling
from core.screen import logging_to
from core.signals import termination_as_interrupt
from core.workflow.after import Flags, OpenedRun, Side, TrainedRun, find_trained, opened_run
from core.workflow.talking import Asked, Batches, sides_of, stream_answer
from data.prompt import PromptRenderer
from data.prompts_file import Prompt, check_system, one_prompt, read_prompts
from data.sources import count
from data.tokenize import load_tokenizer

_log = logging.getLogger("twinkeel")
_SHOWN_LINES = 6
"""Of a prompt above its answers."""


def generate(
    folder: Path,
    *,
    prompt: str | None,
    prompts: str | None,
    side: str,
    system: str | None,
    sampling: Sampling,
    max_tokens: int,
    batch_size: int,
    output: str | None,
    flags: Flags,
    console: Console,
) -> int:
    """Answers a prompt, or those of a file, and shows or writes what both sides say. Returns the exit code.

    Args:
        prompts: a file, or `-`; exactly one of `prompt` and `prompts` is given.
        side: `base`, `adapter` or `both`.
        output: new JSONL file with a line a prompt; None shows the answers.

    Raises:
        UserError: a prompt that can't be answered, no adapter yet, or a file that can't be read or written; no file
            is left behind. Also a prompt that does not fit into the memory, or output of the model that is not a
            number: then, as after an interrupt, the prompts that were finished are in the file.
        KeyboardInterrupt: the prompts that were finished are in the file, if there are any.
    """
    system = check_system(system)
    if prompt is not None:
        asked = [one_prompt(prompt, "--prompt", system)]
    else:
        assert prompts is not None
        asked = read_prompts(str(user_path(prompts)), system=system)
    # answers alone go to the output, so that they can be piped
    notes = Console(stderr=True, width=console.width, highlight=False)
    with logging_to(notes), termination_as_interrupt(), _new_file(output) as path:
        run = find_trained(folder, flags=flags)
        job = _Job(asked, sides_of(side), sampling, max_tokens)
        job.render(run)
        with opened_run(run) as opened:
            if path is not None:
                _write(job, opened, path, batch_size=batch_size, console=console)
            elif len(asked) == 1:
                _show_one(job, opened, console)
            else:
                _show_each(job, opened, batch_size=batch_size, console=console)
    return 0


@dataclass(slots=True)
class _Job:
    """What is asked, of whom and how."""

    asked: Sequence[Prompt]
    sides: Sequence[Side]
    sampling: Sampling
    max_tokens: int
    ids: list[list[int]] = field(default_factory=list)
    stops: list[tuple[str, ...]] = field(default_factory=list)

    def render(self, run: TrainedRun) -> None:
        """Token ids of all prompts, before a model is loaded.

        Raises:
            UserError: a prompt that leaves no room for an answer, or that the chat template refuses.
        """
        renderer = PromptRenderer(load_tokenizer(run.model.path, trust_remote_code=run.config.model.trust_remote_code))
        max_length = run.architecture.max_positions
        for asked in self.asked:
            try:
                ids = renderer.ids(asked.messages, is_pair=asked.is_pair)
            except UserError as error:
                raise UserError(f"{asked.place}: {error.what}", hint=error.hint) from None
            if max_length and len(ids) >= max_length:
                raise too_long(len(ids), max_length, asked.place)
            self.ids.append(ids)
            self.stops.append(renderer.stops(is_pair=asked.is_pair))
        for note in renderer.notes():
            _log.info(note)
        if lost := sum(asked.lost_answer for asked in self.asked):
            _log.info("%s with an answer to the last question: it is left out", count(lost, "conversation"))

    def prompt(self, place: int) -> Asked:
        """What the model reads; its place decides its draws, not its batch."""
        return Asked(self.asked[place].place, self.ids[place], self.stops[place], key=place)

    def record(self, place: int, answers: Mapping[Side, Answer]) -> dict[str, Any]:
        """A line of the output."""
        asked = self.asked[place]
        record = dict(asked.given)
        if asked.is_pair and asked.messages[0].role == "system":
            record["system"] = asked.messages[0].content
        record["prompt_tokens"] = len(self.ids[place])
        for side, answer in answers.items():
            record |= {side: answer.text, f"{side}_tokens": answer.num_tokens, f"{side}_ended": answer.ended}
        return record


def _show_one(job: _Job, opened: OpenedRun, console: Console) -> None:
    screen = Below(console, is_labelled=len(job.sides) > 1)
    for side in job.sides:
        show = screen.begin(side)
        try:
            answer = stream_answer(
                opened,
                side,
                job.ids[0],
                stops=job.stops[0],
                max_tokens=job.max_tokens,
                sampling=job.sampling,
                key=0,
                show=show,
            )
        except KeyboardInterrupt:
            console.print()  # what was begun keeps its line
            raise
        screen.end(answer)


def _show_each(job: _Job, opened: OpenedRun, *, batch_size: int, console: Console) -> None:
    for place, answers in _answered(job, opened, range(len(job.asked)), batch_size=batch_size, bar=_Bar(job, console)):
        lines = wrapped_lines(job.asked[place].text, console.width - 2 if console.is_terminal else UNBROKEN)
        if len(lines) > _SHOWN_LINES:
            lines = [*lines[: _SHOWN_LINES - 1], "…"]
        console.print(Text("\n" * bool(place) + "\n".join(f"> {line}" for line in lines), "bold"), soft_wrap=True)
        screen = Below(console, is_labelled=len(job.sides) > 1)
        for side, answer in answers.items():
            screen.begin(side)(answer.text)
            screen.end(answer)


def _write(job: _Job, opened: OpenedRun, path: Path, *, batch_size: int, console: Console) -> None:
    """Writes the answers in the prompts' order, whatever order they are made in; when stopped, those there are."""
    # prompts of like length in a batch: less padding
    places = sorted(range(len(job.asked)), key=lambda place: len(job.ids[place]))
    lines: dict[int, str] = {}
    try:
        for place, answers in _answered(job, opened, places, batch_size=batch_size, bar=_Bar(job, console)):
            lines[place] = json.dumps(job.record(place, answers), ensure_ascii=False)
    except (KeyboardInterrupt, UserError):
        if lines:
            _keep(path, lines)
            _log.warning("%s: the %s of %d that were finished", path, count(len(lines), "prompt"), len(places))
        raise
    _keep(path, lines)
    console.print(
        f"{path}: {count(len(lines), 'prompt')} answered by {' and '.join(job.sides)}",
        markup=False,
        soft_wrap=True,
    )


def _answered(
    job: _Job, opened: OpenedRun, places: Sequence[int], *, batch_size: int, bar: _Bar
) -> Iterator[tuple[int, dict[Side, Answer]]]:
    """Prompts with their answers, batch by batch."""
    batches = Batches(opened, size=batch_size, max_tokens=job.max_tokens, sampling=job.sampling)
    for batch in batches.cut(places):
        prompts = [job.prompt(place) for place in batch]
        found = {}
        with bar.live():
            for side in job.sides:
                found[side] = batches.run(side, prompts, bar.on_token)
                bar.add_answers(len(batch))
        for index, place in enumerate(batch):
            yield place, {side: found[side][index] for side in job.sides}


class _Bar:
    """How far it is, on a terminal."""

    def __init__(self, job: _Job, console: Console) -> None:
        columns = (
            TextColumn("answers"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=len(job.asked) * len(job.sides), speed="")
        self._num_tokens = 0
        self._seconds = 0.0
        self._started = 0.0

    @contextmanager
    def live(self) -> Iterator[None]:
        """Shown while the context lasts, in which the model is at work."""
        self._started = time.perf_counter()
        with self._bar:
            yield
        self._seconds += time.perf_counter() - self._started

    def on_token(self) -> None:
        self._num_tokens += 1
        seconds = self._seconds + time.perf_counter() - self._started
        self._bar.update(self._task, speed=f"{self._num_tokens / seconds:,.0f} tok/s")

    def add_answers(self, number: int) -> None:
        self._bar.advance(self._task, number)


@contextmanager
def _new_file(output: str | None) -> Iterator[Path | None]:
    """Where the output will be, tried before a model is loaded.

    Raises:
        UserError: it is there already, or can't be written.
    """
    if output is None:
        yield None
        return
    path = user_path(output)
    if path.exists():
        raise UserError(f"--output: {output} is there already", hint="give another name, or delete it")
    probe = path.with_name(f".{path.name}.tmp")  # as `write_atomic` names it
    with disk_errors(path):
        probe.touch()
    try:
        yield path
    finally:
        probe.unlink(missing_ok=True)


def _keep(path: Path, lines: Mapping[int, str]) -> None:
    """Writes the lines in the order of their numbers, all or none."""
    write_atomic(path, "".join(f"{lines[number]}\n" for number in sorted(lines)))
