"""Questions put to a trained run's model: streamed one by one, or in batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import backends
from core.chat.screen import Answer
from core.errors import OutOfMemoryError
from core.sampling import Continuation, Sampling
from core.workflow.after import SIDES, OpenedRun, Side
from data.prompt import TextStream

_log = logging.getLogger("twinkeel")


def sides_of(choice: str) -> tuple[Side, ...]:
    """The sides that `base`, `adapter` or `both` stands for, the base first."""
    return tuple(side for side in SIDES if choice in (side, "both"))


class _EnoughError(Exception):
    """Ends an answer from within."""


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
    """One prompt's answer by one side, shown as it comes.

    Args:
        stops: texts that end the answer, beside the end token.
        key: with `sampling.seed` decides what is drawn.
        show: gets the text piece by piece, whole characters at a time.
        is_interrupted: asked after each token.

    Raises:
        OutOfMemoryError: with what may help.
    """
    stream = TextStream(opened.tokenizer, stops=stops)
    num_tokens = 0

    def on_token(row: int, token: int) -> None:
        nonlocal num_tokens
        num_tokens += 1
        show(stream.push(token))
        if stream.stopped or is_interrupted():
            raise _EnoughError

    learner = opened.use(side)
    started = time.perf_counter()
    ended = False
    try:
        (found,) = backends.generate(
            opened.run.backend.name,
            learner,
            opened.tokenizer,
            [ids],
            max_tokens=max_tokens,
            sampling=sampling,
            keys=[key],
            on_token=on_token,
        )
        ended = found.ended
    except _EnoughError:
        pass
    except OutOfMemoryError as error:
        raise _with_hint(error) from None
    show(stream.finish())
    ended = ended or stream.stopped
    interrupted = not ended and is_interrupted()
    return Answer(
        stream.text,
        num_tokens,
        ended,
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
        is_full=not ended and not interrupted and num_tokens < max_tokens,
    )


class Batches:
    """Continues many prompts, fewer at a time once the device has said that it can't hold so many."""

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

    def run(
        self, side: Side, prompts: Sequence[Sequence[int]], keys: Sequence[int], on_token: Callable[[int, int], None]
    ) -> list[Continuation]:
        """A continuation of each prompt; `keys`, one per prompt, decide what is drawn.

        Raises:
            OutOfMemoryError: not even one fits.
        """
        found: list[Continuation] = []
        while len(found) < len(prompts):
            part = slice(len(found), len(found) + self.size)
            try:
                found += backends.generate(
                    self._opened.run.backend.name,
                    self._opened.use(side),
                    self._opened.tokenizer,
                    prompts[part],
                    max_tokens=self._max_tokens,
                    sampling=self._sampling,
                    keys=keys[part],
                    on_token=on_token,
                )
            except OutOfMemoryError as error:
                tried = len(prompts[part])
                if tried == 1:
                    raise _with_hint(error) from None
                self.size = tried // 2
                _log.warning("out of memory with %d prompts at once: from here %d", tried, self.size)
        return found


def _with_hint(error: OutOfMemoryError) -> OutOfMemoryError:
    return OutOfMemoryError(error.what, hint="shorten the prompt, or lower the number of tokens of an answer")
