"""The first signal asks for a clean end, the second ends at once, and afterwards all is as before."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from core.signals import InterruptFlag

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A signal that slips through must not end the tests."""
    before = {number: signal.getsignal(number) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_sets_the_flag(number: signal.Signals) -> None:
    with InterruptFlag() as flag:
        assert not flag()
        assert flag.exit_code == 0
        os.kill(os.getpid(), number)
        assert flag()
        assert flag.signal == number
    assert flag()  # it is read after the loop too


def test_exit_codes_are_the_shells() -> None:
    codes = []
    for number in BOTH:
        with InterruptFlag() as flag:
            os.kill(os.getpid(), number)
        codes.append(flag.exit_code)
    assert codes == [130, 143]


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_the_second_signal_ends_at_once(first: signal.Signals, second: signal.Signals) -> None:
    with InterruptFlag() as flag:
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
        assert flag.signal == first


@pytest.mark.parametrize("number", BOTH)
def test_handlers_are_restored(number: signal.Signals) -> None:
    heard: list[int] = []
    signal.signal(number, lambda received, frame: heard.append(received))
    with InterruptFlag() as flag:
        os.kill(os.getpid(), number)
    assert heard == []
    assert flag()
    os.kill(os.getpid(), number)
    assert heard == [number]


def test_handlers_are_restored_after_an_error() -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with pytest.raises(ZeroDivisionError), InterruptFlag():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in BOTH] == before


def test_an_ignored_signal_is_ignored_again_afterwards() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with InterruptFlag():
        pass
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
