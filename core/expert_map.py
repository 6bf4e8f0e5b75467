"""A mixture's routing for `monitor`: the facts, and a line for each layer when there is room."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from core.journal import ROUTING
from core.protocols import FloatArray
from core.records import Record, number
from core.routing import SCALARS, routing_parts, shares_of

SHADES = " ░▒▓█"
"""Of an expert that gets less than a quarter, three quarters, five quarters, twice its even share; and of more."""
MAP_HEAD = "   layer  share of each expert, ▒ even: blank < 1/4, ░ < 3/4, ▓ > 5/4, █ > twice"
_BOUNDS = (0.25, 0.75, 1.25, 2.0)
_CELL = 2


def experts_facts(record: Record, *, start: str) -> list[str]:
    """`core.routing.routing_parts` of an evaluation's record; empty where there is no routing in it."""
    routing = _routing(record)
    if any(number(routing.get(name)) is None for name in SCALARS):
        return []
    return routing_parts(routing, start=start if record.get("step") else None)


def collapse_warning(record: Record) -> str | None:
    """A line on the layers that collapsed in training; None when there are none."""
    layers = _routing(record).get("collapsed")
    if not isinstance(layers, list) or not layers:
        return None
    return (
        f"experts: the routing collapsed in training, in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    )


def expert_map(record: Record, *, width: int, height: int) -> list[Text]:
    """A heat map, at most `height` lines of `width` cells: a line for each layer, or for so many neighbours' mean.

    Empty when it does not fit: less than 4 lines, or the experts not side by side.
    """
    shares = shares_of(_routing(record))
    if shares is None or height < 4:
        return []
    cell = _CELL if 10 + _CELL * shares.shape[1] <= width else 1
    if 10 + cell * shares.shape[1] > width:
        return []
    size = -(-len(shares) // height)
    return [_row(shares[first : first + size], first, cell) for first in range(0, len(shares), size)]


def _row(shares: FloatArray, first: int, cell: int) -> Text:
    last = first + len(shares) - 1
    name = str(first) if last == first else f"{first}-{last}"
    relative = shares.mean(axis=0) * shares.shape[1]
    marks = "".join(SHADES[sum(value >= bound for bound in _BOUNDS)] * cell for value in relative)
    return Text.assemble((f"  {name:>6}  ", "dim"), marks)


def _routing(record: Record) -> dict[str, Any]:
    routing = record.get(ROUTING)
    return routing if isinstance(routing, dict) else {}
