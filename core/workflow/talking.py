"""Questions put to a trained run's model: streamed one by one, or in batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import backends
from core.chat.screen import Answer
from core.errors import OutOfMemoryError
from core.sampling import GREEDY, Continuation, Sampling
from core.workflow.after import SIDES, OpenedRun, Side
from data.prompt import TextStream

_log = logging.getLogger("twinkeel")
_SMALLER = "shorten the prompt, or lower the number of tokens of an answer"


def sides_of(choice: str) -> tuple[Side, ...]:
    """The sides that `base`, `adapter` or `both` stands for, the base first."""
    return tuple(side for side in SIDES if choice in (side, "both"))


def answer_prompts(
    opened: OpenedRun,
    side: Side,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Sequence[Sequence[str]],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    keys: Sequence[int] | None = None,
    show: Callable[[int, str], None] = lambda place, piece: None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """The answers of one side to a batch of prompts; how long each took is not known.

    An answer ends with an end token or one of its stops, at a limit, or where prompt and answer fill the model.

    Args:
        prompts: token ids.
        stops: of each prompt, texts that end its answer.
        keys: one per prompt; with `sampling.seed` they decide what is drawn. None: the places.
        show: called for each token with the prompt's place and what the token adds to the text, whole characters at a
            time; and once more at the end of an answer where something is left.
        is_interrupted: asked after each token; ends them all.

    Raises:
        OutOfMemoryError: they don't fit at once.
        UserError: the model's output is not a number.
    """
    streams = [TextStream(opened.tokenizer, stops=of_one) for of_one in stops]

    def on_token(place: int, token: int) -> bool:
        stream = streams[place]
        show(place, stream.push(token))
        return stream.stopped or is_interrupted()

    found = backends.generate(
        opened.run.backend.name,
        opened.use(side),
        opened.tokenizer,
        prompts,
        max_tokens=max_tokens,
        max_length=opened.run.architecture.max_positions or None,
        sampling=sampling,
        keys=keys,
        on_token=on_token,
    )
    for place, stream in enumerate(streams):
        if rest := stream.finish():
            show(place, rest)
    is_over = is_interrupted()
    return [_answer(stream, one, max_tokens, is_over) for stream, one in zip(streams, found, strict=True)]


def _answer(stream: TextStream, found: Continuation, max_tokens: int, is_interrupted: bool) -> Answer:
    ended = found.ended or stream.stopped
    interrupted = is_interrupted and not ended
    is_full = not ended and not interrupted and len(found.ids) < max_tokens
    return Answer(stream.text, len(found.ids), ended, seconds=0.0, interrupted=interrupted, is_full=is_full)


def stream_answer(
    opened: OpenedRun,
    side: Side,
    ids: Sequence[int],
    *,
    stops: Sequence[str],
    max_tokens: int,
    sampling: Sampling,
    key: int,
    show: Callable[[str], None],
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Answer:
    """One prompt's answer by one side, shown as it comes; for the arguments see `answer_prompts`.

    Raises:
        OutOfMemoryError: with what may help.
        UserError: the model's output is not a number.
    """
    started = time.perf_counter()
    try:
        (answer,) = answer_prompts(
            opened,
            side,
            [ids],
            stops=[stops],
            max_tokens=max_tokens,
            sampling=sampling,
            keys=[key],
            show=lambda place, piece: show(piece),
            is_interrupted=is_interrupted,
        )
    except OutOfMemoryError as error:
        raise OutOfMemoryError(error.what, hint=_SMALLER) from None
    return replace(answer, seconds=time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt of many."""

    name: str
    """Where it is from, for errors."""
    ids: Sequence[int]
    stops: Sequence[str]
    key: int
    """With `sampling.seed` decides what is drawn."""


class Batches:
    """Answers many prompts, fewer at a time once the device has said that it can't hold so many."""

    def __init__(self, opened: OpenedRun, *, size: int, max_tokens: int, sampling: Sampling) -> None:
        self.size = size
        self._opened = opened
        self._max_tokens = max_tokens
        self._sampling = sampling

    def cut(self, places: Sequence[int]) -> Iterator[Sequence[int]]:
        """The places in batches of the present size."""
        start = 0
        while start < len(places):
            batch = places[start : start + self.size]
            yield batch
            start += len(batch)

    def run(self, side: Side, prompts: Sequence[Asked], on_token: Callable[[], None]) -> list[Answer]:
        """The answer to each prompt.

        Raises:
            OutOfMemoryError: one does not even fit alone; it is named.
            UserError: the model's output is not a number.
        """
        answers: list[Answer] = []
        while len(answers) < len(prompts):
            part = prompts[len(answers) : len(answers) + self.size]
            try:
                answers += answer_prompts(
                    self._opened,
                    side,
                    [asked.ids for asked in part],
                    stops=[asked.stops for asked in part],
                    max_tokens=self._max_tokens,
                    sampling=self._sampling,
                    keys=[asked.key for asked in part],
                    show=lambda place, piece: on_token(),
                )
            except OutOfMemoryError as error:
                if len(part) == 1:
                    raise OutOfMemoryError(f"{part[0].name}: {error.what}", hint=_SMALLER) from None
                self.size = len(part) // 2
                _log.warning("out of memory with %d prompts at once: from here %d", len(part), self.size)
        return answers
