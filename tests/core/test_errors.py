"""A user's mistake in words."""

from __future__ import annotations

import pytest

from core.errors import NonFiniteLossError, OutOfMemoryError, UserError


def test_two_lines_what_and_what_to_do() -> None:
    error = UserError("data.jsonl:3: no completion", hint="add one")
    assert str(error).splitlines() == ["data.jsonl:3: no completion", "       add one"]
    assert (error.what, error.hint) == ("data.jsonl:3: no completion", "add one")
    # `error: ` before the first line: the second stands below its text
    assert len("error: ") == len("       ")


def test_without_a_hint_there_is_one_line() -> None:
    assert str(UserError("no")) == "no"
    assert UserError("no").hint is None


@pytest.mark.parametrize("kind", [OutOfMemoryError, NonFiniteLossError])
def test_the_special_ones_are_users_errors(kind: type[UserError]) -> None:
    with pytest.raises(UserError) as caught:
        raise kind("it", hint="do")
    assert caught.value.hint == "do"
    assert isinstance(caught.value, ValueError)
