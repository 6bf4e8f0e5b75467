"""SIGINT and SIGTERM. In training they set a flag: the loop ends at the next step boundary, with a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class InterruptFlag:
    """While entered, the first signal asks for a clean end and the second raises `KeyboardInterrupt`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> InterruptFlag:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # not print: a signal may come in the middle of a write
        os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 + the signal's number."""
        return 0 if self.signal is None else 128 + self.signal.value


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """While entered, SIGTERM raises `KeyboardInterrupt` as SIGINT does, so that what was begun is tidied up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
