"""For runs whose pictures nobody looks at: drawing one takes as long as training a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

_DRAW = Figure.savefig


def draw_blank(patch: pytest.MonkeyPatch) -> None:
    """Figures are saved small and empty, until the patch is undone."""

    def savefig(self: Figure, *args: Any, **options: Any) -> None:
        _DRAW(Figure(figsize=(1, 1)), *args, **options)

    patch.setattr(Figure, "savefig", savefig)


def draw(patch: pytest.MonkeyPatch) -> None:
    """Figures are drawn again, whatever was patched before."""
    patch.setattr(Figure, "savefig", _DRAW)
