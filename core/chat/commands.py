"""What a line typed in a chat means: something to answer, or a command; and the settings that a command changes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from core.errors import UserError
from core.sampling import Sampling

COMMANDS: Final = {
    "/help": "this list",
    "/side base|adapter|both": "who answers",
    "/system TEXT": "a system message; alone: none",
    "/set NAME VALUE": "a sampling setting; alone: shows them",
    "/retry": "ask the last question again",
    "/undo": "take the last question back",
    "/clear": "forget what was said",
    "/save FILE.jsonl": "the conversation, as rows that train reads",
    "/quit": "end (as Ctrl-D does)",
}
NAMES = tuple(usage.split()[0] for usage in COMMANDS)
CHOICES = ("base", "adapter", "both")
_ARGUMENTS: Final = {usage.split()[0]: usage.partition(" ")[2] for usage in COMMANDS}
_MAY_STAND_ALONE = ("/system", "/set")


@dataclass(frozen=True, slots=True)
class Command:
    """A command as typed."""

    name: str
    """`/help`, …"""
    argument: str = ""


def parse(line: str) -> Command | None:
    """None for what is to be answered: all that does not begin with a slash.

    Raises:
        UserError: no such command, or one with too much or too little behind it.
    """
    if not line.startswith("/"):
        return None
    name, _, argument = line.strip().partition(" ")
    name, argument = {"/exit": "/quit", "/?": "/help"}.get(name, name), argument.strip()
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise UserError(
            f"{name}: no such command",
            hint=f"did you mean {near[0]}?" if near else "/help lists them; a message may begin with a space, then /",
        )
    wanted = _ARGUMENTS[name]
    if argument and not wanted:
        raise UserError(f"{name} stands alone", hint=f"/help says what {name} does")
    if wanted and not argument and name not in _MAY_STAND_ALONE:
        raise UserError(f"{name}: of what?", hint=f"{name} {wanted}")
    if name == "/side" and argument not in CHOICES:
        raise UserError(f"/side {argument}: no such side", hint=f"/side {wanted}")
    return Command(name, argument)


@dataclass(frozen=True, slots=True)
class Settings:
    """What `/set` changes."""

    sampling: Sampling
    max_tokens: int

    def changed(self, text: str) -> tuple[Settings, str]:
        """With `NAME VALUE` as typed, and the name.

        Raises:
            UserError: no such setting, or no such value.
        """
        name, _, value = text.replace("=", " ").partition(" ")
        name = name.lstrip("-").replace("-", "_").lower()
        if name not in _BOUNDS:
            near = difflib.get_close_matches(name, _BOUNDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_BOUNDS)}"
            raise UserError(f"/set {name}: no such setting", hint=hint)
        bound = _BOUNDS[name]
        try:
            number = bound.kind(value.strip())
        except ValueError:
            number = math.nan
        if not bound.least <= number <= bound.most:  # NaN is neither
            raise UserError(f"/set {name} {value.strip()}".rstrip() + f": must be {bound.says}")
        if name == "max_tokens":
            return replace(self, max_tokens=int(number)), name
        change: dict[str, Any] = {name: number}
        return replace(self, sampling=replace(self.sampling, **change)), name

    def lines(self, only: str | None = None) -> list[str]:
        """`temperature 0.7` and so on; `only`: that setting alone."""
        values = {name: getattr(self.sampling, name, self.max_tokens) for name in SETTINGS}
        return [f"{name} {value}" for name, value in values.items() if only in (None, name)]


@dataclass(frozen=True, slots=True)
class _Bound:
    """What a setting may be; the same bounds as on the command line."""

    kind: Callable[[str], float]
    least: float
    most: float
    says: str


_NATURAL = _Bound(int, 0, 2**63, "a whole number of at least 0")
_BOUNDS: Final = {
    "temperature": _Bound(float, 0.0, 1e6, "a number of at least 0"),
    "top_k": _NATURAL,
    "top_p": _Bound(float, 1e-6, 1.0, "above 0 and at most 1"),
    "repetition_penalty": _Bound(float, 0.1, 10.0, "between 0.1 and 10"),
    "seed": _NATURAL,
    "max_tokens": _Bound(int, 1, 2**31, "a whole number of at least 1"),
}
SETTINGS = tuple(_BOUNDS)
