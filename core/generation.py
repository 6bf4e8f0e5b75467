"""Text from a batch of prompts: what goes on, what has ended and which token comes next.

A backend says what a model makes of the tokens so far (`Decoder`); everything that decides is here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.sampling import Continuation, Sampling, penalise, pick_token
from core.seeding import generator

OnToken = Callable[[int, int], bool]
"""Called with a prompt's place in the batch and its next token; returns whether the answer is long enough."""
NO_TOKEN = -1
"""Stands for a token where the logits have no largest number: one is NaN or infinite, or all are minus infinity."""
_NOT_A_NUMBER = (
    "the training diverged (its losses: python cli.py monitor RUN), or float16 overflowed: train with another --lr, or "
    "with --set model.dtype=bfloat16"
)


class Decoder(Protocol):
    """A model with a key-value cache of some prompts, here called rows.

    After `start` and after each `step` it knows the logits of every row's next token.
    """

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Reads the prompts, each of at least one token."""
        ...

    def likeliest(self) -> list[int]:
        """The most likely next token of each row, or `NO_TOKEN`. Waits for the device."""
        ...

    def logits(self) -> npt.NDArray[np.float32]:
        """[rows, vocabulary], to be changed at will. Waits for the device."""
        ...

    def keep(self, places: Sequence[int]) -> None:
        """Drops all rows but those at these places, which are in ascending order."""
        ...

    def step(self, tokens: Sequence[int]) -> None:
        """Appends a token to each row."""
        ...


def continue_prompts(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    max_length: int | None,
    ends: Collection[int],
    sampling: Sampling,
    keys: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> list[Continuation]:
    """Continues every prompt until it ends or meets a limit; a row that is done costs nothing from then on.

    Args:
        prompts: token ids, at least one each.
        max_tokens: of each answer.
        max_length: of prompt and answer together; a prompt that fills it gets no answer. None: unbounded.
        ends: token ids that end an answer.
        keys: one per prompt; a row's draws are a function of `sampling.seed` and its key. None: its place.
        on_token: called as the tokens come, step by step; end tokens are left out. Where it returns True the row is
            done. What it raises ends everything.

    Raises:
        UserError: logits that are no numbers.
    """
    rows = _Rows(prompts, max_tokens=max_tokens, max_length=max_length, ends=ends, sampling=sampling, keys=keys)
    if rows.active:
        decoder.start([prompts[row] for row in rows.active])
    while rows.active:
        tokens = decoder.likeliest() if rows.takes_likeliest else rows.choose(decoder.logits())
        places = rows.take(tokens, on_token)
        if not places:
            break
        if len(places) < len(tokens):
            decoder.keep(places)
        decoder.step([tokens[place] for place in places])
    return rows.continuations()


def end_tokens(tokenizer: Any, settings: int | Iterable[int] | None) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's, and those of the model's generation settings."""
    more = settings if isinstance(settings, Iterable) else [settings]
    return frozenset(int(token) for token in (tokenizer.eos_token_id, *more) if token is not None)


class _Rows:
    """What has become of each prompt so far."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        max_length: int | None,
        ends: Collection[int],
        sampling: Sampling,
        keys: Sequence[int] | None,
    ) -> None:
        assert all(prompts), "an empty prompt"
        keys = range(len(prompts)) if keys is None else keys
        assert len(keys) == len(prompts), "a key per prompt"
        self._sampling = sampling
        self._ends = ends
        self._prompts = prompts
        self._limits = [_limit(len(prompt), max_tokens, max_length) for prompt in prompts]
        self._ids: list[list[int]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)
        self._randoms = [generator(sampling.seed, "generate", key) for key in keys]
        self.active = [row for row, limit in enumerate(self._limits) if limit > 0]
        """The rows that the decoder has, in its order."""

    @property
    def takes_likeliest(self) -> bool:
        """Whether the most likely token is all there is to know of the logits."""
        return self._sampling.temperature == 0.0 and self._sampling.repetition_penalty == 1.0

    def choose(self, logits: npt.NDArray[np.float32]) -> list[int]:
        """The next token of every active row, from its logits [rows, V]."""
        return [self._choose(row, of_row) for row, of_row in zip(self.active, logits, strict=True)]

    def _choose(self, row: int, logits: npt.NDArray[np.float32]) -> int:
        how = self._sampling
        if not np.isfinite(logits.max()):  # of a NaN anywhere the maximum is NaN
            return NO_TOKEN
        if how.repetition_penalty != 1.0:
            penalise(logits, np.unique([*self._prompts[row], *self._ids[row]]), how.repetition_penalty)
        if how.temperature == 0.0:
            return int(logits.argmax())
        return pick_token(logits, how.temperature, top_p=how.top_p, top_k=how.top_k, random=self._randoms[row])

    def take(self, tokens: Sequence[int], on_token: OnToken | None) -> list[int]:
        """Appends a token to every active row. Returns the places, among those, of the rows that go on."""
        places = [place for place, token in enumerate(tokens) if self._append(self.active[place], token, on_token)]
        self.active = [self.active[place] for place in places]
        return places

    def _append(self, row: int, token: int, on_token: OnToken | None) -> bool:
        """Whether the row goes on."""
        if token == NO_TOKEN:
            raise UserError("the model's output is not a number", hint=_NOT_A_NUMBER)
        if token in self._ends:
            self._ended[row] = True
            return False
        self._ids[row].append(token)
        if on_token is not None and on_token(row, token):
            return False
        return len(self._ids[row]) < self._limits[row]

    def continuations(self) -> list[Continuation]:
        return [Continuation(ids, ended) for ids, ended in zip(self._ids, self._ended, strict=True)]


def _limit(prompt: int, max_tokens: int, max_length: int | None) -> int:
    """Tokens that an answer may have."""
    return max_tokens if max_length is None else min(max_tokens, max_length - prompt)
